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

// result (out_channels, channels, taps) = sum over parts of partial (parts, out_channels, taps,
// channels), in order.
void sum_parts(const ConvPoolBackward& p, const float* partial, int64_t parts, int64_t taps,
               int64_t channels, void* result, cudaStream_t stream);

}  // namespace pyops::cuda::conv
