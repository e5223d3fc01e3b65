// One float vector type for every instruction set, on GCC/Clang vector extensions.
// Only for *.isa.cpp files; kernels may use intrinsics beside it under #ifdef __AVX512F__ etc.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "dtype.h"

#ifndef PYOPS_ISA
#error "compile this file once per instruction set with -DPYOPS_ISA=<name>"
#endif

namespace pyops::cpu::PYOPS_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;  // floats a vector
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef float VecUnaligned __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t VecInt __attribute__((vector_size(kLanes * 4)));
typedef uint16_t HalfVec __attribute__((vector_size(kLanes * 2)));
typedef uint16_t HalfVecUnaligned __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

#define PYOPS_INLINE inline __attribute__((always_inline))

// Calls f with a value of the element type: float, BFloat16 or Half.
template <class F>
PYOPS_INLINE auto with_type(DType dtype, const F& f) {
  if (dtype == DType::kFloat) return f(float{});
  if (dtype == DType::kBFloat16) return f(BFloat16{});
  return f(Half{});
}

PYOPS_INLINE Vec splat(float value) { return value - Vec{}; }
PYOPS_INLINE Vec load(const float* p) { return *reinterpret_cast<const VecUnaligned*>(p); }
PYOPS_INLINE void store(float* p, Vec v) { *reinterpret_cast<VecUnaligned*>(p) = v; }

// max and relu as torch has them: a NaN in either operand gives NaN.
PYOPS_INLINE Vec max_nan(Vec a, Vec b) {
  const VecInt keep_a = (a > b) | (a != a);
  return keep_a ? a : b;
}
PYOPS_INLINE Vec relu(Vec a) {
  const VecInt dead = a <= Vec{};
  return dead ? Vec{} : a;
}

// bfloat16 <-> float, round to nearest even, NaN stays NaN.
PYOPS_INLINE float to_float(float x) { return x; }
PYOPS_INLINE float to_float(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
PYOPS_INLINE void from_float(float f, float* out) { *out = f; }
PYOPS_INLINE void from_float(float f, BFloat16* out) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  out->bits = f != f ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
#if defined(__F16C__)
PYOPS_INLINE float to_float(Half x) { return _cvtsh_ss(x.bits); }
PYOPS_INLINE void from_float(float f, Half* out) { out->bits = _cvtss_sh(f, 0); }
#else
PYOPS_INLINE float to_float(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t rest = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  uint32_t bits = rest;
  float f;
  if (rest >= 0x0f800000u) {  // infinity or NaN
    bits += 0x70000000u;
    bits |= 0x7f800000u;
    std::memcpy(&f, &bits, 4);
  } else {
    std::memcpy(&f, &bits, 4);
    f *= 5.192296858534828e33f;  // 2^112 moves the exponent's bias and normalises subnormals
  }
  std::memcpy(&bits, &f, 4);
  bits |= sign;
  std::memcpy(&f, &bits, 4);
  return f;
}
PYOPS_INLINE void from_float(float f, Half* out) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const uint32_t sign = (bits >> 16) & 0x8000;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) {
    out->bits = static_cast<uint16_t>(sign | 0x7e00);
  } else if (bits >= 0x477ff000u) {  // rounds to infinity
    out->bits = static_cast<uint16_t>(sign | 0x7c00);
  } else if (bits < 0x38800000u) {  // subnormal: let the adder round at 2^-24
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    out->bits = static_cast<uint16_t>(sign | (bits - 0x3f000000u));
  } else {
    bits += 0xfff + ((bits >> 13) & 1);
    out->bits = static_cast<uint16_t>(sign | ((bits - 0x38000000u) >> 13));
  }
}
#endif

PYOPS_INLINE Vec load(const BFloat16* p) {
#if defined(__AVX512F__)
  const __m512i wide =
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return reinterpret_cast<Vec>(_mm512_slli_epi32(wide, 16));
#elif defined(__AVX2__)
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return reinterpret_cast<Vec>(_mm256_slli_epi32(wide, 16));
#else
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}
PYOPS_INLINE Vec load(const Half* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}
PYOPS_INLINE void store(BFloat16* p, Vec v) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)));
#elif defined(__AVX512F__)
  const __m512i bits = reinterpret_cast<__m512i>(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  rounded = _mm512_srli_epi32(rounded, 16);
  rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q),
                                  _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded));
#else
  for (int i = 0; i < kLanes; ++i) from_float(v[i], p + i);
#endif
}
PYOPS_INLINE void store(Half* p, Vec v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, 0));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, 0));
#else
  for (int i = 0; i < kLanes; ++i) from_float(v[i], p + i);
#endif
}

}  // namespace
}  // namespace pyops::cpu::PYOPS_ISA
