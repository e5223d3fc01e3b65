// Gradients of the convolution without a pool, by the kernels of transposed convolutions. Free of
// torch.
#pragma once

#include "conv_relu_pool.h"

namespace pyops::cpu {

// expanded and grad_bias, as expand_gradient and sum_channels give them. output: the op's, whose
// sign tells the activation's gradient. Returns false, having written nothing, if it does not.
bool activation_gradient(const ConvReluPoolGradParams& g, const void* output, void* expanded);

// From the gradient before the pool. p.input and p.weight (contiguous) are read. Each returns
// false, having written nothing, where the library is to be taken.
bool strided_grad_input(const ConvReluPoolParams& p, const void* expanded, void* grad_input);
bool strided_grad_weight(const ConvReluPoolParams& p, const void* expanded, void* grad_weight);

}  // namespace pyops::cpu
