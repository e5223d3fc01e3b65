// Packing queries, keys and values for attention_tile.h, and softmax on transposed scores: what
// forward and decode share. Only for *.isa.cpp files.
#pragma once

#include "attention_dots.h"
#include "attention_scores.h"
#include "attention_tile.h"

namespace pyops::cpu::PYOPS_ISA {
namespace {

constexpr int kQuad = 4;  // keys that softmax takes at a time: those of one Philox counter

PYOPS_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
PYOPS_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
PYOPS_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
PYOPS_INLINE int64_t round_down(int64_t a, int64_t b) { return a / b * b; }
PYOPS_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// ---- packing

PYOPS_INLINE Vec load_words(const float* p, int64_t words, int64_t) {
  return load_first(p, static_cast<int>(words));
}
#if defined(__AVX512BF16__)
PYOPS_INLINE Vec load_words(const BFloat16* p, int64_t, int64_t elements) {
  const __mmask32 mask = elements >= 32 ? ~__mmask32{0} : (__mmask32{1} << elements) - 1;
  return reinterpret_cast<Vec>(_mm512_maskz_loadu_epi16(mask, p));
}
#endif

// (rows, head_dim) to (words rounded up to whole vectors, width), zeros in lanes that hold no
// query.
template <class T, bool kPairs>
void pack_query(const T* src, int64_t row_stride, int64_t all_rows, int64_t head_dim, float* q,
                int64_t width) {
  constexpr int kPerWord = kPairs ? 2 : 1;
  const int64_t words = ceil_div(head_dim, kPerWord);
  for (int64_t v = 0; v * kLanes < all_rows; ++v) {
    const int64_t rows = min(kLanes, all_rows - v * kLanes);
    for (int64_t w = 0; w < words; w += kLanes) {
      const int64_t count = min(kLanes, words - w);
      Vec block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        const T* row = src + (v * kLanes + i) * row_stride + w * kPerWord;
        if constexpr (kPairs) {
          block[i] = load_words(row, count, i < rows ? head_dim - w * kPerWord : 0);
        } else {
          block[i] = load_first(row, static_cast<int>(i < rows ? count : 0));
        }
      }
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(q + (w + i) * width + v * kLanes, block[i]);
    }
  }
}

template <class T>
void convert_rows(const T* src, int64_t row_stride, int64_t rows, int64_t dim, float* dst) {
  for (int64_t j = 0; j < rows; ++j, src += row_stride, dst += dim) {
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) store(dst + d, load(src + d));
    if (d < dim)
      store_first(dst + d, load_first(src + d, static_cast<int>(dim - d)),
                  static_cast<int>(dim - d));
  }
}

#if defined(__AVX512BF16__)
// (rows, dim) to words (rows / 2, dim), each holding rows 2j and 2j + 1; zero beyond the last.
void pair_rows(const BFloat16* src, int64_t row_stride, int64_t rows, int64_t dim, float* dst) {
  for (int64_t j = 0; j < rows; j += 2, src += 2 * row_stride, dst += dim) {
    for (int64_t d = 0; d < dim; d += kLanes) {
      const __mmask16 mask = first_lanes(static_cast<int>(min(kLanes, dim - d)));
      const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, src + d));
      const __m512i high = _mm512_cvtepu16_epi32(
          _mm256_maskz_loadu_epi16(j + 1 < rows ? mask : __mmask16{0}, src + row_stride + d));
      _mm512_mask_storeu_epi32(dst + d, mask, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
  }
}
#endif

// ---- scores of few queries

// The same scores as a tile has them, (count, kLanes); idle lanes repeat the first query.
inline void spread_dots(const float* s, int64_t queries, int64_t count, float* out) {
  for (int64_t j = 0; j < count; ++j, out += kLanes) {
    store(out, splat(s[j]));
    for (int64_t r = 1; r < queries; ++r) out[r] = s[r * kDotKeys + j];
  }
}

// ---- softmax

// Two keys' probabilities to one word a lane.
PYOPS_INLINE Vec pack_pair(Vec low, Vec high) {
#if defined(__AVX512BF16__)
  const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
  const __m512i order = _mm512_set_epi32(0x1f000f, 0x1e000e, 0x1d000d, 0x1c000c, 0x1b000b, 0x1a000a,
                                         0x190009, 0x180008, 0x170007, 0x160006, 0x150005, 0x140004,
                                         0x130003, 0x120002, 0x110001, 0x100000);
  return reinterpret_cast<Vec>(_mm512_permutexvar_epi16(order, both));
#else
  return low + high;  // never called
#endif
}

// The scores of `count` keys from `key` on, whole quads, become probabilities: rows of floats, or
// with pairs half as many rows of words. out may begin at s or before it. Returns their sum.
template <bool kPairs, bool kDropout>
PYOPS_INLINE Vec exponentials(const float* s, float* out, int64_t width, int64_t count, Vec most,
                              Vec to_log2, const QueryLanes& lanes, int64_t key) {
  Vec sum[kQuad] = {};
  for (int64_t j = 0; j < count; j += kQuad, s += kQuad * width) {
    Vec weight[kQuad];
#pragma GCC unroll 4
    for (int t = 0; t < kQuad; ++t) {
      weight[t] = exp2<kPairs ? 3 : 6>((load(s + t * width) - most) * to_log2);
      sum[t] += weight[t];
    }
    if constexpr (kDropout) {
      VecInt kept[kQuad];
      dropout_kept(lanes, key + j, kept);
#pragma GCC unroll 4
      for (int t = 0; t < kQuad; ++t) weight[t] = kept[t] ? weight[t] : Vec{};
    }
    if constexpr (kPairs) {
      store(out, pack_pair(weight[0], weight[1]));
      store(out + width, pack_pair(weight[2], weight[3]));
      out += 2 * width;
    } else {
#pragma GCC unroll 4
      for (int t = 0; t < kQuad; ++t) store(out + t * width, weight[t]);
      out += kQuad * width;
    }
  }
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

PYOPS_INLINE Vec maximum(const float* s, int64_t width, int64_t count, Vec most) {
  Vec part[kQuad] = {most, most, most, most};
  for (int64_t j = 0; j < count; j += kQuad, s += kQuad * width) {
#pragma GCC unroll 4
    for (int t = 0; t < kQuad; ++t) part[t] = max_or_second(load(s + t * width), part[t]);
  }
  return max_or_second(max_or_second(part[0], part[1]), max_or_second(part[2], part[3]));
}

// One query's scores of `count` keys, of which it sees [begin, end), become probabilities; most and
// sum go on from the keys before, alpha is what their outputs are to be multiplied by. Overwrites s
// to whole vectors.
inline void softmax_dots(float* s, int64_t begin, int64_t end, int64_t count, float to_log2,
                         float* most, float* sum, float* alpha) {
  const int64_t padded = round_up(count, kLanes);
  for (int64_t j = 0; j < begin; ++j) s[j] = -kInfinity;
  for (int64_t j = end; j < padded; ++j) s[j] = -kInfinity;
  Vec top = splat(*most), total = {};
  for (int64_t j = 0; j < padded; j += kLanes) top = max_or_second(load(s + j), top);
  float highest = top[0];
  for (int t = 1; t < kLanes; ++t) highest = top[t] > highest ? top[t] : highest;
  const float base = highest == -kInfinity ? 0.0f : highest;
  for (int64_t j = 0; j < padded; j += kLanes) {
    const Vec weight = exp2((load(s + j) - base) * to_log2);
    store(s + j, weight);
    total += weight;
  }
  float added = 0;
  for (int t = 0; t < kLanes; ++t) added += total[t];
  *alpha = exp2((splat(*most) - base) * to_log2)[0];
  *sum = *sum * *alpha + added;
  *most = highest;
}

}  // namespace
}  // namespace pyops::cpu::PYOPS_ISA
