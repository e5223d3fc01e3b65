// Between torch's tensors and the kernels' plain pointers: dtypes, and new tensors on the CPU.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>

#include "../checks.h"
#include "dtype.h"

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

// channels_last where the channels lie innermost; contiguous for all else.
inline bool lies_channels_last(const Tensor& t) {
  return t.size(1) > 1 && t.stride(1) == 1 && !t.is_contiguous();
}

inline std::array<int64_t, 4> dense_strides(const std::array<int64_t, 4>& size,
                                            bool channels_last) {
  if (channels_last) return {size[1] * size[2] * size[3], 1, size[3] * size[1], size[1]};
  return {size[1] * size[2] * size[3], size[2] * size[3], size[3], 1};
}

inline Tensor empty_dense(const std::array<int64_t, 4>& size, bool channels_last,
                          ScalarType dtype) {
  return empty_strided(size, dense_strides(size, channels_last), dtype);
}

// The tensor itself if it already lies densely in that format, else a copy that does.
inline Tensor as_dense(const Tensor& t, bool channels_last) {
  const std::array<int64_t, 4> size = {t.size(0), t.size(1), t.size(2), t.size(3)};
  const auto strides = dense_strides(size, channels_last);
  bool dense = true;
  for (int64_t i = 0; i < 4; ++i) dense = dense && (size[i] == 1 || t.stride(i) == strides[i]);
  if (dense) return t;
  return torch::stable::contiguous(t, channels_last ? torch::headeronly::MemoryFormat::ChannelsLast
                                                    : torch::headeronly::MemoryFormat::Contiguous);
}

}  // namespace pyops::cpu
