// Gradient of the input under max pooling for any kernel, stride and window without dilation. For
// each window and each place in it, the output channels won there are summed as gradient * weights
// in registers, a piece of the kernel at a time, and the sum joins the pixels around that place.
#include "conv_relu_pool_backward.h"

namespace pyops::cpu::PYOPS_ISA {

#if defined(__AVX512F__)
namespace {

constexpr int kBlock = 64;        // output channels at a time, a bit each
constexpr int kPieceVectors = 6;  // kBlock of these stay in L1

// Adds to `out` (rows, vectors), of which rows lie `out_row` floats apart, the last vector of
// each only where `last` says.
using Scatter = void (*)(const float* g, uint64_t channels, const float* weights, float* out,
                         int64_t out_row, __mmask16 last);

template <int kRows, int kVectors>
void scatter(const float* g, uint64_t channels, const float* weights, float* out, int64_t out_row,
             __mmask16 last) {
  __m512 acc[kRows][kVectors];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 6
    for (int i = 0; i < kVectors; ++i) acc[r][i] = _mm512_setzero_ps();
  }
  for (; channels != 0; channels &= channels - 1) {
    const int64_t k = __builtin_ctzll(channels);
    const __m512 v = _mm512_set1_ps(g[k]);
    const float* w = weights + k * (kRows * kVectors * 16);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 6
      for (int i = 0; i < kVectors; ++i) {
        acc[r][i] = _mm512_fmadd_ps(v, _mm512_load_ps(w + (r * kVectors + i) * 16), acc[r][i]);
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 6
    for (int i = 0; i < kVectors; ++i) {
      float* at = out + r * out_row + i * 16;
      if (i + 1 < kVectors) {
        _mm512_storeu_ps(at, _mm512_add_ps(_mm512_loadu_ps(at), acc[r][i]));
      } else {
        const __m512 old = _mm512_maskz_loadu_ps(last, at);
        _mm512_mask_storeu_ps(at, last, _mm512_add_ps(old, acc[r][i]));
      }
    }
  }
}

// By vectors and rows; null where a piece would be too large.
constexpr Scatter kScatter[kPieceVectors][kPieceVectors] = {
    {scatter<1, 1>, scatter<2, 1>, scatter<3, 1>, scatter<4, 1>, scatter<5, 1>, scatter<6, 1>},
    {scatter<1, 2>, scatter<2, 2>, scatter<3, 2>},
    {scatter<1, 3>, scatter<2, 3>},
    {scatter<1, 4>},
    {scatter<1, 5>},
    {scatter<1, 6>}};

// How the work is cut: a task is a band of pixel rows of one image and some blocks of input
// channels; it visits all windows that reach into the band. Depends on shapes alone, so that the
// result does too.
struct Plan {
  int64_t blocks, channels;  // of input channels, and how many each has
  int64_t vectors;           // a kernel row of one block
  int64_t padded;            // output channels rounded up to kBlock
  int64_t piece_rows, piece_vectors;
  int64_t step_y, step_x, reach_y;  // pixels from one window to the next; rows that one reaches
  int64_t top, left;                // padding of the buffered pixels before the image's
  int64_t width, height;            // buffered
  int64_t bands, band_rows, block_groups, blocks_each;

  explicit Plan(const ConvReluPoolParams& p) {
    const int64_t widest = p.kernel_w == 1 ? 96 : p.kernel_w <= 3 ? 32 : 16;
    blocks = ceil_div(p.in_channels, widest);
    channels = ceil_div(p.in_channels, blocks);
    if (channels > 16 && blocks > 1) channels = ceil_div(channels, 16) * 16;
    blocks = ceil_div(p.in_channels, channels);
    vectors = ceil_div(p.kernel_w * channels, 16);
    padded = ceil_div(p.out_channels, kBlock) * kBlock;
    piece_vectors = ceil_div(vectors, ceil_div(vectors, kPieceVectors));
    piece_rows = ceil_div(p.kernel_h, ceil_div(p.kernel_h, kPieceVectors / piece_vectors));

    step_y = p.pool_stride_h * p.stride_h;
    step_x = p.pool_stride_w * p.stride_w;
    reach_y = (p.pool_h - 1) * p.stride_h + p.kernel_h;
    const int64_t reach_x = (p.pool_w - 1) * p.stride_w + p.kernel_w;
    top = p.pool_pad_h * p.stride_h + p.pad_h;
    left = p.pool_pad_w * p.stride_w + p.pad_w;
    height = max64((p.out_h - 1) * step_y + reach_y, top + p.in_h);
    width = max64((p.out_w - 1) * step_x + reach_x, left + p.in_w);

    block_groups = min64(blocks, ceil_div(16, p.batch));
    blocks_each = ceil_div(blocks, block_groups);
    block_groups = ceil_div(blocks, blocks_each);
    // Windows at the edge of a band are visited twice: keep them few.
    const int64_t twice = ceil_div(max64(0, reach_y - step_y), step_y);
    const int64_t most = twice ? max64(1, p.out_h / (8 * twice)) : p.out_h;
    bands = min64(most, ceil_div(16, p.batch * block_groups));
    band_rows = ceil_div(height, bands);
    bands = ceil_div(height, band_rows);
  }
  int64_t kernel_vectors(const ConvReluPoolParams& p) const { return p.kernel_h * vectors; }
};

// A block of output channels' weights as [piece][output channel][row][kernel column, channel].
template <class T>
void pack_weights(const ConvReluPoolParams& p, const Plan& plan, int64_t block, int64_t k0,
                  float* packed) {
  const T* weight = static_cast<const T*>(p.weight);
  const int64_t taps = p.kernel_h * p.kernel_w, c0 = block * plan.channels;
  const int64_t channels = min64(plan.channels, p.in_channels - c0);
  memset(packed, 0, kBlock * plan.kernel_vectors(p) * 16 * sizeof(float));
  for (int64_t r0 = 0; r0 < p.kernel_h; r0 += plan.piece_rows) {
    const int64_t rows = min64(plan.piece_rows, p.kernel_h - r0);
    for (int64_t i0 = 0; i0 < plan.vectors; i0 += plan.piece_vectors) {
      const int64_t floats = min64(plan.piece_vectors, plan.vectors - i0) * 16;
      for (int64_t k = k0; k < min64(p.out_channels, k0 + kBlock); ++k) {
        const T* from = weight + (k * p.in_channels + c0) * taps;
        for (int64_t r = r0; r < r0 + rows; ++r) {
          float* to = packed + ((k - k0) * rows + r - r0) * floats;
          int64_t s = i0 * 16 / plan.channels, c = i0 * 16 % plan.channels;
          for (int64_t i = 0; i < floats && s < p.kernel_w; ++i) {
            if (c < channels) to[i] = to_float(from[c * taps + r * p.kernel_w + s]);
            if (++c == plan.channels) c = 0, ++s;
          }
        }
      }
      packed += kBlock * rows * floats;
    }
  }
}

// Writes pixels (x, channel of the block) as input's row (image, y).
template <class T>
void store_pixels(const ConvReluPoolParams& p, const Plan& plan, T* out, int64_t image,
                  int64_t block, int64_t y, const float* pixels) {
  const int64_t c0 = block * plan.channels;
  const int64_t channels = min64(plan.channels, p.in_channels - c0);
  if (p.channels_last) {
    T* row = out + (image * p.in_h + y) * p.in_w * p.in_channels + c0;
    if (plan.blocks == 1) {
      const int64_t count = p.in_w * channels;
      for (int64_t i = 0; i < count; i += 16) {
        const __mmask16 m = first_lanes(count - i);
        store16(row + i, m, load16(pixels + i, m));
      }
      return;
    }
    for (int64_t x = 0; x < p.in_w; ++x) {
      for (int64_t c = 0; c < channels; c += 16) {
        const __mmask16 m = first_lanes(channels - c);
        store16(row + x * p.in_channels + c, m, load16(pixels + x * plan.channels + c, m));
      }
    }
    return;
  }
  const int64_t plane = p.in_h * p.in_w;
  T* row = out + (image * p.in_channels + c0) * plane + y * p.in_w;
  if (channels < 4) {
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t x = 0; x < p.in_w; ++x) {
        from_float(pixels[x * plan.channels + c], row + c * plane + x);
      }
    }
    return;
  }
  for (int64_t c = 0; c < channels; c += 16) {
    const int64_t count = min64(16, channels - c);
    const __mmask16 lanes = first_lanes(count);
    for (int64_t x = 0; x < p.in_w; x += 16) {
      const int64_t columns = min64(16, p.in_w - x);
      const __mmask16 m = first_lanes(columns);
      __m512 r[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        r[i] = _mm512_setzero_ps();
        if (i < columns) r[i] = load16(pixels + (x + i) * plan.channels + c, lanes);
      }
      transpose16(r);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        if (i < count) store16(row + (c + i) * plane + x, m, r[i]);
      }
    }
  }
}

// One block of input and output channels, one row of windows.
void scatter_row(const ConvReluPoolParams& p, const Plan& plan, const float* g,
                 const uint8_t* codes, const float* weights, int64_t r0, int64_t rows, int64_t i0,
                 int64_t vectors, float* out) {
  const Scatter kernel = kScatter[vectors - 1][rows - 1];
  const int64_t row = plan.width * plan.channels;
  const __mmask16 last = i0 + vectors < plan.vectors
                             ? 0xffff
                             : first_lanes(p.kernel_w * plan.channels - (plan.vectors - 1) * 16);
  out += r0 * row + i0 * 16;
  for (int64_t x = 0; x < p.out_w; ++x) {
    const __m512i c = _mm512_loadu_si512(codes);
    int winner = -128;
    for (int64_t dy = 0; dy < p.pool_h; ++dy) {
      for (int64_t dx = 0; dx < p.pool_w; ++dx, ++winner) {
        const uint64_t won = _mm512_cmpeq_epi8_mask(c, _mm512_set1_epi8(static_cast<char>(winner)));
        if (won == 0) continue;
        kernel(g, won, weights,
               out + dy * p.stride_h * row + (x * plan.step_x + dx * p.stride_w) * plan.channels,
               row, last);
      }
    }
    g += plan.padded;
    codes += plan.padded;
  }
}

template <class T>
void run(const ConvReluPoolGradParams& q) {
  const ConvReluPoolParams& p = q.p;
  const Plan plan(p);
  const Passing passing(p);
  const T* grad = static_cast<const T*>(q.grad_output);
  T* out = static_cast<T*>(q.grad_input);
  const int64_t k_blocks = plan.padded / kBlock;
  const int64_t block_floats = kBlock * plan.kernel_vectors(p) * 16;
  float* packed =
      static_cast<float*>(scratch(0, plan.blocks * k_blocks * block_floats * sizeof(float)));
  parallel_for(plan.blocks * k_blocks, [&](int64_t task) {
    pack_weights<T>(p, plan, task / k_blocks, task % k_blocks * kBlock,
                    packed + task * block_floats);
  });

  parallel_for(p.batch * plan.bands * plan.block_groups, [&](int64_t task) {
    const int64_t group = task % plan.block_groups;
    const int64_t band = task / plan.block_groups % plan.bands;
    const int64_t image = task / plan.block_groups / plan.bands;
    const int64_t pixel0 = band * plan.band_rows;
    const int64_t pixel1 = min64(plan.height, pixel0 + plan.band_rows);
    const int64_t row0 = max64(0, ceil_div(pixel0 - plan.reach_y + 1, plan.step_y));
    const int64_t row1 = min64(p.out_h, ceil_div(pixel1, plan.step_y));
    const int64_t windows = max64(0, row1 - row0) * p.out_w;
    // Buffered rows: what the windows reach, and the band itself.
    const int64_t first = min64(pixel0, row0 * plan.step_y);
    const int64_t end = max64(pixel1, (row1 - 1) * plan.step_y + plan.reach_y);
    const int64_t row_floats = plan.width * plan.channels;
    const int64_t floats = (end - first) * row_floats + 16;

    float* g = static_cast<float*>(scratch(4, windows * plan.padded * 5));
    uint8_t* codes = reinterpret_cast<uint8_t*>(g + windows * plan.padded);
    float* pixels = static_cast<float*>(scratch(5, floats * sizeof(float)));
    memset(codes, 0, windows * plan.padded);
    for (int64_t i = 0; i < windows; i += 16) {
      for (int64_t k = 0; k < p.out_channels; k += 16) {
        load_windows(p, grad, image, row0 * p.out_w + i, min64(16, windows - i), k, passing,
                     g + i * plan.padded + k, plan.padded, codes + i * plan.padded + k,
                     plan.padded);
      }
    }
    if (passing.leaky) {
      for (int64_t i = 0; i < windows; ++i) {
        for (int64_t k = 0; k < p.out_channels; ++k) codes[i * plan.padded + k] |= 0x80;
      }
    }

    const int64_t block_end = min64(plan.blocks, (group + 1) * plan.blocks_each);
    for (int64_t block = group * plan.blocks_each; block < block_end; ++block) {
      memset(pixels, 0, floats * sizeof(float));
      for (int64_t k = 0; k < k_blocks; ++k) {
        const float* weights = packed + (block * k_blocks + k) * block_floats;
        for (int64_t r = 0; r < p.kernel_h; r += plan.piece_rows) {
          const int64_t rows = min64(plan.piece_rows, p.kernel_h - r);
          for (int64_t i = 0; i < plan.vectors; i += plan.piece_vectors) {
            const int64_t vectors = min64(plan.piece_vectors, plan.vectors - i);
            for (int64_t y = row0; y < row1; ++y) {
              const int64_t at = (y - row0) * p.out_w * plan.padded + k * kBlock;
              scatter_row(p, plan, g + at, codes + at, weights, r, rows, i, vectors,
                          pixels + (y * plan.step_y - first) * row_floats);
            }
            weights += kBlock * rows * vectors * 16;
          }
        }
      }
      for (int64_t i = pixel0; i < pixel1; ++i) {
        const int64_t y = i - plan.top;
        if (y < 0 || y >= p.in_h) continue;
        store_pixels(p, plan, out, image, block, y,
                     pixels + (i - first) * row_floats + plan.left * plan.channels);
      }
    }
  });
}

}  // namespace

void backward_data_any(const ConvReluPoolGradParams& q) {
  with_type(q.p.dtype, [&](auto t) { run<decltype(t)>(q); });
}
#endif  // __AVX512F__

}  // namespace pyops::cpu::PYOPS_ISA
