// Convolutions with 4x4 kernels, stride 2 and padding 1 by Winograd's method, and the gradient of
// their weight. Free of torch.
#pragma once

#include "conv_transpose_act.h"
#include "strided_conv.h"

namespace pyops::cpu {

// output = activation((conv(input, weight) + bias) * scale + shift), the last three by channel.
struct StridedConvParams {
  int64_t batch, in_channels, in_h, in_w, out_channels, out_h, out_w;
  OutputActivation activation;
  float negative_slope;
  bool channels_last;
  const float* input;   // (batch, in_channels, in_h, in_w), dense
  const float* weight;  // (out_channels, in_channels, 4, 4), contiguous
  const float* bias;    // (out_channels,), as are scale and shift
  const float* scale;
  const float* shift;
  float* output;  // (batch, out_channels, out_h, out_w), dense as input
};

// Each returns false where another kernel is to be taken: it does not take these parameters, would
// be slower, or met an infinity or a NaN, which the transforms would spread over a tile. The
// result is then not to be read.
PYOPS_ISA_KERNEL(bool, strided_conv_winograd, (const StridedConvParams&))
PYOPS_ISA_KERNEL(bool, conv_transpose_winograd, (const ConvTransposeParams&))
PYOPS_ISA_KERNEL(bool, strided_wgrad_winograd, (const StridedWgradParams&))

}  // namespace pyops::cpu
