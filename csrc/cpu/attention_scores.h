// What is done to the scores between the two products, on transposed tiles: lanes are queries.
// Forward and backward apply it alike. Only for *.isa.cpp files.
#pragma once

#include "attention.h"
#include "philox.h"
#include "vector_math.h"

namespace pyops::cpu::PYOPS_ISA {
namespace {

constexpr float kInfinity = __builtin_inff();

// Up to kLanes queries of one head, from row `row` on.
struct QueryLanes {
  const AttentionProblem* p;
  AttentionSequence sequence;
  int64_t b, h, row, rows;  // rows: how many lanes hold a query
  const char* bias;         // of row `row` and key 0
};

PYOPS_INLINE int64_t bias_size(const AttentionProblem& p) {
  return p.bias_kind == BiasKind::kBool    ? 1
         : p.bias_kind == BiasKind::kFloat ? 4
                                           : element_size(p.dtype);
}

PYOPS_INLINE QueryLanes query_lanes(const AttentionProblem& p, const AttentionSequence& sequence,
                                    int64_t b, int64_t h, int64_t row, int64_t rows) {
  QueryLanes q{&p, sequence, b, h, row, rows, nullptr};
  if (p.bias_kind != BiasKind::kNone) {
    q.bias =
        static_cast<const char*>(p.bias) +
        (b * p.bias_batch_stride + h * p.bias_head_stride + row * p.bias_row_stride) * bias_size(p);
  }
  return q;
}

PYOPS_INLINE VecInt lane_numbers() {
  VecInt lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  return lanes;
}

// A bool mask as what is added to the score.
struct Visible {
  uint8_t value;
};
PYOPS_INLINE float to_float(Visible x) { return x.value ? 0.0f : -kInfinity; }
PYOPS_INLINE Vec load_bias(const Visible* p, int count) {
#if defined(__AVX512F__)
  const __m512i bytes = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first_lanes(count), p));
  const __mmask16 hidden = _mm512_testn_epi32_mask(bytes, bytes);
  return _mm512_maskz_mov_ps(hidden, _mm512_set1_ps(-kInfinity));
#else
  Vec bias = {};
  for (int i = 0; i < count; ++i) bias[i] = to_float(p[i]);
  return bias;
#endif
}
template <class T>
PYOPS_INLINE Vec load_bias(const T* p, int count) {
  return load_first(p, count);
}

// Adds the bias of keys [begin, end) to s, whose row 0 is key 0 and whose rows are `width` apart.
template <class T>
void add_bias(const QueryLanes& q, int64_t begin, int64_t end, float* s, int64_t width) {
  const T* bias = reinterpret_cast<const T*>(q.bias);
  const int64_t row_stride = q.p->bias_row_stride, column_stride = q.p->bias_column_stride;
  if (row_stride == 0) {
    for (int64_t j = begin; j < end; ++j) {
      store(s + j * width, load(s + j * width) + splat(to_float(bias[j * column_stride])));
    }
    return;
  }
  for (int64_t j = begin; j < end; j += kLanes) {
    const int count = static_cast<int>(end - j < kLanes ? end - j : kLanes);
    Vec block[kLanes] = {};
    for (int i = 0; i < q.rows; ++i) {
      const T* row = bias + i * row_stride + j * column_stride;
      if (column_stride == 1) {
        block[i] = load_bias(row, count);
      } else {
        for (int t = 0; t < count; ++t) block[i][t] = to_float(row[t * column_stride]);
      }
    }
    transpose(block);
    for (int t = 0; t < count; ++t) {
      store(s + (j + t) * width, load(s + (j + t) * width) + block[t]);
    }
  }
}

// From q . k to the score, for keys [begin, end); the window is not applied.
inline void finish_scores(const QueryLanes& q, int64_t begin, int64_t end, float* s,
                          int64_t width) {
  const AttentionProblem& p = *q.p;
  const Vec scale = splat(p.scale);
  if (p.softcap > 0) {
    const Vec inverse = splat(p.scale / p.softcap), cap = splat(p.softcap);
    for (int64_t j = begin; j < end; ++j) {
      store(s + j * width, cap * tanh(load(s + j * width) * inverse));
    }
  } else {
    for (int64_t j = begin; j < end; ++j) store(s + j * width, load(s + j * width) * scale);
  }
  if (p.alibi_slopes) {
    const Vec slope = splat(p.alibi_slopes[q.b * p.alibi_batch_stride + q.h]);
    const VecInt diagonal = lane_numbers() + static_cast<int32_t>(q.row + q.sequence.shift);
    for (int64_t j = begin; j < end; ++j) {
      const Vec d = __builtin_convertvector(diagonal - static_cast<int32_t>(j), Vec);
      const Vec distance = d < Vec{} ? -d : d;
      store(s + j * width, load(s + j * width) - slope * distance);
    }
  }
  switch (p.bias_kind) {
    case BiasKind::kNone:
      return;
    case BiasKind::kBool:
      return add_bias<Visible>(q, begin, end, s, width);
    case BiasKind::kFloat:
      return add_bias<float>(q, begin, end, s, width);
    case BiasKind::kOwn:
      if (p.dtype == DType::kFloat) return add_bias<float>(q, begin, end, s, width);
      if (p.dtype == DType::kHalf) return add_bias<Half>(q, begin, end, s, width);
      return add_bias<BFloat16>(q, begin, end, s, width);
  }
}

// Scores of keys [begin, end) that the window hides become -infinity; only the keys that it
// hides from some lane and not from all are looked at one by one.
inline void apply_window(const QueryLanes& q, int64_t begin, int64_t end, float* s, int64_t width) {
  const AttentionProblem& p = *q.p;
  const VecInt lanes = lane_numbers();
  const Vec hidden = splat(-kInfinity);
  const int64_t diagonal = q.row + q.sequence.shift;
  if (p.window_right >= 0) {
    const int64_t first = diagonal + p.window_right + 1;  // lane 0 sees no key from here on
    for (int64_t j = first > begin ? first : begin; j < end; ++j) {
      const int64_t least = j - p.window_right - diagonal;  // lanes before this one do not see j
      const VecInt out = lanes < static_cast<int32_t>(least < kLanes ? least : kLanes);
      store(s + j * width, out ? hidden : load(s + j * width));
    }
  }
  if (p.window_left >= 0) {
    const int64_t last = diagonal + kLanes - 1 - p.window_left;  // the last lane sees all from here
    for (int64_t j = begin; j < (last < end ? last : end); ++j) {
      const int64_t most = j + p.window_left - diagonal;  // lanes after this one do not see j
      const VecInt out = lanes > static_cast<int32_t>(most > -1 ? most : -1);
      store(s + j * width, out ? hidden : load(s + j * width));
    }
  }
}

// Which of keys j .. j + 3 (j % 4 == 0) each lane keeps.
PYOPS_INLINE void dropout_kept(const QueryLanes& q, int64_t j, VecInt (&kept)[4]) {
  const AttentionProblem& p = *q.p;
  const VecUint counter[4] = {
      VecUint{} + static_cast<uint32_t>(j / 4),
      reinterpret_cast<VecUint>(lane_numbers()) + static_cast<uint32_t>(q.row),
      VecUint{} + static_cast<uint32_t>(q.b * p.heads + q.h), VecUint{} + p.philox_offset};
  VecUint words[4];
  philox(counter, p.philox_key, words);
#pragma GCC unroll 4
  for (int t = 0; t < 4; ++t) kept[t] = words[t] >= p.dropout_threshold;
}

}  // namespace
}  // namespace pyops::cpu::PYOPS_ISA
