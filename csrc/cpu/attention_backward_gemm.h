// The small matrix product that all five products of attention backward are made of.
// Only for *.isa.cpp files.
#pragma once

#include "simd_lanes.h"

namespace pyops::cpu::PYOPS_ISA {
namespace {

PYOPS_INLINE Vec splat_word(const float* p) {
#if defined(__AVX512F__)
  return _mm512_set1_ps(*p);
#else
  return splat(*p);
#endif
}

// Operands are arrays of 32-bit words that lie in float arrays. A word is one float, or two
// bfloat16 neighbours along the summed dimension.
struct FloatWords {
  static constexpr int kPack = 1;  // elements a word
  static PYOPS_INLINE Vec multiply_add(Vec a, Vec b, Vec c) { return fma(a, b, c); }
};
#if defined(__AVX512BF16__)
struct BFloat16Words {
  static constexpr int kPack = 2;
  static PYOPS_INLINE Vec multiply_add(Vec a, Vec b, Vec c) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
};
#endif

// [begin, end), empty if begin >= end.
struct Span {
  int begin, end;
};

// Rows and vectors of the tile that is kept in registers.
#if defined(__AVX512F__)
constexpr int kTileRows = 6, kTileVecs = 4;
#else
constexpr int kTileRows = 4, kTileVecs = 2;
#endif

// out[r][c] (+)= sum over t of a[r * a_row + t * a_step] * b[t * b_step + c], R rows of C vectors.
// Summed from zero and added at the end: long sums then lose no more than a blocked product.
template <class Words, int R, int C, bool kAdd>
void multiply_tile(int64_t steps, const float* a, int64_t a_row, int64_t a_step, const float* b,
                   int64_t b_step, float* out, int64_t out_row) {
  Vec acc[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) acc[r][c] = Vec{};
  }
  for (int64_t t = 0; t < steps; ++t, a += a_step, b += b_step) {
    Vec bv[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) bv[c] = load(b + c * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec av = splat_word(a + r * a_row);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) acc[r][c] = Words::multiply_add(av, bv[c], acc[r][c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      float* o = out + r * out_row + c * kLanes;
      store(o, kAdd ? load(o) + acc[r][c] : acc[r][c]);
    }
  }
}

// The same with the number of rows and vectors known at run time only.
template <class Words, bool kAdd, int R = kTileRows, int C = kTileVecs>
PYOPS_INLINE void multiply(int rows, int vecs, int64_t steps, const float* a, int64_t a_row,
                           int64_t a_step, const float* b, int64_t b_step, float* out,
                           int64_t out_row) {
  if constexpr (R > 1) {
    if (rows < R) {
      return multiply<Words, kAdd, R - 1, C>(rows, vecs, steps, a, a_row, a_step, b, b_step, out,
                                             out_row);
    }
  }
  if constexpr (C > 1) {
    if (vecs < C) {
      return multiply<Words, kAdd, R, C - 1>(rows, vecs, steps, a, a_row, a_step, b, b_step, out,
                                             out_row);
    }
  }
  multiply_tile<Words, R, C, kAdd>(steps, a, a_row, a_step, b, b_step, out, out_row);
}

// out[m][n] += sum over t of a[m * a_row + t * a_step] * b[t * b_step + n] for all of `vecs`
// vectors of columns and `rows` rows. steps_of(m, count) says which t the rows [m, m + count) need.
template <class Words, class StepsOf>
PYOPS_INLINE void multiply_add_rows(int rows, int vecs, const StepsOf& steps_of, const float* a,
                                    int64_t a_row, int64_t a_step, const float* b, int64_t b_step,
                                    float* out, int64_t out_row) {
  const int panels = (vecs + kTileVecs - 1) / kTileVecs;
  for (int panel = 0; panel < panels; ++panel) {  // b's panel stays in L1 over all rows
    const int v = vecs * panel / panels, panel_vecs = vecs * (panel + 1) / panels - v;
    for (int m = 0; m < rows; m += kTileRows) {
      const int count = rows - m < kTileRows ? rows - m : kTileRows;
      const Span steps = steps_of(m, count);
      if (steps.begin >= steps.end) continue;
      multiply<Words, true>(count, panel_vecs, steps.end - steps.begin,
                            a + m * a_row + steps.begin * a_step, a_row, a_step,
                            b + steps.begin * b_step + v * kLanes, b_step,
                            out + m * out_row + v * kLanes, out_row);
    }
  }
}

}  // namespace
}  // namespace pyops::cpu::PYOPS_ISA
