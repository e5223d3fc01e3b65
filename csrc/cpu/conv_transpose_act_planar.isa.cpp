// Transposed convolution to few output channels (the last layer of a generator): lanes are pixels
// of one output row and phase, weights are broadcast.
//
// A task is a band of output rows of one image and group. Its input rows are copied to scratch as
// [channel][row][column], padded, so that a tap is a constant offset; sums are kept as
// [channel][row][phase][pixel] until a row is scaled, activated, put in order and written.
#include "conv_transpose_act.h"
#include "conv_transpose_act_epilogue.h"
#include "conv_transpose_act_tables.h"
#include "runtime.h"
#include "simd_lanes.h"

namespace pyops::cpu::PYOPS_ISA {
namespace {

constexpr int kMaxChannels = 4;                // a tile's output channels
constexpr int64_t kMostChannels = kLanes / 2;  // with more, lanes that are channels do better
#if defined(__AVX512F__)
constexpr int kMaxVectors = 4;  // of pixels
#else
constexpr int kMaxVectors = 2;
#endif
constexpr int64_t kTapsPerSum = 32;  // bounds the rounding error of long sums
constexpr int64_t kInputBytes = 512 << 10;

struct Plan {
  ConvTransposeParams p;
  int64_t channels, out_channels;  // of one group
  int64_t pitch;                   // of a scratch row of the input
  int64_t phase_pitch;             // of the sums of one row and phase
  int64_t band_rows, bands;
};

struct TileArguments {
  const float* input;
  int64_t plane;  // from one channel to the next
  const Segment* segments;
  int64_t num_segments, channels;
  const float* weight;  // [channel][K]
  float* sums;
  int64_t sum_plane;
  bool add;
};

// sums[k][pixel] (+)= sum over segments and channels of input[channel][pixel] * weight[channel][k]
using Tile = void (*)(const TileArguments&);

template <int K, int V>
void tile(const TileArguments& a) {
  Vec acc[K][V] = {};
  for (int64_t s = 0; s < a.num_segments; ++s) {
    const float* x = a.input + a.segments[s].input;
    const float* weight = a.weight + a.segments[s].weight;
    for (int64_t c = 0; c < a.channels; ++c, x += a.plane, weight += K) {
      Vec pixels[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) pixels[v] = load(x + v * kLanes);
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) acc[k][v] = fma(pixels[v], splat(weight[k]), acc[k][v]);
      }
    }
  }
#pragma GCC unroll 4
  for (int k = 0; k < K; ++k) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      float* sum = a.sums + k * a.sum_plane + v * kLanes;
      store(sum, a.add ? load(sum) + acc[k][v] : acc[k][v]);
    }
  }
}

template <int K>
Tile select_vectors(int64_t vectors) {
#if defined(__AVX512F__)
  static constexpr Tile kTiles[] = {&tile<K, 1>, &tile<K, 2>, &tile<K, 3>, &tile<K, 4>};
#else
  static constexpr Tile kTiles[] = {&tile<K, 1>, &tile<K, 2>};
#endif
  return kTiles[vectors - 1];
}

Tile select_tile(int64_t channels, int64_t vectors) {
  switch (channels) {
    case 1:
      return select_vectors<1>(vectors);
    case 2:
      return select_vectors<2>(vectors);
    case 3:
      return select_vectors<3>(vectors);
    default:
      return select_vectors<4>(vectors);
  }
}

// Input rows [row, row_end) of one image and group: [channel][row][pitch], zeros at both sides.
template <class T>
void pack_rows(const Plan& plan, const Axis& across, int64_t n, int64_t group, int64_t row,
               int64_t row_end, float* dst) {
  const ConvTransposeParams& p = plan.p;
  const int64_t rows = row_end - row, plane = p.in_h * p.in_w, to_plane = rows * plan.pitch;
  const T* image = static_cast<const T*>(p.input) + n * p.in_channels * plane;
  for (int64_t i = 0; i < plan.channels * rows; ++i) {
    float* line = dst + i * plan.pitch;
    std::memset(line, 0, across.before * 4);
    const int64_t used = across.before + p.in_w;
    std::memset(line + used, 0, (plan.pitch - used) * 4);
  }
  dst += across.before;
  if (!p.channels_last) {
    const T* src = image + group * plan.channels * plane + row * p.in_w;
    for (int64_t c = 0; c < plan.channels; ++c, src += plane) {
      for (int64_t y = 0; y < rows; ++y, dst += plan.pitch) {
        const T* from = src + y * p.in_w;
        for (int64_t x = 0; x < p.in_w; x += kLanes) {
          const int count = static_cast<int>(min(kLanes, p.in_w - x));
          store_first(dst + x, load_first(from + x, count), count);
        }
      }
    }
    return;
  }
  for (int64_t y = 0; y < rows; ++y) {
    const T* src = image + (row + y) * p.in_w * p.in_channels + group * plan.channels;
    for (int64_t c = 0; c < plan.channels; c += kLanes) {
      const int live = static_cast<int>(min(kLanes, plan.channels - c));
      for (int64_t x = 0; x < p.in_w; x += kLanes) {
        const int count = static_cast<int>(min(kLanes, p.in_w - x));
        Vec m[kLanes] = {};
        for (int i = 0; i < count; ++i) m[i] = load_first(src + (x + i) * p.in_channels + c, live);
        transpose(m);
        float* to = dst + c * to_plane + y * plan.pitch + x;
        for (int i = 0; i < live; ++i, to += to_plane) store_first(to, m[i], count);
      }
    }
  }
}

// [output channels, kMaxChannels at a time][tap, by phase][channel][output channel].
template <class T>
void pack_weight(const Plan& plan, const Axis& down, const Axis& across, int64_t group,
                 float* dst) {
  const ConvTransposeParams& p = plan.p;
  const int64_t taps = p.kernel_h * p.kernel_w;
  const T* src = static_cast<const T*>(p.weight) + group * plan.channels * plan.out_channels * taps;
  for (int64_t k = 0; k < plan.out_channels; k += kMaxChannels) {
    const int64_t count = min(kMaxChannels, plan.out_channels - k);
    for (int64_t a = 0; a < p.kernel_h; ++a) {
      for (int64_t b = 0; b < p.kernel_w; ++b) {
        if (a >= down.begin[down.phases] || b >= across.begin[across.phases]) {
          dst += plan.channels * count;  // a tap that meets no output
          continue;
        }
        const T* from = src + k * taps + down.tap[a] * p.kernel_w + across.tap[b];
        for (int64_t c = 0; c < plan.channels; ++c, from += plan.out_channels * taps) {
          for (int64_t i = 0; i < count; ++i) *dst++ = to_float(from[i * taps]);
        }
      }
    }
  }
}

// a0 b0 a1 b1 ... in two vectors.
PYOPS_INLINE void interleave(Vec a, Vec b, Vec* first, Vec* second) {
  VecInt low, high;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    low[i] = i / 2 + (i & 1 ? kLanes : 0);
    high[i] = kLanes / 2 + i / 2 + (i & 1 ? kLanes : 0);
  }
  *first = __builtin_shuffle(a, b, low);
  *second = __builtin_shuffle(a, b, high);
}

// One output row and channel, from its phases to its places; `row` has room for whole vectors.
void finish_row(const Plan& plan, const Axis& across, const Epilogue& epilogue, int64_t channel,
                const float* sums, float* row) {
  const ConvTransposeParams& p = plan.p;
  const Affine affine = affine_of(p, channel);
  if (p.stride_w == 1) {
    for (int64_t x = 0; x < p.out_w; x += kLanes) store(row + x, epilogue(load(sums + x), affine));
    return;
  }
  if (p.stride_w == 2 && across.phases == 2) {
    for (int64_t x = 0; 2 * x < p.out_w; x += kLanes) {
      Vec first, second;
      interleave(load(sums + x), load(sums + plan.phase_pitch + x), &first, &second);
      store(row + 2 * x, epilogue(first, affine));
      store(row + 2 * x + kLanes, epilogue(second, affine));
    }
    return;
  }
  for (int64_t f = 0; f < across.phases; ++f, sums += plan.phase_pitch) {
    for (int64_t x = 0; x < across.outputs(f); x += kLanes) {
      float values[kLanes];
      store(values, epilogue(load(sums + x), affine));
      for (int64_t i = 0; i < kLanes && x + i < across.outputs(f); ++i) {
        row[(x + i) * p.stride_w + f] = values[i];
      }
    }
  }
}

template <class T>
void run_band(const Plan& plan, const Axis& down, const Axis& across, const float* weight,
              int64_t index) {
  const ConvTransposeParams& p = plan.p;
  const int64_t band = index % plan.bands, n = index / plan.bands / p.groups;
  const int64_t group = index / plan.bands % p.groups;
  const int64_t y_begin = band * plan.band_rows, y_end = min(p.out_h, y_begin + plan.band_rows);
  int64_t row = p.in_h, row_end = 0;  // input rows that the band meets
  for (int64_t f = 0; f < down.phases; ++f) {
    const int64_t first = max(0, ceil_div(y_begin - f, p.stride_h));
    const int64_t last = y_end - 1 < f ? -1 : (y_end - 1 - f) / p.stride_h;
    for (int64_t a = down.begin[f]; a < down.begin[f + 1] && first <= last; ++a) {
      row = min(row, max(0, first + down.shift[a]));
      row_end = max(row_end, min(p.in_h, last + down.shift[a] + 1));
    }
  }
  row_end = max(row, row_end);
  const int64_t plane = (row_end - row) * plan.pitch, taps = p.kernel_h * p.kernel_w;
  // Vectors that reach beyond the last row read what is there.
  const int64_t spare = 2 * kMaxVectors * kLanes;
  float* input = static_cast<float*>(scratch(4, (plan.channels * plane + spare) * 4));
  pack_rows<T>(plan, across, n, group, row, row_end, input);
  const int64_t row_sums = across.phases * plan.phase_pitch;
  float* sums = static_cast<float*>(
      scratch(5, (kMaxChannels * row_sums + kMaxChannels * (p.out_w + 2 * kLanes)) * 4));
  float* rows = sums + kMaxChannels * row_sums;
  Segment* segments = static_cast<Segment*>(scratch(6, taps * sizeof(Segment)));
  const Epilogue epilogue(p);
  const int64_t area = p.out_h * p.out_w, row_pitch = p.out_w + 2 * kLanes;
  const int64_t parts = ceil_div(plan.channels, kTapsPerSum);
  const int64_t at_once = max(1, kTapsPerSum / plan.channels);

  weight += group * plan.channels * plan.out_channels * taps;
  for (int64_t k = 0; k < plan.out_channels; k += kMaxChannels) {
    const int64_t count = min(kMaxChannels, plan.out_channels - k);
    const float* block = weight + k * plan.channels * taps;
    for (int64_t y = y_begin; y < y_end; ++y) {
      const int64_t fh = y % p.stride_h;
      for (int64_t fw = 0; fw < across.phases; ++fw) {
        int64_t num_segments = 0;
        for (int64_t i = down.begin[fh]; i < down.begin[fh + 1]; ++i) {
          const int64_t from = y / p.stride_h + down.shift[i];
          if (from < 0 || from >= p.in_h) continue;
          for (int64_t j = across.begin[fw]; j < across.begin[fw + 1]; ++j) {
            segments[num_segments++] = {(from - row) * plan.pitch + across.before + across.shift[j],
                                        (i * p.kernel_w + j) * plan.channels * count};
          }
        }
        const int64_t vectors = ceil_div(across.outputs(fw), kLanes);
        for (int64_t v = 0; v < vectors; v += kMaxVectors) {
          const int64_t here = min(kMaxVectors, vectors - v);
          const Tile tile = select_tile(count, here);
          TileArguments a{};
          a.plane = plane;
          a.sum_plane = row_sums;
          a.sums = sums + fw * plan.phase_pitch + v * kLanes;
          a.num_segments = 0;
          if (num_segments == 0) tile(a);  // zeros
          for (int64_t part = 0; part < parts; ++part) {
            const int64_t c = plan.channels * part / parts;
            a.channels = plan.channels * (part + 1) / parts - c;
            a.input = input + c * plane + v * kLanes;
            a.weight = block + c * count;
            for (int64_t s = 0; s < num_segments; s += at_once) {
              a.segments = segments + s;
              a.num_segments = min(at_once, num_segments - s);
              tile(a);
              a.add = true;
            }
          }
        }
      }
      const int64_t first = group * plan.out_channels + k;
      for (int64_t i = 0; i < count; ++i) {
        finish_row(plan, across, epilogue, first + i, sums + i * row_sums, rows + i * row_pitch);
      }
      T* output = static_cast<T*>(p.output);
      if (p.channels_last) {
        T* to = output + (n * area + y * p.out_w) * p.out_channels + first;
        for (int64_t x = 0; x < p.out_w; ++x, to += p.out_channels) {
          for (int64_t i = 0; i < count; ++i) from_float(rows[i * row_pitch + x], to + i);
        }
        continue;
      }
      for (int64_t i = 0; i < count; ++i) {
        T* to = output + (n * p.out_channels + first + i) * area + y * p.out_w;
        for (int64_t x = 0; x < p.out_w; x += kLanes) {
          const int live = static_cast<int>(min(kLanes, p.out_w - x));
          store_first(to + x, load(rows + i * row_pitch + x), live);
        }
      }
    }
  }
}

template <class T>
void run(const Plan& plan, const Axis& down, const Axis& across) {
  const ConvTransposeParams& p = plan.p;
  const int64_t group_weights = plan.channels * plan.out_channels * p.kernel_h * p.kernel_w;
  float* weight = static_cast<float*>(scratch(0, p.groups * group_weights * 4));
  for (int64_t group = 0; group < p.groups; ++group) {
    pack_weight<T>(plan, down, across, group, weight + group * group_weights);
  }
  parallel_for(p.batch * p.groups * plan.bands,
               [&](int64_t index) { run_band<T>(plan, down, across, weight, index); });
}

}  // namespace

bool conv_transpose_planar(const ConvTransposeParams& p) {
  if (p.dtype == DType::kDouble || p.out_channels / p.groups > kMostChannels) return false;
  const int64_t down_bytes = Axis::bytes(p.kernel_h, p.stride_h, p.out_h);
  int32_t* memory =
      static_cast<int32_t*>(scratch(2, down_bytes + Axis::bytes(p.kernel_w, p.stride_w, p.out_w)));
  const Axis down(p.in_h, p.out_h, p.kernel_h, p.stride_h, p.pad_h, p.dilation_h, memory);
  const Axis across(p.in_w, p.out_w, p.kernel_w, p.stride_w, p.pad_w, p.dilation_w,
                    memory + down_bytes / 4);
  // Rows that fill less than half a vector: better the lanes that are channels.
  if (across.outputs(0) * 2 < kLanes && p.batch > 1 && p.out_channels / p.groups > 1) return false;
  Plan plan{};
  plan.p = p;
  plan.channels = p.in_channels / p.groups;
  plan.out_channels = p.out_channels / p.groups;
  plan.pitch = across.before + p.in_w + across.after;
  plan.phase_pitch = ceil_div(across.outputs(0), kLanes) * kLanes;
  const int64_t rows = ceil_div(p.out_h, p.stride_h), images = p.batch * p.groups;
  int64_t each = max(1, min(rows, kInputBytes / (plan.pitch * plan.channels * 4)));
  const int64_t wanted = num_threads() == 1 ? 1 : 4 * num_threads();
  if (images < wanted) each = min(each, max(1, rows * images / wanted));
  plan.bands = ceil_div(rows, each);
  plan.band_rows = ceil_div(rows, plan.bands) * p.stride_h;
  plan.bands = ceil_div(p.out_h, plan.band_rows);
  if (p.dtype == DType::kFloat) run<float>(plan, down, across);
  if (p.dtype == DType::kBFloat16) run<BFloat16>(plan, down, across);
  if (p.dtype == DType::kHalf) run<Half>(plan, down, across);
  return true;
}

}  // namespace pyops::cpu::PYOPS_ISA
