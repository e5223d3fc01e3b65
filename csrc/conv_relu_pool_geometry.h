// Sizes and options of conv_relu_pool2d, for every backend's kernels. Free of torch.
#pragma once

#include <cstdint>

namespace pyops {

enum class Activation : int { kNone, kRelu, kLeakyRelu };
enum class Pool : int { kNone, kMax, kAvg };

// output = pool(activation(conv(input, weight) + bias)).
struct ConvPoolGeometry {
  int64_t batch, in_channels, in_h, in_w;
  int64_t out_channels, kernel_h, kernel_w;
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups;
  int64_t conv_h, conv_w;  // extent of the convolution's own output
  Activation activation;
  double negative_slope;
  Pool pool;  // kNone: pool_* are 1, 1, 0 and out == conv
  int64_t pool_h, pool_w, pool_stride_h, pool_stride_w, pool_pad_h, pool_pad_w;
  int64_t out_h, out_w;
};

}  // namespace pyops
