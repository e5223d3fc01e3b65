// What the backward's source files share.
#pragma once

#include "conv_relu_pool_tile.cuh"

namespace pyops::cuda::conv {

template <class Call>
void with_type(DType dtype, const Call& call) {
  if (dtype == DType::kBFloat16) return call(__nv_bfloat16{});
  if (dtype == DType::kHalf) return call(__half{});
  call(float{});
}

inline bool is_aligned(const void* at, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(at) % bytes == 0;
}

// Whether 16 bytes of a group's gradients, and their codes, can be read at once: `fuses` only.
inline bool takes_wide_windows(const ConvPoolBackward& p) {
  const int64_t chunk = 16 / element_size(p.dtype);
  return p.out_channels / p.groups % chunk == 0 && is_aligned(p.grad_output, 16) &&
         is_aligned(p.codes, chunk);
}

// result (out_channels, channels, taps) = sum over parts of partial (parts, out_channels, taps,
// channels), in order.
void sum_parts(const ConvPoolBackward& p, const float* partial, int64_t parts, int64_t taps,
               int64_t channels, void* result, cudaStream_t stream);

}  // namespace pyops::cuda::conv
