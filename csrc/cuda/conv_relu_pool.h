// Interface between the op conv_relu_pool2d and its CUDA kernels. Free of torch.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "../conv_relu_pool_geometry.h"

namespace pyops::cuda {

enum class DType : int { kFloat, kBFloat16, kHalf };

inline int64_t element_size(DType dtype) { return dtype == DType::kFloat ? 4 : 2; }

// Elements between neighbours along each axis of a 4-D tensor.
struct Strides {
  int64_t n, c, h, w;
};

// The compute capability (90 for 9.0) and the number of multiprocessors of the tensors' device.
struct Device {
  int capability, multiprocessors;
};

struct ConvPoolForward : ConvPoolGeometry {
  DType dtype;
  bool allow_tf32;  // float32 may be rounded to TF32 on its way into a product
  Device device;

  const void* input;  // (batch, in_channels, in_h, in_w), any strides
  Strides in;
  const void* weight;  // (out_channels, kernel_h, kernel_w, in_channels / groups), dense
  const void* bias;    // (out_channels,) or null
  void* output;        // (batch, out_channels, out_h, out_w), dense: out.c is 1 or out.w is 1
  Strides out;
  // One byte per output element, in output's layout, or null when no gradient is needed.
  //   max: bits 0-6 the winner's place in its window, (y * pool_w + x) counted from the
  //        unclipped window's corner; bit 7 set if the winner's pre-activation passes the
  //        gradient whole (relu: not (value <= 0), leaky_relu: value > 0, none: always)
  //   avg: bit (y * pool_w + x) set where that element passes the gradient whole
  //   none: bit 0 likewise
  uint8_t* codes;
};

// The tensors lie as (batch, h, w, channels) without gaps.
inline bool is_channels_last(const Strides& s, int64_t channels, int64_t h, int64_t w) {
  return s.c == 1 && s.w == channels && s.h == w * channels && s.n == h * w * channels;
}

enum class ForwardKernel : int {
  kNone,    // nothing takes this call
  kHopper,  // wgmma and TMA, sm_90 only: bf16, fp16, channels_last, 16-byte aligned
  kMma,     // mma.sync, sm_80 and later: bf16, fp16, TF32; any layout
  kFma,     // exact float32; any layout
};

// Whether each takes this call, from shapes, dtype, strides, alignment and device alone.
bool conv_relu_pool_forward_hopper_supports(const ConvPoolForward&);
bool conv_relu_pool_forward_mma_supports(const ConvPoolForward&);
bool conv_relu_pool_forward_fma_supports(const ConvPoolForward&);

// Each throws std::runtime_error, with the kernel's name and sizes, if it cannot be launched.
void conv_relu_pool_forward_hopper(const ConvPoolForward&, cudaStream_t);
void conv_relu_pool_forward_mma(const ConvPoolForward&, cudaStream_t);
void conv_relu_pool_forward_fma(const ConvPoolForward&, cudaStream_t);

// The first of them, in the order of the enumeration, that takes this call.
inline ForwardKernel conv_relu_pool_forward_kernel(const ConvPoolForward& p) {
  if (conv_relu_pool_forward_hopper_supports(p)) return ForwardKernel::kHopper;
  if (conv_relu_pool_forward_mma_supports(p)) return ForwardKernel::kMma;
  if (conv_relu_pool_forward_fma_supports(p)) return ForwardKernel::kFma;
  return ForwardKernel::kNone;
}

struct ConvPoolBackward : ConvPoolGeometry {
  DType dtype;
  bool allow_tf32;
  Device device;

  // All (batch, h, w, out_channels), dense. What tells which elements pass the gradient: codes as
  // above, or the op's output where no codes are stored, or neither for no activation.
  const void* grad_output;
  const uint8_t* codes;
  const void* output;
  const void* input;  // (batch, in_channels, in_h, in_w), any strides
  Strides in;
  const void* weight;  // (out_channels, kernel_h, kernel_w, in_channels / groups), dense
  // The gradient before activation and pool, (batch, conv_h, conv_w, out_channels), dense;
  // null where no step needs it (needs_expanded), grad_output itself without either.
  void* expanded;
  void* grad_input;  // in_channels and extents of the input, any strides
  Strides grad_in;
  void* grad_weight;  // (out_channels, in_channels / groups, kernel_h, kernel_w), dense
  void* grad_bias;    // (out_channels,)
  void* workspace;    // as many bytes as the step's workspace function says; aligned to 256
};

// Whether grad_output and codes can stand for `expanded`: windows of at most 2 x 2 that do not
// overlap, so that every pixel has its gradient from one window at most.
inline bool fuses(const ConvPoolBackward& p) {
  return p.pool != Pool::kNone && p.pool_h <= 2 && p.pool_w <= 2 && p.pool_stride_h >= p.pool_h &&
         p.pool_stride_w >= p.pool_w;
}

// Steps of the backward. The first writes `expanded`, which those that do not fuse read.
void conv_relu_pool_expand(const ConvPoolBackward&, cudaStream_t);
// The input's gradient is one plain convolution of `expanded` for each residue of the stride:
// parts 0 to stride_h * stride_w - 1, with the weights that pack puts into `workspace`. Any forward
// kernel that takes the part may run it; or, from grad_output and codes, a fused one. False if the
// part has no pixels.
bool conv_relu_pool_grad_input_part(const ConvPoolBackward&, int64_t part, ConvPoolForward&);
void conv_relu_pool_grad_input_pack(const ConvPoolBackward&, int64_t part, cudaStream_t);
bool conv_relu_pool_grad_input_hopper_supports(const ConvPoolBackward&, const ConvPoolForward&);
bool conv_relu_pool_grad_input_mma_supports(const ConvPoolBackward&, const ConvPoolForward&);
void conv_relu_pool_grad_input_hopper(const ConvPoolBackward&, const ConvPoolForward&,
                                      cudaStream_t);
void conv_relu_pool_grad_input_mma(const ConvPoolBackward&, const ConvPoolForward&, cudaStream_t);
// Sums over pixels in parts of a fixed order, then over the parts: equal inputs, equal bits.
void conv_relu_pool_grad_weight(const ConvPoolBackward&, cudaStream_t);
void conv_relu_pool_grad_bias(const ConvPoolBackward&, cudaStream_t);
size_t conv_relu_pool_grad_input_workspace(const ConvPoolBackward&);
size_t conv_relu_pool_grad_weight_workspace(const ConvPoolBackward&);
size_t conv_relu_pool_grad_bias_workspace(const ConvPoolBackward&);

// Whether the input's gradient is computed without `expanded`. Not where Hopper's convolution takes
// an expanded gradient, but cannot form it: mma.sync has hardly more than half of its speed.
inline bool fuses_grad_input(const ConvPoolBackward& p) {
  for (int64_t part = 0; part < p.stride_h * p.stride_w; ++part) {
    ConvPoolForward f;
    if (!conv_relu_pool_grad_input_part(p, part, f)) continue;
    if (conv_relu_pool_grad_input_hopper_supports(p, f)) continue;
    if (conv_relu_pool_forward_hopper_supports(f)) return false;
    if (!conv_relu_pool_grad_input_mma_supports(p, f)) return false;
  }
  return true;
}

// Whether `expanded` has to be memory of its own.
inline bool needs_expanded(const ConvPoolBackward& p) {
  if (p.pool == Pool::kNone && p.activation == Activation::kNone) return false;
  return !fuses(p) || (p.grad_input && !fuses_grad_input(p));
}

inline size_t conv_relu_pool_backward_workspace(const ConvPoolBackward& p) {
  return std::max({conv_relu_pool_grad_input_workspace(p), conv_relu_pool_grad_weight_workspace(p),
                   conv_relu_pool_grad_bias_workspace(p)});
}

// All gradients whose pointers are set; `convolve(ConvPoolForward&)` runs a forward kernel.
template <class Convolve>
void conv_relu_pool_backward(const ConvPoolBackward& p, const Convolve& convolve,
                             cudaStream_t stream) {
  if (p.expanded && p.expanded != p.grad_output) conv_relu_pool_expand(p, stream);
  for (int64_t part = 0; p.grad_input && part < p.stride_h * p.stride_w; ++part) {
    ConvPoolForward f;
    if (!conv_relu_pool_grad_input_part(p, part, f)) continue;
    conv_relu_pool_grad_input_pack(p, part, stream);
    if (p.expanded) {
      convolve(f);
    } else if (conv_relu_pool_grad_input_hopper_supports(p, f)) {
      conv_relu_pool_grad_input_hopper(p, f, stream);
    } else {
      conv_relu_pool_grad_input_mma(p, f, stream);
    }
  }
  if (p.grad_weight) conv_relu_pool_grad_weight(p, stream);
  if (p.grad_bias) conv_relu_pool_grad_bias(p, stream);
}

}  // namespace pyops::cuda
