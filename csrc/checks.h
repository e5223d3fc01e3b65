// Checks of what an op is called with. The public Python functions say the same more
// fully; these stand between a direct call of torch.ops.pyops.* and a kernel.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

// For calls of torch's C shim; 2.11 and later versions name it differently.
#ifdef STABLE_TORCH_ERROR_CODE_CHECK
#define PYOPS_SHIM_CHECK(call) STABLE_TORCH_ERROR_CODE_CHECK(call)
#else
#define PYOPS_SHIM_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

namespace pyops {

using torch::stable::Tensor;

inline std::string shape_of(const Tensor& t) {
  std::string text = "(";
  for (int64_t i = 0; i < t.dim(); ++i) {
    text += (i ? ", " : "") + std::to_string(t.size(i));
  }
  return text + ")";
}

inline void check_rank(const char* name, const Tensor& t, int64_t rank) {
  STD_TORCH_CHECK(t.dim() == rank, name, ": expected ", rank, " dimensions, got shape ",
                  shape_of(t));
}

inline void check_same(const char* name, const Tensor& t, const char* other_name,
                       const Tensor& other) {
  STD_TORCH_CHECK(t.scalar_type() == other.scalar_type(), name, ": expected the dtype of ",
                  other_name);
  STD_TORCH_CHECK(t.device() == other.device(), name, ": expected the device of ", other_name);
}

inline void check_shape(const char* name, const Tensor& t, const std::vector<int64_t>& expected) {
  bool same = t.dim() == static_cast<int64_t>(expected.size());
  for (size_t i = 0; same && i < expected.size(); ++i) {
    same = t.size(static_cast<int64_t>(i)) == expected[i];
  }
  if (same) return;
  std::string wanted = "(";
  for (size_t i = 0; i < expected.size(); ++i) {
    wanted += (i ? ", " : "") + std::to_string(expected[i]);
  }
  STD_TORCH_CHECK(false, name, ": expected shape ", wanted, "), got ", shape_of(t));
}

}  // namespace pyops
