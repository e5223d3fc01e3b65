// The gradient before the pool, written out. Free of torch.
#pragma once

#include "conv_relu_pool.h"

namespace pyops::cpu {

// expanded (batch, out_channels, conv_h, conv_w), in output's layout: d loss / d (conv + bias).
// output_sign: the op's output, read instead of codes where its sign tells which elements
// pass the gradient (no pool); else null.
void expand_gradient(const ConvReluPoolGradParams& g, const void* output_sign, void* expanded);

// grad_bias (out_channels,): the expanded gradient summed over batch and pixels, in double.
void sum_channels(const ConvReluPoolParams& p, const void* expanded, void* grad_bias);

}  // namespace pyops::cpu
