// Interface between attention_backward.cpp and its kernels. Free of torch.
#pragma once

#include <cstdint>

#include "attention.h"

namespace pyops::cpu {

// Gradients that are not asked for are null.
struct AttentionBackward {
  AttentionProblem p;

  const void* output;       // (batch, heads, seqlen_q, head_dim_v)
  const void* grad_output;  // of output's shape
  HeadStrides output_strides, grad_output_strides;
  const float* lse;       // (batch, heads, seqlen_q), row stride 1
  const float* grad_lse;  // of lse's shape, or null
  // Of lse, and of the arrays below that have one entry a row.
  int64_t lse_batch_stride, lse_head_stride;
  HeadStrides grad_lse_strides;  // row: any

  void *grad_query, *grad_key, *grad_value;
  HeadStrides grad_query_strides, grad_key_strides, grad_value_strides;
  float* grad_sinks;  // (heads,)
  // float32, of bias's shape with 1 where its stride is 0; such strides are 0 here too.
  float* grad_bias;
  int64_t grad_bias_batch_stride, grad_bias_head_stride, grad_bias_row_stride,
      grad_bias_column_stride;
  bool grad_bias_once;  // one score an element, to be stored; else added to zeros

  // Work space. Rows in the order of lse.
  int64_t rows;  // of lse altogether
  float* delta;  // (rows,): sum(grad_output * output) - grad_lse, 0 where lse is -inf
  // (chunks, rows, head_dim_padded) if chunks > 1, else null
  float* partial_grad_query;

  // Keys are cut into chunks, so that few heads occupy many threads. A function of shapes alone.
  int64_t chunk_keys, chunks;
};

// Columns of rows kept in float32 work space, a multiple of every vector length.
inline int64_t padded_columns(int64_t columns) { return (columns + 15) / 16 * 16; }

// delta of the rows [64 * block, 64 * block + 64) of one (batch, head).
PYOPS_ISA_KERNEL(void, attention_backward_delta,
                 (const AttentionBackward&, int64_t b, int64_t h, int64_t block))
// The gradients that come from the keys of one chunk, of one head of key and value and all its
// query heads. grad_query goes to partial_grad_query if there are several chunks.
PYOPS_ISA_KERNEL(void, attention_backward_chunk,
                 (const AttentionBackward&, int64_t b, int64_t kv_head, int64_t chunk))
// grad_query from its parts, rows as for delta.
PYOPS_ISA_KERNEL(void, attention_backward_sum_query,
                 (const AttentionBackward&, int64_t b, int64_t h, int64_t block))

// src to dst, whose dtype is 16 bits wide.
PYOPS_ISA_KERNEL(void, attention_backward_round,
                 (const float* src, int64_t count, DType dtype, void* dst))

}  // namespace pyops::cpu
