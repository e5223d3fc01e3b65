// Sigmoid and tanh for the LSTM cell. Only for *.isa.cpp files.
//
// Both go through powers of two: 2^t = 2^n (1 + r Q(r)), n the nearest integer, |r| <= 1/2, Q a
// polynomial of least relative error. tanh keeps 2^t - 1: through 2^t it would lose the relative
// accuracy of small arguments and have 3 to 9 times the error. kShort is for results that are
// rounded to bfloat16.
#pragma once

#include "simd.h"
#include "simd_lanes.h"

namespace pyops::cpu::PYOPS_ISA {
namespace {

constexpr float kLog2E = 1.44269504f;

PYOPS_INLINE Vec min_or_nan(Vec x, float most) {
#if defined(__AVX512F__)
  return _mm512_min_ps(splat(most), x);
#else
  return x > splat(most) ? splat(most) : x;
#endif
}

PYOPS_INLINE Vec max_or_nan(Vec x, float least) {
#if defined(__AVX512F__)
  return _mm512_max_ps(splat(least), x);
#else
  return x < splat(least) ? splat(least) : x;
#endif
}

struct PowerOfTwo {
  Vec scale;      // 2^n
  Vec remainder;  // t - n
};

// t = x * factor, whose own rounding the remainder does not see.
PYOPS_INLINE PowerOfTwo split_power(Vec x, float factor) {
#if defined(__AVX512F__)
  const Vec n = _mm512_roundscale_ps(x * splat(factor), 0);
  return {_mm512_scalef_ps(splat(1.0f), n), _mm512_fmsub_ps(x, splat(factor), n)};
#else
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec shifted = fma(x, splat(factor), magic);
  const VecInt exponent = (reinterpret_cast<VecInt>(shifted) + (127 - 0x4b400000)) << 23;
  return {reinterpret_cast<Vec>(exponent), fma(x, splat(factor), magic - shifted)};
#endif
}

// numerator / denominator, for a denominator whose reciprocal is a normal number.
template <bool kShort>
PYOPS_INLINE Vec divide(Vec numerator, Vec denominator) {
#if defined(__AVX512F__)
  const Vec r = _mm512_rcp14_ps(denominator), quotient = numerator * r;
  if (kShort) return quotient;
  return fma(_mm512_fnmadd_ps(quotient, denominator, numerator), r, quotient);
#else
  return numerator / denominator;
#endif
}

template <bool kShort>
PYOPS_INLINE Vec sigmoid(Vec x) {
  // Beyond 2^125 the denominator's reciprocal would no longer be normal.
  const PowerOfTwo p = split_power(min_or_nan(max_or_nan(x, -86.6f), 86.6f), -kLog2E);
  const Vec r = p.remainder;
  Vec q;
  if (kShort) {
    q = fma(r, splat(0.0550089292f), splat(0.242210954f));
    q = fma(q, r, splat(0.693282902f));
  } else {
    q = fma(r, splat(0.00015353362f), splat(0.00133988739f));
    q = fma(q, r, splat(0.00961843692f));
    q = fma(q, r, splat(0.0555033237f));
    q = fma(q, r, splat(0.240226477f));
    q = fma(q, r, splat(0.693147182f));
  }
  q = fma(q, r, splat(1.0f));
  return divide<kShort>(splat(1.0f), fma(p.scale, q, splat(1.0f)));
}

template <bool kShort>
PYOPS_INLINE Vec tanh(Vec x) {
  const VecInt sign = reinterpret_cast<VecInt>(x) & int32_t(0x80000000);
  const Vec magnitude = reinterpret_cast<Vec>(reinterpret_cast<VecInt>(x) & 0x7fffffff);
  const PowerOfTwo p = split_power(min_or_nan(magnitude, 43.3f), -2 * kLog2E);
  const Vec r = p.remainder;
  Vec q;
  if (kShort) {
    q = fma(r, splat(0.00961811095f), splat(0.0558372885f));
    q = fma(q, r, splat(0.240232527f));
    q = fma(q, r, splat(0.693136871f));
  } else {
    q = fma(r, splat(0.000154035122f), splat(0.00133907353f));
    q = fma(q, r, splat(0.00961823761f));
    q = fma(q, r, splat(0.0555035733f));
    q = fma(q, r, splat(0.240226492f));
    q = fma(q, r, splat(0.693147182f));
  }
  const Vec expm1 = fma(p.scale, q * r, p.scale - splat(1.0f));  // in (-1, 0]
  const Vec negative = divide<kShort>(expm1, expm1 + splat(2.0f));
  const VecInt bits = (reinterpret_cast<VecInt>(negative) & 0x7fffffff) | sign;
  return reinterpret_cast<Vec>(bits);
}

}  // namespace
}  // namespace pyops::cpu::PYOPS_ISA
