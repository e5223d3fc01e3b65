// attention and attention_varlen on the CPU: checks, layouts, registration.
#include "attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>

#include "attention_checks.h"
#include "runtime.h"

namespace pyops::cpu {
namespace {

constexpr int64_t kMostHeadDim = 256;

void check_dtype_and_dim(const AttentionProblem& p) {
  STD_TORCH_CHECK(p.dtype != DType::kDouble,
                  "query: expected dtype float32, bfloat16 or float16, got float64");
  STD_TORCH_CHECK(p.head_dim <= kMostHeadDim && p.head_dim_v <= kMostHeadDim,
                  "query, value: expected head dimensions of at most ", kMostHeadDim, ", got ",
                  p.head_dim, " and ", p.head_dim_v);
  STD_TORCH_CHECK(p.heads_kv > 0 ? p.heads % p.heads_kv == 0 : p.heads == 0, "key: ", p.heads_kv,
                  " heads do not divide the ", p.heads, " of query");
}

void check_unit_stride(const char* name, const Tensor& t) {
  const int64_t last = t.dim() - 1;
  STD_TORCH_CHECK(t.size(last) <= 1 || t.stride(last) == 1, name,
                  ": expected a last stride of 1, got ", t.stride(last));
}

// The rows of the sequences that `cu_seqlens` delimits.
const int32_t* checked_cu_seqlens(const char* name, const Tensor& t, int64_t total,
                                  const char* longest_name, int64_t longest) {
  check_rank(name, t, 1);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Int && t.is_contiguous() && t.size(0) >= 1, name,
                  ": expected a contiguous int32 tensor of shape (batch + 1,)");
  const int32_t* ends = static_cast<const int32_t*>(t.const_data_ptr());
  STD_TORCH_CHECK(ends[0] == 0, name, ": expected to start at 0, got ", ends[0]);
  for (int64_t b = 0; b + 1 < t.size(0); ++b) {
    STD_TORCH_CHECK(ends[b + 1] >= ends[b], name, ": expected no decrease, got ", ends[b],
                    " before ", ends[b + 1]);
    STD_TORCH_CHECK(ends[b + 1] - ends[b] <= longest, longest_name, ": ", longest,
                    " is less than the ", ends[b + 1] - ends[b], " of sequence ", b);
  }
  const int32_t end = ends[t.size(0) - 1];
  STD_TORCH_CHECK(end <= total, name, ": ends at ", end, ", beyond the ", total,
                  " rows of the tensor");
  return ends;
}

// torch's rule: strides of dimensions of size 1 do not matter, empty tensors are contiguous.
bool is_transposed_contiguous(const Tensor& t) {
  const int64_t order[4] = {0, 2, 1, 3};
  int64_t stride = 1;
  for (int i = 3; i >= 0; --i) {
    const int64_t size = t.size(order[i]);
    if (size == 0) return true;
    if (size != 1 && t.stride(order[i]) != stride) return false;
    stride *= size;
  }
  return true;
}

}  // namespace

void set_attention_options(AttentionProblem& p, const Tensor& query,
                           const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
                           const OptionalTensor& rng_state, double scale, double softcap,
                           int64_t window_left, int64_t window_right, bool top_left,
                           double dropout_p) {
  p.scale = static_cast<float>(scale);
  p.softcap = static_cast<float>(softcap);
  STD_TORCH_CHECK(softcap >= 0 && std::isfinite(softcap),
                  "softcap: expected a finite number of at least 0, got ", softcap);
  STD_TORCH_CHECK(window_left >= -1, "window_left: expected at least -1, got ", window_left);
  STD_TORCH_CHECK(window_right >= -1, "window_right: expected at least -1, got ", window_right);
  p.window_left = window_left, p.window_right = window_right;
  p.top_left = top_left;
  if (alibi_slopes) {
    const Tensor& t = *alibi_slopes;
    if (t.dim() == 1) {
      check_shape("alibi_slopes", t, {p.heads});
    } else {
      check_shape("alibi_slopes", t, {p.batch, p.heads});
      p.alibi_batch_stride = p.heads;
    }
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.is_contiguous(),
                    "alibi_slopes: expected a contiguous float32 tensor");
    STD_TORCH_CHECK(t.device() == query.device(), "alibi_slopes: expected the device of query");
    p.alibi_slopes = static_cast<const float*>(t.const_data_ptr());
  }
  if (sinks) {
    check_shape("sinks", *sinks, {p.heads});
    STD_TORCH_CHECK(sinks->scalar_type() == ScalarType::Float && sinks->is_contiguous(),
                    "sinks: expected a contiguous float32 tensor");
    STD_TORCH_CHECK(sinks->device() == query.device(), "sinks: expected the device of query");
    p.sinks = static_cast<const float*>(sinks->const_data_ptr());
  }
  STD_TORCH_CHECK(dropout_p >= 0 && dropout_p < 1, "dropout_p: expected a number in [0, 1), got ",
                  dropout_p);
  p.keep_scale = 1;
  if (dropout_p > 0) {
    STD_TORCH_CHECK(rng_state.has_value(), "rng_state: expected a tensor, as dropout_p is ",
                    dropout_p);
    check_shape("rng_state", *rng_state, {2});
    STD_TORCH_CHECK(rng_state->scalar_type() == ScalarType::Long && rng_state->is_contiguous(),
                    "rng_state: expected a contiguous int64 tensor");
    STD_TORCH_CHECK(rng_state->device() == query.device(),
                    "rng_state: expected the device of query");
    const int64_t* state = static_cast<const int64_t*>(rng_state->const_data_ptr());
    const double threshold = std::nearbyint(dropout_p * 4294967296.0);
    p.dropout = true;
    p.dropout_threshold =
        threshold >= 4294967295.0 ? ~uint32_t{0} : static_cast<uint32_t>(threshold);
    p.philox_key[0] = static_cast<uint32_t>(state[0]);
    p.philox_key[1] = static_cast<uint32_t>(static_cast<uint64_t>(state[0]) >> 32);
    p.philox_offset = static_cast<uint32_t>(state[1]);
    p.keep_scale = static_cast<float>(1 / (1 - dropout_p));
  }
}

Tensor with_unit_last_stride(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.size(last) <= 1 || t.stride(last) == 1 ? t : torch::stable::contiguous(t);
}

HeadStrides head_strides(const char* name, const Tensor& t) {
  check_unit_stride(name, t);
  return {t.stride(0), t.stride(1), t.stride(2)};
}

HeadStrides packed_strides(const char* name, const Tensor& t) {
  check_unit_stride(name, t);
  return {0, t.stride(1), t.stride(0)};
}

Tensor empty_heads_like(const Tensor& like, int64_t dim) {
  const std::array<int64_t, 4> size = {like.size(0), like.size(1), like.size(2), dim};
  const ScalarType dtype = like.scalar_type();
  if (like.is_contiguous() || !is_transposed_contiguous(like)) return empty_contiguous(size, dtype);
  return empty_strided<4>(size, {size[2] * size[1] * dim, dim, size[1] * dim, 1}, dtype);
}

AttentionProblem make_attention_problem(const Tensor& query, const Tensor& key, const Tensor& value,
                                        const OptionalTensor& bias,
                                        const OptionalTensor& alibi_slopes,
                                        const OptionalTensor& sinks,
                                        const OptionalTensor& rng_state, double scale,
                                        double softcap, int64_t window_left, int64_t window_right,
                                        bool top_left, double dropout_p) {
  check_rank("query", query, 4);
  check_rank("key", key, 4);
  check_rank("value", value, 4);
  check_same("key", key, "query", query);
  check_same("value", value, "query", query);
  AttentionProblem p{};
  p.batch = query.size(0), p.heads = query.size(1);
  p.seqlen_q = query.size(2), p.head_dim = query.size(3);
  p.heads_kv = key.size(1), p.seqlen_k = key.size(2), p.head_dim_v = value.size(3);
  check_shape("key", key, {p.batch, p.heads_kv, p.seqlen_k, p.head_dim});
  check_shape("value", value, {p.batch, p.heads_kv, p.seqlen_k, p.head_dim_v});
  p.dtype = dtype_of("query", query);
  check_dtype_and_dim(p);
  p.query = query.const_data_ptr(), p.query_strides = head_strides("query", query);
  p.key = key.const_data_ptr(), p.key_strides = head_strides("key", key);
  p.value = value.const_data_ptr(), p.value_strides = head_strides("value", value);
  set_attention_options(p, query, alibi_slopes, sinks, rng_state, scale, softcap, window_left,
                        window_right, top_left, dropout_p);
  if (bias) {
    check_rank("bias", *bias, 4);
    const int64_t full[4] = {p.batch, p.heads, p.seqlen_q, p.seqlen_k};
    int64_t strides[4];
    for (int i = 0; i < 4; ++i) {
      STD_TORCH_CHECK(bias->size(i) == 1 || bias->size(i) == full[i], "bias: expected size 1 or ",
                      full[i], " in dimension ", i, ", got ", bias->size(i));
      strides[i] = bias->size(i) == 1 ? 0 : bias->stride(i);
    }
    STD_TORCH_CHECK(bias->device() == query.device(), "bias: expected the device of query");
    const ScalarType type = bias->scalar_type();
    p.bias_kind = type == ScalarType::Bool      ? BiasKind::kBool
                  : type == ScalarType::Float   ? BiasKind::kFloat
                  : type == query.scalar_type() ? BiasKind::kOwn
                                                : BiasKind::kNone;
    STD_TORCH_CHECK(p.bias_kind != BiasKind::kNone,
                    "bias: expected dtype bool, float32 or that of query");
    p.bias = bias->const_data_ptr();
    p.bias_batch_stride = strides[0], p.bias_head_stride = strides[1];
    p.bias_row_stride = strides[2], p.bias_column_stride = strides[3];
  }
  return p;
}

AttentionProblem make_attention_varlen_problem(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& cu_seqlens_q,
    const Tensor& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
    const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
    const OptionalTensor& rng_state, double scale, double softcap, int64_t window_left,
    int64_t window_right, bool top_left, double dropout_p) {
  check_rank("query", query, 3);
  check_rank("key", key, 3);
  check_rank("value", value, 3);
  check_same("key", key, "query", query);
  check_same("value", value, "query", query);
  AttentionProblem p{};
  p.heads = query.size(1), p.head_dim = query.size(2);
  p.heads_kv = key.size(1), p.head_dim_v = value.size(2);
  check_shape("key", key, {key.size(0), p.heads_kv, p.head_dim});
  check_shape("value", value, {key.size(0), p.heads_kv, p.head_dim_v});
  p.dtype = dtype_of("query", query);
  check_dtype_and_dim(p);
  p.cu_seqlens_q =
      checked_cu_seqlens("cu_seqlens_q", cu_seqlens_q, query.size(0), "max_seqlen_q", max_seqlen_q);
  p.cu_seqlens_k =
      checked_cu_seqlens("cu_seqlens_k", cu_seqlens_k, key.size(0), "max_seqlen_k", max_seqlen_k);
  check_shape("cu_seqlens_k", cu_seqlens_k, {cu_seqlens_q.size(0)});
  p.batch = cu_seqlens_q.size(0) - 1;
  p.seqlen_q = max_seqlen_q, p.seqlen_k = max_seqlen_k;
  p.query = query.const_data_ptr(), p.query_strides = packed_strides("query", query);
  p.key = key.const_data_ptr(), p.key_strides = packed_strides("key", key);
  p.value = value.const_data_ptr(), p.value_strides = packed_strides("value", value);
  set_attention_options(p, query, alibi_slopes, sinks, rng_state, scale, softcap, window_left,
                        window_right, top_left, dropout_p);
  return p;
}

namespace {

// Waking another thread costs some microseconds: about what this many multiplications take.
bool is_small(const AttentionProblem& p) {
  const int64_t scores = p.batch * p.heads * p.seqlen_q * p.seqlen_k;
  return scores * (p.head_dim + p.head_dim_v) < 200000;
}

void run(const AttentionForward& f) {
  const SingleThread scope(is_small(f.p));
  PYOPS_ISA_SELECT(attention_forward)(f);
}

std::tuple<Tensor, Tensor> attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                     const OptionalTensor& bias, const OptionalTensor& alibi_slopes,
                                     const OptionalTensor& sinks, const OptionalTensor& rng_state,
                                     double scale, double softcap, int64_t window_left,
                                     int64_t window_right, bool top_left, double dropout_p) {
  AttentionForward f{};
  f.p = make_attention_problem(query, key, value, bias, alibi_slopes, sinks, rng_state, scale,
                               softcap, window_left, window_right, top_left, dropout_p);
  Tensor output = empty_heads_like(query, f.p.head_dim_v);
  Tensor lse = empty_contiguous<3>({f.p.batch, f.p.heads, f.p.seqlen_q}, ScalarType::Float);
  f.output = output.mutable_data_ptr(), f.output_strides = head_strides("output", output);
  f.lse = static_cast<float*>(lse.mutable_data_ptr());
  f.lse_batch_stride = f.p.heads * f.p.seqlen_q, f.lse_head_stride = f.p.seqlen_q;
  run(f);
  return {output, lse};
}

// What it refuses, the public function checks again with errors that say more, or does otherwise.
Tensor attention_plain(const Tensor& query, const Tensor& key, const Tensor& value,
                       std::optional<double> scale, bool causal, bool top_left) {
  STD_TORCH_CHECK(query.numel() > 0 && key.numel() > 0 && value.numel() > 0,
                  "query, key, value: expected no empty tensor");
  const double factor = scale ? *scale : std::pow(query.size(query.dim() - 1), -0.5);
  STD_TORCH_CHECK(std::isfinite(factor), "scale: expected a finite number, got ", factor);
  const Tensor q = with_unit_last_stride(query), k = with_unit_last_stride(key),
               v = with_unit_last_stride(value);
  AttentionForward f{};
  f.p =
      make_attention_problem(q, k, v, {}, {}, {}, {}, factor, 0, -1, causal ? 0 : -1, top_left, 0);
  Tensor output = empty_heads_like(q, f.p.head_dim_v);
  f.output = output.mutable_data_ptr(), f.output_strides = head_strides("output", output);
  run(f);
  return output;
}

std::tuple<Tensor, Tensor> attention_varlen(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& cu_seqlens_q,
    const Tensor& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
    const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
    const OptionalTensor& rng_state, double scale, double softcap, int64_t window_left,
    int64_t window_right, bool top_left, double dropout_p) {
  AttentionForward f{};
  f.p = make_attention_varlen_problem(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
                                      max_seqlen_k, alibi_slopes, sinks, rng_state, scale, softcap,
                                      window_left, window_right, top_left, dropout_p);
  const int64_t total = query.size(0);
  Tensor output = empty_contiguous<3>({total, f.p.heads, f.p.head_dim_v}, query.scalar_type());
  Tensor lse = empty_contiguous<2>({f.p.heads, total}, ScalarType::Float);
  f.output = output.mutable_data_ptr(), f.output_strides = packed_strides("output", output);
  f.lse = static_cast<float*>(lse.mutable_data_ptr());
  f.lse_head_stride = total;
  // Rows after the last sequence.
  const int64_t used = f.p.cu_seqlens_q[f.p.batch], row = f.p.heads * f.p.head_dim_v;
  std::memset(static_cast<char*>(f.output) + used * row * element_size(f.p.dtype), 0,
              (total - used) * row * element_size(f.p.dtype));
  for (int64_t h = 0; h < f.p.heads; ++h) {
    std::fill(f.lse + h * total + used, f.lse + (h + 1) * total,
              -std::numeric_limits<float>::infinity());
  }
  run(f);
  return {output, lse};
}

}  // namespace
}  // namespace pyops::cpu

STABLE_TORCH_LIBRARY_IMPL(pyops, CPU, m) {
  m.impl("attention", TORCH_BOX(&pyops::cpu::attention));
  m.impl("attention_plain", TORCH_BOX(&pyops::cpu::attention_plain));
  m.impl("attention_varlen", TORCH_BOX(&pyops::cpu::attention_varlen));
}
