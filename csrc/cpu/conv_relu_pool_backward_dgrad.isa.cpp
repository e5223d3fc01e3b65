// Gradient of the input for a 3x3 kernel under 2x2 max pooling. A window's winner spreads its
// gradient over 3x3 of the 4x4 pixels that the window's convolutions read. Those 16 pixels times
// 16 input channels stay in 16 registers while a block of output channels passes by, and slide
// along the row of windows; which 9 of the 16 take part is known at compile time because the
// output channels are visited by winner.
#include "conv_relu_pool_backward.h"

namespace pyops::cpu::PYOPS_ISA {

#if defined(__AVX512F__)
namespace {

constexpr int kBlock = 32;  // output channels whose weights (32 x 9 x 16 floats) stay in L1
constexpr int kTaps = 9;

// (kBlock, 9, 16 input channels) from (out_channels, in_channels, 9), zero beyond the edges.
template <class T>
void pack_weights(const ConvReluPoolParams& p, const T* weight, int64_t k0, int64_t c0,
                  float* packed) {
  const int64_t rows = min64(kBlock, p.out_channels - k0);
  const int64_t count = min64(16, p.in_channels - c0) * kTaps;
  const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13);
  const __m512i high = _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15);
  alignas(64) float flat[16 * kTaps];
  for (int64_t k = 0; k < rows; ++k, packed += kTaps * 16) {
    const T* from = weight + ((k0 + k) * p.in_channels + c0) * kTaps;
    // What the next call packs: rows are too far apart for the hardware to foresee them.
    const int64_t ahead = k0 + kBlock < p.out_channels ? kBlock * p.in_channels * kTaps
                                                       : (16 - k0 * p.in_channels) * kTaps;
    const uintptr_t next = reinterpret_cast<uintptr_t>(from) + ahead * sizeof(T);
    for (uintptr_t i = 0; i < 16 * kTaps * sizeof(T); i += 64) {
      _mm_prefetch(reinterpret_cast<const char*>(next + i), _MM_HINT_T1);
    }
    const float* f = whole_floats(from, count == 16 * kTaps);
    if (!f) {
      f = flat;
      for (int i = 0; i < kTaps; ++i) {
        _mm512_store_ps(flat + i * 16, load16(from + i * 16, first_lanes(count - i * 16)));
      }
    }
    __m512 r[8], t[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      r[i] = _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(f + i * kTaps)),
                                _mm256_loadu_ps(f + (i + 8) * kTaps), 1);
    }
#pragma GCC unroll 2
    for (int h = 0; h < 8; h += 4) {
      const __m512 a = _mm512_unpacklo_ps(r[h], r[h + 1]), b = _mm512_unpackhi_ps(r[h], r[h + 1]);
      const __m512 c = _mm512_unpacklo_ps(r[h + 2], r[h + 3]);
      const __m512 d = _mm512_unpackhi_ps(r[h + 2], r[h + 3]);
      t[h] = _mm512_shuffle_ps(a, c, 0x44);
      t[h + 1] = _mm512_shuffle_ps(a, c, 0xee);
      t[h + 2] = _mm512_shuffle_ps(b, d, 0x44);
      t[h + 3] = _mm512_shuffle_ps(b, d, 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512d a = _mm512_castps_pd(t[i]), b = _mm512_castps_pd(t[i + 4]);
      _mm512_store_pd(packed + i * 16, _mm512_permutex2var_pd(a, low, b));
      _mm512_store_pd(packed + (i + 4) * 16, _mm512_permutex2var_pd(a, high, b));
    }
    for (int i = 0; i < 16; ++i) packed[8 * 16 + i] = f[i * kTaps + 8];
  }
}

// For every window of a run, and block of 32 output channels: which of them were won by place
// 0..3 and pass a gradient.
void winner_masks(const ConvReluPoolParams& p, const uint8_t* codes, int64_t windows,
                  int64_t padded, uint32_t* masks) {
  const bool leaky = p.activation == Activation::kLeakyRelu;
  const __m256i keep = _mm256_set1_epi8(leaky ? 0x7f : -1);
  const int flag = leaky ? 0 : 0x80;
  for (int64_t i = 0; i < windows; ++i) {
    for (int64_t k = 0; k < padded; k += kBlock, masks += 4) {
      const int64_t left = p.out_channels - k;
      const uint32_t valid = left >= kBlock ? ~0u : (1u << left) - 1;
      const __m256i c = _mm256_and_si256(
          keep, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i * padded + k)));
      for (int w = 0; w < 4; ++w) {
        masks[w] = valid & _mm256_cmpeq_epi8_mask(c, _mm256_set1_epi8(static_cast<char>(flag | w)));
      }
    }
  }
}

// One row of windows, one block of output channels, 16 input channels: adds to 4 rows of pixels.
void slide(const float* g, int64_t g_stride, const uint32_t* masks, int64_t mask_stride,
           int64_t windows, const float* weights, float* out, int64_t row) {
  const __m512 zero = _mm512_setzero_ps();
  __m512 p00 = zero, p01 = zero, p02 = zero, p03 = zero;
  __m512 p10 = zero, p11 = zero, p12 = zero, p13 = zero;
  __m512 p20 = zero, p21 = zero, p22 = zero, p23 = zero;
  __m512 p30 = zero, p31 = zero, p32 = zero, p33 = zero;
#define PYOPS_TAP(tap, pixel) pixel = _mm512_fmadd_ps(v, _mm512_load_ps(w + (tap) * 16), pixel);
#define PYOPS_WINNER(place, a, b, c, d, e, f, g_, h, i)                              \
  for (uint32_t left = masks[place]; left != 0; left &= left - 1) {                  \
    const int64_t k = __builtin_ctz(left);                                           \
    const __m512 v = _mm512_set1_ps(g[k]);                                           \
    const float* w = weights + k * (kTaps * 16);                                     \
    PYOPS_TAP(0, a)                                                                  \
    PYOPS_TAP(1, b)                                                                  \
    PYOPS_TAP(2, c)                                                                  \
    PYOPS_TAP(3, d)                                                                  \
    PYOPS_TAP(4, e) PYOPS_TAP(5, f) PYOPS_TAP(6, g_) PYOPS_TAP(7, h) PYOPS_TAP(8, i) \
  }
#define PYOPS_LEAVE(offset, pixel) \
  _mm512_store_ps(out + (offset), _mm512_add_ps(_mm512_load_ps(out + (offset)), pixel))
// The two columns that later windows do not touch.
#define PYOPS_LEAVE_COLUMNS()     \
  PYOPS_LEAVE(0, p00);            \
  PYOPS_LEAVE(16, p01);           \
  PYOPS_LEAVE(row, p10);          \
  PYOPS_LEAVE(row + 16, p11);     \
  PYOPS_LEAVE(2 * row, p20);      \
  PYOPS_LEAVE(2 * row + 16, p21); \
  PYOPS_LEAVE(3 * row, p30);      \
  PYOPS_LEAVE(3 * row + 16, p31)
  for (int64_t x = 0; x < windows; ++x) {
    PYOPS_WINNER(0, p00, p01, p02, p10, p11, p12, p20, p21, p22);
    PYOPS_WINNER(1, p01, p02, p03, p11, p12, p13, p21, p22, p23);
    PYOPS_WINNER(2, p10, p11, p12, p20, p21, p22, p30, p31, p32);
    PYOPS_WINNER(3, p11, p12, p13, p21, p22, p23, p31, p32, p33);
    PYOPS_LEAVE_COLUMNS();
    p00 = p02, p01 = p03, p02 = zero, p03 = zero;
    p10 = p12, p11 = p13, p12 = zero, p13 = zero;
    p20 = p22, p21 = p23, p22 = zero, p23 = zero;
    p30 = p32, p31 = p33, p32 = zero, p33 = zero;
    g += g_stride;
    masks += mask_stride;
    out += 32;
  }
  PYOPS_LEAVE_COLUMNS();
#undef PYOPS_TAP
#undef PYOPS_WINNER
#undef PYOPS_LEAVE_COLUMNS
#undef PYOPS_LEAVE
}

// How the work is cut: a task is some images, or a band of window rows of one image, times some
// blocks of 16 input channels. Depends on shapes alone, so that the result does too.
struct Plan {
  int64_t padded;  // output channels rounded up to kBlock
  int64_t images;  // a task
  int64_t rows;    // of windows, a task
  int64_t image_groups, bands, blocks, block_groups, blocks_each;
  int64_t width;       // pixels a buffered row
  int64_t pixel_rows;  // at most, buffered for one image of a task

  explicit Plan(const ConvReluPoolParams& p) {
    padded = ceil_div(p.out_channels, kBlock) * kBlock;
    blocks = ceil_div(p.in_channels, 16);
    const int64_t plane = p.out_h * p.out_w;
    const int64_t fit = max64(1, (480 << 10) / (5 * padded + 300));  // windows within L2
    images = 1;
    bands = 1;
    if (plane * 2 <= fit) {
      images = min64(fit / plane, ceil_div(p.batch, 8));
    } else {
      bands = min64(p.out_h, ceil_div(plane, fit));
    }
    rows = ceil_div(p.out_h, bands);
    bands = ceil_div(p.out_h, rows);
    image_groups = ceil_div(p.batch, images);
    images = ceil_div(p.batch, image_groups);
    image_groups = ceil_div(p.batch, images);
    block_groups = min64(blocks, ceil_div(16, image_groups * bands));
    blocks_each = ceil_div(blocks, block_groups);
    block_groups = ceil_div(blocks, blocks_each);
    width = max64(2 * p.out_w + 2, p.in_w + p.pad_w);
    pixel_rows = max64(2 * rows + 2, p.in_h + p.pad_h - 2 * (bands - 1) * rows);
  }
  int64_t tasks() const { return image_groups * bands * block_groups; }
  // Two pixel rows that two bands share, as each of them has it.
  int64_t seam_floats() const { return 2 * width * 16; }
  int64_t seam(int64_t image, int64_t band, int64_t block, int64_t lower) const {
    return (((image * (bands - 1) + band) * blocks + block) * 2 + lower) * seam_floats();
  }
};

template <class T>
void run(const ConvReluPoolGradParams& q) {
  const ConvReluPoolParams& p = q.p;
  const Plan plan(p);
  const Passing passing(p);
  const T* grad = static_cast<const T*>(q.grad_output);
  const T* weight = static_cast<const T*>(p.weight);
  T* out = static_cast<T*>(q.grad_input);
  const int64_t row_floats = plan.width * 16;
  const int64_t seams = p.batch * (plan.bands - 1) * plan.blocks * 2 * plan.seam_floats();
  float* seam = seams ? static_cast<float*>(scratch(0, seams * sizeof(float))) : nullptr;

  parallel_for(plan.tasks(), [&](int64_t task) {
    const int64_t group = task % plan.block_groups;
    const int64_t band = task / plan.block_groups % plan.bands;
    const int64_t image0 = task / plan.block_groups / plan.bands * plan.images;
    const int64_t images = min64(plan.images, p.batch - image0);
    const int64_t row0 = band * plan.rows, rows = min64(plan.rows, p.out_h - row0);
    const int64_t run_windows = rows * p.out_w;  // an image
    const bool last = band + 1 == plan.bands;
    const int64_t pixel_rows = last ? plan.pixel_rows : 2 * rows + 2;
    const int64_t pixel_floats = pixel_rows * row_floats;

    float* g = static_cast<float*>(scratch(4, images * run_windows * plan.padded * sizeof(float)));
    const int64_t mask_stride = plan.padded / kBlock * 4;
    uint32_t* masks = static_cast<uint32_t*>(
        scratch(5, images * run_windows * mask_stride * sizeof(uint32_t) + 16 * plan.padded));
    uint8_t* codes = reinterpret_cast<uint8_t*>(masks + images * run_windows * mask_stride);
    float* pixels = static_cast<float*>(
        scratch(6, (images * pixel_floats + kBlock * kTaps * 16) * sizeof(float)));
    float* packed = pixels + images * pixel_floats;

    for (int64_t n = 0; n < images; ++n) {
      for (int64_t i = 0; i < run_windows; i += 16) {
        const int64_t count = min64(16, run_windows - i), at = n * run_windows + i;
        for (int64_t k = 0; k < p.out_channels; k += 16) {
          load_windows(p, grad, image0 + n, row0 * p.out_w + i, count, k, passing,
                       g + at * plan.padded + k, plan.padded, codes + k, plan.padded);
        }
        winner_masks(p, codes, count, plan.padded, masks + at * mask_stride);
      }
    }

    const int64_t block_end = min64(plan.blocks, (group + 1) * plan.blocks_each);
    for (int64_t block = group * plan.blocks_each; block < block_end; ++block) {
      memset(pixels, 0, images * pixel_floats * sizeof(float));
      for (int64_t k = 0; k < plan.padded; k += kBlock) {
        pack_weights(p, weight, k, block * 16, packed);
        for (int64_t n = 0; n < images; ++n) {
          for (int64_t y = 0; y < rows; ++y) {
            const int64_t at = n * run_windows + y * p.out_w;
            slide(g + at * plan.padded + k, plan.padded, masks + at * mask_stride + k / kBlock * 4,
                  mask_stride, p.out_w, packed, pixels + n * pixel_floats + 2 * y * row_floats,
                  row_floats);
          }
        }
      }
      for (int64_t n = 0; n < images; ++n) {
        const float* from = pixels + n * pixel_floats;
        const int64_t first = band == 0 ? 0 : 2, end = last ? pixel_rows : 2 * rows;
        if (first) {
          memcpy(seam + plan.seam(image0 + n, band - 1, block, 1), from,
                 plan.seam_floats() * sizeof(float));
        }
        if (!last) {
          memcpy(seam + plan.seam(image0 + n, band, block, 0), from + end * row_floats,
                 plan.seam_floats() * sizeof(float));
        }
        for (int64_t i = first; i < end; ++i) {
          const int64_t y = 2 * row0 + i - p.pad_h;
          if (y < 0 || y >= p.in_h) continue;
          store_row(p, out, image0 + n, block * 16, y, from + i * row_floats + p.pad_w * 16,
                    nullptr);
        }
      }
    }
  });

  if (!seams) return;
  parallel_for(p.batch * (plan.bands - 1), [&](int64_t task) {
    const int64_t image = task / (plan.bands - 1), band = task % (plan.bands - 1);
    for (int64_t block = 0; block < plan.blocks; ++block) {
      const float* upper = seam + plan.seam(image, band, block, 0) + p.pad_w * 16;
      const float* lower = seam + plan.seam(image, band, block, 1) + p.pad_w * 16;
      for (int64_t i = 0; i < 2; ++i) {
        const int64_t y = 2 * (band + 1) * plan.rows + i - p.pad_h;
        if (y < 0 || y >= p.in_h) continue;
        store_row(p, out, image, block * 16, y, upper + i * row_floats, lower + i * row_floats);
      }
    }
  });
}

}  // namespace

void backward_data_3x3(const ConvReluPoolGradParams& q) {
  with_type(q.p.dtype, [&](auto t) { run<decltype(t)>(q); });
}
#endif  // __AVX512F__

}  // namespace pyops::cpu::PYOPS_ISA
