// The strided convolution without a pool, and its gradients by the kernels of transposed
// convolutions. Free of torch.
#pragma once

#include "conv_relu_pool.h"

namespace pyops::cpu {

// Whether strided_forward takes it: 4x4, stride 2, padding 1, no pool, no codes.
bool suits_strided_forward(const ConvReluPoolParams& p);
// The whole op; p.weight is contiguous. If it returns false, the output is not to be read.
bool strided_forward(const ConvReluPoolParams& p);

// expanded and grad_bias, as expand_gradient and sum_channels give them. output: the op's, whose
// sign tells the activation's gradient. Returns false, having written nothing, if it does not.
bool activation_gradient(const ConvReluPoolGradParams& g, const void* output, void* expanded);

// From the gradient before the pool. p.input and p.weight (contiguous) are read. Each returns
// false where the library is to be taken; the result is then not to be read.
bool strided_grad_input(const ConvReluPoolParams& p, const void* expanded, void* grad_input);
bool strided_grad_weight(const ConvReluPoolParams& p, const void* expanded, void* grad_weight);

}  // namespace pyops::cpu
