// From an attention op's arguments to an AttentionProblem: shared by forward and backward.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "attention.h"
#include "tensors.h"

namespace pyops::cpu {

using OptionalTensor = std::optional<Tensor>;

// Checks everything and sets every field.
AttentionProblem make_attention_problem(const Tensor& query, const Tensor& key, const Tensor& value,
                                        const OptionalTensor& bias,
                                        const OptionalTensor& alibi_slopes,
                                        const OptionalTensor& sinks,
                                        const OptionalTensor& rng_state, double scale,
                                        double softcap, int64_t window_left, int64_t window_right,
                                        bool top_left, double dropout_p);

// The same for query (total_q, heads, head_dim), key and value (total_k, heads_kv, ...): as
// seen by the kernels, (batch, heads, seqlen, dim) with a batch stride of 0.
AttentionProblem make_attention_varlen_problem(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& cu_seqlens_q,
    const Tensor& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
    const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
    const OptionalTensor& rng_state, double scale, double softcap, int64_t window_left,
    int64_t window_right, bool top_left, double dropout_p);

// Part of both: what does not depend on the keys. Reads batch and heads.
void set_attention_options(AttentionProblem& p, const Tensor& query,
                           const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
                           const OptionalTensor& rng_state, double scale, double softcap,
                           int64_t window_left, int64_t window_right, bool top_left,
                           double dropout_p);

Tensor with_unit_last_stride(const Tensor& t);

// Strides of a 4-D tensor (batch, heads, seqlen, dim); checks that the last one is 1.
HeadStrides head_strides(const char* name, const Tensor& t);
// Of a 3-D tensor (total, heads, dim) seen as (batch, heads, seqlen, dim).
HeadStrides packed_strides(const char* name, const Tensor& t);

// Uninitialised (batch, heads, seqlen, dim) in the layout of `like`: (batch, seqlen, heads, dim) in
// memory if that is how `like` lies and it is not contiguous, else contiguous.
Tensor empty_heads_like(const Tensor& like, int64_t dim);

}  // namespace pyops::cpu
