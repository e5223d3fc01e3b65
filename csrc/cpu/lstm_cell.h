// Sigmoid and tanh for the LSTM cell. Only for *.isa.cpp files.
//
// tanh goes through expm1: through exp it would lose the relative accuracy of small arguments and
// have 3 to 9 times the error. kShort is for results that are rounded to bfloat16.
#pragma once

#include "simd.h"
#include "simd_lanes.h"

namespace pyops::cpu::PYOPS_ISA {
namespace {

struct ScaledExpm1 {
  Vec expm1;  // e^r - 1
  Vec scale;  // e^x = scale * e^r, a power of two
};

// For |x| <= 87.
template <bool kShort>
PYOPS_INLINE ScaledExpm1 scaled_expm1(Vec x) {
  const Vec log2e = splat(1.44269504f);
#if defined(__AVX512F__)
  const Vec n = _mm512_roundscale_ps(x * log2e, 0);
  const Vec scale = _mm512_scalef_ps(splat(1.0f), n);
#else
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec shifted = fma(x, log2e, magic);
  const Vec n = shifted - magic;
  const VecInt exponent = (reinterpret_cast<VecInt>(shifted) + (127 - 0x4b400000)) << 23;
  const Vec scale = reinterpret_cast<Vec>(exponent);
#endif
  Vec r = fma(n, splat(-0.693359375f), x);  // ln 2 in two parts, the first exact in few bits
  r = fma(n, splat(2.12194440e-4f), r);
  Vec q;
  if (kShort) {
    q = fma(r, splat(4.18666504e-2f), splat(1.67493117e-1f));
    q = fma(q, r, splat(4.99994603e-1f));
  } else {
    q = fma(r, splat(1.39391694e-3f), splat(8.36615966e-3f));
    q = fma(q, r, splat(4.16663845e-2f));
    q = fma(q, r, splat(1.66665474e-1f));
    q = fma(q, r, splat(5.00000004e-1f));
  }
  return {fma(q * r, r, r), scale};
}

// numerator / denominator, for a denominator whose reciprocal is a normal number.
template <bool kShort>
PYOPS_INLINE Vec divide(Vec numerator, Vec denominator) {
#if defined(__AVX512F__)
  Vec r = _mm512_rcp14_ps(denominator);
  if (!kShort) r = fma(_mm512_fnmadd_ps(denominator, r, splat(1.0f)), r, r);
  return numerator * r;
#else
  return numerator / denominator;
#endif
}

PYOPS_INLINE Vec clamp(Vec x, float low, float high) {  // NaN stays
  x = x < splat(low) ? splat(low) : x;
  return x > splat(high) ? splat(high) : x;
}

template <bool kShort>
PYOPS_INLINE Vec sigmoid(Vec x) {
  const ScaledExpm1 e = scaled_expm1<kShort>(clamp(Vec{} - x, -87.0f, 87.0f));
  return divide<kShort>(splat(1.0f), fma(e.scale, e.expm1, e.scale + splat(1.0f)));
}

template <bool kShort>
PYOPS_INLINE Vec tanh(Vec x) {
  const VecInt sign = reinterpret_cast<VecInt>(x) & int32_t(0x80000000);
  const Vec magnitude = reinterpret_cast<Vec>(reinterpret_cast<VecInt>(x) ^ sign);
  const Vec twice = splat(-2.0f) * magnitude;
  const ScaledExpm1 e = scaled_expm1<kShort>(twice < splat(-40.0f) ? splat(-40.0f) : twice);
  const Vec expm1 = fma(e.scale, e.expm1, e.scale - splat(1.0f));  // in (-1, 0]
  const Vec result = divide<kShort>(Vec{} - expm1, expm1 + splat(2.0f));
  return reinterpret_cast<Vec>(reinterpret_cast<VecInt>(result) | sign);
}

}  // namespace
}  // namespace pyops::cpu::PYOPS_ISA
