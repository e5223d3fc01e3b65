// Interface between the op conv_relu_pool2d and its CPU kernels. Free of torch.
#pragma once

#include <cstdint>

#include "../conv_relu_pool_geometry.h"
#include "dtype.h"
#include "isa.h"

namespace pyops::cpu {

// output = pool(activation(conv(input, weight) + bias)).
// All tensors are dense; `channels_last` says how input and output (and codes, grads) lie:
// false (batch, channels, h, w), true (batch, h, w, channels). The weight is
// (out_channels, in_channels / groups, kernel_h, kernel_w), unless `weight_channels_last`:
// (out_channels, kernel_h, kernel_w, in_channels). Winograd's and the direct kernels take that,
// for one group of an even number of channels, 8 or more.
struct ConvReluPoolParams : ConvPoolGeometry {
  DType dtype;
  bool channels_last, weight_channels_last;

  const void* input;  // (batch, in_channels, in_h, in_w)
  const void* weight;
  const void* bias;  // (out_channels,) or null
  void* output;      // (batch, out_channels, out_h, out_w)
  // One byte per output element, in output's layout, or null when no gradient is needed.
  //   max: bits 0-6 the winner's place in its window, (y * pool_w + x) counted from the
  //        unclipped window's corner; bit 7 set if the winner's pre-activation passes the
  //        gradient whole (relu: not (value <= 0), leaky_relu: value > 0, none: always)
  //   avg: bit (y * pool_w + x) set where that element passes the gradient whole
  //   none: bit 0 likewise
  uint8_t* codes;
  // If set, Winograd's kernel writes the convolution before bias, activation and pool here
  // and nothing else: (batch, conv_h, conv_w, out_channels rounded up to whole vectors).
  float* sums;
};

struct ConvReluPoolGradParams {
  ConvReluPoolParams p;     // p.output and p.bias are not read; p.codes is
  const void* grad_output;  // in output's layout
  void* grad_input;         // in input's layout, or null if not asked for
  void* grad_weight;        // contiguous, or null
  void* grad_bias;          // (out_channels,), or null
};

// Each returns false, having written nothing, if it does not take these parameters
// (shape, dtype) or would be slower than the next one in the order below.
// 3x3, stride 1, dilation 1, groups 1, 2x2 pool with stride 2 and no padding:
PYOPS_ISA_KERNEL(bool, conv_relu_pool_stem, (const ConvReluPoolParams&))      // few input channels
PYOPS_ISA_KERNEL(bool, conv_relu_pool_winograd, (const ConvReluPoolParams&))  // many
// The same for bfloat16 without codes, in integers:
PYOPS_ISA_KERNEL(bool, conv_relu_pool_winograd_int16, (const ConvReluPoolParams&))
// The same convolution under any other pool, in two passes over a few images at a time:
PYOPS_ISA_KERNEL(bool, conv_relu_pool_winograd_any_pool, (const ConvReluPoolParams&))
// Any geometry:
PYOPS_ISA_KERNEL(bool, conv_relu_pool_depthwise, (const ConvReluPoolParams&))
PYOPS_ISA_KERNEL(bool, conv_relu_pool_direct, (const ConvReluPoolParams&))
// Plain loops, every dtype and geometry, accumulates in double for double and float else.
void conv_relu_pool_generic(const ConvReluPoolParams&);

// Max pooling, using that only each window's winner carries gradient.
PYOPS_ISA_KERNEL(bool, conv_relu_pool_backward_sparse, (const ConvReluPoolGradParams&))

}  // namespace pyops::cpu
