// The gradient of a strided convolution's weight, for a convolution and for a transposed one.
// Free of torch.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "isa.h"

namespace pyops::cpu {

// grad_weight[a, b, r, s] = sum over n, i, j of
//     low[n, a, i, j] * high[n, b, i * stride - pad + r * dilation, likewise j].
// Of a convolution, low is the gradient of its output and high its input; of a transposed one, low
// is its input and high the gradient of its output: the layout of grad_weight is theirs in both
// cases. low and high lie dense, both as `channels_last` says.
struct StridedWgradParams {
  int64_t batch, groups;
  int64_t low_channels, low_h, low_w;
  int64_t high_channels, high_h, high_w;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  DType dtype;
  bool channels_last;
  bool accurate;      // even where slower: the library's sums have several times the error
  const void* low;    // (batch, low_channels, low_h, low_w)
  const void* high;   // (batch, high_channels, high_h, high_w)
  void* grad_weight;  // (low_channels, high_channels / groups, kernel_h, kernel_w), contiguous
};

// Returns false, having written nothing, for double and, unless `accurate`, where the library is as
// fast.
PYOPS_ISA_KERNEL(bool, strided_conv_wgrad, (const StridedWgradParams&))

}  // namespace pyops::cpu
