// Convolutions with 4x4 kernels, stride 2 and padding 1 by Winograd's method, and the gradient of
// their weight. Free of torch.
#pragma once

#include "conv_transpose_act.h"
#include "strided_conv.h"

namespace pyops::cpu {

// Whether the kernels below take this convolution or transposed one, from or to that many channels.
template <class Params>
static inline bool suits_strided_winograd(const Params& p, int64_t channels, int64_t others) {
  return p.dtype == DType::kFloat && p.groups == 1 && p.kernel_h == 4 && p.kernel_w == 4 &&
         p.stride_h == 2 && p.stride_w == 2 && p.pad_h == 1 && p.pad_w == 1 && p.dilation_h == 1 &&
         p.dilation_w == 1 && channels % 32 == 0 && others % 32 == 0;
}

// What suits_strided_winograd says yes to:
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
