// Element types of tensors, as kernels see them. Free of torch.
#pragma once

#include <cstdint>

namespace pyops::cpu {

enum class DType : int { kFloat, kBFloat16, kHalf, kDouble };

inline int64_t element_size(DType dtype) {
  return dtype == DType::kDouble ? 8 : dtype == DType::kFloat ? 4 : 2;
}

}  // namespace pyops::cpu
