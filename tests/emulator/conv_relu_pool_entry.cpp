// The convolution kernels as the op chooses among them, for ctypes: emulated.
#include "conv_relu_pool.h"
#include "emulator.h"

using namespace pyops::cuda;

namespace {

// sizes: the integers that both structs have. `out` are the output's strides; the backward's lie
// channels_last.
template <class Params>
Params make(const int64_t* sizes, float slope, Strides& out) {
  Params p{};
  int64_t* const geometry[] = {&p.batch,        &p.in_channels, &p.in_h,          &p.in_w,
                               &p.out_channels, &p.kernel_h,    &p.kernel_w,      &p.stride_h,
                               &p.stride_w,     &p.pad_h,       &p.pad_w,         &p.dilation_h,
                               &p.dilation_w,   &p.groups,      &p.conv_h,        &p.conv_w,
                               &p.pool_h,       &p.pool_w,      &p.pool_stride_h, &p.pool_stride_w,
                               &p.pool_pad_h,   &p.pool_pad_w,  &p.out_h,         &p.out_w,
                               &p.in.n,         &p.in.c,        &p.in.h,          &p.in.w,
                               &out.n,          &out.c,         &out.h,           &out.w};
  for (int64_t* field : geometry) *field = *sizes++;
  p.activation = static_cast<pyops::Activation>(*sizes++);
  p.negative_slope = slope;
  p.pool = static_cast<pyops::Pool>(*sizes++);
  p.dtype = static_cast<DType>(*sizes++);
  p.allow_tf32 = *sizes++ != 0;
  p.device.capability = static_cast<int>(*sizes++);
  p.device.multiprocessors = static_cast<int>(*sizes++);
  return p;
}

void convolve(const ConvPoolForward& p) {
  if (conv_relu_pool_forward_hopper_supports(p)) return conv_relu_pool_forward_hopper(p, nullptr);
  if (conv_relu_pool_forward_mma_supports(p)) return conv_relu_pool_forward_mma(p, nullptr);
  if (conv_relu_pool_forward_fma_supports(p)) return conv_relu_pool_forward_fma(p, nullptr);
  throw std::runtime_error("no kernel takes this");
}

}  // namespace

extern "C" {

const char* conv_relu_pool_forward(const int64_t* sizes, float slope, const void* input,
                                   const void* weight, const void* bias, void* output,
                                   uint8_t* codes) {
  return emu::run([&] {
    Strides out;
    ConvPoolForward p = make<ConvPoolForward>(sizes, slope, out);
    p.out = out;
    p.input = input, p.weight = weight, p.bias = bias, p.output = output, p.codes = codes;
    convolve(p);
  });
}

int64_t conv_relu_pool_workspace(const int64_t* sizes) {
  Strides out;
  return conv_relu_pool_backward_workspace(make<ConvPoolBackward>(sizes, 0.0f, out));
}

bool conv_relu_pool_needs_expanded(const int64_t* sizes, bool grad_input) {
  Strides out;
  ConvPoolBackward p = make<ConvPoolBackward>(sizes, 0.0f, out);
  p.grad_input = reinterpret_cast<void*>(grad_input ? 256 : 0);
  p.grad_in = p.in;
  return needs_expanded(p);
}

// The gradient of the input lies as the input does.
const char* conv_relu_pool_gradients(const int64_t* sizes, float slope, const void* grad_output,
                                     const uint8_t* codes, const void* output, const void* input,
                                     const void* weight, void* expanded, void* grad_input,
                                     void* grad_weight, void* grad_bias, void* workspace) {
  return emu::run([&] {
    Strides out;
    ConvPoolBackward p = make<ConvPoolBackward>(sizes, slope, out);
    p.grad_output = grad_output, p.codes = codes, p.output = output, p.input = input;
    p.weight = weight, p.expanded = expanded, p.grad_input = grad_input, p.grad_in = p.in;
    p.grad_weight = grad_weight, p.grad_bias = grad_bias, p.workspace = workspace;
    conv_relu_pool_backward(p, convolve, nullptr);
  });
}
}
