// Which Hopper convolution takes a call, and how it divides the work: host code only.
#include <algorithm>
#include <cstdlib>
#include <string_view>

#include "conv_relu_pool_backward.cuh"
#include "conv_relu_pool_wgmma.h"

namespace pyops::cuda {
namespace {

constexpr int64_t kMostSize = int64_t{1} << 31;

int64_t parts(int64_t size, int64_t part) { return (size + part - 1) / part; }

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// What both kernels ask.
bool takes(const ConvPoolForward& f) {
  const bool pool =
      f.pool == Pool::kNone ||
      (f.pool == Pool::kMax && f.pool_h == 2 && f.pool_w == 2 && f.pool_stride_h == 2 &&
       f.pool_stride_w == 2 && f.pool_pad_h == 0 && f.pool_pad_w == 0 &&
       // No window is cut off by the edge.
       f.out_h <= f.conv_h / 2 && f.out_w <= f.conv_w / 2);
  return f.device.capability == 90 && f.dtype != DType::kFloat && f.stride_h == 1 &&
         f.stride_w == 1 && f.dilation_h == 1 && f.dilation_w == 1 && f.groups == 1 && pool &&
         // Without a pool the output tells what codes would.
         (f.pool == Pool::kMax || !f.codes) &&
         // The activation follows the maximum.
         (f.activation != Activation::kLeakyRelu || f.negative_slope >= 0) &&
         f.out_channels % 8 == 0 && f.out_channels < kMostSize / kTaps &&
         is_channels_last(f.out, f.out_channels, f.out_h, f.out_w) && aligned(f.output) &&
         aligned(f.codes) && f.batch < kMostSize && f.in_h + 2 * f.pad_h < kMostSize - 1024 &&
         f.in_w + 2 * f.pad_w < kMostSize - 1024;
}

Addressing chosen_addressing() {
  const char* name = std::getenv("PYOPS_WGMMA_ADDRESSING");
  if (!name) return kDefaultAddressing;
  const std::string_view wanted = name;
  return wanted == "copies"    ? Addressing::kCopies
         : wanted == "shifted" ? Addressing::kShifted
         : wanted == "pitch16" ? Addressing::kPitch16
         : wanted == "planes"  ? Addressing::kPlanes
                               : kDefaultAddressing;
}

}  // namespace

bool conv_relu_pool_forward_wgmma_supports(const ConvPoolForward& f) {
  return takes(f) && f.kernel_h == 3 && f.kernel_w == 3 && f.in_channels % 8 == 0 &&
         f.out_channels % 16 == 0 && f.in_channels >= 16 && f.in_channels < kMostSize &&
         is_channels_last(f.in, f.in_channels, f.in_h, f.in_w) && aligned(f.input) &&
         aligned(f.weight);
}

bool conv_relu_pool_forward_wgmma_stem_supports(const ConvPoolForward& f) {
  const int64_t products = f.kernel_h * f.kernel_w * f.in_channels;
  const bool kernel = f.in_channels == 1 ? products <= 32 && f.kernel_h <= kMostStemKernel &&
                                               f.kernel_w <= kMostStemKernel
                                         : f.in_channels == 3 && f.kernel_h == 3 && f.kernel_w == 3;
  return takes(f) && kernel &&
         // Offsets within an image are 32 bits wide, in bytes.
         2 * (2 * f.in.c + f.in_h * f.in.h + f.in_w * f.in.w) < kMostSize && f.in.c >= 0 &&
         f.in.h >= 0 && f.in.w >= 0;
}

WgmmaPlan conv_relu_pool_wgmma_plan(const ConvPoolForward& f, Addressing addressing) {
  WgmmaPlan best{};
  double least = 0;
  for (const int rows : {32, 28, 16, 14}) {
    if (rows > 16 && addressing != Addressing::kShifted) continue;  // shared memory is full
    WgmmaPlan plan{};
    plan.rows = rows;
    // Rows and columns that no window takes are left out.
    plan.tiles_h = static_cast<int>(parts(f.out_h * f.pool_h, rows));
    plan.tiles_w = static_cast<int>(parts(f.out_w * f.pool_w, kTileWidth));
    plan.output_blocks = static_cast<int>(parts(f.out_channels, kBlockChannels));
    plan.channel_blocks = static_cast<int>(parts(f.in_channels, kBlockChannels));
    plan.works = parts(f.batch * plan.tiles_h * plan.tiles_w, kGroups) * plan.output_blocks;
    const int most = std::max(f.device.multiprocessors, 1);
    plan.resident = plan.channel_blocks == 1 && plan.output_blocks <= most;
    // A block with resident weights stays with one block of output channels.
    const int step = plan.resident ? plan.output_blocks : 1;
    plan.grid = static_cast<int>(std::min<int64_t>(plan.works, most / step * step));
    const double rounds = static_cast<double>(parts(plan.works, std::max(plan.grid, 1)));
    const double cost = rounds * (rows + 2);  // the 2: waiting, finishing
    if (best.rows == 0 || cost < least) {
      best = plan;
      least = cost;
    }
  }
  return best;
}

bool conv_relu_pool_forward_hopper_supports(const ConvPoolForward& f) {
  return conv_relu_pool_forward_wgmma_supports(f) || conv_relu_pool_forward_wgmma_stem_supports(f);
}

void conv_relu_pool_forward_hopper(const ConvPoolForward& f, cudaStream_t stream) {
  if (conv_relu_pool_forward_wgmma_supports(f))
    conv_relu_pool_forward_wgmma(f, chosen_addressing(), stream);
  else
    conv_relu_pool_forward_wgmma_stem(f, stream);
}

bool conv_relu_pool_grad_input_hopper_supports(const ConvPoolBackward& p,
                                               const ConvPoolForward& f) {
  return fuses(p) && p.pool_h == 2 && p.pool_w == 2 && p.pool_stride_h == 2 &&
         p.pool_stride_w == 2 && conv::takes_wide_windows(p) && forms_halos(chosen_addressing()) &&
         conv_relu_pool_forward_wgmma_supports(f);
}

void conv_relu_pool_grad_input_hopper(const ConvPoolBackward& p, const ConvPoolForward& f,
                                      cudaStream_t stream) {
  conv_relu_pool_forward_wgmma(f, chosen_addressing(), stream, &p);
}

}  // namespace pyops::cuda
