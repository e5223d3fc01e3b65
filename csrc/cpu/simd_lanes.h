// Part vectors, transposition and the few operations for which vector extensions have no
// operator. Only for *.isa.cpp files.
#pragma once

#include "simd.h"

namespace pyops::cpu::PYOPS_ISA {
namespace {

PYOPS_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// For operands known not to be NaN: one instruction.
PYOPS_INLINE Vec max_finite(Vec a, Vec b) { return a > b ? a : b; }

// The largest of four; NaN if one of them is NaN.
PYOPS_INLINE Vec max_nan(Vec a, Vec b, Vec c, Vec d) {
  const Vec most = max_finite(max_finite(a, b), max_finite(c, d)), nan = splat(__builtin_nanf(""));
#if defined(__AVX512F__)
  const __mmask16 unordered =
      _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q) | _mm512_cmp_ps_mask(c, d, _CMP_UNORD_Q);
  return _mm512_mask_mov_ps(most, unordered, nan);
#else
  return (a != a) | (b != b) | (c != c) | (d != d) ? nan : most;
#endif
}

PYOPS_INLINE bool any(VecInt mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask(reinterpret_cast<__m512i>(mask), reinterpret_cast<__m512i>(mask)) !=
         0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(reinterpret_cast<__m256>(mask)) != 0;
#else
  int32_t all = 0;
  for (int i = 0; i < kLanes; ++i) all |= mask[i];
  return all != 0;
#endif
}

#if defined(__AVX512F__)
PYOPS_INLINE __mmask16 first_lanes(int count) {
  return count >= kLanes ? __mmask16(0xffff) : static_cast<__mmask16>((1u << count) - 1);
}
PYOPS_INLINE Vec masked_load(const float* p, __mmask16 mask) {
  return _mm512_maskz_loadu_ps(mask, p);
}
PYOPS_INLINE Vec masked_load(const BFloat16* p, __mmask16 mask) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p));
  return reinterpret_cast<Vec>(_mm512_slli_epi32(wide, 16));
}
PYOPS_INLINE Vec masked_load(const Half* p, __mmask16 mask) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, p));
}
#endif

// The first `count` elements, zeros after them; reads nothing beyond.
template <class T>
PYOPS_INLINE Vec load_first(const T* p, int count) {
#if defined(__AVX512F__)
  return masked_load(p, first_lanes(count));
#else
  if (count >= kLanes) return load(p);
  T part[kLanes] = {};
  for (int i = 0; i < count; ++i) part[i] = p[i];
  return load(part);
#endif
}

// Writes the first `count` elements and nothing else.
template <class T>
PYOPS_INLINE void store_first(T* p, Vec v, int count) {
  if (count >= kLanes) return store(p, v);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, first_lanes(count), v);
  } else {
    T all[kLanes];
    store(all, v);
    _mm256_mask_storeu_epi16(p, first_lanes(count),
                             _mm256_loadu_si256(reinterpret_cast<const __m256i*>(all)));
  }
#else
  T part[kLanes];
  store(part, v);
  for (int i = 0; i < count; ++i) p[i] = part[i];
#endif
}

// Writes the low bytes of the first `count` elements and nothing else.
PYOPS_INLINE void store_bytes(uint8_t* p, VecInt v, int count) {
#if defined(__AVX512F__)
  _mm512_mask_cvtepi32_storeu_epi8(p, first_lanes(count), reinterpret_cast<__m512i>(v));
#else
  for (int i = 0; i < kLanes && i < count; ++i) p[i] = static_cast<uint8_t>(v[i]);
#endif
}

// a and b end to end: the elements at even places, and those at odd ones.
PYOPS_INLINE void split_even_odd(Vec a, Vec b, Vec* even, Vec* odd) {
#if defined(__AVX512F__)
  const __m512i step = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  *even = _mm512_permutex2var_ps(a, step, b);
  *odd = _mm512_permutex2var_ps(a, _mm512_add_epi32(step, _mm512_set1_epi32(1)), b);
#else
  for (int i = 0; i < kLanes / 2; ++i) {
    (*even)[i] = a[2 * i];
    (*odd)[i] = a[2 * i + 1];
    (*even)[kLanes / 2 + i] = b[2 * i];
    (*odd)[kLanes / 2 + i] = b[2 * i + 1];
  }
#endif
}

#if defined(__AVX512F__)
// For _mm512_permutex2var_ps: which lanes of rows i and i + step row i gets, and row i + step.
struct TransposeLanes {
  alignas(64) int32_t low[4][16], high[4][16];
};
constexpr TransposeLanes make_transpose_lanes() {
  TransposeLanes lanes{};
  for (int level = 0; level < 4; ++level) {
    const int step = 1 << level;
    for (int lane = 0; lane < 16; ++lane) {
      lanes.low[level][lane] = lane & step ? 16 + lane - step : lane;
      lanes.high[level][lane] = lane & step ? 16 + lane : lane + step;
    }
  }
  return lanes;
}
constexpr TransposeLanes kTransposeLanes = make_transpose_lanes();
#endif

// rows[i][j] <-> rows[j][i].
PYOPS_INLINE void transpose(Vec (&rows)[kLanes]) {
#if defined(__AVX512F__)
#pragma GCC unroll 4
  for (int level = 3; level >= 0; --level) {
    const __m512i low = _mm512_load_si512(kTransposeLanes.low[level]);
    const __m512i high = _mm512_load_si512(kTransposeLanes.high[level]);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i >> level & 1) continue;
      const Vec a = rows[i], b = rows[i + (1 << level)];
      rows[i] = _mm512_permutex2var_ps(a, low, b);
      rows[i + (1 << level)] = _mm512_permutex2var_ps(a, high, b);
    }
  }
#else
  float cells[kLanes][kLanes];
  for (int i = 0; i < kLanes; ++i) store(cells[i], rows[i]);
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < kLanes; ++j) rows[i][j] = cells[j][i];
  }
#endif
}

}  // namespace
}  // namespace pyops::cpu::PYOPS_ISA
