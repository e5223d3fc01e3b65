/// The one way to launch a kernel, and tensor maps for TMA. No torch here: the op's entry makes the
/// tensors' device current (torch::stable::accelerator::DeviceGuard) and gives its stream.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "ptx.cuh"

namespace pyops {

struct LaunchConfig {
  const char* name;  // of the kernel, for messages
  dim3 grid;
  dim3 block;
  dim3 cluster{1, 1, 1};
  size_t smem = 0;  // bytes of dynamic shared memory
  cudaStream_t stream = nullptr;
};

inline std::string describe(const LaunchConfig& config) {
  const auto size = [](const dim3& d) {
    return std::to_string(d.x) + "x" + std::to_string(d.y) + "x" + std::to_string(d.z);
  };
  return std::string(config.name) + " (grid " + size(config.grid) + ", block " +
         size(config.block) + ", cluster " + size(config.cluster) + ", " +
         std::to_string(config.smem) + " bytes of shared memory)";
}

inline std::string describe(const char* what) { return what; }

// `what` failed: a text, or the launch's config, put into words only then.
template <class What>
void check(cudaError_t error, const What& what) {
  if (error == cudaSuccess) return;
#ifdef PYOPS_EMULATE
  throw std::runtime_error(describe(what));
#else
  cudaGetLastError();  // or the next launch would report this error again
  throw std::runtime_error(describe(what) + ": " + cudaGetErrorString(error));
#endif
}

/// Launches kernel(args...); std::runtime_error with the kernel's name and sizes if that fails.
/// An empty grid launches nothing.
template <class... Params, class... Args>
void launch(const LaunchConfig& config, void (*kernel)(Params...), Args&&... args) {
  if (config.grid.x == 0 || config.grid.y == 0 || config.grid.z == 0) return;
#ifdef PYOPS_EMULATE
  const auto thread = [&] { kernel(static_cast<Params>(args)...); };
  emu::launch({describe(config).c_str(), config.grid, config.block, config.cluster, config.smem},
              std::cref(thread));
#else
  if (config.smem > 48 * 1024)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(config.smem)),
          config);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = config.cluster.x;
  attribute.val.clusterDim.y = config.cluster.y;
  attribute.val.clusterDim.z = config.cluster.z;
  const bool clustered = config.cluster.x * config.cluster.y * config.cluster.z > 1;
  cudaLaunchConfig_t native{};
  native.gridDim = config.grid;
  native.blockDim = config.block;
  native.dynamicSmemBytes = config.smem;
  native.stream = config.stream;
  native.attrs = &attribute;
  native.numAttrs = clustered ? 1 : 0;
  check(cudaLaunchKernelEx(&native, kernel, static_cast<Params>(args)...), config);
#endif
}

/// A tensor in global memory as TMA sees it. Dimensions innermost first.
struct TensorMapConfig {
  CUtensorMapDataType type;
  int rank;
  const void* base;                  // aligned to 16 bytes
  uint64_t sizes[5];                 // elements
  uint64_t strides[4];               // bytes, of dimensions 1...; multiples of 16
  uint32_t box[5];                   // elements spanned, at most 256 each
  uint32_t steps[5]{1, 1, 1, 1, 1};  // every steps[i]-th element of the box is taken
  CUtensorMapSwizzle swizzle = CU_TENSOR_MAP_SWIZZLE_NONE;
  CUtensorMapL2promotion promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_128B;
};

/// The tensor map for TMA: pass it to the kernel as `const __grid_constant__ CUtensorMap`.
/// Reads outside the tensor give zeros.
inline CUtensorMap make_tensor_map(const TensorMapConfig& config) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
#ifdef PYOPS_EMULATE
  const Encode encode = cuTensorMapEncodeTiled;
#else
  // Looked up through the runtime, so that nothing links against libcuda.
  static const Encode encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult result{};
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000,
                                           cudaEnableDefault, &result),
          "cuTensorMapEncodeTiled");
    if (result != cudaDriverEntryPointSuccess)
      throw std::runtime_error("the driver has no cuTensorMapEncodeTiled: it needs CUDA 12");
    return reinterpret_cast<Encode>(entry);
  }();
#endif
  CUtensorMap map;
  const CUresult result = encode(
      &map, config.type, static_cast<cuuint32_t>(config.rank), const_cast<void*>(config.base),
      config.sizes, config.strides, config.box, config.steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      config.swizzle, config.promotion, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    std::string text = "cuTensorMapEncodeTiled refused (error " +
                       std::to_string(static_cast<int>(result)) + ") rank " +
                       std::to_string(config.rank) + ", sizes";
    for (int i = 0; i < config.rank; ++i) text += " " + std::to_string(config.sizes[i]);
    text += ", strides";
    for (int i = 0; i + 1 < config.rank; ++i) text += " " + std::to_string(config.strides[i]);
    text += ", box";
    for (int i = 0; i < config.rank; ++i) text += " " + std::to_string(config.box[i]);
    throw std::runtime_error(text);
  }
  return map;
}

/// Element type of a tensor map.
template <class T>
constexpr CUtensorMapDataType tensor_map_type() {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  else if constexpr (std::is_same_v<T, __half>)
    return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  else if constexpr (std::is_same_v<T, float>)
    return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  else if constexpr (sizeof(T) == 4)
    return CU_TENSOR_MAP_DATA_TYPE_UINT32;
  else
    return CU_TENSOR_MAP_DATA_TYPE_UINT8;
}

}  // namespace pyops
