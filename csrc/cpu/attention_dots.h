// Scores of few queries, for forward, backward and decode: exp(score - lse) shows it where they sum
// in another order. Only for *.isa.cpp files.
#pragma once

#include "simd_lanes.h"

namespace pyops::cpu::PYOPS_ISA {
namespace {

// Few queries leave most lanes of a tile idle. Without pairs, scores of up to so many are dot
// products along the head dimension, (queries, kDotKeys): lanes are keys, of softmax too.
constexpr int64_t kDotQueries = 8;
constexpr int64_t kDotKeys = 128;

// Whether that is quicker, in vector instructions a key; output rows then lie along the head
// dimension too. A tile takes one for each word of the head dimension and about 12 for the
// exponential, however many queries there are.
PYOPS_INLINE bool few_queries(int64_t queries, int64_t keys, int64_t head_dim, int64_t head_dim_v) {
  const auto vectors = [](int64_t dim) { return (dim + kLanes - 1) / kLanes; };
  return queries <= kDotQueries && keys >= kLanes && queries * vectors(head_dim_v) <= head_dim_v &&
         queries * (vectors(head_dim) + 3) <= head_dim + 12;
}

// Lane i: the sum of rows[i].
PYOPS_INLINE Vec lane_sums(Vec (&rows)[kLanes]) {
#if defined(__AVX512F__)
#pragma GCC unroll 4
  for (int level = 3; level >= 0; --level) {
    const __m512i low = _mm512_load_si512(kTransposeLanes.low[level]);
    const __m512i high = _mm512_load_si512(kTransposeLanes.high[level]);
#pragma GCC unroll 8
    for (int i = 0; i < 1 << level; ++i) {
      const Vec a = rows[i], b = rows[i + (1 << level)];
      rows[i] = _mm512_permutex2var_ps(a, low, b) + _mm512_permutex2var_ps(a, high, b);
    }
  }
  return rows[0];
#elif defined(__AVX2__)
  const Vec low =
      _mm256_hadd_ps(_mm256_hadd_ps(rows[0], rows[1]), _mm256_hadd_ps(rows[2], rows[3]));
  const Vec high =
      _mm256_hadd_ps(_mm256_hadd_ps(rows[4], rows[5]), _mm256_hadd_ps(rows[6], rows[7]));
  return _mm256_permute2f128_ps(low, high, 0x20) + _mm256_permute2f128_ps(low, high, 0x31);
#else
  transpose(rows);
  Vec sum = rows[0];
  for (int i = 1; i < kLanes; ++i) sum += rows[i];
  return sum;
#endif
}

// Scores of `count` keys, up to kDotKeys. q: rows of floats q_row floats apart; k: k_row bytes
// apart. Of the last vector of each row only what belongs to keys means anything.
inline void score_dots(const float* q, int64_t q_row, int64_t queries, const char* k, int64_t k_row,
                       int64_t dim, float* s, int64_t count) {
  constexpr int64_t kAhead = 32;  // keys
  for (int64_t j = 0; j < count; j += kLanes) {
    const float* key[kLanes];
    for (int64_t t = 0; t < kLanes; ++t) {
      key[t] = reinterpret_cast<const float*>(k + (j + t < count ? j + t : count - 1) * k_row);
    }
    for (int64_t r = 0; r < queries; ++r) {
      const float* query = q + r * q_row;
      Vec sum[kLanes] = {};
      int64_t d = 0;
      for (; d + kLanes <= dim; d += kLanes) {
        const Vec part = load(query + d);
#pragma GCC unroll 16
        for (int t = 0; t < kLanes; ++t) {
          if (d % 16 == 0) {  // once a cache line; hardware loses the rows of a small head_dim
            __builtin_prefetch(reinterpret_cast<const char*>(key[t] + d) + kAhead * k_row);
          }
          sum[t] = fma(load(key[t] + d), part, sum[t]);
        }
      }
      if (d < dim) {
        const int left = static_cast<int>(dim - d);
        const Vec part = load_first(query + d, left);
#pragma GCC unroll 16
        for (int t = 0; t < kLanes; ++t) sum[t] = fma(load_first(key[t] + d, left), part, sum[t]);
      }
      store(s + r * kDotKeys + j, lane_sums(sum));
    }
  }
}

}  // namespace
}  // namespace pyops::cpu::PYOPS_ISA
