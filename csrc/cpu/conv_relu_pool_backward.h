// Shared by the conv_relu_pool_backward*.isa.cpp files: the parts of the sparse backward
// and the AVX-512 helpers they have in common.
#pragma once

#include "conv_relu_pool.h"
#include "runtime.h"
#include "simd.h"

namespace pyops::cpu::PYOPS_ISA {

// 3x3 kernel, stride 1, under 2x2 windows, stride 2. The stem is for at most kStemChannels input
// channels, and computes all that is asked for.
constexpr int64_t kStemChannels = 4;
void backward_stem(const ConvReluPoolGradParams& q);
void backward_data_3x3(const ConvReluPoolGradParams& q);
// Any kernel and window without dilation.
void backward_data_any(const ConvReluPoolGradParams& q);
void backward_weight_any(const ConvReluPoolGradParams& q);

#if defined(__AVX512F__)
namespace {

PYOPS_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
PYOPS_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
PYOPS_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The first `count` of 16 lanes.
PYOPS_INLINE __mmask16 first_lanes(int64_t count) {
  return count >= 16 ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}

PYOPS_INLINE __m512 load16(const float* p, __mmask16 m) { return _mm512_maskz_loadu_ps(m, p); }
PYOPS_INLINE __m512 load16(const BFloat16* p, __mmask16 m) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
PYOPS_INLINE __m512 load16(const Half* p, __mmask16 m) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, p));
}

PYOPS_INLINE __m512 load16(const float* p) { return _mm512_loadu_ps(p); }
template <class T>
PYOPS_INLINE __m512 load16(const T* p) {
  return load16(p, 0xffff);
}

PYOPS_INLINE void store16(float* p, __mmask16 m, __m512 v) { _mm512_mask_storeu_ps(p, m, v); }
template <class T>
PYOPS_INLINE void store16(T* p, __mmask16 m, __m512 v) {
  alignas(32) T narrow[16];
  store(narrow, reinterpret_cast<Vec>(v));
  _mm256_mask_storeu_epi16(p, m, *reinterpret_cast<const __m256i*>(narrow));
}

// `p` itself if it is an array of float that may be read as it lies, else null.
PYOPS_INLINE const float* whole_floats(const float* p, bool whole) { return whole ? p : nullptr; }
PYOPS_INLINE float* whole_floats(float* p, bool whole) { return whole ? p : nullptr; }
template <class T>
PYOPS_INLINE float* whole_floats(T*, bool) {
  return nullptr;
}

// 16 x 16 floats in registers.
PYOPS_INLINE void transpose16(__m512 (&r)[16]) {
  __m512 t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    r[4 * i + 1] = _mm512_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    r[4 * i + 2] = _mm512_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    r[4 * i + 3] = _mm512_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// 16 x 16 bytes in registers.
PYOPS_INLINE void transpose16(__m128i (&r)[16]) {
  __m128i t[16];
#pragma GCC unroll 4
  for (int round = 0; round < 4; ++round) {
#pragma GCC unroll 16
    for (int i = 0; i < 8; ++i) {
      t[2 * i] = _mm_unpacklo_epi8(r[i], r[i + 8]);
      t[2 * i + 1] = _mm_unpackhi_epi8(r[i], r[i + 8]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = t[i];
  }
}

// Which gradients flow: bit 7 of a code says whole; leaky_relu passes the others scaled.
struct Passing {
  bool leaky;
  __m512 slope;
  explicit Passing(const ConvReluPoolParams& p)
      : leaky(p.activation == Activation::kLeakyRelu),
        slope(_mm512_set1_ps(static_cast<float>(p.negative_slope))) {}
  PYOPS_INLINE __mmask16 alive(__m128i codes, __mmask16 valid) const {
    return leaky ? valid : static_cast<__mmask16>(_mm_movepi8_mask(codes) & valid);
  }
  // Dead lanes become exactly zero, whatever the gradient.
  PYOPS_INLINE __m512 apply(__m512 g, __m128i codes, __mmask16 valid) const {
    const __mmask16 whole = _mm_movepi8_mask(codes) & valid;
    return leaky ? _mm512_mask_mul_ps(g, static_cast<__mmask16>(~whole), g, slope)
                 : _mm512_maskz_mov_ps(whole, g);
  }
};

// A block of 16 consecutive windows (in output order within one image) and 16 output channels,
// as 16 rows of channels. `row_stride` counts elements; `codes` rows are 16 bytes apart there.
template <class T>
PYOPS_INLINE void load_windows(const ConvReluPoolParams& p, const T* grad, int64_t image,
                               int64_t window, int64_t windows, int64_t channel,
                               const Passing& passing, float* g, int64_t g_stride, uint8_t* codes,
                               int64_t code_stride) {
  const int64_t plane = p.out_h * p.out_w;
  const __mmask16 channels = first_lanes(p.out_channels - channel);
  if (p.channels_last) {
    for (int64_t i = 0; i < windows; ++i) {
      const int64_t at = (image * plane + window + i) * p.out_channels + channel;
      const __m128i c = _mm_maskz_loadu_epi8(channels, p.codes + at);
      const __m512 v = passing.apply(load16(grad + at, channels), c, channels);
      _mm512_storeu_ps(g + i * g_stride, v);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i * code_stride), c);
    }
    return;
  }
  const int64_t rows = min64(16, p.out_channels - channel);
  const int64_t at = (image * p.out_channels + channel) * plane + window;
  const T* from = grad + at;
  const uint8_t* code = p.codes + at;
  __m128i b[16];
  __m512 r[16];
  if (windows == 16 && rows == 16) {
    // Prefetch: planes are too many for the hardware to follow.
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      b[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(code + i * plane));
      r[i] = load16(from + i * plane);
      _mm_prefetch(from + i * plane + 16, _MM_HINT_T0);
    }
  } else {
    const __mmask16 valid = first_lanes(windows);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      const __mmask16 m = i < rows ? valid : 0;
      const int64_t row = i < rows ? i * plane : 0;
      b[i] = _mm_maskz_loadu_epi8(m, code + row);
      r[i] = load16(from + row, m);
    }
  }
  transpose16(r);
  transpose16(b);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    if (i < windows) {
      _mm512_storeu_ps(g + i * g_stride, passing.apply(r[i], b[i], first_lanes(rows)));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i * code_stride), b[i]);
    }
  }
}

// Writes `width` pixels of 16 channels, [pixel][16] in memory, as input's row (image, y).
template <class T>
PYOPS_INLINE void store_row(const ConvReluPoolParams& p, T* out, int64_t image, int64_t channel,
                            int64_t y, const float* pixels, const float* addend) {
  const int64_t channels = min64(16, p.in_channels - channel);
  if (p.channels_last) {
    const __mmask16 m = first_lanes(channels);
    T* row = out + ((image * p.in_h + y) * p.in_w) * p.in_channels + channel;
    for (int64_t x = 0; x < p.in_w; ++x) {
      __m512 v = _mm512_loadu_ps(pixels + x * 16);
      if (addend) v = _mm512_add_ps(v, _mm512_loadu_ps(addend + x * 16));
      store16(row + x * p.in_channels, m, v);
    }
    return;
  }
  T* row = out + ((image * p.in_channels + channel) * p.in_h + y) * p.in_w;
  const int64_t plane = p.in_h * p.in_w;
  for (int64_t x = 0; x < p.in_w; x += 16) {
    const int64_t count = min64(16, p.in_w - x);
    const __mmask16 m = first_lanes(count);
    __m512 r[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      r[i] = _mm512_setzero_ps();
      if (i < count) {
        r[i] = _mm512_loadu_ps(pixels + (x + i) * 16);
        if (addend) r[i] = _mm512_add_ps(r[i], _mm512_loadu_ps(addend + (x + i) * 16));
      }
    }
    transpose16(r);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      if (i < channels) store16(row + i * plane + x, m, r[i]);
    }
  }
}

}  // namespace
#endif  // __AVX512F__

}  // namespace pyops::cpu::PYOPS_ISA
