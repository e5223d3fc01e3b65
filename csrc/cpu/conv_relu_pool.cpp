// conv_relu_pool2d on the CPU: checks, memory formats, choice of kernel, registration.
#include "conv_relu_pool.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <string>
#include <tuple>
#include <vector>

#include "../conv_relu_pool_checks.h"
#include "conv_relu_pool_expand.h"
#include "conv_relu_pool_strided.h"
#include "runtime.h"
#include "tensors.h"

namespace pyops::cpu {
namespace {

using IntList = std::vector<int64_t>;

ConvReluPoolParams make_params(const Tensor& input, const Tensor& weight,
                               const ConvPoolOptions& options) {
  ConvReluPoolParams p{};
  static_cast<ConvPoolGeometry&>(p) = make_geometry(input, weight, options);
  p.dtype = dtype_of("input", input);
  p.channels_last = lies_channels_last(input);
  return p;
}

// Waking another thread costs some microseconds: about what this many multiplications take.
bool is_small(const ConvReluPoolParams& p) {
  const int64_t products = p.batch * p.out_channels * p.conv_h * p.conv_w * p.kernel_h *
                           p.kernel_w * (p.in_channels / p.groups);
  return products < 200000;
}

// The weight lies as p.weight_channels_last says; it is copied only where a kernel needs it so.
void run_forward(ConvReluPoolParams& p, const Tensor& weight) {
  const SingleThread scope(is_small(p));
  Tensor w = weight;
  const auto lay_contiguous = [&] {
    w = as_dense(weight, false);
    p.weight = w.const_data_ptr();
    p.weight_channels_last = false;
  };
  if (p.groups > 1 || p.in_channels < 8 || p.in_channels % 2 == 1) lay_contiguous();
  if (suits_strided_forward(p)) {
    lay_contiguous();
    if (strided_forward(p)) return;
  }
  if (p.dtype != DType::kDouble) {
    if (PYOPS_ISA_SELECT(conv_relu_pool_stem)(p)) return;
    if (PYOPS_ISA_SELECT(conv_relu_pool_winograd_int16)(p)) return;
    if (PYOPS_ISA_SELECT(conv_relu_pool_winograd)(p)) return;
    if (PYOPS_ISA_SELECT(conv_relu_pool_winograd_any_pool)(p)) return;
    if (PYOPS_ISA_SELECT(conv_relu_pool_depthwise)(p)) return;
    if (PYOPS_ISA_SELECT(conv_relu_pool_direct)(p)) return;
  }
  lay_contiguous();
  conv_relu_pool_generic(p);
}

// Images of a few pixels fill the direct kernel's rows badly: the library's convolution and the
// activation in place are faster. Always NCHW: its channels_last has several times the error.
bool library_is_faster(const ConvReluPoolParams& p) {
  return p.dtype == DType::kFloat && p.pool == Pool::kNone &&
         std::max(p.stride_h, p.stride_w) > 1 && p.groups == 1 && p.conv_h * p.conv_w <= 16 &&
         p.in_channels >= 128 && p.batch >= 16 && !stores_codes(p) && !suits_strided_forward(p);
}

Tensor library_forward(const ConvReluPoolParams& p, const Tensor& input, const Tensor& weight,
                       const std::optional<Tensor>& bias) {
  const IntList stride = {p.stride_h, p.stride_w}, padding = {p.pad_h, p.pad_w};
  const IntList dilation = {p.dilation_h, p.dilation_w}, no_padding = {0, 0};
  using torch::stable::detail::from;
  std::array<StableIValue, 9> stack{from(as_dense(input, false)),
                                    from(as_dense(weight, false)),
                                    from(bias),
                                    from(stride),
                                    from(padding),
                                    from(dilation),
                                    from(false),
                                    from(no_padding),
                                    from(p.groups)};
  PYOPS_SHIM_CHECK(torch_call_dispatcher("aten::convolution", "", stack.data(), TORCH_ABI_VERSION));
  Tensor output = as_dense(torch::stable::detail::to<Tensor>(stack[0]), p.channels_last);
  if (p.activation == Activation::kNone) return output;
  const float slope =
      p.activation == Activation::kLeakyRelu ? static_cast<float>(p.negative_slope) : 0.0f;
  const int64_t image = p.out_channels * p.out_h * p.out_w;
  float* data = static_cast<float*>(output.mutable_data_ptr());
  parallel_for(p.batch, [&](int64_t b) {
    float* y = data + b * image;
    for (int64_t i = 0; i < image; ++i) {
      const float below = slope == 0.0f ? 0.0f : y[i] * slope;  // not 0 * -infinity
      y[i] = y[i] < 0.0f ? below : y[i];
    }
  });
  return output;
}

std::tuple<Tensor, Tensor> forward(const Tensor& input, const Tensor& weight,
                                   const std::optional<Tensor>& bias, PYOPS_CONV_POOL_PARAMETERS,
                                   bool with_codes) {
  ConvReluPoolParams p = make_params(input, weight, PYOPS_CONV_POOL_OPTIONS);
  if (bias) {
    check_shape("bias", *bias, {p.out_channels});
    check_same("bias", *bias, "input", input);
  }
  const bool codes_wanted = with_codes && stores_codes(p);
  STD_TORCH_CHECK(!codes_wanted || codes_fit(p), "pool_size: a window of ", p.pool_h, " x ",
                  p.pool_w, " is too large for backend cpu when gradients are needed");
  if (library_is_faster(p)) {
    return {library_forward(p, input, weight, bias), empty_vector(0, ScalarType::Byte)};
  }
  const std::array<int64_t, 4> size = {p.batch, p.out_channels, p.out_h, p.out_w};
  Tensor output = empty_dense(size, p.channels_last, input.scalar_type());
  Tensor codes = codes_wanted ? empty_dense(size, p.channels_last, ScalarType::Byte)
                              : empty_vector(0, ScalarType::Byte);
  if (p.batch > 0) {
    const Tensor x = as_dense(input, p.channels_last);
    p.weight_channels_last = lies_channels_last(weight);
    const Tensor w = as_dense(weight, p.weight_channels_last);
    std::optional<Tensor> b = bias;
    if (b && !b->is_contiguous()) b = torch::stable::contiguous(*b);
    p.input = x.const_data_ptr();
    p.weight = w.const_data_ptr();
    p.bias = b ? b->const_data_ptr() : nullptr;
    p.output = output.mutable_data_ptr();
    p.codes = codes_wanted ? static_cast<uint8_t*>(codes.mutable_data_ptr()) : nullptr;
    run_forward(p, w);
  }
  return {output, codes};
}

// What the sparse kernel does not take: the gradient before the pool is written out, then come
// the gradients of the plain convolution, the library's where our own are not faster.
void backward_dense(ConvReluPoolGradParams g, const Tensor& input, const Tensor& weight,
                    const std::vector<bool>& mask, const Tensor& codes_or_output,
                    std::array<Tensor*, 3> results) {
  const ConvReluPoolParams& p = g.p;
  const ScalarType dtype = input.scalar_type();
  const std::array<int64_t, 4> size = {p.batch, p.out_channels, p.conv_h, p.conv_w};
  Tensor expanded = empty_dense(size, p.channels_last, dtype);
  const bool by_output = codes_or_output.scalar_type() == dtype;
  const void* output = by_output ? codes_or_output.const_data_ptr() : nullptr;
  if (mask[2]) {
    *results[2] = empty_vector(p.out_channels, dtype);
    g.grad_bias = results[2]->mutable_data_ptr();
  }
  if (!activation_gradient(g, output, expanded.mutable_data_ptr())) {
    expand_gradient(g, output, expanded.mutable_data_ptr());
    // the library's own sum has several times the error in channels_last
    if (mask[2]) sum_channels(p, expanded.const_data_ptr(), g.grad_bias);
  }
  bool wanted[3] = {mask[0], mask[1], false};
  if (mask[0]) {
    Tensor dx = empty_dense({p.batch, p.in_channels, p.in_h, p.in_w}, p.channels_last, dtype);
    wanted[0] = !strided_grad_input(p, expanded.const_data_ptr(), dx.mutable_data_ptr());
    if (!wanted[0]) *results[0] = dx;
  }
  if (mask[1]) {
    Tensor dw = empty_dense({p.out_channels, weight.size(1), p.kernel_h, p.kernel_w}, false, dtype);
    wanted[1] = !strided_grad_weight(p, expanded.const_data_ptr(), dw.mutable_data_ptr());
    if (!wanted[1]) *results[1] = dw;
  }
  if (!wanted[0] && !wanted[1]) return;
  const IntList stride = {p.stride_h, p.stride_w}, padding = {p.pad_h, p.pad_w};
  const IntList dilation = {p.dilation_h, p.dilation_w}, no_padding = {0, 0};
  using torch::stable::detail::from;
  std::array<StableIValue, 11> stack{from(expanded),
                                     from(input),
                                     from(weight),
                                     from(std::optional<IntList>()),
                                     from(stride),
                                     from(padding),
                                     from(dilation),
                                     from(false),
                                     from(no_padding),
                                     from(p.groups),
                                     from(torch::headeronly::HeaderOnlyArrayRef<bool>(wanted, 3))};
  PYOPS_SHIM_CHECK(
      torch_call_dispatcher("aten::convolution_backward", "", stack.data(), TORCH_ABI_VERSION));
  for (int i = 0; i < 3; ++i) {
    Tensor result = torch::stable::detail::to<Tensor>(stack[i]);
    if (wanted[i]) *results[i] = as_dense(result, i == 0 && p.channels_last);
  }
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& input,
                                            const Tensor& weight, const Tensor& codes,
                                            PYOPS_CONV_POOL_PARAMETERS,
                                            std::vector<bool> output_mask) {
  ConvReluPoolGradParams g{};
  ConvReluPoolParams& p = g.p;
  p = make_params(input, weight, PYOPS_CONV_POOL_OPTIONS);
  STD_TORCH_CHECK(output_mask.size() == 3, "output_mask: expected three booleans, got ",
                  output_mask.size());
  STD_TORCH_CHECK(codes_fit(p), "pool_size: a window of ", p.pool_h, " x ", p.pool_w,
                  " is too large for backend cpu when gradients are needed");
  check_shape("grad_output", grad_output, {p.batch, p.out_channels, p.out_h, p.out_w});
  check_same("grad_output", grad_output, "input", input);
  Tensor selector = codes;
  if (stores_codes(p)) {
    check_shape("codes", codes, {p.batch, p.out_channels, p.out_h, p.out_w});
    STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Byte, "codes: expected dtype uint8");
    selector = as_dense(codes, p.channels_last);
    p.codes = static_cast<uint8_t*>(selector.data_ptr());
  } else if (p.activation != Activation::kNone) {
    check_shape("codes", codes, {p.batch, p.out_channels, p.out_h, p.out_w});
    check_same("codes", codes, "input", input);
    selector = as_dense(codes, p.channels_last);
  }

  const ScalarType dtype = input.scalar_type();
  Tensor grad_input = empty_vector(0, dtype);
  Tensor grad_weight = empty_vector(0, dtype);
  Tensor grad_bias = empty_vector(0, dtype);
  if (p.batch == 0) {
    if (output_mask[0]) {
      grad_input = empty_dense({p.batch, p.in_channels, p.in_h, p.in_w}, p.channels_last, dtype);
    }
    if (output_mask[1]) grad_weight = torch::stable::new_zeros(weight, weight.sizes());
    if (output_mask[2]) grad_bias = torch::stable::new_zeros(weight, {p.out_channels});
    return {grad_input, grad_weight, grad_bias};
  }
  const SingleThread scope(is_small(p));
  const Tensor grad = as_dense(grad_output, p.channels_last);
  const Tensor x = as_dense(input, p.channels_last);
  const Tensor w = as_dense(weight, false);
  g.grad_output = grad.const_data_ptr();
  p.input = x.const_data_ptr();
  p.weight = w.const_data_ptr();

  if (p.pool == Pool::kMax && p.dtype != DType::kDouble) {
    Tensor dx = grad_input, dw = grad_weight, db = grad_bias;
    if (output_mask[0]) {
      dx = empty_dense({p.batch, p.in_channels, p.in_h, p.in_w}, p.channels_last, dtype);
      g.grad_input = dx.mutable_data_ptr();
    }
    if (output_mask[1]) {
      dw = empty_dense({p.out_channels, weight.size(1), p.kernel_h, p.kernel_w}, false, dtype);
      g.grad_weight = dw.mutable_data_ptr();
    }
    if (output_mask[2]) {
      db = empty_vector(p.out_channels, dtype);
      g.grad_bias = db.mutable_data_ptr();
    }
    if (PYOPS_ISA_SELECT(conv_relu_pool_backward_sparse)(g)) return {dx, dw, db};
    g.grad_input = g.grad_weight = g.grad_bias = nullptr;
  }
  backward_dense(g, x, w, output_mask, selector, {&grad_input, &grad_weight, &grad_bias});
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace
}  // namespace pyops::cpu

STABLE_TORCH_LIBRARY_IMPL(pyops, CPU, m) {
  m.impl("conv_relu_pool2d", TORCH_BOX(&pyops::cpu::forward));
  m.impl("conv_relu_pool2d_backward", TORCH_BOX(&pyops::cpu::backward));
}
