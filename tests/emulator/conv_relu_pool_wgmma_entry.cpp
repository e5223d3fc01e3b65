// The Hopper convolutions for ctypes: emulated.
#include "conv_relu_pool_wgmma.h"
#include "emulator.h"

using namespace pyops;
using namespace pyops::cuda;

namespace {

// sizes: batch, in_channels, in_h, in_w, out_channels, kernel_h, kernel_w, pad_h, pad_w, activation,
// pool, 1 for float16, multiprocessors, strides of the input (n, c, h, w).
ConvPoolForward forward(const int64_t* sizes, double slope, void* const* tensors) {
  ConvPoolForward f{};
  f.batch = sizes[0];
  f.in_channels = sizes[1];
  f.in_h = sizes[2];
  f.in_w = sizes[3];
  f.out_channels = sizes[4];
  f.kernel_h = sizes[5];
  f.kernel_w = sizes[6];
  f.pad_h = sizes[7];
  f.pad_w = sizes[8];
  f.stride_h = f.stride_w = f.dilation_h = f.dilation_w = f.groups = 1;
  f.conv_h = f.in_h + 2 * f.pad_h - f.kernel_h + 1;
  f.conv_w = f.in_w + 2 * f.pad_w - f.kernel_w + 1;
  f.activation = static_cast<Activation>(sizes[9]);
  f.negative_slope = slope;
  f.pool = static_cast<Pool>(sizes[10]);
  const int64_t window = f.pool == Pool::kNone ? 1 : 2;
  f.pool_h = f.pool_w = f.pool_stride_h = f.pool_stride_w = window;
  f.out_h = f.conv_h / window;
  f.out_w = f.conv_w / window;
  f.dtype = sizes[11] ? DType::kHalf : DType::kBFloat16;
  f.device = {90, static_cast<int>(sizes[12])};
  f.in = {sizes[13], sizes[14], sizes[15], sizes[16]};
  f.out = {f.out_h * f.out_w * f.out_channels, 1, f.out_w * f.out_channels, f.out_channels};
  f.input = tensors[0];
  f.weight = tensors[1];
  f.bias = tensors[2];
  f.output = tensors[3];
  f.codes = static_cast<uint8_t*>(tensors[4]);
  f.workspace = tensors[5];
  return f;
}

}  // namespace

extern "C" {

// tensors: input, weight (out_channels, kernel_h, kernel_w, in_channels), bias or null, output, codes
// or null, workspace. addressing: of the deep kernel, or -1 for what the op would take.
const char* conv_relu_pool_wgmma(const int64_t* sizes, double slope, void* const* tensors,
                                 int addressing) {
  return emu::run([&] {
    const ConvPoolForward f = forward(sizes, slope, tensors);
    if (addressing < 0)
      conv_relu_pool_forward_hopper(f, nullptr);
    else
      conv_relu_pool_forward_wgmma(f, static_cast<Addressing>(addressing), nullptr);
  });
}

// 0: neither, 1: deep, 2: first layers.
int conv_relu_pool_wgmma_supports(const int64_t* sizes, double slope, void* const* tensors) {
  const ConvPoolForward f = forward(sizes, slope, tensors);
  return conv_relu_pool_forward_wgmma_supports(f)        ? 1
         : conv_relu_pool_forward_wgmma_stem_supports(f) ? 2
                                                         : 0;
}

int64_t conv_relu_pool_wgmma_workspace(const int64_t* sizes) {
  void* const none[6]{};
  return static_cast<int64_t>(conv_relu_pool_forward_hopper_workspace(forward(sizes, 0, none)));
}

// rows, tiles_h, tiles_w, works, resident, grid
void conv_relu_pool_wgmma_plan(const int64_t* sizes, int addressing, int64_t* plan) {
  void* const none[6]{};
  const WgmmaPlan p = pyops::cuda::conv_relu_pool_wgmma_plan(forward(sizes, 0, none),
                                                             static_cast<Addressing>(addressing));
  const int64_t values[]{p.rows, p.tiles_h, p.tiles_w, p.works, p.resident, p.grid};
  for (int i = 0; i < 6; ++i) plan[i] = values[i];
}

}  // extern "C"
