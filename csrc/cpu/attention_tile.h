// Products of attention on transposed tiles: lanes are queries, keys and values are broadcast from
// where they lie. Shared by every precision: a "word" is what one 32-bit lane multiplies, a float
// or, with pairs, two bfloat16 whose products are added. Only for *.isa.cpp files.
//
//   scores  S[key][query]  = sum over words w of  K[key][w] * Q[w][query]
//   outputs O[d][query]   += sum over words j of  V[j][d]   * P[j][query]
//
// Q, S, P and O have `width` lanes a row, a multiple of kLanes.
#pragma once

#include "simd_lanes.h"

namespace pyops::cpu::PYOPS_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kBlockVectors = 4;   // vectors of queries a tile has at most
constexpr int kAccumulators = 16;  // vectors of sums kept in registers
#elif defined(__AVX2__)
constexpr int kBlockVectors = 2;
constexpr int kAccumulators = 12;
#else
constexpr int kBlockVectors = 2;
constexpr int kAccumulators = 8;
#endif
constexpr int kBlockQueries = kBlockVectors * kLanes;

#if defined(__AVX512BF16__)
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
#endif

template <bool kPairs>
PYOPS_INLINE Vec add_product(Vec a, Vec b, Vec sum) {
#if defined(__AVX512BF16__)
  if constexpr (kPairs) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
#endif
  return fma(a, b, sum);
}

// One word to all lanes; its bits may be no float.
PYOPS_INLINE Vec splat_word(const void* p) {
  int32_t bits;
  std::memcpy(&bits, p, 4);
  return reinterpret_cast<Vec>(bits - VecInt{});
}
PYOPS_INLINE Vec splat_half_word(const void* p) {
  uint16_t bits;
  std::memcpy(&bits, p, 2);
  return reinterpret_cast<Vec>(static_cast<int32_t>(bits) - VecInt{});
}

template <int Vectors>
constexpr int tile_rows() {
  return kAccumulators / Vectors;
}

// s (+)= scores of Rows keys, k_row bytes apart, over `words` words and, with pairs, perhaps half a
// word more. s: Rows rows of Vectors vectors.
template <bool kPairs, int Rows, int Vectors>
__attribute__((noinline)) void score_tile(const float* q, int64_t width, const char* k,
                                          int64_t k_row, int64_t words, bool half, bool add,
                                          float* s) {
  Vec sum[Rows][Vectors] = {};
  for (int64_t w = 0; w < words; ++w, q += width) {
    Vec query[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) query[v] = load(q + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const Vec key = splat_word(k + r * k_row + w * 4);
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) sum[r][v] = add_product<kPairs>(key, query[v], sum[r][v]);
    }
  }
  if (kPairs && half) {
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const Vec key = splat_half_word(k + r * k_row + words * 4);
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
        sum[r][v] = add_product<kPairs>(key, load(q + v * kLanes), sum[r][v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r, s += width) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      store(s + v * kLanes, add ? load(s + v * kLanes) + sum[r][v] : sum[r][v]);
    }
  }
}

template <bool kPairs, int Vectors, int Rest = tile_rows<Vectors>() - 1>
PYOPS_INLINE void score_rest(const float* q, int64_t width, const char* k, int64_t k_row,
                             int64_t words, bool half, bool add, float* s, int64_t count) {
  if constexpr (Rest > 0) {
    if (count == Rest) {
      return score_tile<kPairs, Rest, Vectors>(q, width, k, k_row, words, half, add, s);
    }
    score_rest<kPairs, Vectors, Rest - 1>(q, width, k, k_row, words, half, add, s, count);
  }
}
// The scores of `count` keys of `dim` elements: tiles of the full height, then one of what is left.
template <bool kPairs, int Vectors>
void score_keys(const float* q, int64_t width, const char* k, int64_t k_row, int64_t dim, float* s,
                int64_t count) {
  constexpr int kRows = tile_rows<Vectors>();
  // Summed from zero before they are added to the score: bounds the rounding error.
  constexpr int64_t kSumWords = 128;
  const int64_t words = kPairs ? dim / 2 : dim;
  int64_t w = 0;
  do {
    const int64_t part = words - w < kSumWords ? words - w : kSumWords;
    const bool half = kPairs && dim % 2 && w + part == words, add = w > 0;
    const float* query = q + w * width;
    const char* key = k + w * 4;
    float* out = s;
    int64_t left = count;
    for (; left >= kRows; left -= kRows, key += kRows * k_row, out += kRows * width) {
      score_tile<kPairs, kRows, Vectors>(query, width, key, k_row, part, half, add, out);
    }
    score_rest<kPairs, Vectors>(query, width, key, k_row, part, half, add, out, left);
    w += part;
  } while (w < words);
}

// The keys that an output tile sums over: vector v of the queries has words [begin, end[v]), and
// end[] does not decrease (a causal diagonal).
struct WordRange {
  int64_t begin, end[kBlockVectors];
};

template <bool kPairs, int Rows, int Vectors, int First>
PYOPS_INLINE void output_sums(const float*& p, int64_t width, const char*& v, int64_t v_row,
                              int64_t count, Vec (&sum)[Rows][Vectors]) {
  for (; count > 0; --count, p += width, v += v_row) {
    Vec weight[Vectors];
#pragma GCC unroll 4
    for (int i = First; i < Vectors; ++i) weight[i] = load(p + i * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const Vec value = splat_word(v + r * 4);
#pragma GCC unroll 4
      for (int i = First; i < Vectors; ++i) {
        sum[r][i] = add_product<kPairs>(value, weight[i], sum[r][i]);
      }
    }
  }
}

// o = V P, or o * alpha + V P unless `first`, for Rows rows of o. p and v point at word 0.
template <bool kPairs, int Rows, int Vectors>
__attribute__((noinline)) void output_tile(const float* p, int64_t width, const char* v,
                                           int64_t v_row, const WordRange& range,
                                           const float* alpha, bool first, float* o) {
  Vec sum[Rows][Vectors] = {};
  p += range.begin * width;
  v += range.begin * v_row;
  output_sums<kPairs, Rows, Vectors, 0>(p, width, v, v_row, range.end[0] - range.begin, sum);
  if constexpr (Vectors > 1) {
    output_sums<kPairs, Rows, Vectors, 1>(p, width, v, v_row, range.end[1] - range.end[0], sum);
  }
  if constexpr (Vectors > 2) {
    output_sums<kPairs, Rows, Vectors, 2>(p, width, v, v_row, range.end[2] - range.end[1], sum);
  }
  if constexpr (Vectors > 3) {
    output_sums<kPairs, Rows, Vectors, 3>(p, width, v, v_row, range.end[3] - range.end[2], sum);
  }
  static_assert(Vectors <= 4, "one line above for each vector");
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < Vectors; ++i) {
      float* out = o + r * width + i * kLanes;
      store(out, first ? sum[r][i] : fma(load(out), load(alpha + i * kLanes), sum[r][i]));
    }
  }
}

template <bool kPairs, int Vectors, int Rest = tile_rows<Vectors>() - 1>
PYOPS_INLINE void output_rest(const float* p, int64_t width, const char* v, int64_t v_row,
                              const WordRange& range, const float* alpha, bool first, float* o,
                              int64_t dim) {
  if constexpr (Rest > 0) {
    if (dim == Rest) {
      return output_tile<kPairs, Rest, Vectors>(p, width, v, v_row, range, alpha, first, o);
    }
    output_rest<kPairs, Vectors, Rest - 1>(p, width, v, v_row, range, alpha, first, o, dim);
  }
}
template <bool kPairs, int Vectors>
void output_dims(const float* p, int64_t width, const char* v, int64_t v_row,
                 const WordRange& range, const float* alpha, bool first, float* o, int64_t dim) {
  constexpr int kRows = tile_rows<Vectors>();
  for (; dim >= kRows; dim -= kRows, v += kRows * 4, o += kRows * width) {
    output_tile<kPairs, kRows, Vectors>(p, width, v, v_row, range, alpha, first, o);
  }
  output_rest<kPairs, Vectors>(p, width, v, v_row, range, alpha, first, o, dim);
}

// The same with o as it lies, (Rows, dim rounded up to whole vectors), for keys [begin, end), few
// queries, and floats: fewer products than a tile where queries are fewer than lanes, and nothing
// to transpose. Key j's weight for query r is p[j * p_key + r * p_row]. alpha: (Rows,).
template <int Rows, int Parts>
PYOPS_INLINE void output_parts(const float* p, int64_t p_key, int64_t p_row, const float* v,
                               int64_t v_row, int64_t begin, int64_t end, const float* alpha,
                               bool first, float* o, int64_t o_row, int count) {
  Vec sum[Rows][Parts] = {};
  for (int64_t j = begin; j < end; ++j) {
    Vec value[Parts];
#pragma GCC unroll 4
    for (int i = 0; i < Parts; ++i) {
      const float* part = v + j * v_row + i * kLanes;
      value[i] = Parts > 1 ? load(part) : load_first(part, count);
    }
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const Vec weight = splat(p[j * p_key + r * p_row]);
#pragma GCC unroll 4
      for (int i = 0; i < Parts; ++i) sum[r][i] = fma(weight, value[i], sum[r][i]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < Parts; ++i) {
      float* out = o + r * o_row + i * kLanes;
      store(out, first ? sum[r][i] : fma(load(out), splat(alpha[r]), sum[r][i]));
    }
  }
}
template <int Rows>
void output_rows_of(const float* p, int64_t p_key, int64_t p_row, const float* v, int64_t v_row,
                    int64_t begin, int64_t end, const float* alpha, bool first, float* o,
                    int64_t dim) {
  constexpr int kParts = Rows < 4 ? 4 : Rows < 8 ? 2 : 1;  // enough sums to hide their latency
  const int64_t o_row = (dim + kLanes - 1) / kLanes * kLanes;
  int64_t d = 0;
  if constexpr (kParts > 1) {
    for (; d + kParts * kLanes <= dim; d += kParts * kLanes) {
      output_parts<Rows, kParts>(p, p_key, p_row, v + d, v_row, begin, end, alpha, first, o + d,
                                 o_row, kLanes);
    }
  }
  for (; d < dim; d += kLanes) {
    const int count = static_cast<int>(dim - d < kLanes ? dim - d : kLanes);
    output_parts<Rows, 1>(p, p_key, p_row, v + d, v_row, begin, end, alpha, first, o + d, o_row,
                          count);
  }
}
template <int Rows = kLanes>
PYOPS_INLINE void output_rows(int rows, const float* p, int64_t p_key, int64_t p_row,
                              const float* v, int64_t v_row, int64_t begin, int64_t end,
                              const float* alpha, bool first, float* o, int64_t dim) {
  if constexpr (Rows > 1) {
    if (rows < Rows) {
      return output_rows<Rows - 1>(rows, p, p_key, p_row, v, v_row, begin, end, alpha, first, o,
                                   dim);
    }
  }
  output_rows_of<Rows>(p, p_key, p_row, v, v_row, begin, end, alpha, first, o, dim);
}

}  // namespace
}  // namespace pyops::cpu::PYOPS_ISA
