// The Hopper convolutions for ctypes: emulated.
#include "conv_relu_pool_wgmma.h"
#include "emulator.h"

using namespace pyops;
using namespace pyops::cuda;

namespace {

struct Tensors {
  const void *input, *weight, *bias;
  void *output, *codes, *workspace;
};

// sizes: batch, in_channels, in_h, in_w, out_channels, kernel_h, kernel_w, pad_h, pad_w,
// activation, pool, 1 for float16, multiprocessors, strides of the input (n, c, h, w).
ConvPoolForward forward(const int64_t* sizes, float slope, const Tensors& tensors) {
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
  f.input = tensors.input;
  f.weight = tensors.weight;
  f.bias = tensors.bias;
  f.output = tensors.output;
  f.codes = static_cast<uint8_t*>(tensors.codes);
  f.workspace = tensors.workspace;
  return f;
}

}  // namespace

extern "C" {

// weight (out_channels, kernel_h, kernel_w, in_channels); bias and codes may be null. addressing:
// of the deep kernel, or -1 for what the op would take.
const char* conv_relu_pool_wgmma(const int64_t* sizes, float slope, const void* input,
                                 const void* weight, const void* bias, void* output, void* codes,
                                 void* workspace, int64_t addressing) {
  return emu::run([&] {
    const ConvPoolForward f =
        forward(sizes, slope, {input, weight, bias, output, codes, workspace});
    if (addressing < 0)
      conv_relu_pool_forward_hopper(f, nullptr);
    else
      conv_relu_pool_forward_wgmma(f, static_cast<Addressing>(addressing), nullptr);
  });
}

// facts: 0 neither kernel, 1 deep, 2 first layers; bytes of workspace; rows, tiles_h, tiles_w,
// works, resident, grid of the plan.
const char* conv_relu_pool_wgmma_facts(const int64_t* sizes, float slope, const void* input,
                                       const void* weight, void* output, void* codes,
                                       int64_t addressing, int64_t* facts) {
  return emu::run([&] {
    const ConvPoolForward f =
        forward(sizes, slope, {input, weight, nullptr, output, codes, nullptr});
    const WgmmaPlan plan = conv_relu_pool_wgmma_plan(f, static_cast<Addressing>(addressing));
    facts[0] = conv_relu_pool_forward_wgmma_supports(f)        ? 1
               : conv_relu_pool_forward_wgmma_stem_supports(f) ? 2
                                                               : 0;
    facts[1] = static_cast<int64_t>(conv_relu_pool_forward_hopper_workspace(f));
    facts[2] = plan.rows;
    facts[3] = plan.tiles_h;
    facts[4] = plan.tiles_w;
    facts[5] = plan.works;
    facts[6] = plan.resident;
    facts[7] = plan.grid;
  });
}

}  // extern "C"
