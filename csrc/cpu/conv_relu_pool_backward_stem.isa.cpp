// All gradients of a 3x3 kernel over few input channels under 2x2 max pooling: one pass that
// brings windows into (window, output channel) order once.
//   input: a window's 4x4 pixels of one input channel are one vector; the weights of every
//     output channel are tabulated as such vectors for each of the four winners, so that an
//     output channel costs one multiply-add an input channel.
//   weight: lanes are output channels, each takes its tap out of the 4x4 pixels by a permutation.
#include "conv_relu_pool_backward.h"

namespace pyops::cpu::PYOPS_ISA {

#if defined(__AVX512F__)
namespace {

constexpr int kTaps = 9;
constexpr int kTable = 96;  // vectors of 4 winners: 24 KB of weights at a time stay in L1
constexpr int kTasks = 64;  // at most, as each keeps its own sums of grad_weight

// A window's sums where NaN or infinity met the zeros around a winner's taps: without those.
template <int kChannels>
__attribute__((noinline, cold)) void sum_taps(const float* g, const uint8_t* entries, int64_t count,
                                              const float* table, __m512 (&sum)[kChannels]) {
  for (int c = 0; c < kChannels; ++c) sum[c] = _mm512_setzero_ps();
  for (int64_t k = 0; k < count; ++k, table += 4 * kChannels * 16) {
    const int winner = entries[k] / (2 * kChannels);
    const __mmask16 taps = static_cast<__mmask16>(0x777 << (winner / 2 * 4 + winner % 2));
    const __m512 v = _mm512_set1_ps(g[k]);
    for (int c = 0; c < kChannels; ++c) {
      const __m512 w = _mm512_load_ps(table + (winner * kChannels + c) * 16);
      sum[c] = _mm512_mask3_fmadd_ps(v, w, sum[c], taps);
    }
  }
}

// Adds one row of windows to tiles of 2x2 pixels: out[c][tile row 0 or 1][tile][4]. An output
// channel's weights are at table + entry * 8 for its winner.
template <int kChannels>
void spread(const float* g, const uint8_t* entries, int64_t stride, int64_t count,
            const float* table, int64_t windows, float* out, int64_t plane, int64_t row) {
  constexpr int kWays = kChannels == 1 ? 4 : 2;  // independent sums, to cover the latency
  const __m512i tiled = _mm512_setr_epi32(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
  __m512 carry[kChannels];
#pragma GCC unroll 4
  for (int c = 0; c < kChannels; ++c) carry[c] = _mm512_setzero_ps();
  for (int64_t x = 0; x <= windows; ++x) {
    __m512 sum[kWays][kChannels];
#pragma GCC unroll 4
    for (int i = 0; i < kWays; ++i) {
#pragma GCC unroll 4
      for (int c = 0; c < kChannels; ++c) sum[i][c] = _mm512_setzero_ps();
    }
    if (x < windows) {
      const float* weights = table;
      for (int64_t k = 0; k < count; k += kWays) {
#pragma GCC unroll 4
        for (int i = 0; i < kWays; ++i) {
          const __m512 v = _mm512_set1_ps(g[k + i]);
          const float* w = weights + (i * 4 * kChannels * 16) + int64_t{entries[k + i]} * 8;
#pragma GCC unroll 4
          for (int c = 0; c < kChannels; ++c) {
            sum[i][c] = _mm512_fmadd_ps(v, _mm512_load_ps(w + c * 16), sum[i][c]);
          }
        }
        weights += kWays * 4 * kChannels * 16;
      }
    }
    __m512 totals[kChannels];
    __mmask16 nan = 0;
#pragma GCC unroll 4
    for (int c = 0; c < kChannels; ++c) {
      totals[c] = sum[0][c];
#pragma GCC unroll 4
      for (int i = 1; i < kWays; ++i) totals[c] = _mm512_add_ps(totals[c], sum[i][c]);
      nan |= _mm512_cmp_ps_mask(totals[c], totals[c], _CMP_UNORD_Q);
    }
    if (__builtin_expect(nan != 0, 0)) {
      __m512 exact[kChannels];
      sum_taps<kChannels>(g, entries, count, table, exact);
#pragma GCC unroll 4
      for (int c = 0; c < kChannels; ++c) totals[c] = exact[c];
    }
    g += stride;
    entries += stride;
#pragma GCC unroll 4
    for (int c = 0; c < kChannels; ++c) {
      // Columns 0 and 1 are this tile's, 2 and 3 the next one's.
      const __m512 total = _mm512_permutexvar_ps(tiled, totals[c]);
      const __m256 done =
          _mm256_add_ps(_mm512_castps512_ps256(total), _mm512_castps512_ps256(carry[c]));
      carry[c] = _mm512_castps256_ps512(_mm512_extractf32x8_ps(total, 1));
      float* upper = out + c * plane + x * 4;
      float* lower = upper + row;
      _mm_store_ps(upper, _mm_add_ps(_mm_load_ps(upper), _mm256_castps256_ps128(done)));
      _mm_store_ps(lower, _mm_add_ps(_mm_load_ps(lower), _mm256_extractf128_ps(done, 1)));
    }
  }
}

// Adds to sums[c][tap][16 output channels].
template <int kChannels>
void correlate(const float* patches, int64_t patch_stride, const float* g, const uint8_t* corners,
               int64_t stride, int64_t windows, float* sums) {
  __m512 acc[kChannels][kTaps];
#pragma GCC unroll 3
  for (int c = 0; c < kChannels; ++c) {
#pragma GCC unroll 9
    for (int t = 0; t < kTaps; ++t) acc[c][t] = _mm512_setzero_ps();
  }
  for (int64_t i = 0; i < windows; ++i) {
    const __m512 v = _mm512_loadu_ps(g + i * stride);
    const __m512i corner = _mm512_cvtepu8_epi32(
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(corners + i * stride)));
    const float* patch = patches + i * patch_stride;
#pragma GCC unroll 9
    for (int t = 0; t < kTaps; ++t) {
      const __m512i place =
          t ? _mm512_add_epi32(corner, _mm512_set1_epi32(t / 3 * 4 + t % 3)) : corner;
#pragma GCC unroll 3
      for (int c = 0; c < kChannels; ++c) {
        acc[c][t] = _mm512_fmadd_ps(v, _mm512_permutexvar_ps(place, _mm512_load_ps(patch + c * 16)),
                                    acc[c][t]);
      }
    }
  }
#pragma GCC unroll 3
  for (int c = 0; c < kChannels; ++c) {
#pragma GCC unroll 9
    for (int t = 0; t < kTaps; ++t) {
      float* at = sums + (c * kTaps + t) * 16;
      _mm512_store_ps(at, _mm512_add_ps(_mm512_load_ps(at), acc[c][t]));
    }
  }
}

// From codes: where a winner's weights are in the table, in units of 8 floats, and where it is
// among the 4x4 pixels.
void translate(const uint8_t* codes, int64_t count, int64_t channels, uint8_t* entries,
               uint8_t* corners) {
  for (int64_t i = 0; i < count; ++i) {
    entries[i] = static_cast<uint8_t>((codes[i] & 3) * 2 * channels);
    corners[i] = static_cast<uint8_t>((codes[i] & 1) + (codes[i] & 2) * 2);
  }
}

void add_gradients(const float* g, int64_t stride, int64_t windows, float* sum) {
  __m512 part[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(),
                    _mm512_setzero_ps()};
  int64_t i = 0;
  for (; i + 4 <= windows; i += 4) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      part[j] = _mm512_add_ps(part[j], _mm512_loadu_ps(g + (i + j) * stride));
    }
  }
  for (; i < windows; ++i) part[0] = _mm512_add_ps(part[0], _mm512_loadu_ps(g + i * stride));
  const __m512 total =
      _mm512_add_ps(_mm512_add_ps(part[0], part[1]), _mm512_add_ps(part[2], part[3]));
  _mm512_store_ps(sum, _mm512_add_ps(_mm512_load_ps(sum), total));
}

// How the work is cut: a task is some images, or a band of window rows of one image. Depends on
// shapes alone, so that the result does too.
struct Plan {
  int64_t channels, padded;                   // input channels; output channels rounded up to 16
  int64_t images, rows, bands, image_groups;  // a task: images, window rows
  int64_t group;                              // window rows taken at once
  int64_t table_channels;                     // output channels of which the weights are in L1
  int64_t tile_row, tile_plane;               // floats
  int64_t pixel_row, pixel_plane;             // floats
  int64_t sums;  // floats a task keeps for the sums of grad_weight and grad_bias

  explicit Plan(const ConvReluPoolParams& p) {
    channels = p.in_channels;
    padded = ceil_div(p.out_channels, 16) * 16;
    table_channels = min64(padded, kTable / channels / 16 * 16);
    images = max64(ceil_div(p.batch, kTasks), min64(p.batch, 1024 / (p.out_h * p.out_w)));
    bands = images > 1 ? 1 : ceil_div(p.out_h, max64(24, ceil_div(p.batch * p.out_h, kTasks)));
    rows = ceil_div(p.out_h, bands);
    bands = ceil_div(p.out_h, rows);
    image_groups = ceil_div(p.batch, images);
    group = max64(1, min64(64 / p.out_w, rows));
    tile_row = ceil_div((max64(p.out_w + 1, ceil_div(p.in_w + p.pad_w, 2))) * 4 + 64, 32) * 32;
    tile_plane =
        (max64(rows + 2, ceil_div(p.in_h + p.pad_h, 2) - (bands - 1) * rows + 2)) * tile_row;
    pixel_row = ceil_div(max64(2 * p.out_w + 2, p.pad_w + p.in_w) + 16, 16) * 16;
    pixel_plane = (2 * group + 2) * pixel_row;
    sums = padded * (channels * kTaps + 1);
  }
};

template <class T>
void tabulate(const ConvReluPoolParams& p, const Plan& plan, const T* weight, float* table) {
  memset(table, 0, plan.padded * 4 * plan.channels * 16 * sizeof(float));
  for (int64_t k = 0; k < p.out_channels; ++k) {
    for (int64_t w = 0; w < 4; ++w) {
      for (int64_t c = 0; c < plan.channels; ++c) {
        float* to = table + ((k * 4 + w) * plan.channels + c) * 16 + w / 2 * 4 + w % 2;
        const T* from = weight + (k * plan.channels + c) * kTaps;
        for (int64_t t = 0; t < kTaps; ++t) to[t / 3 * 4 + t % 3] = to_float(from[t]);
      }
    }
  }
}

// Rows of padded input under `rows` rows of windows, as [channel][row][pixel].
template <class T>
void pad_rows(const ConvReluPoolParams& p, const Plan& plan, int64_t image, int64_t row0,
              int64_t rows, float* pixels) {
  const T* input = static_cast<const T*>(p.input);
  const bool planar = !p.channels_last || plan.channels == 1;
  for (int64_t i = 0; i < 2 * rows + 2; ++i) {
    const int64_t y = 2 * row0 + i - p.pad_h;
    for (int64_t c = 0; c < plan.channels; ++c) {
      float* to = pixels + c * plan.pixel_plane + i * plan.pixel_row;
      memset(to, 0, plan.pixel_row * sizeof(float));
      if (y < 0 || y >= p.in_h) continue;
      to += p.pad_w;
      if (planar) {
        const T* from = input + ((image * plan.channels + c) * p.in_h + y) * p.in_w;
        for (int64_t x = 0; x < p.in_w; x += 16) {
          const __mmask16 m = first_lanes(p.in_w - x);
          _mm512_mask_storeu_ps(to + x, m, load16(from + x, m));
        }
      } else {
        const T* from = input + (image * p.in_h + y) * p.in_w * plan.channels + c;
        for (int64_t x = 0; x < p.in_w; ++x) to[x] = to_float(from[x * plan.channels]);
      }
    }
  }
}

// The 4x4 pixels of every window, as [window][channel][16].
void cut_patches(const ConvReluPoolParams& p, const Plan& plan, int64_t rows, const float* pixels,
                 float* patches) {
  for (int64_t y = 0; y < rows; ++y) {
    for (int64_t x = 0; x < p.out_w; ++x) {
      for (int64_t c = 0; c < plan.channels; ++c, patches += 16) {
        const float* at = pixels + c * plan.pixel_plane + 2 * y * plan.pixel_row + 2 * x;
        for (int64_t i = 0; i < 4; ++i) {
          _mm_store_ps(patches + i * 4, _mm_loadu_ps(at + i * plan.pixel_row));
        }
      }
    }
  }
}

template <class T>
void store_tiles(const ConvReluPoolParams& p, const Plan& plan, T* out, int64_t image,
                 int64_t tile_y, const float* tiles, float* rows) {
  const __m512i even = _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14);
  const __m512i odd = _mm512_setr_epi64(1, 3, 5, 7, 9, 11, 13, 15);
  const bool planar = !p.channels_last || plan.channels == 1;
  for (int64_t c = 0; c < plan.channels; ++c) {
    const float* from = tiles + c * plan.tile_plane;
    float* upper = rows;
    float* lower = rows + plan.tile_row / 2;
    for (int64_t i = 0; i < plan.tile_row / 2; i += 16) {
      const __m512d a = _mm512_castps_pd(_mm512_load_ps(from + 2 * i));
      const __m512d b = _mm512_castps_pd(_mm512_load_ps(from + 2 * i + 16));
      _mm512_storeu_pd(upper + i, _mm512_permutex2var_pd(a, even, b));
      _mm512_storeu_pd(lower + i, _mm512_permutex2var_pd(a, odd, b));
    }
    for (int64_t i = 0; i < 2; ++i) {
      const int64_t y = 2 * tile_y + i - p.pad_h;
      if (y < 0 || y >= p.in_h) continue;
      const float* row = (i ? lower : upper) + p.pad_w;
      if (planar) {
        T* to = out + ((image * plan.channels + c) * p.in_h + y) * p.in_w;
        for (int64_t x = 0; x < p.in_w; x += 16) {
          store16(to + x, first_lanes(p.in_w - x), _mm512_loadu_ps(row + x));
        }
      } else {
        T* to = out + (image * p.in_h + y) * p.in_w * plan.channels + c;
        for (int64_t x = 0; x < p.in_w; ++x) from_float(row[x], to + x * plan.channels);
      }
    }
  }
}

using Spread = decltype(&spread<1>);
constexpr Spread kSpread[] = {spread<1>, spread<2>, spread<3>, spread<4>};
using Correlate = decltype(&correlate<1>);
constexpr Correlate kCorrelate[] = {correlate<1>, correlate<2>, correlate<3>};

template <class T>
void run(const ConvReluPoolGradParams& q) {
  const ConvReluPoolParams& p = q.p;
  const Plan plan(p);
  const Passing passing(p);
  const T* grad = static_cast<const T*>(q.grad_output);
  T* grad_input = static_cast<T*>(q.grad_input);
  float* table = nullptr;
  if (grad_input) {
    table = static_cast<float*>(scratch(0, plan.padded * 4 * plan.channels * 16 * sizeof(float)));
    tabulate(p, plan, static_cast<const T*>(p.weight), table);
  }
  const bool sums_wanted = q.grad_weight || q.grad_bias;
  const int64_t tasks = plan.image_groups * plan.bands;
  float* all_sums =
      sums_wanted ? static_cast<float*>(scratch(1, tasks * plan.sums * sizeof(float))) : nullptr;

  parallel_for(tasks, [&](int64_t task) {
    const int64_t band = task % plan.bands, image0 = task / plan.bands * plan.images;
    const int64_t end_image = min64(p.batch, image0 + plan.images);
    const int64_t row0 = band * plan.rows, row1 = min64(p.out_h, row0 + plan.rows);
    const int64_t group_windows = plan.group * p.out_w;
    // The row of windows above the band reaches into its first tiles.
    const int64_t first_row = grad_input && row0 > 0 ? row0 - 1 : row0;
    const int64_t tile0 = row0 - 1;
    float* sums = nullptr;
    if (sums_wanted) {
      sums = all_sums + task * plan.sums;
      memset(sums, 0, plan.sums * sizeof(float));
    }
    float* g = static_cast<float*>(scratch(4, group_windows * plan.padded * 7));
    uint8_t* codes = reinterpret_cast<uint8_t*>(g + group_windows * plan.padded);
    uint8_t* entries = codes + group_windows * plan.padded;
    uint8_t* corners = entries + group_windows * plan.padded;
    float* tiles = static_cast<float*>(
        scratch(5, (plan.channels * plan.tile_plane + plan.tile_row + 64) * sizeof(float)));
    float* rows = tiles + plan.channels * plan.tile_plane;
    float* patches = static_cast<float*>(
        scratch(6, (group_windows * 16 + plan.pixel_plane) * plan.channels * sizeof(float)));
    float* pixels = patches + group_windows * plan.channels * 16;

    for (int64_t image = image0; image < end_image; ++image) {
      if (grad_input) memset(tiles, 0, plan.channels * plan.tile_plane * sizeof(float));
      for (int64_t y = first_row, count; y < row1; y += count) {
        count = y < row0 ? 1 : min64(plan.group, row1 - y);
        const int64_t windows = count * p.out_w;
        for (int64_t i = 0; i < windows; i += 16) {
          for (int64_t k = 0; k < plan.padded; k += 16) {
            load_windows(p, grad, image, y * p.out_w + i, min64(16, windows - i), k, passing,
                         g + i * plan.padded + k, plan.padded, codes + i * plan.padded + k,
                         plan.padded);
          }
        }
        translate(codes, windows * plan.padded, plan.channels, entries, corners);
        if (grad_input) {
          for (int64_t k = 0; k < plan.padded; k += plan.table_channels) {
            const int64_t channels = min64(plan.table_channels, plan.padded - k);
            for (int64_t i = 0; i < count; ++i) {
              const int64_t at = i * p.out_w * plan.padded + k;
              kSpread[plan.channels - 1](
                  g + at, entries + at, plan.padded, channels, table + k * 4 * plan.channels * 16,
                  p.out_w, tiles + (y + i - tile0) * plan.tile_row, plan.tile_plane, plan.tile_row);
            }
          }
        }
        if (!sums_wanted || y < row0) continue;
        if (q.grad_weight) {
          pad_rows<T>(p, plan, image, y, count, pixels);
          cut_patches(p, plan, count, pixels, patches);
        }
        for (int64_t k = 0; k < plan.padded; k += 16) {
          float* sum = sums + k * (plan.channels * kTaps + 1);
          if (q.grad_weight) {
            const int64_t each = plan.channels == 4 ? 2 : plan.channels;
            for (int64_t c = 0; c < plan.channels; c += each) {
              kCorrelate[each - 1](patches + c * 16, plan.channels * 16, g + k, corners + k,
                                   plan.padded, windows, sum + c * kTaps * 16);
            }
          }
          if (q.grad_bias) {
            add_gradients(g + k, plan.padded, windows, sum + plan.channels * kTaps * 16);
          }
        }
      }
      if (!grad_input) continue;
      const bool last = row1 == p.out_h;
      const int64_t end = last ? max64(row1 + 1, ceil_div(p.in_h + p.pad_h, 2)) : row1;
      for (int64_t y = row0; y < end; ++y) {
        store_tiles(p, plan, grad_input, image, y, tiles + (y - tile0) * plan.tile_row, rows);
      }
    }
  });

  if (!sums_wanted) return;
  T* grad_weight = static_cast<T*>(q.grad_weight);
  T* grad_bias = static_cast<T*>(q.grad_bias);
  const int64_t values = plan.channels * kTaps + 1;
  for (int64_t k = 0; k < p.out_channels; ++k) {
    for (int64_t i = 0; i < values; ++i) {
      const float* at = all_sums + (k / 16 * 16 * values + i * 16) + k % 16;
      double total = 0;
      for (int64_t task = 0; task < tasks; ++task) total += at[task * plan.sums];
      const float value = static_cast<float>(total);
      if (i + 1 < values) {
        if (grad_weight) from_float(value, grad_weight + k * (values - 1) + i);
      } else if (grad_bias) {
        from_float(value, grad_bias + k);
      }
    }
  }
}

}  // namespace

void backward_stem(const ConvReluPoolGradParams& q) {
  with_type(q.p.dtype, [&](auto t) { run<decltype(t)>(q); });
}
#endif  // __AVX512F__

}  // namespace pyops::cpu::PYOPS_ISA
