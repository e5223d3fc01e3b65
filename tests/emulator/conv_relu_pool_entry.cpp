// The generic convolution kernels for ctypes: emulated.
#include "conv_relu_pool.h"
#include "emulator.h"

using namespace pyops::cuda;

namespace {

// sizes: the integers of ConvPoolForward in the order of its fields.
ConvPoolForward make(const int64_t* sizes, float slope) {
  ConvPoolForward p{};
  int64_t* const geometry[] = {
      &p.batch,         &p.in_channels,   &p.in_h,       &p.in_w,       &p.out_channels,
      &p.kernel_h,      &p.kernel_w,      &p.stride_h,   &p.stride_w,   &p.pad_h,
      &p.pad_w,         &p.dilation_h,    &p.dilation_w, &p.groups,     &p.conv_h,
      &p.conv_w,        &p.pool_h,        &p.pool_w,     &p.pool_stride_h, &p.pool_stride_w,
      &p.pool_pad_h,    &p.pool_pad_w,    &p.out_h,      &p.out_w,      &p.in.n,
      &p.in.c,          &p.in.h,          &p.in.w,       &p.out.n,      &p.out.c,
      &p.out.h,         &p.out.w};
  for (int64_t* field : geometry) *field = *sizes++;
  p.activation = static_cast<pyops::Activation>(*sizes++);
  p.negative_slope = slope;
  p.pool = static_cast<pyops::Pool>(*sizes++);
  p.dtype = static_cast<DType>(*sizes++);
  p.allow_tf32 = *sizes++ != 0;
  p.device = {80, static_cast<int>(*sizes++)};
  return p;
}

}  // namespace

extern "C" {

const char* conv_relu_pool_forward(const int64_t* sizes, float slope, const void* input,
                                   const void* weight, const void* bias, void* output,
                                   uint8_t* codes) {
  return emu::run([&] {
    ConvPoolForward p = make(sizes, slope);
    p.input = input, p.weight = weight, p.bias = bias, p.output = output, p.codes = codes;
    if (conv_relu_pool_forward_mma_supports(p)) {
      conv_relu_pool_forward_mma(p, nullptr);
    } else if (conv_relu_pool_forward_fma_supports(p)) {
      conv_relu_pool_forward_fma(p, nullptr);
    } else {
      throw std::runtime_error("no generic kernel takes this");
    }
  });
}
}
