// attention_backward and attention_varlen_backward on the CPU: checks, work space, the order of
// the passes, registration.
#include "attention_backward.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "attention_checks.h"
#include "runtime.h"

namespace pyops::cpu {
namespace {

constexpr int64_t kRowBlock = 64;
constexpr int64_t kFewestChunkKeys = 256, kMostChunks = 8, kWantedTasks = 64;

// Heads and batch entries that one task runs one after the other, because they add to the same
// elements of grad_bias.
struct Order {
  int64_t batch_tasks, batch_each, head_tasks, heads_each;
};

Order order_of(const AttentionBackward& g) {
  const bool join_batch = g.grad_bias && g.grad_bias_batch_stride == 0;
  const bool join_heads = g.grad_bias && g.grad_bias_head_stride == 0;
  const AttentionProblem& p = g.p;
  return {join_batch ? 1 : p.batch, join_batch ? p.batch : 1, join_heads ? 1 : p.heads_kv,
          join_heads ? p.heads_kv : 1};
}

void choose_chunks(AttentionBackward& g) {
  int64_t keys = 0;
  for (int64_t b = 0; b < g.p.batch; ++b) {
    keys = std::max(keys, attention_sequence(g.p, b).seqlen_k);
  }
  const Order order = order_of(g);
  const int64_t tasks = std::max<int64_t>(order.batch_tasks * order.head_tasks, 1);
  int64_t chunks =
      std::min({(kWantedTasks + tasks - 1) / tasks, keys / kFewestChunkKeys, kMostChunks});
  if (g.grad_bias && g.grad_bias_column_stride == 0) chunks = 1;  // all keys add to one element
  chunks = std::max<int64_t>(chunks, 1);
  const int64_t each = std::max<int64_t>((keys + chunks - 1) / chunks, 1);
  g.chunk_keys = (each + kFewestChunkKeys - 1) / kFewestChunkKeys * kFewestChunkKeys;
  g.chunks = std::max<int64_t>((keys + g.chunk_keys - 1) / g.chunk_keys, 1);
}

void sum_sinks(const AttentionBackward& g) {
  const AttentionProblem& p = g.p;
  parallel_for(p.heads, [&](int64_t h) {
    double total = 0;
    for (int64_t b = 0; b < p.batch; ++b) {
      const AttentionSequence s = attention_sequence(p, b);
      const int64_t row = b * g.lse_batch_stride + h * g.lse_head_stride + s.first_q;
      for (int64_t i = row; i < row + s.seqlen_q; ++i) {
        if (g.lse[i] == -std::numeric_limits<float>::infinity()) continue;
        total -= std::exp(static_cast<double>(p.sinks[h]) - g.lse[i]) * g.delta[i];
      }
    }
    g.grad_sinks[h] = static_cast<float>(total);
  });
}

// Needs every field but the work space.
void run(AttentionBackward& g) {
  AttentionProblem& p = g.p;
  const int64_t products =
      p.batch * p.heads * p.seqlen_q * p.seqlen_k * (p.head_dim + p.head_dim_v);
  const SingleThread scope(products < 100000);
  // Wider windows mean no more, and sums with them cannot overflow.
  const int64_t widest = p.seqlen_q + p.seqlen_k;
  p.window_left = std::min(p.window_left, widest);
  p.window_right = std::min(p.window_right, widest);
  choose_chunks(g);

  Tensor delta = empty_vector(g.rows, ScalarType::Float);
  g.delta = static_cast<float*>(delta.mutable_data_ptr());
  const bool split_query = g.grad_query && g.chunks > 1;
  Tensor partial = empty_vector(split_query ? g.chunks * g.rows * padded_columns(p.head_dim) : 0,
                                ScalarType::Float);
  g.partial_grad_query = split_query ? static_cast<float*>(partial.mutable_data_ptr()) : nullptr;

  const int64_t blocks = (p.seqlen_q + kRowBlock - 1) / kRowBlock;
  const auto for_row_blocks = [&](const auto& body) {
    parallel_for(p.batch * p.heads * blocks, [&](int64_t index) {
      const int64_t head = index / blocks;
      body(g, head / p.heads, head % p.heads, index % blocks);
    });
  };
  for_row_blocks(PYOPS_ISA_SELECT(attention_backward_delta));
  if (g.grad_sinks) sum_sinks(g);
  if (!g.grad_query && !g.grad_key && !g.grad_value && !g.grad_bias) return;

  const Order order = order_of(g);
  const int64_t tasks = order.batch_tasks * order.head_tasks;
  const auto chunk = PYOPS_ISA_SELECT(attention_backward_chunk);
  parallel_for(tasks * g.chunks, [&](int64_t index) {
    const int64_t b0 = index % tasks / order.head_tasks * order.batch_each;
    const int64_t h0 = index % order.head_tasks * order.heads_each;
    for (int64_t b = b0; b < b0 + order.batch_each; ++b) {
      for (int64_t h = h0; h < h0 + order.heads_each; ++h) chunk(g, b, h, index / tasks);
    }
  });
  if (split_query) for_row_blocks(PYOPS_ISA_SELECT(attention_backward_sum_query));
}

void check_saved(const Tensor& grad_output, const OptionalTensor& grad_lse, const Tensor& output,
                 const Tensor& lse, const Tensor& query, const std::vector<int64_t>& output_shape,
                 const std::vector<int64_t>& lse_shape) {
  check_shape("output", output, output_shape);
  check_same("output", output, "query", query);
  check_shape("grad_output", grad_output, output_shape);
  check_same("grad_output", grad_output, "query", query);
  check_shape("lse", lse, lse_shape);
  STD_TORCH_CHECK(lse.scalar_type() == ScalarType::Float && lse.is_contiguous(),
                  "lse: expected a contiguous float32 tensor");
  if (grad_lse) {
    check_shape("grad_lse", *grad_lse, lse_shape);
    check_same("grad_lse", *grad_lse, "lse", lse);
  }
}

void check_mask(const std::vector<bool>& mask, size_t size) {
  STD_TORCH_CHECK(mask.size() == size, "output_mask: expected ", size, " booleans, got ",
                  mask.size());
}

Tensor empty_result(const Tensor& like) { return empty_vector(0, like.scalar_type()); }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_output, const OptionalTensor& grad_lse, const Tensor& query,
    const Tensor& key, const Tensor& value, const Tensor& output, const Tensor& lse,
    const OptionalTensor& bias, const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
    const OptionalTensor& rng_state, double scale, double softcap, int64_t window_left,
    int64_t window_right, bool top_left, double dropout_p, std::vector<bool> output_mask) {
  AttentionBackward g{};
  AttentionProblem& p = g.p;
  p = make_attention_problem(query, key, value, bias, alibi_slopes, sinks, rng_state, scale,
                             softcap, window_left, window_right, top_left, dropout_p);
  check_mask(output_mask, 5);
  check_saved(grad_output, grad_lse, output, lse, query,
              {p.batch, p.heads, p.seqlen_q, p.head_dim_v}, {p.batch, p.heads, p.seqlen_q});
  const Tensor grad = with_unit_last_stride(grad_output), out = with_unit_last_stride(output);
  g.output = out.const_data_ptr(), g.output_strides = head_strides("output", out);
  g.grad_output = grad.const_data_ptr();
  g.grad_output_strides = head_strides("grad_output", grad);
  g.lse = static_cast<const float*>(lse.const_data_ptr());
  g.rows = p.batch * p.heads * p.seqlen_q;
  g.lse_batch_stride = p.heads * p.seqlen_q, g.lse_head_stride = p.seqlen_q;
  if (grad_lse) {
    g.grad_lse = static_cast<const float*>(grad_lse->const_data_ptr());
    g.grad_lse_strides = {grad_lse->stride(0), grad_lse->stride(1), grad_lse->stride(2)};
  }

  Tensor grad_query = empty_result(query), grad_key = empty_result(query),
         grad_value = empty_result(query), grad_bias = empty_result(bias ? *bias : query),
         grad_sinks = empty_vector(0, ScalarType::Float);
  if (output_mask[0]) {
    grad_query = empty_heads_like(query, p.head_dim);
    g.grad_query = grad_query.mutable_data_ptr();
    g.grad_query_strides = head_strides("grad_query", grad_query);
  }
  if (output_mask[1]) {
    grad_key = empty_heads_like(key, p.head_dim);
    g.grad_key = grad_key.mutable_data_ptr();
    g.grad_key_strides = head_strides("grad_key", grad_key);
  }
  if (output_mask[2]) {
    grad_value = empty_heads_like(value, p.head_dim_v);
    g.grad_value = grad_value.mutable_data_ptr();
    g.grad_value_strides = head_strides("grad_value", grad_value);
  }
  Tensor bias_sums = grad_bias;
  if (output_mask[3]) {
    STD_TORCH_CHECK(bias && p.bias_kind != BiasKind::kBool,
                    "output_mask: a gradient of bias needs a bias of floating point");
    std::array<int64_t, 4> size, strides;
    int64_t count = 1;
    for (int i = 3; i >= 0; --i) {
      size[i] = bias->size(i);
      strides[i] = size[i] == 1 ? 0 : count;
      count *= size[i];
    }
    g.grad_bias_once =
        strides[2] != 0 && strides[3] != 0 && count == p.batch * p.heads * p.seqlen_q * p.seqlen_k;
    const bool all_written = g.grad_bias_once && p.window_left < 0 && p.window_right < 0;
    bias_sums = all_written ? empty_contiguous(size, ScalarType::Float)
                            : torch::stable::new_zeros(lse, {size[0], size[1], size[2], size[3]});
    g.grad_bias = static_cast<float*>(bias_sums.mutable_data_ptr());
    g.grad_bias_batch_stride = strides[0], g.grad_bias_head_stride = strides[1];
    g.grad_bias_row_stride = strides[2], g.grad_bias_column_stride = strides[3];
    grad_bias =
        p.bias_kind == BiasKind::kFloat ? bias_sums : empty_contiguous(size, bias->scalar_type());
  }
  if (output_mask[4]) {
    STD_TORCH_CHECK(sinks.has_value(), "output_mask: a gradient of sinks needs sinks");
    grad_sinks = empty_vector(p.heads, ScalarType::Float);
    g.grad_sinks = static_cast<float*>(grad_sinks.mutable_data_ptr());
  }
  run(g);
  if (output_mask[3] && p.bias_kind == BiasKind::kOwn) {
    PYOPS_ISA_SELECT(attention_backward_round)
    (g.grad_bias, bias_sums.numel(), p.dtype, grad_bias.mutable_data_ptr());
  }
  return {grad_query, grad_key, grad_value, grad_bias, grad_sinks};
}

// (total, heads, dim) for the gradient of a packed tensor, of whose rows `used` belong to
// sequences.
Tensor empty_packed_like(const Tensor& like, int64_t used) {
  if (used < like.size(0)) {
    return torch::stable::new_zeros(like, {like.size(0), like.size(1), like.size(2)});
  }
  return empty_contiguous<3>({like.size(0), like.size(1), like.size(2)}, like.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_varlen_backward(
    const Tensor& grad_output, const OptionalTensor& grad_lse, const Tensor& query,
    const Tensor& key, const Tensor& value, const Tensor& output, const Tensor& lse,
    const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, int64_t max_seqlen_q,
    int64_t max_seqlen_k, const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
    const OptionalTensor& rng_state, double scale, double softcap, int64_t window_left,
    int64_t window_right, bool top_left, double dropout_p, std::vector<bool> output_mask) {
  AttentionBackward g{};
  AttentionProblem& p = g.p;
  p = make_attention_varlen_problem(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
                                    max_seqlen_k, alibi_slopes, sinks, rng_state, scale, softcap,
                                    window_left, window_right, top_left, dropout_p);
  check_mask(output_mask, 4);
  const int64_t total = query.size(0);
  check_saved(grad_output, grad_lse, output, lse, query, {total, p.heads, p.head_dim_v},
              {p.heads, total});
  // The bounds of loops over rows: what the sequences have, whatever the caller says.
  p.seqlen_q = p.seqlen_k = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    const AttentionSequence s = attention_sequence(p, b);
    p.seqlen_q = std::max(p.seqlen_q, s.seqlen_q);
    p.seqlen_k = std::max(p.seqlen_k, s.seqlen_k);
  }
  const Tensor grad = with_unit_last_stride(grad_output), out = with_unit_last_stride(output);
  g.output = out.const_data_ptr(), g.output_strides = packed_strides("output", out);
  g.grad_output = grad.const_data_ptr();
  g.grad_output_strides = packed_strides("grad_output", grad);
  g.lse = static_cast<const float*>(lse.const_data_ptr());
  g.rows = p.heads * total;
  g.lse_head_stride = total;
  if (grad_lse) {
    g.grad_lse = static_cast<const float*>(grad_lse->const_data_ptr());
    g.grad_lse_strides = {0, grad_lse->stride(0), grad_lse->stride(1)};
  }

  Tensor grad_query = empty_result(query), grad_key = empty_result(query),
         grad_value = empty_result(query), grad_sinks = empty_vector(0, ScalarType::Float);
  if (output_mask[0]) {
    grad_query = empty_packed_like(query, p.cu_seqlens_q[p.batch]);
    g.grad_query = grad_query.mutable_data_ptr();
    g.grad_query_strides = packed_strides("grad_query", grad_query);
  }
  if (output_mask[1]) {
    grad_key = empty_packed_like(key, p.cu_seqlens_k[p.batch]);
    g.grad_key = grad_key.mutable_data_ptr();
    g.grad_key_strides = packed_strides("grad_key", grad_key);
  }
  if (output_mask[2]) {
    grad_value = empty_packed_like(value, p.cu_seqlens_k[p.batch]);
    g.grad_value = grad_value.mutable_data_ptr();
    g.grad_value_strides = packed_strides("grad_value", grad_value);
  }
  if (output_mask[3]) {
    STD_TORCH_CHECK(sinks.has_value(), "output_mask: a gradient of sinks needs sinks");
    grad_sinks = empty_vector(p.heads, ScalarType::Float);
    g.grad_sinks = static_cast<float*>(grad_sinks.mutable_data_ptr());
  }
  run(g);
  return {grad_query, grad_key, grad_value, grad_sinks};
}

}  // namespace
}  // namespace pyops::cpu

STABLE_TORCH_LIBRARY_IMPL(pyops, CPU, m) {
  m.impl("attention_backward", TORCH_BOX(&pyops::cpu::attention_backward));
  m.impl("attention_varlen_backward", TORCH_BOX(&pyops::cpu::attention_varlen_backward));
}
