// exp2, exp, tanh and log on Vec. Relative errors are given beside each, for normal results: of
// subnormal ones some instruction sets make zero. Only for *.isa.cpp files.
#pragma once

#include "simd_lanes.h"

namespace pyops::cpu::PYOPS_ISA {
namespace {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

#if defined(__AVX512F__)
// GCC 12 warns of its own intrinsics where they have no mask; a full one costs nothing.
constexpr __mmask16 kAllLanes = 0xffff;
#endif

// The larger one; b where either is NaN. The compiler makes two instructions of `a > b ? a : b`.
PYOPS_INLINE Vec max_or_second(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_mask_max_ps(a, kAllLanes, a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

PYOPS_INLINE Vec round_to_even(Vec x) {  // |x| < 2^22
#if defined(__AVX512F__)
  return _mm512_mask_roundscale_ps(x, kAllLanes, x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  // volatile: the compiler may not cancel the two.
  const Vec magic = splat(12582912.0f);
  volatile Vec shifted = x + magic;
  return shifted - magic;
#endif
}

// x * 2^n for whole n in [kLeastPower, 127] and |x| near 1; kLeastPower gives 0.
#if defined(__AVX512F__)
constexpr float kLeastPower = -160.0f;
#else
constexpr float kLeastPower = -127.0f;
#endif
PYOPS_INLINE Vec scale_by_power(Vec x, Vec n) {
#if defined(__AVX512F__)
  return _mm512_mask_scalef_ps(x, kAllLanes, x, n);
#else
  const VecInt exponent = __builtin_convertvector(n, VecInt);
  return x * reinterpret_cast<Vec>((exponent + 127) << 23);
#endif
}

// p[0] + p[1] x + ... + p[Degree] x^Degree.
template <int Degree>
PYOPS_INLINE Vec polynomial(const float (&p)[Degree + 1], Vec x) {
  Vec sum = splat(p[Degree]);
#pragma GCC unroll 16
  for (int i = Degree - 1; i >= 0; --i) sum = fma(sum, x, splat(p[i]));
  return sum;
}

// Minimax on [-0.5, 0.5], relative error 2e-9 (degree 6) and 7.5e-5 (degree 3).
constexpr float kExp2Degree6[] = {1.0f,          0.69314721f,   0.24022647f,   0.055503288f,
                                  0.0096184890f, 0.0013399931f, 0.00015345812f};
constexpr float kExp2Degree3[] = {0.99992807f, 0.69326099f, 0.24261112f, 0.055171669f};

// 2^x for x < 128; 0 for -infinity, NaN for NaN. Degree 6: 1 ulp; degree 3: 7.5e-5, enough for
// results that are rounded to bfloat16.
template <int Degree = 6>
PYOPS_INLINE Vec exp2(Vec x) {
  x = max_or_second(splat(kLeastPower), x);
  const Vec n = round_to_even(x);
  if constexpr (Degree == 3) {
    return scale_by_power(polynomial<3>(kExp2Degree3, x - n), n);
  } else {
    return scale_by_power(polynomial<6>(kExp2Degree6, x - n), n);
  }
}

// (e^r - 1 - r) / r^2 on [-ln2 / 2, ln2 / 2].
constexpr float kExpm1Rest[] = {0.5f,          0.16666667f,   0.041666355f,
                                0.0083332730f, 0.0013941025f, 0.00019914242f};

// e^x as 2^n * (1 + tail), x in [-110, 88].
PYOPS_INLINE void split_exp(Vec x, Vec* n, Vec* tail) {
  *n = round_to_even(x * kLog2e);
  Vec r = fma(*n, splat(-0.693145752f), x);  // ln 2 in two parts
  r = fma(*n, splat(-1.42860677e-6f), r);
  *tail = fma(polynomial<5>(kExpm1Rest, r) * r, r, r);
}

// e^x for x < 88; 1 ulp.
PYOPS_INLINE Vec exp(Vec x) {
  Vec n, tail;
  split_exp(max_or_second(splat(kLeastPower * kLn2), x), &n, &tail);
  return scale_by_power(tail + 1.0f, n);
}

// By e^2|x| - 1, which loses nothing near 0 and next to nothing near 1, where 1 - tanh^2 is a
// gradient.
PYOPS_INLINE Vec tanh(Vec x) {
  const VecInt sign = reinterpret_cast<VecInt>(x) & static_cast<int32_t>(0x80000000u);
  const Vec magnitude = reinterpret_cast<Vec>(reinterpret_cast<VecInt>(x) ^ sign);
  Vec n, tail;
  split_exp(-max_or_second(splat(-19.0f), magnitude * -2.0f), &n, &tail);  // 1 from there on
  const Vec power = scale_by_power(splat(1.0f), n);
  const Vec expm1 = fma(power, tail, power - 1.0f);
  const Vec result = expm1 / (expm1 + 2.0f);
  return reinterpret_cast<Vec>(reinterpret_cast<VecInt>(result) | sign);
}

// (log(1 + f) - f + f^2 / 2) / f^3 on [sqrt(1/2) - 1, sqrt(2) - 1].
constexpr float kLogRest[] = {0.33333311f,  -0.24999987f, 0.20002218f,  -0.16669248f, 0.14218816f,
                              -0.12384471f, 0.11872055f,  -0.11788841f, 0.069161539f};

// Natural logarithm of x > 0, 1 ulp; -infinity for 0 (and for subnormals), NaN for NaN.
PYOPS_INLINE Vec log(Vec x) {
  const VecInt bits = reinterpret_cast<VecInt>(x);
  // Subtracting the bits of sqrt(1/2) leaves the exponent of x relative to [sqrt(1/2), sqrt(2)).
  const VecInt exponent = (bits - 0x3f3504f3) >> 23;
  const Vec f = reinterpret_cast<Vec>(bits - (exponent << 23)) - 1.0f;
  const Vec n = __builtin_convertvector(exponent, Vec);
  const Vec square = f * f;
  Vec low = polynomial<8>(kLogRest, f) * f * square;
  low = fma(n, splat(1.42860677e-6f), low);
  low = fma(square, splat(-0.5f), low);
  Vec result = fma(n, splat(0.693145752f), f + low);
  result = x < splat(1.17549435e-38f) ? splat(-__builtin_inff()) : result;
  return x <= splat(3.402823466e38f) ? result : x;  // infinity and NaN as they are
}

}  // namespace
}  // namespace pyops::cpu::PYOPS_ISA
