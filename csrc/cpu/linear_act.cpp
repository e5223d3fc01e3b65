// linear_act on the CPU: the library's matrix product, then the activation in place while the
// result is in cache.
#include "linear_act.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <optional>
#include <string>

#include "tensors.h"

namespace pyops::cpu {
namespace {

Tensor forward(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
               std::string activation, double negative_slope) {
  const DType dtype = dtype_of("input", input);
  STD_TORCH_CHECK(dtype != DType::kDouble, "input: backend cpu takes no float64");
  check_rank("weight", weight, 2);
  check_same("weight", weight, "input", input);
  if (bias) check_same("bias", *bias, "input", input);
  const OutputActivation kind = output_activation_of(activation);
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(input), from(weight), from(bias)};
  PYOPS_SHIM_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  Tensor output = torch::stable::detail::to<Tensor>(stack[0]);
  if (!output.is_contiguous()) output = torch::stable::contiguous(output);
  const ActivationParams p{kind, static_cast<float>(negative_slope), dtype, output.numel(),
                           output.mutable_data_ptr()};
  PYOPS_ISA_SELECT(activate)(p);
  return output;
}

}  // namespace
}  // namespace pyops::cpu

STABLE_TORCH_LIBRARY_IMPL(pyops, CPU, m) { m.impl("linear_act", TORCH_BOX(&pyops::cpu::forward)); }
