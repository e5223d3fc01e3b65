// Gradient of the weight under max pooling. For each output channel only the winners of the
// windows count: over a tile of windows, whose input (pixels x channels of one block) stays in
// L1, each winner adds gradient * input row segments to accumulators that hold the whole kernel
// of that output channel, lanes running over (kernel column, input channel).
#include "conv_relu_pool_backward.h"

namespace pyops::cpu::PYOPS_ISA {

#if defined(__AVX512F__)
namespace {

constexpr int kTileRow = 8;    // windows a row of a tile has slots for
constexpr int kMaxSlots = 64;  // windows a tile has slots for, a bit each
constexpr int kMaxVectors = 6;
constexpr int kMaxRows = 8;

// Adds to `sum` (kernel rows, vectors), of which rows lie `sum_row` floats apart.
using Accumulate = void (*)(const char* x, int64_t row_bytes, const float* g,
                            const int32_t* offsets, uint64_t alive, float* sum, int64_t sum_row);

template <int kRows, int kVectors>
void accumulate(const char* x, int64_t row_bytes, const float* g, const int32_t* offsets,
                uint64_t alive, float* sum, int64_t sum_row) {
  __m512 acc[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) acc[r][i] = _mm512_setzero_ps();
  }
  for (; alive != 0; alive &= alive - 1) {
    const int64_t slot = __builtin_ctzll(alive);
    const __m512 v = _mm512_set1_ps(g[slot]);
    const char* row = x + offsets[slot];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) {
        acc[r][i] = _mm512_fmadd_ps(v, _mm512_loadu_ps(row + r * row_bytes + i * 64), acc[r][i]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) {
      float* at = sum + r * sum_row + i * 16;
      _mm512_store_ps(at, _mm512_add_ps(_mm512_load_ps(at), acc[r][i]));
    }
  }
}

#define PYOPS_ROWS(v)              \
  {accumulate<1, v>,               \
   accumulate<2, v>,               \
   accumulate<3, v>,               \
   accumulate<(v < 6 ? 4 : 3), v>, \
   accumulate<(v < 6 ? 5 : 3), v>, \
   accumulate<(v < 5 ? 6 : 3), v>, \
   accumulate<(v < 4 ? 7 : 3), v>, \
   accumulate<(v < 4 ? 8 : 3), v>}
constexpr Accumulate kAccumulate[kMaxVectors][kMaxRows] = {
    PYOPS_ROWS(1), PYOPS_ROWS(2), PYOPS_ROWS(3), PYOPS_ROWS(4), PYOPS_ROWS(5), PYOPS_ROWS(6)};
#undef PYOPS_ROWS
constexpr int kRowsThatFit[kMaxVectors] = {8, 8, 8, 6, 5, 3};

// How the work is cut. Depends on shapes alone, so that the result does too.
struct Plan {
  int64_t blocks, channels;                      // of input channels, and how many each has
  int64_t vectors, sum_row;                      // a kernel row of one block, and its floats
  int64_t sum_floats;                            // of one block, all output channels
  int64_t tile_w, tile_h, tile_cols, tile_rows;  // windows a tile; tiles
  int64_t step_y, step_x;                        // input pixels from one window to the next
  int64_t width, height, row_bytes;              // of the packed input under a row of tiles
  int64_t chunks, units_each, units;             // a unit is a row of tiles
  int64_t piece_rows, piece_vectors;
  bool stream;  // grad_weight is too large to be fetched into the caches just to be overwritten

  explicit Plan(const ConvReluPoolParams& p) {
    const int64_t widest = p.kernel_w == 1 ? 96 : p.kernel_w <= 3 ? 32 : 16;
    blocks = ceil_div(p.in_channels, widest);
    channels = ceil_div(p.in_channels, blocks);
    if (channels > 16 && blocks > 1) channels = ceil_div(channels, 16) * 16;
    blocks = ceil_div(p.in_channels, channels);
    vectors = ceil_div(p.kernel_w * channels, 16);
    sum_row = vectors * 16;
    sum_floats = p.out_channels * p.kernel_h * sum_row;

    step_y = p.pool_stride_h * p.stride_h;
    step_x = p.pool_stride_w * p.stride_w;
    tile_cols = ceil_div(p.out_w, kTileRow);
    tile_w = ceil_div(p.out_w, tile_cols);
    const int64_t tile_pixels = span(tile_w, step_x, p.pool_w, p.stride_w, p.kernel_w);
    tile_h = kMaxSlots / kTileRow;
    while (tile_h > 1 &&
           span(tile_h, step_y, p.pool_h, p.stride_h, p.kernel_h) * tile_pixels * channels * 4 >
               (24 << 10)) {
      --tile_h;
    }
    tile_rows = ceil_div(p.out_h, tile_h);
    tile_h = ceil_div(p.out_h, tile_rows);
    tile_rows = ceil_div(p.out_h, tile_h);
    width = span(p.out_w, step_x, p.pool_w, p.stride_w, p.kernel_w);
    height = span(tile_h, step_y, p.pool_h, p.stride_h, p.kernel_h);
    // The rows of a tile follow one another in L1's sets (4096 bytes apart is the same set).
    row_bytes = ceil_div(width * channels * 4 + 64, 64) * 64;
    const int64_t tile_bytes = ceil_div(tile_pixels * channels * 4, 64) * 64 % 4096;
    row_bytes += (tile_bytes - row_bytes % 4096 + 4096) % 4096;

    units = p.batch * tile_rows;
    const int64_t work = units * tile_h * p.out_w * p.out_channels * p.kernel_h * vectors;
    chunks = max64(1, min64(min64(units, work >> 18), ceil_div(16, blocks)));
    units_each = ceil_div(units, chunks);
    chunks = ceil_div(units, units_each);

    piece_vectors = ceil_div(vectors, ceil_div(vectors, kMaxVectors));
    const int64_t fit = kRowsThatFit[piece_vectors - 1];
    piece_rows = ceil_div(p.kernel_h, ceil_div(p.kernel_h, fit));
    stream = p.out_channels * p.in_channels * p.kernel_h * p.kernel_w >= 1 << 20;
  }
  static int64_t span(int64_t windows, int64_t step, int64_t pool, int64_t stride, int64_t kernel) {
    return (windows - 1) * step + (pool - 1) * stride + kernel;
  }
};

// The input rows under one row of tiles as [row][pixel][channel of the block], zero outside.
template <class T>
void pack_input(const ConvReluPoolParams& p, const Plan& plan, int64_t image, int64_t tile_row,
                int64_t block, char* packed) {
  const T* input = static_cast<const T*>(p.input);
  const int64_t y0 = (tile_row * plan.tile_h * p.pool_stride_h - p.pool_pad_h) * p.stride_h;
  const int64_t left = p.pool_pad_w * p.stride_w + p.pad_w;
  const int64_t c0 = block * plan.channels;
  const int64_t channels = min64(plan.channels, p.in_channels - c0);
  const int64_t end = min64(plan.width, left + p.in_w);  // pixels that exist
  for (int64_t i = 0; i < plan.height; ++i) {
    float* row = reinterpret_cast<float*>(packed + i * plan.row_bytes);
    const int64_t y = y0 - p.pad_h + i;
    if (y < 0 || y >= p.in_h) {
      memset(row, 0, plan.row_bytes);
      continue;
    }
    memset(row, 0, min64(left, plan.width) * plan.channels * 4);
    if (end < plan.width) {
      memset(row + end * plan.channels, 0, (plan.width - end) * plan.channels * 4);
    }
    if (channels < plan.channels) memset(row, 0, plan.row_bytes);
    float* to = row + left * plan.channels;
    const int64_t pixels = end - left;
    if (p.channels_last) {
      const T* from = input + ((image * p.in_h + y) * p.in_w) * p.in_channels + c0;
      for (int64_t x = 0; x < pixels; ++x) {
        int64_t c = 0;
        for (; c + 16 <= channels; c += 16) {
          _mm512_storeu_ps(to + x * plan.channels + c, load16(from + x * p.in_channels + c));
        }
        if (c < channels) {
          const __mmask16 m = first_lanes(channels - c);
          _mm512_mask_storeu_ps(to + x * plan.channels + c, m,
                                load16(from + x * p.in_channels + c, m));
        }
      }
      continue;
    }
    const T* from = input + ((image * p.in_channels + c0) * p.in_h + y) * p.in_w;
    const int64_t plane = p.in_h * p.in_w;
    if (channels < 4) {
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t x = 0; x < pixels; ++x) {
          to[x * plan.channels + c] = to_float(from[c * plane + x]);
        }
      }
      continue;
    }
    for (int64_t c = 0; c < channels; c += 16) {
      const int64_t count = min64(16, channels - c);
      const __mmask16 lanes = first_lanes(count);
      for (int64_t x = 0; x < pixels; x += 16) {
        const int64_t columns = min64(16, pixels - x);
        const __mmask16 m = first_lanes(columns);
        __m512 r[16];
#pragma GCC unroll 16
        for (int j = 0; j < 16; ++j) {
          r[j] = _mm512_setzero_ps();
          if (j < count) r[j] = load16(from + (c + j) * plane + x, m);
        }
        transpose16(r);
#pragma GCC unroll 16
        for (int j = 0; j < 16; ++j) {
          if (j < columns) _mm512_mask_storeu_ps(to + (x + j) * plan.channels + c, lanes, r[j]);
        }
      }
    }
  }
}

// What a tile has to say about 16 output channels.
struct TileGradients {
  alignas(64) float g[16 * kMaxSlots];
  alignas(64) int32_t offsets[16 * kMaxSlots];
  uint64_t alive[16];
};

struct WinnerOffsets {
  alignas(64) int32_t place[128];  // bytes from the window's first pixel to the winner's
  bool few;                        // at most 16 places: one register

  WinnerOffsets(const ConvReluPoolParams& p, const Plan& plan) {
    few = p.pool_h * p.pool_w <= 16;
    for (int64_t i = 0; i < 128; ++i) {
      place[i] = i >= p.pool_h * p.pool_w
                     ? 0
                     : static_cast<int32_t>(i / p.pool_w * p.stride_h * plan.row_bytes +
                                            i % p.pool_w * p.stride_w * plan.channels * 4);
    }
  }
  PYOPS_INLINE __m512i operator()(__m128i codes) const {
    const __m512i wide = _mm512_cvtepu8_epi32(_mm_and_si128(codes, _mm_set1_epi8(0x7f)));
    return few ? _mm512_permutexvar_epi32(wide, _mm512_load_si512(place))
               : _mm512_i32gather_epi32(wide, place, 4);
  }
};

PYOPS_INLINE long long load_eight(const uint8_t* p) {
  long long v;
  std::memcpy(&v, p, 8);
  return v;
}
PYOPS_INLINE __m512 load_halves(const float* a, const float* b) {
  return _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(a)), _mm256_loadu_ps(b), 1);
}
template <class T>
PYOPS_INLINE __m512 load_halves(const T* a, const T* b) {
  return _mm512_insertf32x8(load16(a, 0xff), _mm512_castps512_ps256(load16(b, 0xff)), 1);
}

template <class T>
void gather_tile(const ConvReluPoolParams& p, const Plan& plan, const T* grad,
                 const Passing passing, const WinnerOffsets& winners, int64_t image, int64_t row0,
                 int64_t rows, int64_t col0, int64_t cols, int64_t channel, TileGradients* tile) {
  const int64_t plane = p.out_h * p.out_w;
  const int64_t channels = min64(16, p.out_channels - channel);
  const __mmask16 half = first_lanes(cols);
  const int32_t step_y = static_cast<int32_t>(plan.step_y * plan.row_bytes);
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7);
  const __m512i columns = _mm512_mullo_epi32(
      lane, _mm512_set1_epi32(static_cast<int32_t>(plan.step_x * plan.channels * 4)));
  const int64_t width = p.out_w;
  for (int64_t k = 0; k < channels; ++k) tile->alive[k] = 0;
  for (int64_t y = 0; y < rows; y += 2) {
    const bool two = y + 1 < rows;
    const __mmask16 upper = two ? half : 0;
    const __mmask16 valid = static_cast<__mmask16>(half | (upper << 8));
    const __m512i base = _mm512_add_epi32(
        columns, _mm512_mask_mov_epi32(_mm512_set1_epi32(static_cast<int32_t>(y) * step_y), 0xff00,
                                       _mm512_set1_epi32(static_cast<int32_t>(y + 1) * step_y)));
    __m512 g[16];
    __m128i codes[16];
    if (p.channels_last) {
      const __mmask16 m = first_lanes(channels);
      const int64_t at = ((image * p.out_h + row0 + y) * p.out_w + col0) * p.out_channels + channel;
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const int64_t slot = at + ((i >> 3) * p.out_w + (i & 7)) * p.out_channels;
        const __mmask16 lanes = valid >> i & 1 ? m : 0;
        codes[i] = _mm_maskz_loadu_epi8(lanes, p.codes + slot);
      }
      transpose16(codes);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const int64_t slot = at + ((i >> 3) * p.out_w + (i & 7)) * p.out_channels;
        const __mmask16 lanes = valid >> i & 1 ? m : 0;
        g[i] = load16(grad + slot, lanes);
      }
      transpose16(g);
    }
    const int64_t at = (image * p.out_channels + channel) * plane + (row0 + y) * p.out_w + col0;
    const T* from = grad + at;
    const uint8_t* code = p.codes + at;
    const bool full = valid == 0xffff;
    float* to_g = tile->g + y * kTileRow;
    int32_t* to_offsets = tile->offsets + y * kTileRow;
    for (int64_t k = 0; k < channels; ++k) {
      __m512 v;
      __m128i c;
      if (p.channels_last) {
        v = g[k];
        c = codes[k];
      } else {
        if (full) {
          c = _mm_set_epi64x(load_eight(code + width), load_eight(code));
          v = load_halves(from, from + width);
        } else {
          c = _mm_unpacklo_epi64(_mm_maskz_loadu_epi8(half, code),
                                 _mm_maskz_loadu_epi8(upper, code + width));
          v = _mm512_insertf32x8(load16(from, half),
                                 _mm512_castps512_ps256(load16(from + width, upper)), 1);
        }
        code += plane;
        from += plane;
      }
      _mm512_store_ps(to_g, passing.apply(v, c, valid));
      _mm512_store_si512(to_offsets, _mm512_add_epi32(base, winners(c)));
      tile->alive[k] |= static_cast<uint64_t>(passing.alive(c, valid)) << (y * kTileRow);
      to_g += kMaxSlots;
      to_offsets += kMaxSlots;
    }
  }
}

// (16 channels, 9) from (9, 16 channels).
PYOPS_INLINE void transpose_taps(const __m512 (&taps)[9], float* out) {
  const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
  const __m512i high = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  __m512 t[8];
#pragma GCC unroll 2
  for (int h = 0; h < 8; h += 4) {
    const __m512 a = _mm512_unpacklo_ps(taps[h], taps[h + 1]);
    const __m512 b = _mm512_unpackhi_ps(taps[h], taps[h + 1]);
    const __m512 c = _mm512_unpacklo_ps(taps[h + 2], taps[h + 3]);
    const __m512 d = _mm512_unpackhi_ps(taps[h + 2], taps[h + 3]);
    t[h] = _mm512_shuffle_ps(a, c, 0x44);
    t[h + 1] = _mm512_shuffle_ps(a, c, 0xee);
    t[h + 2] = _mm512_shuffle_ps(b, d, 0x44);
    t[h + 3] = _mm512_shuffle_ps(b, d, 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(t[i]), b = _mm512_castps_pd(t[i + 4]);
    const __m512 near = _mm512_castpd_ps(_mm512_permutex2var_pd(a, low, b));
    const __m512 far = _mm512_castpd_ps(_mm512_permutex2var_pd(a, high, b));
    _mm256_storeu_ps(out + i * 9, _mm512_castps512_ps256(near));
    _mm256_storeu_ps(out + (i + 4) * 9, _mm512_extractf32x8_ps(near, 1));
    _mm256_storeu_ps(out + (i + 8) * 9, _mm512_castps512_ps256(far));
    _mm256_storeu_ps(out + (i + 12) * 9, _mm512_extractf32x8_ps(far, 1));
  }
  alignas(64) float last[16];
  _mm512_store_ps(last, taps[8]);
  for (int i = 0; i < 16; ++i) out[i * 9 + 8] = last[i];
}

// Sums the chunks of one output channel and block of input channels into grad_weight.
template <class T>
void write_weight(const ConvReluPoolParams& p, const Plan& plan, int64_t k, int64_t block,
                  const float* sums, int64_t chunks, int64_t chunk_stride, T* out) {
  const int64_t c0 = block * plan.channels, taps = p.kernel_h * p.kernel_w;
  const int64_t channels = min64(plan.channels, p.in_channels - c0);
  out += (k * p.in_channels + c0) * taps;
  if (taps == 9 && p.kernel_h == 3 && plan.channels % 16 == 0) {
    for (int64_t c = 0; c < channels; c += 16) {
      __m512 v[9];
#pragma GCC unroll 9
      for (int t = 0; t < 9; ++t) {
        const float* at = sums + t / 3 * plan.sum_row + t % 3 * plan.channels + c;
        v[t] = _mm512_load_ps(at);
        for (int64_t i = 1; i < chunks; ++i) {
          v[t] = _mm512_add_ps(v[t], _mm512_load_ps(at + i * chunk_stride));
        }
      }
      const int64_t count = min64(16, channels - c) * 9;
      T* to = out + c * 9;
      alignas(64) float flat[144];
      float* whole = whole_floats(to, count == 144);
      if (whole && plan.stream && reinterpret_cast<uintptr_t>(whole) % 64 == 0) {
        transpose_taps(v, flat);
        for (int i = 0; i < 9; ++i) _mm512_stream_ps(whole + i * 16, _mm512_load_ps(flat + i * 16));
        continue;
      }
      if (whole) {
        transpose_taps(v, whole);
        continue;
      }
      transpose_taps(v, flat);
      for (int64_t i = 0; i < count; i += 16) {
        store16(to + i, first_lanes(count - i), _mm512_load_ps(flat + i));
      }
    }
    return;
  }
  for (int64_t r = 0; r < p.kernel_h; ++r) {
    for (int64_t s = 0; s < p.kernel_w; ++s) {
      const float* at = sums + r * plan.sum_row + s * plan.channels;
      for (int64_t c = 0; c < channels; ++c) {
        float total = at[c];
        for (int64_t i = 1; i < chunks; ++i) total += at[c + i * chunk_stride];
        from_float(total, out + c * taps + r * p.kernel_w + s);
      }
    }
  }
}

template <class T>
void run(const ConvReluPoolGradParams& q) {
  const ConvReluPoolParams& p = q.p;
  const Plan plan(p);
  const Passing passing(p);
  const WinnerOffsets winners(p, plan);
  const T* grad = static_cast<const T*>(q.grad_output);
  T* out = static_cast<T*>(q.grad_weight);
  const int64_t kernel_floats = p.kernel_h * plan.sum_row;
  const int64_t chunk_stride = plan.blocks * plan.sum_floats;
  float* partial =
      plan.chunks == 1
          ? nullptr
          : static_cast<float*>(scratch(0, plan.chunks * chunk_stride * sizeof(float)));

  parallel_for(plan.chunks * plan.blocks, [&](int64_t task) {
    const int64_t chunk = task / plan.blocks, block = task % plan.blocks;
    float* sums = partial ? partial + chunk * chunk_stride + block * plan.sum_floats
                          : static_cast<float*>(scratch(4, plan.sum_floats * sizeof(float)));
    memset(sums, 0, plan.sum_floats * sizeof(float));
    char* packed = static_cast<char*>(scratch(5, plan.height * plan.row_bytes));
    TileGradients* tile = static_cast<TileGradients*>(scratch(6, sizeof(TileGradients)));
    const int64_t end = min64(plan.units, (chunk + 1) * plan.units_each);
    for (int64_t unit = chunk * plan.units_each; unit < end; ++unit) {
      const int64_t image = unit / plan.tile_rows, tile_row = unit % plan.tile_rows;
      const int64_t row0 = tile_row * plan.tile_h, rows = min64(plan.tile_h, p.out_h - row0);
      pack_input<T>(p, plan, image, tile_row, block, packed);
      for (int64_t col0 = 0; col0 < p.out_w; col0 += plan.tile_w) {
        const int64_t cols = min64(plan.tile_w, p.out_w - col0);
        const char* x = packed + col0 * plan.step_x * plan.channels * 4;
        for (int64_t k0 = 0; k0 < p.out_channels; k0 += 16) {
          gather_tile(p, plan, grad, passing, winners, image, row0, rows, col0, cols, k0, tile);
          const int64_t channels = min64(16, p.out_channels - k0);
          for (int64_t k = 0; k < channels; ++k) {
            float* sum = sums + (k0 + k) * kernel_floats;
            const float* g = tile->g + k * kMaxSlots;
            const int32_t* offsets = tile->offsets + k * kMaxSlots;
            for (int64_t r = 0; r < p.kernel_h; r += plan.piece_rows) {
              const int64_t piece_rows = min64(plan.piece_rows, p.kernel_h - r);
              for (int64_t i = 0; i < plan.vectors; i += plan.piece_vectors) {
                const int64_t piece_vectors = min64(plan.piece_vectors, plan.vectors - i);
                kAccumulate[piece_vectors - 1][piece_rows - 1](
                    x + r * plan.row_bytes + i * 64, plan.row_bytes, g, offsets, tile->alive[k],
                    sum + r * plan.sum_row + i * 16, plan.sum_row);
              }
            }
          }
        }
      }
    }
    if (partial) return;
    for (int64_t k = 0; k < p.out_channels; ++k) {
      write_weight(p, plan, k, block, sums + k * kernel_floats, 1, 0, out);
    }
    _mm_sfence();  // streamed stores
  });

  if (!partial) return;
  const int64_t each = max64(1, (1 << 16) / (plan.blocks * kernel_floats * plan.chunks));
  parallel_for(ceil_div(p.out_channels, each), [&](int64_t task) {
    const int64_t end = min64(p.out_channels, (task + 1) * each);
    for (int64_t k = task * each; k < end; ++k) {
      for (int64_t block = 0; block < plan.blocks; ++block) {
        write_weight(p, plan, k, block, partial + block * plan.sum_floats + k * kernel_floats,
                     plan.chunks, chunk_stride, out);
      }
    }
    _mm_sfence();  // streamed stores
  });
}

}  // namespace

void backward_weight_any(const ConvReluPoolGradParams& q) {
  with_type(q.p.dtype, [&](auto t) { run<decltype(t)>(q); });
}
#endif  // __AVX512F__

}  // namespace pyops::cpu::PYOPS_ISA
