// conv_relu_pool2d on CUDA: checks, memory formats, choice of kernel, registration.
#include "conv_relu_pool.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../conv_relu_pool_checks.h"
#include "tensors.h"

namespace pyops::cuda {
namespace {

// From so many input channels a group on, an input whose channels do not lie innermost is copied
// into channels_last: what reads it needs 16 bytes of channels at a time to be fast.
constexpr int64_t kChannelsCopied = 16;

DType dtype_of(const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kHalf;
    default:
      STD_TORCH_CHECK(false, name, ": backend cuda takes float32, bfloat16 and float16");
  }
}

Strides strides_of(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}; }

Tensor empty_dense(const Tensor& like, const std::array<int64_t, 4>& size, bool channels_last,
                   ScalarType dtype) {
  return empty_strided(like, size, dense_strides(size, channels_last), dtype);
}

void run_forward(const ConvPoolForward& p, const Tensor& like) {
  const cudaStream_t stream = current_stream(like);
  switch (conv_relu_pool_forward_kernel(p)) {
    case ForwardKernel::kHopper:
      return conv_relu_pool_forward_hopper(p, stream);
    case ForwardKernel::kMma:
      return conv_relu_pool_forward_mma(p, stream);
    case ForwardKernel::kFma:
      return conv_relu_pool_forward_fma(p, stream);
    default:
      STD_TORCH_CHECK(false, "backend cuda has no kernel for input (", p.batch, ", ", p.in_channels,
                      ", ", p.in_h, ", ", p.in_w, ") with a window of ", p.pool_h, " x ", p.pool_w,
                      " on compute capability ", p.device.capability);
  }
}

template <bool AllowTf32>
std::tuple<Tensor, Tensor> forward(const Tensor& input, const Tensor& weight,
                                   const std::optional<Tensor>& bias, PYOPS_CONV_POOL_PARAMETERS,
                                   bool with_codes) {
  ConvPoolForward p{};
  static_cast<ConvPoolGeometry&>(p) = make_geometry(input, weight, PYOPS_CONV_POOL_OPTIONS);
  p.dtype = dtype_of("input", input);
  p.allow_tf32 = AllowTf32;
  if (bias) {
    check_shape("bias", *bias, {p.out_channels});
    check_same("bias", *bias, "input", input);
  }
  const bool codes_wanted = with_codes && stores_codes(p);
  STD_TORCH_CHECK(!codes_wanted || codes_fit(p), "pool_size: a window of ", p.pool_h, " x ",
                  p.pool_w, " is too large for backend cuda when gradients are needed");
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  p.device = device_of(input);
  const bool channels_last = lies_channels_last(input);
  const std::array<int64_t, 4> size = {p.batch, p.out_channels, p.out_h, p.out_w};
  Tensor output = empty_dense(input, size, channels_last, input.scalar_type());
  Tensor codes = codes_wanted ? empty_dense(input, size, channels_last, ScalarType::Byte)
                              : empty_vector(input, 0, ScalarType::Byte);
  if (p.batch > 0) {
    const bool copied = input.stride(1) != 1 && p.in_channels / p.groups >= kChannelsCopied;
    const Tensor x = copied ? as_dense(input, true) : input;
    const Tensor w = as_dense(weight, true);
    std::optional<Tensor> b = bias;
    if (b && !b->is_contiguous()) b = torch::stable::contiguous(*b);
    p.input = x.const_data_ptr();
    p.in = strides_of(x);
    p.weight = w.const_data_ptr();
    p.bias = b ? b->const_data_ptr() : nullptr;
    p.output = output.mutable_data_ptr();
    p.out = strides_of(output);
    p.codes = codes_wanted ? static_cast<uint8_t*>(codes.mutable_data_ptr()) : nullptr;
    run_forward(p, input);
  }
  return {output, codes};
}

template <bool AllowTf32>
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& input,
                                            const Tensor& weight, const Tensor& codes,
                                            PYOPS_CONV_POOL_PARAMETERS,
                                            std::vector<bool> output_mask) {
  ConvPoolBackward p{};
  static_cast<ConvPoolGeometry&>(p) = make_geometry(input, weight, PYOPS_CONV_POOL_OPTIONS);
  p.dtype = dtype_of("input", input);
  p.allow_tf32 = AllowTf32;
  STD_TORCH_CHECK(output_mask.size() == 3, "output_mask: expected three booleans, got ",
                  output_mask.size());
  STD_TORCH_CHECK(codes_fit(p), "pool_size: a window of ", p.pool_h, " x ", p.pool_w,
                  " is too large for backend cuda when gradients are needed");
  const std::vector<int64_t> out_shape = {p.batch, p.out_channels, p.out_h, p.out_w};
  check_shape("grad_output", grad_output, out_shape);
  check_same("grad_output", grad_output, "input", input);
  const bool by_codes = stores_codes(p);
  const bool by_output = !by_codes && p.activation != Activation::kNone;
  if (by_codes || by_output) check_shape("codes", codes, out_shape);
  if (by_codes) {
    STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Byte, "codes: expected dtype uint8");
  } else if (by_output) {
    check_same("codes", codes, "input", input);
  }

  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  p.device = device_of(input);
  const ScalarType dtype = input.scalar_type();
  Tensor grad_input = empty_vector(input, 0, dtype);
  Tensor grad_weight = empty_vector(input, 0, dtype);
  Tensor grad_bias = empty_vector(input, 0, dtype);
  if (output_mask[0]) {
    grad_input = empty_dense(input, {p.batch, p.in_channels, p.in_h, p.in_w},
                             lies_channels_last(input), dtype);
  }
  if (p.batch == 0) {
    if (output_mask[1]) grad_weight = torch::stable::new_zeros(weight, weight.sizes());
    if (output_mask[2]) grad_bias = torch::stable::new_zeros(weight, {p.out_channels});
    return {grad_input, grad_weight, grad_bias};
  }
  if (output_mask[0]) {
    p.grad_input = grad_input.mutable_data_ptr();
    p.grad_in = strides_of(grad_input);
  }
  if (output_mask[1]) {
    grad_weight =
        empty_dense(input, {p.out_channels, weight.size(1), p.kernel_h, p.kernel_w}, false, dtype);
    p.grad_weight = grad_weight.mutable_data_ptr();
  }
  if (output_mask[2]) {
    grad_bias = empty_vector(input, p.out_channels, dtype);
    p.grad_bias = grad_bias.mutable_data_ptr();
  }
  const Tensor grad = as_dense(grad_output, true);
  const Tensor selector = by_codes || by_output ? as_dense(codes, true) : codes;
  const bool copied = input.stride(1) != 1 && p.in_channels / p.groups >= kChannelsCopied;
  const Tensor x = copied ? as_dense(input, true) : input;
  const Tensor w = as_dense(weight, true);
  p.grad_output = grad.const_data_ptr();
  if (by_codes) p.codes = static_cast<const uint8_t*>(selector.const_data_ptr());
  if (by_output) p.output = selector.const_data_ptr();
  p.input = x.const_data_ptr();
  p.in = strides_of(x);
  p.weight = w.const_data_ptr();
  std::optional<Tensor> expanded;
  if (needs_expanded(p)) {
    expanded = empty_dense(input, {p.batch, p.out_channels, p.conv_h, p.conv_w}, true, dtype);
    p.expanded = expanded->mutable_data_ptr();
  } else if (!fuses(p)) {
    p.expanded = grad.data_ptr();
  }
  const size_t bytes = conv_relu_pool_backward_workspace(p);
  Tensor workspace = empty_vector(input, static_cast<int64_t>(bytes), ScalarType::Byte);
  p.workspace = workspace.mutable_data_ptr();
  conv_relu_pool_backward(
      p, [&](ConvPoolForward& f) { run_forward(f, input); }, current_stream(input));
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace
}  // namespace pyops::cuda

STABLE_TORCH_LIBRARY_IMPL(pyops, CUDA, m) {
  m.impl("conv_relu_pool2d", TORCH_BOX(&pyops::cuda::forward<false>));
  m.impl("conv_relu_pool2d_backward", TORCH_BOX(&pyops::cuda::backward<false>));
  m.impl("conv_relu_pool2d_tf32", TORCH_BOX(&pyops::cuda::forward<true>));
  m.impl("conv_relu_pool2d_tf32_backward", TORCH_BOX(&pyops::cuda::backward<true>));
}
