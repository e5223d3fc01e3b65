// Between torch's arguments and the kernels' plain ones: dtypes, activations, and new tensors on
// the CPU.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <string>

#include "../checks.h"
#include "../memory_format.h"
#include "dtype.h"
#include "output_activation.h"

namespace pyops::cpu {

using torch::headeronly::ScalarType;

inline DType dtype_of(const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kHalf;
    case ScalarType::Double:
      return DType::kDouble;
    default:
      STD_TORCH_CHECK(false, name, ": expected dtype float32, bfloat16, float16 or float64");
  }
}

inline OutputActivation output_activation_of(const std::string& name) {
  if (name == "relu") return OutputActivation::kRelu;
  if (name == "leaky_relu") return OutputActivation::kLeakyRelu;
  if (name == "tanh") return OutputActivation::kTanh;
  if (name == "sigmoid") return OutputActivation::kSigmoid;
  STD_TORCH_CHECK(name == "none",
                  "activation: expected relu, leaky_relu, tanh, sigmoid or none, got ", name);
  return OutputActivation::kNone;
}

// Uninitialised. torch::stable::empty costs several times as much.
template <size_t Rank>
Tensor empty_strided(const std::array<int64_t, Rank>& size,
                     const std::array<int64_t, Rank>& strides, ScalarType dtype) {
  const int32_t shim_dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  PYOPS_SHIM_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(Rank), size.data(), strides.data(),
                                            shim_dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

template <size_t Rank>
Tensor empty_contiguous(const std::array<int64_t, Rank>& size, ScalarType dtype) {
  std::array<int64_t, Rank> strides;
  int64_t stride = 1;
  for (size_t i = Rank; i-- > 0;) {
    strides[i] = stride;
    stride *= size[i] > 0 ? size[i] : 1;
  }
  return empty_strided(size, strides, dtype);
}

inline Tensor empty_vector(int64_t size, ScalarType dtype) {
  return empty_contiguous<1>({size}, dtype);
}

inline Tensor empty_dense(const std::array<int64_t, 4>& size, bool channels_last,
                          ScalarType dtype) {
  return empty_strided(size, dense_strides(size, channels_last), dtype);
}

}  // namespace pyops::cpu
