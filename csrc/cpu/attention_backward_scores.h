// From scores to probabilities and from their gradients to those of the scores, row by row.
// Only for *.isa.cpp files.
#pragma once

#include "attention_backward.h"
#include "philox.h"
#include "vector_math.h"

namespace pyops::cpu::PYOPS_ISA {
namespace {

constexpr int kBlockQ = 64;     // queries of a tile
constexpr int kBlockK = 128;    // most keys of a tile
constexpr int kScoreRow = 144;  // floats a row of scores; not a power of two, for L1's sets

// What one tile of scores belongs to.
struct ScoreTile {
  const AttentionBackward* g;
  int64_t b, h;    // batch entry and query head
  int64_t q0, k0;  // first query and key, within the sequence
  int rows, keys;
  int64_t diagonal;          // row r's diagonal is key r + diagonal of the tile
  const float *lse, *delta;  // (rows,)
  float* scores;             // (rows, kScoreRow): query . key, becomes what multiplies grad_output
  float* grads;              // the same of grad_output . value, becomes the gradient of query . key
  float* bias_columns;       // (kBlockK,): grad_bias summed over the rows of the tile
  float bias_sum;

  // Keys of the tile that row r sees.
  PYOPS_INLINE int first(int r) const {
    const int64_t left = g->p.window_left, k = r + diagonal - left;
    return left < 0 || k < 0 ? 0 : k < keys ? static_cast<int>(k) : keys;
  }
  PYOPS_INLINE int end(int r) const {
    const int64_t right = g->p.window_right, k = r + diagonal + right + 1;
    return right < 0 || k > keys ? keys : k > 0 ? static_cast<int>(k) : 0;
  }
  // Rows of the tile that see any of the keys [k, k + count).
  PYOPS_INLINE int first_row(int k) const {
    const int64_t r = k - diagonal - g->p.window_right;
    return g->p.window_right < 0 || r < 0 ? 0 : r < rows ? static_cast<int>(r) : rows;
  }
  PYOPS_INLINE int end_row(int k, int count) const {
    const int64_t r = k + count - diagonal + g->p.window_left;
    return g->p.window_left < 0 || r > rows ? rows : r > 0 ? static_cast<int>(r) : 0;
  }
};

PYOPS_INLINE Vec lane_numbers() {
  Vec lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = static_cast<float>(i);
  return lanes;
}

// w[0][0], w[1][0], w[2][0], w[3][0], w[0][1], ... to dst.
PYOPS_INLINE void store_interleaved(float* dst, const Vec (&w)[4]) {
#if defined(__AVX512F__)
  const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  const Vec even[2] = {_mm512_permutex2var_ps(w[0], low, w[2]),
                       _mm512_permutex2var_ps(w[0], high, w[2])};
  const Vec odd[2] = {_mm512_permutex2var_ps(w[1], low, w[3]),
                      _mm512_permutex2var_ps(w[1], high, w[3])};
  for (int half = 0; half < 2; ++half) {
    store(dst + 32 * half, _mm512_permutex2var_ps(even[half], low, odd[half]));
    store(dst + 32 * half + 16, _mm512_permutex2var_ps(even[half], high, odd[half]));
  }
#else
  for (int i = 0; i < kLanes; ++i) {
    for (int k = 0; k < 4; ++k) dst[4 * i + k] = w[k][i];
  }
#endif
}

// keep[c] for the keys [begin, end) of the tile: keep_scale, or 0 where dropped.
void dropout_row(const ScoreTile& t, int r, int begin, int end, float* keep) {
  const AttentionProblem& p = t.g->p;
  VecUint lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = static_cast<uint32_t>(i);
  for (int c = begin / (4 * kLanes) * (4 * kLanes); c < end; c += 4 * kLanes) {
    const VecUint zero{};
    const VecUint counter[4] = {
        lanes + static_cast<uint32_t>((t.k0 + c) / 4), zero + static_cast<uint32_t>(t.q0 + r),
        zero + static_cast<uint32_t>(t.b * p.heads + t.h), zero + p.philox_offset};
    VecUint words[4];
    philox(counter, p.philox_key, words);
    Vec kept[4];
    for (int w = 0; w < 4; ++w) {
      const VecInt keeps = words[w] >= p.dropout_threshold;
      kept[w] = keeps ? splat(p.keep_scale) : Vec{};
    }
    store_interleaved(keep + c, kept);
  }
}

PYOPS_INLINE float own_to_float(const void* p, int64_t i, DType dtype) {
  switch (dtype) {
    case DType::kFloat:
      return static_cast<const float*>(p)[i];
    case DType::kBFloat16:
      return to_float(static_cast<const BFloat16*>(p)[i]);
    default:
      return to_float(static_cast<const Half*>(p)[i]);
  }
}

template <class T>
PYOPS_INLINE void copy_row(const void* src, int64_t at, int begin, int end, float* dst) {
  for (int c = begin; c < end; c += kLanes) {
    store(dst + c,
          load_first(static_cast<const T*>(src) + at + c, end - c < kLanes ? end - c : kLanes));
  }
}

// bias[c] as an addend of the score for the keys [begin, end) of the tile.
void bias_row(const ScoreTile& t, int r, int begin, int end, float* bias) {
  const AttentionProblem& p = t.g->p;
  const int64_t step = p.bias_column_stride;
  const int64_t at = t.b * p.bias_batch_stride + t.h * p.bias_head_stride +
                     (t.q0 + r) * p.bias_row_stride + t.k0 * step;
  if (p.bias_kind == BiasKind::kBool) {
    const uint8_t* bytes = static_cast<const uint8_t*>(p.bias) + at;
    for (int c = begin; c < end; ++c) bias[c] = bytes[c * step] ? 0.0f : -__builtin_inff();
    return;
  }
  const DType dtype = p.bias_kind == BiasKind::kFloat ? DType::kFloat : p.dtype;
  if (step != 1) {
    for (int c = begin; c < end; ++c) bias[c] = own_to_float(p.bias, at + c * step, dtype);
  } else if (dtype == DType::kFloat) {
    copy_row<float>(p.bias, at, begin, end, bias);
  } else if (dtype == DType::kBFloat16) {
    copy_row<BFloat16>(p.bias, at, begin, end, bias);
  } else {
    copy_row<Half>(p.bias, at, begin, end, bias);
  }
}

// Adds the gradients of row r's scores [begin, end) to grad_bias, or to the sums of the tile.
void add_to_grad_bias(ScoreTile& t, int r, int begin, int end, const float* grad) {
  const AttentionBackward& g = *t.g;
  float* target = g.grad_bias + t.b * g.grad_bias_batch_stride + t.h * g.grad_bias_head_stride +
                  (t.q0 + r) * g.grad_bias_row_stride + t.k0;
  if (g.grad_bias_column_stride == 0) {
    float sum = 0.0f;
    for (int c = begin; c < end; ++c) sum += grad[c];
    if (g.grad_bias_row_stride == 0) {
      t.bias_sum += sum;
    } else {
      target[-t.k0] += sum;
    }
    return;
  }
  if (g.grad_bias_row_stride == 0) target = t.bias_columns;
  for (int c = begin; c < end; c += kLanes) {
    const int count = end - c < kLanes ? end - c : kLanes;
    const Vec sum = load_first(grad + c, count);
    store_first(target + c, g.grad_bias_once ? sum : sum + load_first(target + c, count), count);
  }
}

// Before and after the rows of a tile, where grad_bias is summed over rows.
void begin_grad_bias(ScoreTile& t) {
  t.bias_sum = 0.0f;
  for (int c = 0; c < kBlockK; ++c) t.bias_columns[c] = 0.0f;
}
void end_grad_bias(const ScoreTile& t) {
  const AttentionBackward& g = *t.g;
  if (g.grad_bias_row_stride != 0) return;
  float* target = g.grad_bias + t.b * g.grad_bias_batch_stride + t.h * g.grad_bias_head_stride;
  if (g.grad_bias_column_stride == 0) {
    *target += t.bias_sum;
  } else {
    for (int c = 0; c < t.keys; ++c) target[t.k0 + c] += t.bias_columns[c];
  }
}

// What one row of a tile needs.
struct ScoreRow {
  float *scores, *grads;
  int first, end;  // keys it sees
  float lse, delta;
  Vec lanes;
  // Not for plain attention:
  int64_t diagonal;
  float slope;
  const float *bias, *keep;
  float* bias_grads;  // or null
};

// Row r's scores and grads of the vector at key c, in place. kEdge: the row does not see all of it.
template <bool kPlain, bool kEdge, int kExpDegree>
PYOPS_INLINE void score_vector(const ScoreTile& t, const ScoreRow& row, int c) {
  const AttentionProblem& p = t.g->p;
  float *scores = row.scores + c, *grads = row.grads + c;
  Vec x = load(scores), grad = load(grads), factor = splat(p.scale);
  VecInt hidden{};
  if constexpr (kEdge) {
    hidden = (row.lanes < static_cast<float>(row.first - c)) |
             (row.lanes >= static_cast<float>(row.end - c));
  }
  if constexpr (kPlain) {
    x = fma(x, factor, splat(-row.lse)) * kLog2e;
    x = max_or_second(splat(-126.0f), x);
  } else {
    if (p.softcap > 0.0f) {  // rounded as forward does it
      const Vec t = tanh(x * (p.scale / p.softcap));
      x = t * p.softcap;
      factor *= 1.0f - t * t;
    } else {
      x *= factor;
    }
    if (p.alibi_slopes) {
      const Vec distance = static_cast<float>(row.diagonal - c) - row.lanes;
      x -= row.slope * (distance > Vec{} ? distance : -distance);
    }
    if (p.bias_kind != BiasKind::kNone) x += load(row.bias + c);
    x = (x - row.lse) * kLog2e;
    hidden |= x < -126.0f;
  }
  Vec probability = exp2<kExpDegree>(x);
  if constexpr (!kPlain || kEdge) probability = hidden ? Vec{} : probability;
  Vec kept = probability;
  if constexpr (!kPlain) {
    if (p.dropout) {
      const Vec keep = load(row.keep + c);
      grad *= keep;
      kept = hidden ? Vec{} : kept * keep;
    }
  }
  grad = probability * (grad - row.delta);
  if constexpr (!kPlain || kEdge) grad = hidden ? Vec{} : grad;  // also where grads is not finite
  if constexpr (!kPlain) {
    if (row.bias_grads) store(row.bias_grads + c, grad);
  }
  store(scores, kept);
  store(grads, grad * factor);
}

// Row r of scores and grads, in place. Vectors [begin, end) were computed; the others become 0.
template <bool kPlain, int kExpDegree>
PYOPS_INLINE void score_row(ScoreTile& t, int r, int begin, int end, int vecs) {
  const AttentionBackward& g = *t.g;
  const AttentionProblem& p = g.p;
  float bias[kBlockK], keep[kBlockK], bias_grads[kBlockK];
  ScoreRow row;
  row.scores = t.scores + r * kScoreRow, row.grads = t.grads + r * kScoreRow;
  row.first = t.first(r), row.end = t.end(r);
  // A row without keys has lse -inf and must not give NaN.
  row.lse = t.lse[r] == -__builtin_inff() ? __builtin_inff() : t.lse[r];
  row.delta = t.delta[r];
  row.lanes = lane_numbers();
  if constexpr (!kPlain) {
    row.diagonal = t.diagonal + r;
    row.slope = p.alibi_slopes ? p.alibi_slopes[t.b * p.alibi_batch_stride + t.h] : 0.0f;
    row.bias = bias, row.keep = keep, row.bias_grads = g.grad_bias ? bias_grads : nullptr;
    if (p.bias_kind != BiasKind::kNone) bias_row(t, r, row.first, row.end, bias);
    if (p.dropout) dropout_row(t, r, row.first, row.end, keep);
  }
  for (int v = 0; v < vecs; ++v) {
    const int c = v * kLanes;
    if (v < begin || v >= end || c >= row.end || c + kLanes <= row.first) {
      store(row.scores + c, Vec{});
      store(row.grads + c, Vec{});
    } else if (c < row.first || c + kLanes > row.end) {
      score_vector<kPlain, true, kExpDegree>(t, row, c);
    } else {
      score_vector<kPlain, false, kExpDegree>(t, row, c);
    }
  }
  if constexpr (!kPlain) {
    if (g.grad_bias && row.first < row.end) {
      add_to_grad_bias(t, r, row.first, row.end, bias_grads);
    }
  }
}

}  // namespace
}  // namespace pyops::cpu::PYOPS_ISA
