// Winograd transforms F(m x n, 3x3) with channels in the lanes. Only for *.isa.cpp files.
// Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2016); the points
// of m = 4 are 0, +-5/8, +-3/2 and infinity, which lose far less accuracy than 0, +-1, +-2.
#pragma once

#include "simd_lanes.h"

namespace pyops::cpu::PYOPS_ISA {
namespace {

// One dimension. input: m + 2 pixels -> positions, weight: 3 taps -> positions,
// output: m + 2 positions -> m pixels.
template <int m>
struct Transform;

template <>
struct Transform<2> {
  PYOPS_INLINE static void input(const Vec (&d)[4], Vec (&v)[4]) {
    v[0] = d[0] - d[2];
    v[1] = d[1] + d[2];
    v[2] = d[2] - d[1];
    v[3] = d[3] - d[1];
  }
  PYOPS_INLINE static void weight(const Vec (&g)[3], Vec (&u)[4]) {
    const Vec even = 0.5f * (g[0] + g[2]), odd = 0.5f * g[1];
    u[0] = g[0];
    u[1] = even + odd;
    u[2] = even - odd;
    u[3] = g[2];
  }
  PYOPS_INLINE static void output(const Vec (&m)[4], Vec (&y)[2]) {
    y[0] = m[0] + (m[1] + m[2]);
    y[1] = m[3] + (m[1] - m[2]);
  }
};

template <>
struct Transform<4> {
  // Every one of these is exact in binary.
  static constexpr float a = 0.625f, b = 1.5f, aa = a * a, bb = b * b;

  PYOPS_INLINE static void input(const Vec (&d)[6], Vec (&v)[6]) {
    const Vec even_a = fma(d[2], splat(-bb), d[4]), odd_a = fma(d[1], splat(-bb), d[3]);
    const Vec even_b = fma(d[2], splat(-aa), d[4]), odd_b = fma(d[1], splat(-aa), d[3]);
    v[0] = fma(d[0], splat(aa * bb), fma(d[2], splat(-aa - bb), d[4]));
    v[1] = fma(odd_a, splat(a), even_a);
    v[2] = fma(odd_a, splat(-a), even_a);
    v[3] = fma(odd_b, splat(b), even_b);
    v[4] = fma(odd_b, splat(-b), even_b);
    v[5] = fma(d[1], splat(aa * bb), fma(d[3], splat(-aa - bb), d[5]));
  }
  PYOPS_INLINE static void weight(const Vec (&g)[3], Vec (&u)[6]) {
    constexpr float na = 1 / (2 * aa * (aa - bb)), nb = 1 / (2 * bb * (bb - aa));
    const Vec even_a = fma(g[2], splat(aa), g[0]), even_b = fma(g[2], splat(bb), g[0]);
    u[0] = g[0] * (1 / (aa * bb));
    u[1] = fma(g[1], splat(a), even_a) * na;
    u[2] = fma(g[1], splat(-a), even_a) * na;
    u[3] = fma(g[1], splat(b), even_b) * nb;
    u[4] = fma(g[1], splat(-b), even_b) * nb;
    u[5] = g[2];
  }
  PYOPS_INLINE static void output(const Vec (&m)[6], Vec (&y)[4]) {
    const Vec even_a = m[1] + m[2], odd_a = m[1] - m[2];
    const Vec even_b = m[3] + m[4], odd_b = m[3] - m[4];
    y[0] = m[0] + (even_a + even_b);
    y[1] = fma(odd_a, splat(a), odd_b * b);
    y[2] = fma(even_a, splat(aa), even_b * bb);
    y[3] = fma(odd_a, splat(a * aa), fma(odd_b, splat(b * bb), m[5]));
  }
};

// kHeight x kWidth outputs from (kHeight + 2) x (kWidth + 2) positions.
template <int kHeight, int kWidth>
struct Winograd {
  static constexpr int kRows = kHeight + 2, kColumns = kWidth + 2;
  static constexpr int kPositions = kRows * kColumns;

  // d: first pixel of the tile, rows `pitch` floats apart; v: positions `stride` floats apart.
  PYOPS_INLINE static void input(const float* d, int64_t pitch, float* v, int64_t stride) {
    Vec half[kColumns][kRows];
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
      Vec row[kColumns], out[kColumns];
#pragma GCC unroll 6
      for (int j = 0; j < kColumns; ++j) row[j] = load(d + i * pitch + j * kLanes);
      Transform<kWidth>::input(row, out);
#pragma GCC unroll 6
      for (int j = 0; j < kColumns; ++j) half[j][i] = out[j];
    }
#pragma GCC unroll 6
    for (int j = 0; j < kColumns; ++j) {
      Vec out[kRows];
      Transform<kHeight>::input(half[j], out);
#pragma GCC unroll 6
      for (int i = 0; i < kRows; ++i) store(v + (i * kColumns + j) * stride, out[i]);
    }
  }

  // Bit i * kWidth + j is set where output (i, j) of that tile sees zeros only.
  PYOPS_INLINE static int blank_outputs(const float* d, int64_t pitch) {
    VecInt across[kRows][kWidth];
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
      VecInt row[kColumns];
#pragma GCC unroll 6
      for (int j = 0; j < kColumns; ++j) {
        row[j] = reinterpret_cast<VecInt>(load(d + i * pitch + j * kLanes));
      }
#pragma GCC unroll 6
      for (int j = 0; j < kWidth; ++j) across[i][j] = row[j] | row[j + 1] | row[j + 2];
    }
    int blank = 0;
#pragma GCC unroll 6
    for (int i = 0; i < kHeight; ++i) {
#pragma GCC unroll 6
      for (int j = 0; j < kWidth; ++j) {
        const VecInt bits = across[i][j] | across[i + 1][j] | across[i + 2][j];
        const VecInt seen = (bits & 0x7fffffff) != 0;  // a negative zero is one, too
        if (!any(seen)) blank |= 1 << (i * kWidth + j);
      }
    }
    return blank;
  }

  // g: nine taps, one vector each; u: positions `stride` floats apart.
  PYOPS_INLINE static void weight(const float* g, float* u, int64_t stride) {
    Vec half[kColumns][3];
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i) {
      const Vec row[3] = {load(g + (3 * i) * kLanes), load(g + (3 * i + 1) * kLanes),
                          load(g + (3 * i + 2) * kLanes)};
      Vec out[kColumns];
      Transform<kWidth>::weight(row, out);
#pragma GCC unroll 6
      for (int j = 0; j < kColumns; ++j) half[j][i] = out[j];
    }
#pragma GCC unroll 6
    for (int j = 0; j < kColumns; ++j) {
      Vec out[kRows];
      Transform<kHeight>::weight(half[j], out);
#pragma GCC unroll 6
      for (int i = 0; i < kRows; ++i) store(u + (i * kColumns + j) * stride, out[i]);
    }
  }

  // m: positions `stride` floats apart.
  PYOPS_INLINE static void output(const float* m, int64_t stride, Vec (&y)[kHeight][kWidth]) {
    Vec half[kHeight][kColumns];
#pragma GCC unroll 6
    for (int j = 0; j < kColumns; ++j) {
      Vec column[kRows], out[kHeight];
#pragma GCC unroll 6
      for (int i = 0; i < kRows; ++i) column[i] = load(m + (i * kColumns + j) * stride);
      Transform<kHeight>::output(column, out);
#pragma GCC unroll 6
      for (int i = 0; i < kHeight; ++i) half[i][j] = out[i];
    }
#pragma GCC unroll 6
    for (int i = 0; i < kHeight; ++i) Transform<kWidth>::output(half[i], y[i]);
  }
};

}  // namespace
}  // namespace pyops::cpu::PYOPS_ISA
