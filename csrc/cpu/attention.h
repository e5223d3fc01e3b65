// Interface between the attention ops and their CPU kernels. Free of torch.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "isa.h"

namespace pyops::cpu {

// Of a tensor seen as (batch, heads, rows, columns), in elements; the last stride is 1.
struct HeadStrides {
  int64_t batch, head, row;
};

enum class BiasKind : int {
  kNone,
  kBool,   // bytes; 0 hides the key
  kFloat,  // float32, added to the score
  kOwn,    // the dtype of query, added to the score
};

// What forward and backward of attention share: shapes, where query, key and value lie, and how
// a score is made of scale * query . key, in this order: softcap * tanh(score / softcap),
// - alibi_slope * |i + shift - j|, + bias; a key the window hides scores -inf.
struct AttentionProblem {
  int64_t batch, heads, heads_kv;  // heads % heads_kv == 0
  int64_t seqlen_q, seqlen_k;      // varlen: the longest of the batch
  int64_t head_dim, head_dim_v;
  DType dtype;  // of query, key, value, output and their gradients: not kDouble

  const void* query;  // (batch, heads, seqlen_q, head_dim)
  const void* key;    // (batch, heads_kv, seqlen_k, head_dim)
  const void* value;  // (batch, heads_kv, seqlen_k, head_dim_v)
  HeadStrides query_strides, key_strides, value_strides;
  // varlen, else null: (batch + 1,) first row of each sequence in the packed tensors, whose batch
  // strides are 0.
  const int32_t* cu_seqlens_q;
  const int32_t* cu_seqlens_k;

  BiasKind bias_kind;
  const void* bias;  // (batch, heads, seqlen_q, seqlen_k), strides 0 where broadcast
  int64_t bias_batch_stride, bias_head_stride, bias_row_stride, bias_column_stride;
  const float* alibi_slopes;   // (heads,) or (batch, heads), or null
  int64_t alibi_batch_stride;  // 0 or heads
  const float* sinks;          // (heads,) or null: a logit of each row that has no value

  float scale, softcap;               // softcap 0: none
  int64_t window_left, window_right;  // -1: unlimited
  bool top_left;

  bool dropout;
  uint32_t dropout_threshold;  // kept iff philox's word >= this
  uint32_t philox_key[2], philox_offset;
  float keep_scale;  // 1 / (1 - dropout_p)
};

// One batch entry: where its rows begin, how many there are, and its diagonal. Row i's diagonal
// is key i + shift.
struct AttentionSequence {
  int64_t first_q, first_k;  // rows to skip in the packed tensors; 0 if not varlen
  int64_t seqlen_q, seqlen_k, shift;
};

inline AttentionSequence attention_sequence(const AttentionProblem& p, int64_t b) {
  AttentionSequence s{0, 0, p.seqlen_q, p.seqlen_k, 0};
  if (p.cu_seqlens_q) {
    s.first_q = p.cu_seqlens_q[b];
    s.first_k = p.cu_seqlens_k[b];
    s.seqlen_q = p.cu_seqlens_q[b + 1] - s.first_q;
    s.seqlen_k = p.cu_seqlens_k[b + 1] - s.first_k;
  }
  s.shift = p.top_left ? 0 : s.seqlen_k - s.seqlen_q;
  return s;
}

// The keys that row i sees: [first_visible, end_visible), possibly empty (first >= end).
inline int64_t first_visible(const AttentionProblem& p, const AttentionSequence& s, int64_t i) {
  const int64_t first = i + s.shift - p.window_left;
  return p.window_left < 0 || first < 0 ? 0 : first;
}
inline int64_t end_visible(const AttentionProblem& p, const AttentionSequence& s, int64_t i) {
  const int64_t end = i + s.shift + p.window_right + 1;
  return p.window_right < 0 || end > s.seqlen_k ? s.seqlen_k : end;
}

struct AttentionForward {
  AttentionProblem p;
  void* output;  // (batch, heads, seqlen_q, head_dim_v)
  HeadStrides output_strides;
  float* lse;  // (batch, heads, seqlen_q), natural log; row stride 1; or null
  int64_t lse_batch_stride, lse_head_stride;
};

PYOPS_ISA_KERNEL(void, attention_forward, (const AttentionForward&))

// Attention of few queries to a cache whose keys may lie in pages. The queries have been rotated
// and packed, the new keys and values are in the cache.
struct AttentionDecode {
  int64_t batch, heads, heads_kv, seqlen_q, head_dim, head_dim_v;
  DType dtype;
  const void* query;        // (batch, heads, seqlen_q, head_dim), contiguous
  const void* key_cache;    // (batch or pages, heads_kv, page, head_dim)
  const void* value_cache;  // (batch or pages, heads_kv, page, head_dim_v)
  HeadStrides key_strides, value_strides;
  const int64_t* seqlens;      // (batch,) keys of each sequence
  const int32_t* leftpad;      // (batch,) keys at the start that nobody sees, or null
  const int32_t* block_table;  // (batch, most pages of a sequence), or null: sequence b is page b
  int64_t block_table_stride, page;

  const float* alibi_slopes;  // (heads,) or (batch, heads), or null
  int64_t alibi_batch_stride;
  const float* sinks;  // (heads,) or null
  float scale, softcap;
  int64_t window_left, window_right;

  int64_t splits, split_keys;  // split i takes keys [i * split_keys, (i + 1) * split_keys)
  int64_t partial_floats;      // attention_decode_partial_floats()
  float* partial;              // (batch, heads_kv, splits, partial_floats)
  void* output;                // (batch, heads, seqlen_q, head_dim_v)
  HeadStrides output_strides;
  float* lse;  // (batch, heads, seqlen_q)
};

// What one split's result takes, for the instruction set in use.
PYOPS_ISA_KERNEL(int64_t, attention_decode_partial_floats, (const AttentionDecode&))
PYOPS_ISA_KERNEL(void, attention_decode, (const AttentionDecode&))

}  // namespace pyops::cpu
