// What follows the convolution, shared by the direct kernels: sums of the convolution lie in
// scratch as [row][pixel][channel] and are given bias, activation, pool and codes and written. Only
// for *.isa.cpp files.
#pragma once

#include "conv_relu_pool.h"
#include "runtime.h"
#include "simd.h"

namespace pyops::cpu::PYOPS_ISA {
namespace {

PYOPS_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
PYOPS_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
PYOPS_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- transposition of kLanes x kLanes words

template <int kDistance>
PYOPS_INLINE void exchange(Vec (&rows)[kLanes]) {
  VecInt low, high;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    low[i] = i & kDistance ? kLanes + i - kDistance : i;
    high[i] = i & kDistance ? kLanes + i : i + kDistance;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & kDistance) continue;
    const Vec a = rows[i], b = rows[i + kDistance];
    rows[i] = __builtin_shuffle(a, b, low);
    rows[i + kDistance] = __builtin_shuffle(a, b, high);
  }
}

PYOPS_INLINE void transpose(Vec (&rows)[kLanes]) {
  exchange<1>(rows);
  exchange<2>(rows);
#if defined(__AVX2__)
  exchange<4>(rows);
#endif
#if defined(__AVX512F__)
  exchange<8>(rows);
#endif
}

// ---- bias, activation, pool, codes

PYOPS_INLINE Vec activate(const ConvReluPoolParams& p, Vec v) {
  if (p.activation == Activation::kRelu) return relu(v);
  if (p.activation == Activation::kLeakyRelu) return v > Vec{} ? v : v * splat(p.negative_slope);
  return v;
}

PYOPS_INLINE VecInt passes_gradient(const ConvReluPoolParams& p, Vec v) {
  if (p.activation == Activation::kRelu) return ~(v <= Vec{});
  if (p.activation == Activation::kLeakyRelu) return v > Vec{};
  return ~VecInt{};
}

// Convolution rows in scratch, one vector of channels.
struct ConvRows {
  const float* data;
  int64_t first_row, pixel_stride;
  Vec bias;
};

// Whether the activation may follow the pool: without codes the winner's place does not matter.
template <Pool kPool, bool kCodes>
PYOPS_INLINE bool activates_last(const ConvReluPoolParams& p) {
  return kPool == Pool::kMax && !kCodes &&
         !(p.activation == Activation::kLeakyRelu && p.negative_slope < 0);
}

// Pools rows x columns pixels from `row` on; `place` is the first's place in the unclipped window.
template <Pool kPool, bool kCodes>
PYOPS_INLINE Vec pool_window(const ConvReluPoolParams& p, const ConvRows& conv, const float* row,
                             int64_t rows, int64_t columns, int64_t place, Vec* codes) {
  if (activates_last<kPool, kCodes>(p)) {
    Vec value = load(row);
    for (int64_t y = 0; y < rows; ++y) {
      for (int64_t x = 0; x < columns; ++x) {
        if (x + y == 0) continue;
        value = max_nan(load(row + (y * p.conv_w + x) * conv.pixel_stride), value);
      }
    }
    return activate(p, value + conv.bias);
  }
  Vec value = {};
  VecInt code = {};
  for (int64_t y = 0; y < rows; ++y) {
    for (int64_t x = 0; x < columns; ++x) {
      const Vec before = load(row + (y * p.conv_w + x) * conv.pixel_stride) + conv.bias;
      const Vec after = activate(p, before);
      const int32_t here = static_cast<int32_t>(place + y * p.pool_w + x);
      if (kPool == Pool::kAvg) {
        value += after;
        if (kCodes) code |= passes_gradient(p, before) & (1 << here);
        continue;
      }
      const VecInt first = VecInt{} - (x + y == 0);
      const VecInt wins = first | (after > value) | (after != after);
      value = wins ? after : value;
      if (kCodes) code = wins ? (passes_gradient(p, before) & 128) | here : code;
    }
  }
  if (kCodes) *codes = reinterpret_cast<Vec>(code);
  return value;
}

// `count` outputs from the flat index `flat` (row * out_w + column) on.
template <Pool kPool, bool kCodes>
void pool_pixels(const ConvReluPoolParams& p, const ConvRows& conv, int64_t flat, int64_t count,
                 Vec* values, Vec* codes) {
  if (kPool == Pool::kNone) {
    const float* at = conv.data + (flat - conv.first_row * p.conv_w) * conv.pixel_stride;
    for (int64_t i = 0; i < count; ++i, at += conv.pixel_stride) {
      const Vec before = load(at) + conv.bias;
      values[i] = activate(p, before);
      if (kCodes) codes[i] = reinterpret_cast<Vec>(passes_gradient(p, before) & 1);
    }
    return;
  }
  int64_t oy = flat / p.out_w, ox = flat % p.out_w;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t y0 = oy * p.pool_stride_h - p.pool_pad_h;
    const int64_t x0 = ox * p.pool_stride_w - p.pool_pad_w;
    const int64_t y = max(y0, 0), rows = min(y0 + p.pool_h, p.conv_h) - y;
    const int64_t x = max(x0, 0), columns = min(x0 + p.pool_w, p.conv_w) - x;
    const float* row = conv.data + ((y - conv.first_row) * p.conv_w + x) * conv.pixel_stride;
    const int64_t place = (y - y0) * p.pool_w + (x - x0);
    // The common windows, with their loops unrolled.
    Vec value = rows == 2 && columns == 2
                    ? pool_window<kPool, kCodes>(p, conv, row, 2, 2, place, codes + i)
                : rows == 3 && columns == 3
                    ? pool_window<kPool, kCodes>(p, conv, row, 3, 3, place, codes + i)
                    : pool_window<kPool, kCodes>(p, conv, row, rows, columns, place, codes + i);
    if (kPool == Pool::kAvg) {
      // As torch: padding counts, what ceil_mode adds beyond it does not.
      const int64_t height = min(y0 + p.pool_h, p.conv_h + p.pool_pad_h) - y0;
      const int64_t width = min(x0 + p.pool_w, p.conv_w + p.pool_pad_w) - x0;
      value /= splat(static_cast<float>(height * width));
    }
    values[i] = value;
    if (++ox == p.out_w) {
      ox = 0;
      ++oy;
    }
  }
}

using PoolPixels = void (*)(const ConvReluPoolParams&, const ConvRows&, int64_t, int64_t, Vec*,
                            Vec*);

PoolPixels select_pool(const ConvReluPoolParams& p) {
  static constexpr PoolPixels kPools[3][2] = {
      {&pool_pixels<Pool::kNone, false>, &pool_pixels<Pool::kNone, true>},
      {&pool_pixels<Pool::kMax, false>, &pool_pixels<Pool::kMax, true>},
      {&pool_pixels<Pool::kAvg, false>, &pool_pixels<Pool::kAvg, true>}};
  return kPools[static_cast<int>(p.pool)][p.codes != nullptr];
}

PYOPS_INLINE void store_codes(uint8_t* dst, Vec codes, int64_t count) {
#if defined(__AVX512F__)
  const __m128i bytes = _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(codes));
  _mm_mask_storeu_epi8(dst, static_cast<__mmask16>((1u << count) - 1), bytes);
#else
  for (int64_t i = 0; i < count; ++i)
    dst[i] = static_cast<uint8_t>(reinterpret_cast<VecInt>(codes)[i]);
#endif
}

template <class T>
PYOPS_INLINE void store_part(T* dst, Vec v, int64_t count) {
  if (count == kLanes) return store(dst, v);
  T part[kLanes];
  store(part, v);
  std::memcpy(dst, part, count * sizeof(T));
}

// Channels [first, first + count) of image n, in `vectors` vectors.
struct Channels {
  int64_t n, first, count, vectors;
};

// Pools and writes output rows [row, row_end) of some channels.
template <class T>
void finish_rows(const ConvReluPoolParams& p, const Channels& channels, const float* sums,
                 int64_t first_conv_row, int64_t row, int64_t row_end) {
  const PoolPixels pool = select_pool(p);
  const int64_t area = p.out_h * p.out_w, stride = channels.vectors * kLanes;
  const bool plain = p.pool == Pool::kNone && !p.codes;
  for (int64_t v = 0; v * kLanes < channels.count; ++v) {
    const int64_t valid = min(kLanes, channels.count - v * kLanes);
    const int64_t k = channels.first + v * kLanes;
    ConvRows conv{sums + v * kLanes, first_conv_row, stride, Vec{}};
    if (p.bias) {
      const T* bias = static_cast<const T*>(p.bias) + k;
      for (int64_t i = 0; i < valid; ++i) conv.bias[i] = to_float(bias[i]);
    }
    for (int64_t flat = row * p.out_w; flat < row_end * p.out_w; flat += kLanes) {
      const int64_t count = min(kLanes, row_end * p.out_w - flat);
      Vec values[kLanes], codes[kLanes];
      if (plain && count == kLanes) {
        const float* at = sums + (flat - first_conv_row * p.conv_w) * stride + v * kLanes;
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) values[i] = activate(p, load(at + i * stride) + conv.bias);
      } else {
        pool(p, conv, flat, count, values, codes);
      }
      if (p.channels_last) {
        const int64_t at = (channels.n * area + flat) * p.out_channels + k;
        if (!p.codes && count == kLanes && valid == kLanes) {
          T* to = static_cast<T*>(p.output) + at;
#pragma GCC unroll 16
          for (int i = 0; i < kLanes; ++i, to += p.out_channels) store(to, values[i]);
          continue;
        }
        for (int64_t i = 0; i < count; ++i) {
          const int64_t to = at + i * p.out_channels;
          store_part(static_cast<T*>(p.output) + to, values[i], valid);
          if (p.codes) store_codes(p.codes + to, codes[i], valid);
        }
        continue;
      }
      const int64_t at = (channels.n * p.out_channels + k) * area + flat;
      transpose(values);
      if (valid == kLanes && count == kLanes) {
        T* to = static_cast<T*>(p.output) + at;
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i, to += area) store(to, values[i]);
      } else {
        for (int64_t i = 0; i < valid; ++i) {
          store_part(static_cast<T*>(p.output) + at + i * area, values[i], count);
        }
      }
      if (p.codes) {
        transpose(codes);
        for (int64_t i = 0; i < valid; ++i) store_codes(p.codes + at + i * area, codes[i], count);
      }
    }
  }
}

// The convolution rows that an output row pools.
PYOPS_INLINE int64_t pool_begin(const ConvReluPoolParams& p, int64_t out_row) {
  return max(0, out_row * p.pool_stride_h - p.pool_pad_h);
}
PYOPS_INLINE int64_t pool_end(const ConvReluPoolParams& p, int64_t out_row) {
  return min(p.conv_h, out_row * p.pool_stride_h - p.pool_pad_h + p.pool_h);
}

// Writes output rows [row_begin, row_end) of some channels, a few at a time, so that their
// convolution rows stay in the cache. convolve(begin, end, sums) computes convolution rows.
template <class T, class Convolve>
void finish_band(const ConvReluPoolParams& p, const Channels& channels, int64_t row_begin,
                 int64_t row_end, const Convolve& convolve) {
  constexpr int64_t kConvBytes = 128 << 10;
  const int64_t row_floats = p.conv_w * channels.vectors * kLanes;
  const int64_t fitting = max(p.pool_h, kConvBytes / (row_floats * 4));
  const int64_t step = (fitting - p.pool_h) / p.pool_stride_h + 1;
  float* sums = static_cast<float*>(scratch(5, fitting * row_floats * 4));
  int64_t have_begin = 0, have_end = 0;  // convolution rows in sums
  for (int64_t row = row_begin; row < row_end; row += step) {
    const int64_t last = min(row + step, row_end);
    const int64_t begin = pool_begin(p, row), end = pool_end(p, last - 1);
    const int64_t kept = max(0, have_end - begin);  // windows overlap
    if (kept > 0) {
      std::memmove(sums, sums + (begin - have_begin) * row_floats, kept * row_floats * 4);
    }
    convolve(begin + kept, end, sums + kept * row_floats);
    have_begin = begin;
    have_end = end;
    finish_rows<T>(p, channels, sums, begin, row, last);
  }
}

}  // namespace
}  // namespace pyops::cpu::PYOPS_ISA
