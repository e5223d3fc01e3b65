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

// Operands of out[row][lane] (+)= sum over words of a[row][word] * w[word][lane], lanes being
// V * kLanes. Strides of a in bytes, of w and out in floats.
struct Product {
  const char* a;
  int64_t row_bytes, word_bytes;
  int64_t words;
  const float* w;
  int64_t w_stride;
  float* out;
  int64_t out_stride;
  bool add;
  // Weights that the next product reads, laid out like these, or null. They are asked for while
  // this one runs: a third-level cache that others fill too answers too late for the first tile.
  const float* next = nullptr;
};

template <bool kPairs, int V, int R>
void tile(const Product& p) {
  constexpr int64_t kAhead = 8;  // words whose weights are prefetched
  constexpr int kPerLine = 16 / kLanes;
  constexpr int kNext = V == 1 ? 1 : V / 2;  // so that two tiles ask for all of `next`
  Vec acc[R][V] = {};
  const int64_t row_bytes = p.row_bytes, row3 = 3 * row_bytes, w_stride = p.w_stride;
  const char* a = p.a;
  const float* w = p.w;
  const float* next = p.next ? p.next : w;
  for (int64_t k = 0; k < p.words; ++k) {
    Vec wv[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      wv[v] = load(w + v * kLanes);
      if (v % kPerLine == 0) __builtin_prefetch(w + kAhead * w_stride + v * kLanes);
    }
    w += w_stride;
#pragma GCC unroll 2
    for (int v = 0; v < kNext; v += kPerLine) __builtin_prefetch(next + v * kLanes, 0, 2);
    next += kNext * kLanes;
    const char* at = a;
    a += p.word_bytes;
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const Vec x = broadcast_word(at + (r % 3) * row_bytes);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] = multiply_add<kPairs>(x, wv[v], acc[r][v]);
      if (r % 3 == 2) at += row3;
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      float* out = p.out + r * p.out_stride + v * kLanes;
      store(out, p.add ? load(out) + acc[r][v] : acc[r][v]);
    }
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

using Tile = void (*)(const Product&);

template <bool kPairs, int V, int... kRows>
Tile select_tile(int64_t rows, Ints<kRows...>) {
  static constexpr Tile kTiles[] = {&tile<kPairs, V, kRows>...};
  return kTiles[rows - 1];
}

template <bool kPairs, int V>
void multiply_rows(Product p, int64_t rows) {
  constexpr int kMost = V == 4 ? kTileRows4 : kTileRows2;
  using Rows = typename Range<kMost>::type;
  const int64_t tiles = (rows + kMost - 1) / kMost;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t count = (rows + tiles - i - 1) / (tiles - i);
    select_tile<kPairs, V>(count, Rows())(p);
    if (p.next && i == 0) p.next += p.words * (p.w_stride / 2);
    p.a += count * p.row_bytes;
    p.out += count * p.out_stride;
    rows -= count;
  }
}

// Words summed in registers before they are added to the sum in memory: bounds the rounding error
// of long sums.
constexpr int64_t kWordsPerSum = 512;

// Any number of rows, `vectors` (1, 2 or 4) wide.
template <bool kPairs>
void multiply(Product p, int64_t rows, int64_t vectors) {
  for (int64_t left = p.words; left > 0; left -= kWordsPerSum, p.add = true) {
    p.words = min(left, kWordsPerSum);
    if (vectors == 4) {
      multiply_rows<kPairs, 4>(p, rows);
    } else if (vectors == 2) {
      multiply_rows<kPairs, 2>(p, rows);
    } else {
      multiply_rows<kPairs, 1>(p, rows);
    }
    p.a += p.words * p.word_bytes;
    p.w += p.words * p.w_stride;
    if (p.next) p.next += p.words * p.w_stride;
  }
}

}  // namespace
}  // namespace pyops::cpu::PYOPS_ISA
