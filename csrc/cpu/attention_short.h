// Many short sequences: one vector of queries and one block of keys each. Their products are so few
// that what a task of the general kernel decides and prepares takes as long as they do; here it is
// decided once for all heads. The sums run in the same order. Only for *.isa.cpp files.
#pragma once

#include "attention_softmax.h"
#include "runtime.h"

namespace pyops::cpu::PYOPS_ISA {
namespace {

struct ShortAttention {
  const AttentionForward* f;
  int64_t begin, end;     // keys that any query sees; begin % kQuad == 0
  float to_log2, to_log;  // from a score to an exponent of 2, and to a natural one
};

// Whether float sequences whose scores need only a positive scale and the window are short.
PYOPS_INLINE bool is_short(const AttentionForward& f) {
  const AttentionProblem& p = f.p;
  return p.dtype == DType::kFloat && !p.cu_seqlens_q && !p.dropout && p.seqlen_q <= kLanes &&
         p.seqlen_k <= kDotKeys && !few_queries(p.seqlen_q, p.seqlen_k, p.head_dim, p.head_dim_v) &&
         p.seqlen_q * ceil_div(p.head_dim_v, kLanes) <= p.head_dim_v;
}

void short_head(const ShortAttention& a, const QueryLanes& lanes, float* memory) {
  const AttentionForward& f = *a.f;
  const AttentionProblem& p = f.p;
  const int64_t b = lanes.b, h = lanes.h, head_kv = h / (p.heads / p.heads_kv);
  const int rows = static_cast<int>(p.seqlen_q);
  float* const q = memory;                                     // (head_dim, kLanes)
  float* const s = q + round_up(p.head_dim, kLanes) * kLanes;  // (seqlen_k, kLanes)
  float* const o = s + kDotKeys * kLanes;                      // (seqlen_q, head_dim_v rounded up)
  pack_query<float, false>(
      static_cast<const float*>(p.query) + b * p.query_strides.batch + h * p.query_strides.head,
      p.query_strides.row, rows, p.head_dim, q, kLanes);
  const float* key = static_cast<const float*>(p.key) + b * p.key_strides.batch +
                     head_kv * p.key_strides.head + a.begin * p.key_strides.row;
  score_keys<false, 1>(q, kLanes, reinterpret_cast<const char*>(key), p.key_strides.row * 4,
                       p.head_dim, s + a.begin * kLanes, a.end - a.begin);
  apply_window(lanes, a.begin, a.end, s, kLanes);
  const int64_t count = round_up(a.end - a.begin, kQuad);
  const Vec hidden = splat(-kInfinity);
  for (int64_t j = a.end; j < a.begin + count; ++j) store(s + j * kLanes, hidden);

  float* const seen = s + a.begin * kLanes;
  const Vec most = maximum(seen, kLanes, count, hidden);
  const Vec base = most == hidden ? Vec{} : most;  // nothing seen: -infinity less itself is NaN
  const Vec sum =
      exponentials<false, false>(seen, seen, kLanes, count, base, splat(a.to_log2), lanes, a.begin);
  if (f.lse) {
    store_first(f.lse + b * f.lse_batch_stride + h * f.lse_head_stride,
                fma(most, splat(a.to_log), log(sum)), rows);
  }
  alignas(64) float factor[kLanes];
  store(factor, sum == Vec{} ? Vec{} : 1.0f / sum);
  const float* value = static_cast<const float*>(p.value) + b * p.value_strides.batch +
                       head_kv * p.value_strides.head;
  output_rows(rows, s, kLanes, 1, value, p.value_strides.row, a.begin, a.end, nullptr, true, o,
              p.head_dim_v);
  float* output =
      static_cast<float*>(f.output) + b * f.output_strides.batch + h * f.output_strides.head;
  const float* row = o;
  for (int i = 0; i < rows; ++i, output += f.output_strides.row) {
    for (int64_t d = 0; d < p.head_dim_v; d += kLanes, row += kLanes) {
      store_first(output + d, load(row) * splat(factor[i]),
                  static_cast<int>(min(kLanes, p.head_dim_v - d)));
    }
  }
}

// Heads [first, last) of all batch entries.
void short_heads(const ShortAttention& a, int64_t first, int64_t last) {
  const AttentionProblem& p = a.f->p;
  float* memory =
      static_cast<float*>(scratch(4, (round_up(p.head_dim, kLanes) * kLanes + kDotKeys * kLanes +
                                      p.seqlen_q * round_up(p.head_dim_v, kLanes)) *
                                         sizeof(float)));
  const AttentionSequence sequence = attention_sequence(p, 0);
  for (int64_t i = first; i < last; ++i) {
    const int64_t b = i / p.heads;
    short_head(a, query_lanes(p, sequence, b, i - b * p.heads, 0, p.seqlen_q), memory);
  }
}

}  // namespace
}  // namespace pyops::cpu::PYOPS_ISA
