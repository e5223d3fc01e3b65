// lstm on the CPU: checks, memory layouts, registration.
#include "lstm.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <array>
#include <cstring>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "runtime.h"
#include "tensors.h"

namespace pyops::cpu {
namespace {

using OptionalTensor = std::optional<Tensor>;

// What both ops are called with, made readable by the kernels; keeps copies alive.
struct Call {
  LstmParams p{};
  Tensor input, h0, c0;
  std::vector<Tensor> weights;
  std::vector<const void*> weight_data;
  std::vector<int64_t> batch_sizes, row_begin;
  bool batch_first;
};

Tensor as_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// The tensor itself if its features lie side by side and no stride is negative or zero by
// expansion only where a kernel reads; else a copy.
Tensor with_unit_stride(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.size(last) <= 1 || t.stride(last) == 1 ? t : torch::stable::contiguous(t);
}

LstmSequence sequence_of(const Tensor& t, void* data) {
  return t.dim() == 3 ? LstmSequence{data, t.stride(0), t.stride(1)}
                      : LstmSequence{data, 0, t.stride(0)};
}

// (steps, batch, features) or packed (rows, features), laid out as the op's input is.
Tensor empty_sequence(const Call& call, int64_t features, ScalarType dtype) {
  const LstmParams& p = call.p;
  if (p.batch_sizes) return empty_contiguous<2>({p.rows, features}, dtype);
  const std::array<int64_t, 3> size = {p.steps, p.batch, features};
  if (!call.batch_first) return empty_contiguous<3>(size, dtype);
  const auto at_least_one = [](int64_t n) { return n > 0 ? n : 1; };
  return empty_strided<3>(
      size, {at_least_one(features), at_least_one(p.steps) * at_least_one(features), 1}, dtype);
}

// A large new tensor is mapped page by page as it is first written: with 4 KB pages that can take
// half as long as the computation.
void use_huge_pages(Tensor& t) {
#if defined(__linux__)
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(t.data_ptr());
  const uintptr_t end = begin + t.numel() * t.element_size();
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage;
  if (end > first + 4 * kPage) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

void read_batch_sizes(const Tensor& t, Call* call) {
  check_rank("batch_sizes", t, 1);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long, "batch_sizes: expected dtype int64");
  STD_TORCH_CHECK(t.is_cpu(), "batch_sizes: expected a tensor on the CPU");
  const Tensor dense = as_contiguous(t);
  const int64_t* sizes = static_cast<const int64_t*>(dense.const_data_ptr());
  LstmParams& p = call->p;
  p.steps = t.size(0);
  int64_t row = 0, most = p.batch;
  for (int64_t step = 0; step < p.steps; ++step) {
    const int64_t size = sizes[step];
    STD_TORCH_CHECK(size > 0 && size <= most && (step > 0 || size == p.batch),
                    "batch_sizes: expected positive integers that never increase, the first the "
                    "batch of h0 (",
                    p.batch, "), got ", size, " at ", step);
    call->batch_sizes.push_back(size);
    call->row_begin.push_back(row);
    row += size;
    most = size;
  }
  STD_TORCH_CHECK(row == p.rows, "batch_sizes: expected a sum of ", p.rows,
                  ", the rows of input, got ", row);
  p.batch_sizes = call->batch_sizes.data();
  p.row_begin = call->row_begin.data();
}

void read_call(const Tensor& input, const Tensor& h0, const Tensor& c0,
               const std::vector<Tensor>& weights, const OptionalTensor& batch_sizes,
               bool has_biases, int64_t num_layers, bool bidirectional, Call* call) {
  LstmParams& p = call->p;
  check_rank("input", input, batch_sizes ? 2 : 3);
  check_rank("h0", h0, 3);
  p.dtype = dtype_of("input", input);
  STD_TORCH_CHECK(p.dtype != DType::kDouble,
                  "input: backend cpu takes float32, bfloat16 and float16, got float64");
  STD_TORCH_CHECK(num_layers >= 1, "num_layers: expected at least 1, got ", num_layers);
  p.layers = num_layers;
  p.directions = bidirectional ? 2 : 1;
  p.has_biases = has_biases;
  p.batch = batch_sizes ? h0.size(1) : input.size(1);
  p.steps = input.size(0);
  p.rows = batch_sizes ? input.size(0) : p.steps * p.batch;
  p.input_size = input.size(input.dim() - 1);
  p.hidden_size = h0.size(2);
  STD_TORCH_CHECK(p.hidden_size > 0, "h0: expected a hidden size above 0, got ", shape_of(h0));
  call->batch_first = !batch_sizes && input.stride(1) > input.stride(0);
  if (batch_sizes) read_batch_sizes(*batch_sizes, call);
  const int64_t indices = p.layers * p.directions, gates = 4 * p.hidden_size;
  check_shape("h0", h0, {indices, p.batch, p.hidden_size});
  check_shape("c0", c0, {indices, p.batch, p.hidden_size});
  check_same("h0", h0, "input", input);
  check_same("c0", c0, "input", input);
  const int64_t per = p.tensors_per_index();
  STD_TORCH_CHECK(static_cast<int64_t>(weights.size()) == per * indices, "weights: expected ",
                  per * indices, " tensors, got ", weights.size());
  for (int64_t i = 0; i < per * indices; ++i) {
    const Tensor& w = weights[i];
    const int64_t kind = i % per, layer = i / per / p.directions;
    check_same("weights", w, "input", input);
    if (kind == 0) check_shape("w_ih", w, {gates, p.in_features(layer)});
    if (kind == 1) check_shape("w_hh", w, {gates, p.hidden_size});
    if (kind > 1) check_shape(kind == 2 ? "b_ih" : "b_hh", w, {gates});
    call->weights.push_back(as_contiguous(w));
    call->weight_data.push_back(call->weights.back().const_data_ptr());
  }
  call->input = with_unit_stride(input);
  call->h0 = as_contiguous(h0);
  call->c0 = as_contiguous(c0);
  p.input = sequence_of(call->input, call->input.data_ptr());
  p.h0 = call->h0.const_data_ptr();
  p.c0 = call->c0.const_data_ptr();
  p.weights = call->weight_data.data();
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& input, const Tensor& h0,
                                                   const Tensor& c0, std::vector<Tensor> weights,
                                                   const OptionalTensor& batch_sizes,
                                                   bool has_biases, int64_t num_layers,
                                                   bool bidirectional, bool save_for_backward) {
  Call call;
  read_call(input, h0, c0, weights, batch_sizes, has_biases, num_layers, bidirectional, &call);
  LstmParams& p = call.p;
  const ScalarType dtype = input.scalar_type();
  const std::array<int64_t, 3> state = {p.layers * p.directions, p.batch, p.hidden_size};
  Tensor output = empty_sequence(call, p.directions * p.hidden_size, dtype);
  Tensor h_n = empty_contiguous<3>(state, dtype), c_n = empty_contiguous<3>(state, dtype);
  Tensor saved = empty_vector(save_for_backward ? p.saved_size() : 0, dtype);
  use_huge_pages(saved);
  p.output = sequence_of(output, output.mutable_data_ptr());
  p.h_n = h_n.mutable_data_ptr();
  p.c_n = c_n.mutable_data_ptr();
  p.saved = save_for_backward ? saved.mutable_data_ptr() : nullptr;
  if (p.batch > 0 && p.steps > 0) {
    lstm_forward(p);
  } else {  // also no rows: nothing to copy
    std::memcpy(p.h_n, p.h0, state[0] * state[1] * state[2] * element_size(p.dtype));
    std::memcpy(p.c_n, p.c0, state[0] * state[1] * state[2] * element_size(p.dtype));
  }
  return {output, h_n, c_n, saved};
}

// No steps or no batch: the states pass unchanged.
void backward_without_rows(const LstmGradParams& g, std::vector<Tensor>& grad_weights) {
  const LstmParams& p = g.p;
  const size_t state = p.layers * p.directions * p.batch * p.hidden_size * element_size(p.dtype);
  const auto pass = [&](void* to, const void* from) {
    if (to && from) std::memcpy(to, from, state);
    if (to && !from) std::memset(to, 0, state);
  };
  pass(g.grad_h0, g.grad_h_n);
  pass(g.grad_c0, g.grad_c_n);
  for (Tensor& w : grad_weights) {
    std::memset(w.mutable_data_ptr(), 0, w.numel() * element_size(p.dtype));
  }
}

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> backward(
    const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
    const OptionalTensor& grad_c_n, const Tensor& input, const Tensor& h0, const Tensor& c0,
    std::vector<Tensor> weights, const OptionalTensor& batch_sizes, const Tensor& output,
    const Tensor& saved, bool has_biases, int64_t num_layers, bool bidirectional,
    std::vector<bool> output_mask) {
  Call call;
  read_call(input, h0, c0, weights, batch_sizes, has_biases, num_layers, bidirectional, &call);
  LstmGradParams g{};
  g.p = call.p;
  const LstmParams& p = g.p;
  STD_TORCH_CHECK(output_mask.size() == 4, "output_mask: expected four booleans, got ",
                  output_mask.size());
  const int64_t features = p.directions * p.hidden_size, indices = p.layers * p.directions;
  const std::vector<int64_t> state = {indices, p.batch, p.hidden_size};
  std::vector<int64_t> sequence = {p.steps, p.batch, features};
  if (p.batch_sizes) sequence = {p.rows, features};
  check_shape("output", output, sequence);
  check_same("output", output, "input", input);
  check_shape("saved", saved, {p.saved_size()});
  check_same("saved", saved, "input", input);
  const Tensor y = with_unit_stride(output), kept = as_contiguous(saved);
  g.p.output = sequence_of(y, y.data_ptr());
  g.p.saved = kept.data_ptr();

  Tensor dy = y, dh_n = y, dc_n = y;
  if (grad_output) {
    check_shape("grad_output", *grad_output, sequence);
    check_same("grad_output", *grad_output, "input", input);
    dy = with_unit_stride(*grad_output);
    g.grad_output = sequence_of(dy, dy.data_ptr());
  }
  if (grad_h_n) {
    check_shape("grad_h_n", *grad_h_n, state);
    check_same("grad_h_n", *grad_h_n, "input", input);
    dh_n = as_contiguous(*grad_h_n);
    g.grad_h_n = dh_n.const_data_ptr();
  }
  if (grad_c_n) {
    check_shape("grad_c_n", *grad_c_n, state);
    check_same("grad_c_n", *grad_c_n, "input", input);
    dc_n = as_contiguous(*grad_c_n);
    g.grad_c_n = dc_n.const_data_ptr();
  }

  const ScalarType dtype = input.scalar_type();
  Tensor grad_input = empty_vector(0, dtype), grad_h0 = empty_vector(0, dtype);
  Tensor grad_c0 = empty_vector(0, dtype);
  std::vector<Tensor> grad_weights;
  std::vector<void*> grad_weight_data;
  if (output_mask[0]) {
    grad_input = empty_sequence(call, p.input_size, dtype);
    g.grad_input = sequence_of(grad_input, grad_input.mutable_data_ptr());
  }
  if (output_mask[1]) {
    grad_h0 = empty_contiguous<3>({indices, p.batch, p.hidden_size}, dtype);
    g.grad_h0 = grad_h0.mutable_data_ptr();
  }
  if (output_mask[2]) {
    grad_c0 = empty_contiguous<3>({indices, p.batch, p.hidden_size}, dtype);
    g.grad_c0 = grad_c0.mutable_data_ptr();
  }
  if (output_mask[3]) {
    for (const Tensor& w : weights) {
      grad_weights.push_back(w.dim() == 1 ? empty_vector(w.size(0), dtype)
                                          : empty_contiguous<2>({w.size(0), w.size(1)}, dtype));
      grad_weight_data.push_back(grad_weights.back().mutable_data_ptr());
    }
    g.grad_weights = grad_weight_data.data();
  }
  if (p.rows > 0) {
    lstm_backward(g);
  } else {
    backward_without_rows(g, grad_weights);
  }
  return {grad_input, grad_h0, grad_c0, grad_weights};
}

}  // namespace
}  // namespace pyops::cpu

STABLE_TORCH_LIBRARY_IMPL(pyops, CPU, m) {
  m.impl("lstm", TORCH_BOX(&pyops::cpu::forward));
  m.impl("lstm_backward", TORCH_BOX(&pyops::cpu::backward));
}
