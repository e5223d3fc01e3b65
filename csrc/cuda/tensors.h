// Between torch's tensors and the kernels' plain pointers: new tensors, streams and facts of a
// device.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>

#include "../checks.h"
#include "../memory_format.h"
#include "conv_relu_pool.h"

namespace pyops::cuda {

using torch::headeronly::ScalarType;

// Uninitialised, on the device of `like`.
template <size_t Rank>
Tensor empty_strided(const Tensor& like, const std::array<int64_t, Rank>& size,
                     const std::array<int64_t, Rank>& strides, ScalarType dtype) {
  const int32_t shim_dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  PYOPS_SHIM_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(Rank), size.data(), strides.data(),
                                            shim_dtype, aoti_torch_device_type_cuda(),
                                            like.get_device_index(), &handle));
  return Tensor(handle);
}

inline Tensor empty_vector(const Tensor& like, int64_t size, ScalarType dtype) {
  return empty_strided<1>(like, {size}, {1}, dtype);
}

inline cudaStream_t current_stream(const Tensor& like) {
  void* stream = nullptr;
  PYOPS_SHIM_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// PYOPS_CUDA_ARCH=80 takes the kernels that an sm_80 would.
inline Device device_of(const Tensor& like) {
  constexpr int kMost = 64;
  static Device known[kMost];  // written by several threads at most with the same values
  const int index = like.get_device_index();
  STD_TORCH_CHECK(index >= 0 && index < kMost, "device: index ", index, " is beyond ", kMost);
  Device device = known[index];
  if (device.multiprocessors == 0) {
    int major = 0, minor = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index);
    const cudaError_t error =
        cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index);
    STD_TORCH_CHECK(error == cudaSuccess, "device ", index, ": ", cudaGetErrorString(error));
    device.capability = major * 10 + minor;
    known[index] = device;
  }
#ifndef PYOPS_SM90A  // built without code for 9.0a: none of its kernels
  device.capability = std::min(device.capability, 89);
#endif
  if (const char* lowered = std::getenv("PYOPS_CUDA_ARCH")) {
    device.capability = std::min(device.capability, std::atoi(lowered));
  }
  return device;
}

}  // namespace pyops::cuda
