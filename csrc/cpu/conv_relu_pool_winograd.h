// Winograd's transforms with channels in the lanes. Only for *.isa.cpp files.
// Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2016).
#pragma once

#include "simd_lanes.h"

namespace pyops::cpu::PYOPS_ISA {
namespace {

// One dimension. input: pixels -> positions, weight: taps -> positions, output: positions ->
// pixels.

// Exact on small integers; so is F25Exact.
struct F23 {
  static constexpr int kOutputs = 2, kTaps = 3, kPixels = 4, kPositions = 4;

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

// The points 0, +-5/8, +-3/2 and infinity lose far less accuracy than 0, +-1, +-2; every product of
// theirs is exact in binary.
template <int outputs, int taps>
struct SixPoints {
  static constexpr int kOutputs = outputs, kTaps = taps, kPixels = 6, kPositions = 6;
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
  PYOPS_INLINE static void weight(const Vec (&g)[kTaps], Vec (&u)[6]) {
    constexpr float na = 1 / (2 * aa * (aa - bb)), nb = 1 / (2 * bb * (bb - aa));
    Vec even_a = fma(g[2], splat(aa), g[0]), even_b = fma(g[2], splat(bb), g[0]);
    Vec odd_a = g[1], odd_b = g[1];
    if constexpr (kTaps == 5) {
      even_a = fma(g[4], splat(aa * aa), even_a), even_b = fma(g[4], splat(bb * bb), even_b);
      odd_a = fma(g[3], splat(aa), odd_a), odd_b = fma(g[3], splat(bb), odd_b);
    }
    u[0] = g[0] * (1 / (aa * bb));
    u[1] = fma(odd_a, splat(a), even_a) * na;
    u[2] = fma(odd_a, splat(-a), even_a) * na;
    u[3] = fma(odd_b, splat(b), even_b) * nb;
    u[4] = fma(odd_b, splat(-b), even_b) * nb;
    u[5] = g[kTaps - 1];
  }
  PYOPS_INLINE static void output(const Vec (&x)[6], Vec (&y)[kOutputs]) {
    const Vec even_a = x[1] + x[2], odd_a = x[1] - x[2];
    const Vec even_b = x[3] + x[4], odd_b = x[3] - x[4];
    y[0] = x[0] + (even_a + even_b);
    if constexpr (kOutputs == 2) {
      y[1] = fma(odd_a, splat(a), fma(odd_b, splat(b), x[5]));
    } else {
      y[1] = fma(odd_a, splat(a), odd_b * b);
      y[2] = fma(even_a, splat(aa), even_b * bb);
      y[3] = fma(odd_a, splat(a * aa), fma(odd_b, splat(b * bb), x[5]));
    }
  }
};

using F43 = SixPoints<4, 3>;
using F25 = SixPoints<2, 5>;

// Three taps by F(2, 3), the other two by F(2, 2).
struct F25Exact {
  static constexpr int kOutputs = 2, kTaps = 5, kPixels = 6, kPositions = 7;

  PYOPS_INLINE static void input(const Vec (&d)[6], Vec (&v)[7]) {
    const Vec first[4] = {d[0], d[1], d[2], d[3]};
    Vec positions[4];
    F23::input(first, positions);
    for (int i = 0; i < 4; ++i) v[i] = positions[i];
    v[4] = d[3] - d[4];
    v[5] = d[4];
    v[6] = d[5] - d[4];
  }
  PYOPS_INLINE static void weight(const Vec (&g)[5], Vec (&u)[7]) {
    const Vec first[3] = {g[0], g[1], g[2]};
    Vec positions[4];
    F23::weight(first, positions);
    for (int i = 0; i < 4; ++i) u[i] = positions[i];
    u[4] = g[3];
    u[5] = g[3] + g[4];
    u[6] = g[4];
  }
  PYOPS_INLINE static void output(const Vec (&x)[7], Vec (&y)[2]) {
    const Vec first[4] = {x[0], x[1], x[2], x[3]};
    F23::output(first, y);
    y[0] += x[4] + x[5];
    y[1] += x[5] + x[6];
  }
};

// Two dimensions: kHeight x kWidth outputs from kRows x kColumns positions.
template <class Down, class Across>
struct Winograd {
  static_assert(Down::kTaps == Across::kTaps);
  static constexpr int kTaps = Down::kTaps;
  static constexpr int kHeight = Down::kOutputs, kWidth = Across::kOutputs;
  static constexpr int kRows = Down::kPositions, kColumns = Across::kPositions;
  static constexpr int kPositions = kRows * kColumns;

  // d: first pixel of the tile, rows `pitch` floats apart; v: positions `stride` floats apart.
  PYOPS_INLINE static void input(const float* d, int64_t pitch, float* v, int64_t stride) {
    Vec half[kColumns][Down::kPixels];
#pragma GCC unroll 7
    for (int i = 0; i < Down::kPixels; ++i) {
      Vec row[Across::kPixels], out[kColumns];
#pragma GCC unroll 7
      for (int j = 0; j < Across::kPixels; ++j) row[j] = load(d + i * pitch + j * kLanes);
      Across::input(row, out);
#pragma GCC unroll 7
      for (int j = 0; j < kColumns; ++j) half[j][i] = out[j];
    }
#pragma GCC unroll 7
    for (int j = 0; j < kColumns; ++j) {
      Vec out[kRows];
      Down::input(half[j], out);
#pragma GCC unroll 7
      for (int i = 0; i < kRows; ++i) store(v + (i * kColumns + j) * stride, out[i]);
    }
  }

  // Bit i * kWidth + j is set where output (i, j) of that tile sees zeros only.
  PYOPS_INLINE static int blank_outputs(const float* d, int64_t pitch) {
    VecInt across[Down::kPixels][kWidth];
#pragma GCC unroll 7
    for (int i = 0; i < Down::kPixels; ++i) {
      VecInt row[Across::kPixels];
#pragma GCC unroll 7
      for (int j = 0; j < Across::kPixels; ++j) {
        row[j] = reinterpret_cast<VecInt>(load(d + i * pitch + j * kLanes));
      }
#pragma GCC unroll 7
      for (int j = 0; j < kWidth; ++j) {
        across[i][j] = row[j];
#pragma GCC unroll 4
        for (int tap = 1; tap < kTaps; ++tap) across[i][j] |= row[j + tap];
      }
    }
    int blank = 0;
#pragma GCC unroll 7
    for (int i = 0; i < kHeight; ++i) {
#pragma GCC unroll 7
      for (int j = 0; j < kWidth; ++j) {
        VecInt bits = across[i][j];
#pragma GCC unroll 4
        for (int tap = 1; tap < kTaps; ++tap) bits |= across[i + tap][j];
        const VecInt seen = (bits & 0x7fffffff) != 0;  // a negative zero is one, too
        if (!any(seen)) blank |= 1 << (i * kWidth + j);
      }
    }
    return blank;
  }

  // g: the taps, one vector each; u: positions `stride` floats apart.
  PYOPS_INLINE static void weight(const float* g, float* u, int64_t stride) {
    Vec half[kColumns][kTaps];
#pragma GCC unroll 5
    for (int i = 0; i < kTaps; ++i) {
      Vec row[kTaps], out[kColumns];
#pragma GCC unroll 5
      for (int j = 0; j < kTaps; ++j) row[j] = load(g + (kTaps * i + j) * kLanes);
      Across::weight(row, out);
#pragma GCC unroll 7
      for (int j = 0; j < kColumns; ++j) half[j][i] = out[j];
    }
#pragma GCC unroll 7
    for (int j = 0; j < kColumns; ++j) {
      Vec out[kRows];
      Down::weight(half[j], out);
#pragma GCC unroll 7
      for (int i = 0; i < kRows; ++i) store(u + (i * kColumns + j) * stride, out[i]);
    }
  }

  // m: positions `stride` floats apart.
  PYOPS_INLINE static void output(const float* m, int64_t stride, Vec (&y)[kHeight][kWidth]) {
    Vec half[kHeight][kColumns];
#pragma GCC unroll 7
    for (int j = 0; j < kColumns; ++j) {
      Vec column[kRows], out[kHeight];
#pragma GCC unroll 7
      for (int i = 0; i < kRows; ++i) column[i] = load(m + (i * kColumns + j) * stride);
      Down::output(column, out);
#pragma GCC unroll 7
      for (int i = 0; i < kHeight; ++i) half[i][j] = out[i];
    }
#pragma GCC unroll 7
    for (int i = 0; i < kHeight; ++i) Across::output(half[i], y[i]);
  }
};

}  // namespace
}  // namespace pyops::cpu::PYOPS_ISA
