// Transposed convolution by output phase: lanes are output channels, inputs are broadcast.
//
// The outputs of one phase (y mod stride, x mod stride) are a dense convolution with the phase's
// own taps: a product of (rows x words) by (words x channels) for each tap, summed. Rows of the
// register tile are pixels of one output row that have the phase in common or, where images are
// small, the same pixel of several images: then taps that meet no input are skipped, not
// multiplied by padding. Sums go to scratch as [pixel][channel], from which they are scaled,
// activated and written.
//
// A "word" is what one 32-bit lane multiplies: a float, or two bfloat16 channels.
#include "conv_transpose_act.h"
#include "conv_transpose_act_epilogue.h"
#include "conv_transpose_act_tables.h"
#include "runtime.h"
#include "simd_lanes.h"

namespace pyops::cpu::PYOPS_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kMaxRows = 14;  // rows x kVectors accumulators fill the register file
#elif defined(__AVX2__)
constexpr int kMaxRows = 6;
#else
constexpr int kMaxRows = 4;
#endif
constexpr int kVectors = 2;
constexpr int64_t kBlock = kVectors * kLanes;  // output channels in a block
// Words summed in registers from zero before they are added to the sum in memory: bounds the
// rounding error of long sums.
constexpr int64_t kWordsPerSum = 128;
constexpr int64_t kInputBytes = 384 << 10;  // of a task: input and sums share the
constexpr int64_t kSumsBytes = 256 << 10;   // second-level cache with the weights
constexpr int64_t kChunkBytes = 16 << 20;   // of images packed at once
constexpr int64_t kSmallImage = 64;         // pixels

struct Plan {
  ConvTransposeParams p;
  bool pairs;                      // words are two bfloat16
  bool by_image;                   // rows of a tile are images
  int64_t channels, out_channels;  // of one group
  int64_t words, pixel_words;      // of one pixel; and to the next
  int64_t blocks, tail_vectors;    // blocks of output channels, and vectors in the last
  int64_t columns;                 // of the scratch copy of the input
  int64_t band_rows, bands;        // output rows of a task
  int64_t split_blocks, splits;    // blocks of a task

  int64_t vectors(int64_t block) const { return block + 1 < blocks ? kVectors : tail_vectors; }
  int64_t taps() const { return p.kernel_h * p.kernel_w; }
  int64_t block_words(int64_t block) const { return taps() * words * vectors(block) * kLanes; }
  int64_t group_words() const {
    return taps() * words * kLanes * ((blocks - 1) * kVectors + tail_vectors);
  }
};

typedef int32_t WordInt __attribute__((may_alias));

PYOPS_INLINE Vec pair_words(Vec low, Vec high) {  // both exactly bfloat16
  const VecInt upper = reinterpret_cast<VecInt>(high) & static_cast<int32_t>(0xffff0000);
  const VecInt lower = reinterpret_cast<VecInt>(low) >> 16 & 0xffff;
  return reinterpret_cast<Vec>(upper | lower);
}

// ---- packing

// `pixels` neighbouring pixels of one image, from src on, to dst: [pixel][words].
template <class T>
void pack_pixels(const Plan& plan, const T* src, int64_t pixels, float* dst) {
  const ConvTransposeParams& p = plan.p;
  const int64_t per_word = plan.pairs ? 2 : 1;
  if (p.channels_last) {
    for (int64_t i = 0; i < pixels; ++i, src += p.in_channels, dst += plan.pixel_words) {
      if (plan.pairs) {
        std::memcpy(dst, src, plan.channels * sizeof(T));
        if (plan.channels % 2) {
          reinterpret_cast<WordInt*>(dst)[plan.words - 1] &= 0xffff;
        }
        continue;
      }
      for (int64_t c = 0; c < plan.channels; c += kLanes) {
        const int count = static_cast<int>(min(kLanes, plan.channels - c));
        store_first(dst + c, load_first(src + c, count), count);
      }
    }
    return;
  }
  const int64_t plane = p.in_h * p.in_w;
  for (int64_t word = 0; word < plan.words; word += kLanes) {
    const int count = static_cast<int>(min(kLanes, plan.words - word));
    const T* from = src + word * per_word * plane;
    for (int64_t i = 0; i < pixels; i += kLanes) {
      const int live = static_cast<int>(min(kLanes, pixels - i));
      Vec rows[kLanes] = {}, high[kLanes] = {};
      for (int j = 0; j < count; ++j) rows[j] = load_first(from + j * per_word * plane + i, live);
      transpose(rows);
      if (plan.pairs) {
        for (int j = 0; j < count; ++j) {
          const bool exists = (word + j) * 2 + 1 < plan.channels;
          if (exists) high[j] = load_first(from + (2 * j + 1) * plane + i, live);
        }
        transpose(high);
        for (int j = 0; j < live; ++j) rows[j] = pair_words(rows[j], high[j]);
      }
      for (int j = 0; j < live; ++j) {
        store_first(dst + (i + j) * plan.pixel_words + word, rows[j], count);
      }
    }
  }
}

// A pointer to channel 0 of a group of image n.
template <class T>
PYOPS_INLINE const T* image_of(const Plan& plan, int64_t n, int64_t group) {
  const int64_t plane = plan.p.in_h * plan.p.in_w;
  return static_cast<const T*>(plan.p.input) + n * plan.p.in_channels * plane +
         group * plan.channels * (plan.p.channels_last ? 1 : plane);
}

// Input rows [row, row_end) of one image and group: [row][column][words], zeros at both sides.
template <class T>
void pack_rows(const Plan& plan, const Axis& across, int64_t n, int64_t group, int64_t row,
               int64_t row_end, float* dst) {
  const T* src = image_of<T>(plan, n, group);
  const int64_t step = plan.p.channels_last ? plan.p.in_channels : 1;
  for (; row < row_end; ++row, dst += plan.columns * plan.pixel_words) {
    std::memset(dst, 0, across.before * plan.pixel_words * 4);
    pack_pixels(plan, src + row * plan.p.in_w * step, plan.p.in_w,
                dst + across.before * plan.pixel_words);
    std::memset(dst + (across.before + plan.p.in_w) * plan.pixel_words, 0,
                across.after * plan.pixel_words * 4);
  }
}

// One block of output channels: [tap, by phase][word][channel], zeros beyond the last channel.
template <class T>
void pack_weight(const Plan& plan, const Axis& down, const Axis& across, int64_t group,
                 int64_t block, float* dst) {
  const int64_t taps = plan.taps(), vectors = plan.vectors(block);
  const int64_t valid = min(kBlock, plan.out_channels - block * kBlock);
  const int64_t channel_stride = plan.out_channels * taps;
  const T* src = static_cast<const T*>(plan.p.weight) + group * plan.channels * channel_stride +
                 block * kBlock * taps;
  const int64_t segment = plan.words * vectors * kLanes;
  int64_t* place = static_cast<int64_t*>(scratch(6, taps * sizeof(int64_t)));
  for (int64_t t = 0; t < taps; ++t) place[t] = -1;  // a tap that meets no output
  for (int64_t a = 0; a < down.begin[down.phases]; ++a) {
    for (int64_t b = 0; b < across.begin[across.phases]; ++b) {
      place[down.tap[a] * plan.p.kernel_w + across.tap[b]] = (a * plan.p.kernel_w + b) * segment;
    }
  }
  for (int64_t word = 0; word < plan.words; ++word) {
    for (int64_t v = 0; v < vectors; ++v) {
      const int live = static_cast<int>(min(kLanes, valid - v * kLanes));
      for (int64_t t = 0; t < taps; t += kLanes) {
        const int count = static_cast<int>(min(kLanes, taps - t));
        const int64_t channel = plan.pairs ? 2 * word : word;
        const T* from = src + channel * channel_stride + v * kLanes * taps + t;
        Vec rows[kLanes] = {}, high[kLanes] = {};
        for (int i = 0; i < live; ++i) rows[i] = load_first(from + i * taps, count);
        transpose(rows);
        if (plan.pairs) {
          if (channel + 1 < plan.channels) {
            from += channel_stride;
            for (int i = 0; i < live; ++i) high[i] = load_first(from + i * taps, count);
            transpose(high);
          }
          for (int i = 0; i < count; ++i) rows[i] = pair_words(rows[i], high[i]);
        }
        for (int i = 0; i < count; ++i) {
          if (place[t + i] < 0) continue;
          store(dst + place[t + i] + (word * vectors + v) * kLanes, rows[i]);
        }
      }
    }
  }
}

// ---- the inner kernel

struct TileArguments {
  const float* input;
  int64_t row_step;  // words from one row of the tile to the next
  const Segment* segments;
  int64_t num_segments, words;
  const float* weight;  // [word][V * kLanes]
  float* sums;
  int64_t sum_step;
  bool add;
};

// sums[row][channel] (+)= sum over segments and words of input[row][word] * weight[word][channel]
using Tile = void (*)(const TileArguments&);

template <bool kPairs>
PYOPS_INLINE Vec multiply_add(const float* x, Vec w, Vec sum) {
#if defined(__AVX512BF16__)
  if constexpr (kPairs) {
    const __m512i word = _mm512_set1_epi32(*reinterpret_cast<const WordInt*>(x));
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(word));
  }
#endif
  return fma(splat(*x), w, sum);
}

template <bool kPairs, int V, int P>
void tile(const TileArguments& a) {
  Vec acc[P][V] = {};
  const int64_t step = a.row_step, step3 = 3 * a.row_step;
  for (int64_t s = 0; s < a.num_segments; ++s) {
    const float* x = a.input + a.segments[s].input;
    const float* weight = a.weight + a.segments[s].weight;
    for (const float* const end = x + a.words; x < end; ++x, weight += V * kLanes) {
      Vec w[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        w[v] = load(weight + v * kLanes);
        __builtin_prefetch(weight + (16 * V + v) * kLanes);
      }
      const float* at = x;
#pragma GCC unroll 16
      for (int i = 0; i < P; ++i) {
        const float* row = i % 4 == 3 ? at + step3 : at + (i % 4) * step;
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) acc[i][v] = multiply_add<kPairs>(row, w[v], acc[i][v]);
        if (i % 4 == 3) at += 4 * step;
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < P; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      float* sum = a.sums + i * a.sum_step + v * kLanes;
      store(sum, a.add ? load(sum) + acc[i][v] : acc[i][v]);
    }
  }
}

template <int... kInts>
struct Ints {};
template <int kCount, int... kInts>
struct Range : Range<kCount - 1, kCount, kInts...> {};
template <int... kInts>
struct Range<0, kInts...> {
  using type = Ints<kInts...>;
};

template <bool kPairs, int... kRows>
Tile select_tile(int64_t vectors, int64_t rows, Ints<kRows...>) {
  static constexpr Tile kOne[kMaxRows] = {&tile<kPairs, 1, kRows>...};
  static constexpr Tile kTwo[kMaxRows] = {&tile<kPairs, 2, kRows>...};
  return (vectors == 2 ? kTwo : kOne)[rows - 1];
}

Tile select_tile([[maybe_unused]] const Plan& plan, int64_t vectors, int64_t rows) {
  using Rows = typename Range<kMaxRows>::type;
#if defined(__AVX512BF16__)
  if (plan.pairs) return select_tile<true>(vectors, rows, Rows());
#endif
  return select_tile<false>(vectors, rows, Rows());
}

// Every segment for `rows` rows, in tiles of about one size.
void multiply(const Plan& plan, int64_t vectors, TileArguments a, const Segment* segments,
              int64_t num_segments, int64_t rows) {
  if (num_segments == 0) {
    for (int64_t i = 0; i < rows; ++i) {
      std::memset(a.sums + i * a.sum_step, 0, vectors * kLanes * 4);
    }
    return;
  }
  const float* const input = a.input;
  float* const sums = a.sums;
  const float* const weight = a.weight;
  const int64_t tiles = ceil_div(rows, kMaxRows), each = rows / tiles, wide = rows % tiles;
  const Tile narrow_tile = select_tile(plan, vectors, each);
  const Tile wide_tile = wide > 0 ? select_tile(plan, vectors, each + 1) : narrow_tile;
  const int64_t parts = ceil_div(plan.words, kWordsPerSum);
  const int64_t at_once = max(1, kWordsPerSum / plan.words);
  a.add = false;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t word = plan.words * part / parts;
    a.words = plan.words * (part + 1) / parts - word;
    a.weight = weight + word * vectors * kLanes;
    for (int64_t s = 0; s < num_segments; s += at_once) {
      a.segments = segments + s;
      a.num_segments = min(at_once, num_segments - s);
      a.input = input + word;
      a.sums = sums;
      for (int64_t i = 0; i < tiles; ++i) {
        const bool is_wide = i < wide;
        (is_wide ? wide_tile : narrow_tile)(a);
        a.input += (each + is_wide) * a.row_step;
        a.sums += (each + is_wide) * a.sum_step;
      }
      a.add = true;
    }
  }
}

// ---- writing

// `count` pixels of the channels [k, k + valid) of image n, from the flat index `pixel` on.
template <class T>
void finish(const Plan& plan, const Epilogue& epilogue, const float* sums, int64_t sum_step,
            int64_t n, int64_t pixel, int64_t count, int64_t k, int64_t valid) {
  const ConvTransposeParams& p = plan.p;
  const int64_t area = p.out_h * p.out_w;
  T* const output = static_cast<T*>(p.output);
  for (int64_t v = 0; v < valid; v += kLanes, sums += kLanes) {
    const int live = static_cast<int>(min(kLanes, valid - v));
    const Affine lanes = affine_of_lanes(p, k + v);
    for (int64_t i = 0; i < count; i += kLanes) {
      const int here = static_cast<int>(min(kLanes, count - i));
      const float* from = sums + i * sum_step;
      if (p.channels_last) {
        T* to = output + (n * area + pixel + i) * p.out_channels + k + v;
        for (int j = 0; j < here; ++j, to += p.out_channels) {
          store_first(to, epilogue(load(from + j * sum_step), lanes), live);
        }
        continue;
      }
      Vec values[kLanes] = {};
      if (here == kLanes) {
#pragma GCC unroll 16
        for (int j = 0; j < kLanes; ++j) values[j] = load(from + j * sum_step);
      } else {
        for (int j = 0; j < here; ++j) values[j] = load(from + j * sum_step);
      }
      transpose(values);
      T* to = output + (n * p.out_channels + k + v) * area + pixel + i;
      for (int j = 0; j < live; ++j, to += area) {
        store_first(to, epilogue(values[j], affine_of(p, k + v + j)), here);
      }
    }
  }
}

// ---- tasks

struct Context {
  Plan plan;
  Axis down, across;
  const float* weight;
};

// Rows of tiles are pixels: a band of output rows of one image and group, some blocks.
template <class T>
void run_band(const Context& context, int64_t index) {
  const Plan& plan = context.plan;
  const ConvTransposeParams& p = plan.p;
  const Axis &down = context.down, &across = context.across;
  const int64_t split = index % plan.splits, band = index / plan.splits % plan.bands;
  const int64_t n = index / plan.splits / plan.bands / p.groups;
  const int64_t group = index / plan.splits / plan.bands % p.groups;
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
  const int64_t row_words = plan.columns * plan.pixel_words;
  float* input = static_cast<float*>(scratch(4, max(0, row_end - row) * row_words * 4));
  pack_rows<T>(plan, across, n, group, row, row_end, input);
  float* sums =
      static_cast<float*>(scratch(5, (y_end - y_begin) * p.out_w * kBlock * sizeof(float)));
  Segment* segments = static_cast<Segment*>(scratch(6, plan.taps() * sizeof(Segment)));
  const Epilogue epilogue(p);

  const int64_t block_end = min(plan.blocks, (split + 1) * plan.split_blocks);
  for (int64_t block = split * plan.split_blocks; block < block_end; ++block) {
    const int64_t vectors = plan.vectors(block), pitch = vectors * kLanes;
    TileArguments a{};
    a.weight =
        context.weight + group * plan.group_words() + block * plan.taps() * plan.words * kBlock;
    a.row_step = plan.pixel_words;
    a.input = input;
    a.sum_step = p.stride_w * pitch;
    for (int64_t fh = 0; fh < down.phases; ++fh) {
      for (int64_t fw = 0; fw < across.phases; ++fw) {
        for (int64_t y = y_begin + ((fh - y_begin) % p.stride_h + p.stride_h) % p.stride_h;
             y < y_end; y += p.stride_h) {
          int64_t count = 0;
          for (int64_t i = down.begin[fh]; i < down.begin[fh + 1]; ++i) {
            const int64_t from = y / p.stride_h + down.shift[i];
            if (from < 0 || from >= p.in_h) continue;
            for (int64_t j = across.begin[fw]; j < across.begin[fw + 1]; ++j) {
              segments[count++] = {
                  (from - row) * row_words + (across.before + across.shift[j]) * plan.pixel_words,
                  (i * p.kernel_w + j) * plan.words * pitch};
            }
          }
          a.sums = sums + ((y - y_begin) * p.out_w + fw) * pitch;
          multiply(plan, vectors, a, segments, count, across.outputs(fw));
        }
      }
    }
    const int64_t k = group * plan.out_channels + block * kBlock;
    finish<T>(plan, epilogue, sums, pitch, n, y_begin * p.out_w, (y_end - y_begin) * p.out_w, k,
              min(kBlock, plan.out_channels - block * kBlock));
  }
}

// Rows of tiles are images [image, image_end), which lie packed at `input`: one block.
template <class T>
void run_images(const Context& context, const float* input, int64_t image_words, int64_t image,
                int64_t image_end, int64_t group, int64_t block) {
  const Plan& plan = context.plan;
  const ConvTransposeParams& p = plan.p;
  const Axis &down = context.down, &across = context.across;
  const int64_t vectors = plan.vectors(block), pitch = vectors * kLanes;
  const int64_t area = p.out_h * p.out_w, images = image_end - image;
  float* sums = static_cast<float*>(scratch(5, images * area * pitch * sizeof(float)));
  Segment* segments = static_cast<Segment*>(scratch(6, plan.taps() * sizeof(Segment)));
  TileArguments a{};
  a.weight =
      context.weight + group * plan.group_words() + block * plan.taps() * plan.words * kBlock;
  a.row_step = image_words;
  a.input = input;
  a.sum_step = area * pitch;
  for (int64_t fh = 0; fh < down.phases; ++fh) {
    for (int64_t fw = 0; fw < across.phases; ++fw) {
      for (int64_t y = fh; y < p.out_h; y += p.stride_h) {
        for (int64_t x = fw; x < p.out_w; x += p.stride_w) {
          int64_t count = 0;
          for (int64_t i = down.begin[fh]; i < down.begin[fh + 1]; ++i) {
            const int64_t row = y / p.stride_h + down.shift[i];
            if (row < 0 || row >= p.in_h) continue;
            for (int64_t j = across.begin[fw]; j < across.begin[fw + 1]; ++j) {
              const int64_t column = x / p.stride_w + across.shift[j];
              if (column < 0 || column >= p.in_w) continue;
              segments[count++] = {(row * p.in_w + column) * plan.pixel_words,
                                   (i * p.kernel_w + j) * plan.words * pitch};
            }
          }
          a.sums = sums + (y * p.out_w + x) * pitch;
          multiply(plan, vectors, a, segments, count, images);
        }
      }
    }
  }
  const Epilogue epilogue(p);
  const int64_t k = group * plan.out_channels + block * kBlock;
  for (int64_t i = 0; i < images; ++i) {
    finish<T>(plan, epilogue, sums + i * a.sum_step, pitch, image + i, 0, area, k,
              min(kBlock, plan.out_channels - block * kBlock));
  }
}

// ---- planning

// Distances of an odd number of cache lines keep rows that are read together in different sets.
int64_t spread(int64_t words) { return words < 128 ? words : ceil_div(words, 16) * 16 | 16; }

Plan make_plan(const ConvTransposeParams& p, const Axis& across) {
  Plan plan{};
  plan.p = p;
#if defined(__AVX512BF16__)
  plan.pairs = p.dtype == DType::kBFloat16;
#endif
  plan.channels = p.in_channels / p.groups;
  plan.out_channels = p.out_channels / p.groups;
  plan.words = plan.pairs ? ceil_div(plan.channels, 2) : plan.channels;
  plan.pixel_words = spread(plan.words);
  plan.blocks = ceil_div(plan.out_channels, kBlock);
  plan.tail_vectors = ceil_div(plan.out_channels - (plan.blocks - 1) * kBlock, kLanes);
  plan.columns = across.before + p.in_w + across.after;
  plan.by_image = p.in_h * p.in_w <= kSmallImage && p.batch >= kMaxRows / 2;
  if (plan.by_image) return plan;

  // Bands of whole strides, few enough rows for the caches, and tasks for all threads.
  const int64_t rows = ceil_div(p.out_h, p.stride_h);
  const int64_t row_bytes = plan.columns * plan.pixel_words * 4;
  const int64_t sums_bytes = p.stride_h * p.out_w * kBlock * 4;
  int64_t each = max(1, min(rows, min(kInputBytes / row_bytes, kSumsBytes / sums_bytes)));
  const int64_t images = p.batch * p.groups, wanted = num_threads() == 1 ? 1 : 4 * num_threads();
  if (images < wanted) each = min(each, max(1, rows * images / wanted));
  plan.bands = ceil_div(rows, each);
  plan.band_rows = ceil_div(rows, plan.bands) * p.stride_h;
  plan.bands = ceil_div(p.out_h, plan.band_rows);
  plan.splits = 1;
  if (images * plan.bands < num_threads()) plan.splits = min(plan.blocks, num_threads());
  plan.split_blocks = ceil_div(plan.blocks, plan.splits);
  plan.splits = ceil_div(plan.blocks, plan.split_blocks);
  return plan;
}

template <class T>
void run(const Context& context) {
  const Plan& plan = context.plan;
  const ConvTransposeParams& p = plan.p;
  float* weight = static_cast<float*>(scratch(0, p.groups * plan.group_words() * 4));
  parallel_for(p.groups * plan.blocks, [&](int64_t index) {
    const int64_t group = index / plan.blocks, block = index % plan.blocks;
    pack_weight<T>(plan, context.down, context.across, group, block,
                   weight + group * plan.group_words() + block * plan.taps() * plan.words * kBlock);
  });
  Context ready = context;
  ready.weight = weight;
  if (!plan.by_image) {
    parallel_for(p.batch * p.groups * plan.bands * plan.splits,
                 [&](int64_t index) { run_band<T>(ready, index); });
    return;
  }
  const int64_t area = p.in_h * p.in_w, image_words = spread(area * plan.pixel_words);
  const int64_t group_image = image_words * p.groups;
  const int64_t fitting = max(kMaxRows, kChunkBytes / 4 / group_image);
  for (int64_t begin = 0; begin < p.batch; begin += fitting) {
    const int64_t images = min(fitting, p.batch - begin);
    float* input = static_cast<float*>(scratch(1, images * group_image * 4));
    parallel_for(images, [&](int64_t i) {
      for (int64_t group = 0; group < p.groups; ++group) {
        const T* from = image_of<T>(plan, begin + i, group);
        pack_pixels(plan, from, area, input + (group * images + i) * image_words);
      }
    });
    const int64_t tiles = ceil_div(images, kMaxRows);
    parallel_for(tiles * p.groups * plan.blocks, [&](int64_t index) {
      const int64_t part = index % tiles, block = index / tiles % plan.blocks;
      const int64_t group = index / tiles / plan.blocks;
      const int64_t first = images * part / tiles, last = images * (part + 1) / tiles;
      run_images<T>(ready, input + (group * images + first) * image_words, image_words,
                    begin + first, begin + last, group, block);
    });
  }
}

}  // namespace

bool conv_transpose_direct(const ConvTransposeParams& p) {
  const int64_t down_bytes = Axis::bytes(p.kernel_h, p.stride_h, p.out_h);
  int32_t* memory =
      static_cast<int32_t*>(scratch(2, down_bytes + Axis::bytes(p.kernel_w, p.stride_w, p.out_w)));
  const Axis down(p.in_h, p.out_h, p.kernel_h, p.stride_h, p.pad_h, p.dilation_h, memory);
  const Axis across(p.in_w, p.out_w, p.kernel_w, p.stride_w, p.pad_w, p.dilation_w,
                    memory + down_bytes / 4);
  const Context context{make_plan(p, across), down, across, nullptr};
  if (p.dtype == DType::kFloat) run<float>(context);
  if (p.dtype == DType::kBFloat16) run<BFloat16>(context);
  if (p.dtype == DType::kHalf) run<Half>(context);
  return p.dtype != DType::kDouble;
}

}  // namespace pyops::cpu::PYOPS_ISA
