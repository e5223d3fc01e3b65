// The matrix product inside the LSTM kernels: a tile of rows x vectors in registers.
// Only for *.isa.cpp files.
//
// A "word" is what one 32-bit lane multiplies: a float, or two bfloat16 (kPairs).
#pragma once

#include "simd.h"
#include "simd_lanes.h"

namespace pyops::cpu::PYOPS_ISA {
namespace {

PYOPS_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
PYOPS_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

// Rows of a tile that is four or two vectors wide: with them the register file is full.
#if defined(__AVX512F__)
constexpr int kTileRows4 = 6, kTileRows2 = 12;
#else
constexpr int kTileRows4 = 3, kTileRows2 = 6;
#endif

typedef int32_t WordInt __attribute__((may_alias));

template <bool kPairs>
PYOPS_INLINE Vec broadcast_word(const char* p) {
  return reinterpret_cast<Vec>(*reinterpret_cast<const WordInt*>(p) - VecInt{});
}

template <bool kPairs>
PYOPS_INLINE Vec multiply_add(Vec x, Vec w, Vec sum) {
#if defined(__AVX512BF16__)
  if (kPairs) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(x));
  }
#endif
  return fma(x, w, sum);
}

// out[row][V * kLanes] = sum over words of a[row][word] * w[word][V * kLanes]
using Tile = void (*)(const char* a, int64_t row_bytes, int64_t words, const float* w, float* out,
                      int64_t out_stride);

template <bool kPairs, int V, int R>
void tile(const char* a, int64_t row_bytes, int64_t words, const float* w, float* out,
          int64_t out_stride) {
  constexpr int64_t kAhead = 2048;  // bytes of weights prefetched
  Vec acc[R][V] = {};
  const int64_t row3 = 3 * row_bytes;
  for (int64_t k = 0; k < words; ++k) {
    Vec wv[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      wv[v] = load(w + v * kLanes);
      if (v % (64 / (4 * kLanes)) == 0) {
        __builtin_prefetch(reinterpret_cast<const char*>(w + v * kLanes) + kAhead);
      }
    }
    w += V * kLanes;
    const char* at = a + 4 * k;
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const Vec x = broadcast_word<kPairs>(at + (r % 3) * row_bytes);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] = multiply_add<kPairs>(x, wv[v], acc[r][v]);
      if (r % 3 == 2) at += row3;
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(out + r * out_stride + v * kLanes, acc[r][v]);
  }
}

template <int... kInts>
struct Ints {};
template <int kCount, int... kInts>
struct Range : Range<kCount - 1, kCount, kInts...> {};
template <int... kInts>
struct Range<0, kInts...> {
  using type = Ints<kInts...>;
};

template <bool kPairs, int V, int... kRows>
Tile select_tile(int64_t rows, Ints<kRows...>) {
  static constexpr Tile kTiles[] = {&tile<kPairs, V, kRows>...};
  return kTiles[rows - 1];
}

template <bool kPairs, int V>
void multiply_rows(const char* a, int64_t row_bytes, int64_t rows, int64_t words, const float* w,
                   float* out, int64_t out_stride) {
  constexpr int kMost = V == 4 ? kTileRows4 : kTileRows2;
  using Rows = typename Range<kMost>::type;
  const int64_t tiles = (rows + kMost - 1) / kMost;
  for (int64_t i = 0, row = 0; i < tiles; ++i) {
    const int64_t count = (rows - row + tiles - i - 1) / (tiles - i);
    select_tile<kPairs, V>(count, Rows())(a + row * row_bytes, row_bytes, words, w,
                                          out + row * out_stride, out_stride);
    row += count;
  }
}

}  // namespace
}  // namespace pyops::cpu::PYOPS_ISA
