// Interface between the op conv_transpose2d_act and its CPU kernels. Free of torch.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "isa.h"
#include "output_activation.h"

namespace pyops::cpu {

// output = activation((conv_transpose(input, weight) + bias) * scale + shift), the last three by
// channel.
// Input and output are dense; `channels_last` says how they lie: false (batch, channels, h, w),
// true (batch, h, w, channels).
struct ConvTransposeParams {
  int64_t batch, in_channels, in_h, in_w;
  int64_t out_channels, kernel_h, kernel_w, out_h, out_w;
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups;
  OutputActivation activation;
  float negative_slope;
  DType dtype;
  bool channels_last;

  const void* input;   // (batch, in_channels, in_h, in_w)
  const void* weight;  // (in_channels, out_channels / groups, kernel_h, kernel_w), contiguous
  const float* bias;   // (out_channels,) and readable one vector beyond; so are scale and shift
  const float* scale;
  const float* shift;
  void* output;  // (batch, out_channels, out_h, out_w)
};

// Each returns false, having written nothing, if it does not take these parameters or would be
// slower than the next one. Not for double.
PYOPS_ISA_KERNEL(bool, conv_transpose_planar, (const ConvTransposeParams&))  // few output channels
PYOPS_ISA_KERNEL(bool, conv_transpose_direct, (const ConvTransposeParams&))  // any geometry

// The gradient before the activation, told by the output, and its sums by channel.
struct ActivationGradParams {
  int64_t batch, channels, pixels;
  OutputActivation activation;
  double negative_slope;
  DType dtype;
  bool channels_last;
  const void* grad_output;  // (batch, channels, pixels), as `channels_last` says
  const void* output;       // likewise
  void* grad;               // likewise
  double* partial;          // (batch, channels): sums over an image's pixels
};

// Not for double.
PYOPS_ISA_KERNEL(void, activation_gradient, (const ActivationGradParams&))

}  // namespace pyops::cpu
