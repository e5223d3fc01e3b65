// conv_relu_pool2d forward in exact float32: the implicit GEMM of conv_relu_pool_mma.cu without
// tensor cores, for any layout, elements read one by one.
#include <algorithm>

#include "conv_relu_pool_tile.cuh"
#include "kernel_plan.h"
#include "launch.cuh"

namespace pyops::cuda::conv {

constexpr int kFmaThreads = 256;
constexpr int kFmaChannels = 64;
constexpr int kFmaDepth = 16;  // of k in a stage
// Products of this many k are added up apart: one running sum over thousands would have several
// times the rounding error.
constexpr int kFmaPartial = 64;
constexpr int kFmaPitch = kFmaChannels + 8;

// Two stages, k outermost; over them the finished tile is laid. 4 floats keep rows of 16 bytes.
struct FmaStage {
  float pixels[kFmaDepth][kRows + 4];
  float weights[kFmaDepth][kFmaChannels + 4];
};
constexpr size_t kFmaSmem =
    sizeof(TileTables) + std::max(2 * sizeof(FmaStage), kRows * kFmaPitch * sizeof(float));

__global__ void __launch_bounds__(kFmaThreads)
    conv_relu_pool_forward_fma_kernel(const __grid_constant__ ConvPoolForward p,
                                      const __grid_constant__ Tiling t) {
  DYN_SMEM(smem);
  TileTables& tables = *reinterpret_cast<TileTables*>(smem);
  FmaStage* stages = reinterpret_cast<FmaStage*>(smem + sizeof(TileTables));

  int64_t tile = blockIdx.x;
  const int block = divide(tile, t.channel_blocks);
  const int group = divide(tile, p.groups);
  const int group_channels = static_cast<int>(p.out_channels / p.groups);
  const int limit = group_channels - block * kFmaChannels;
  const int64_t channel = static_cast<int64_t>(group) * group_channels + block * kFmaChannels;
  fill_tables(p, t, tile, kFmaThreads, tables);
  ptx::sync_threads();

  const int channels = static_cast<int>(p.in_channels / p.groups);
  const int reduction = static_cast<int>(p.kernel_h * p.kernel_w) * channels;
  const float* input = static_cast<const float*>(p.input) + group * channels * p.in.c;
  const float* weight = static_cast<const float*>(p.weight) + channel * reduction;

  // This thread loads one k of each stage, and every 16th row.
  const int my_k = threadIdx.x % kFmaDepth, my_row = threadIdx.x / kFmaDepth;
  constexpr int kRowStep = kFmaThreads / kFmaDepth;
  Tap tap;
  tap.advance(my_k, channels, static_cast<int>(p.kernel_w));
  const auto load = [&](FmaStage& stage, int k) {
    const int dy = tap.r * static_cast<int>(p.dilation_h);
    const int dx = tap.s * static_cast<int>(p.dilation_w);
    const int64_t shift = dy * p.in.h + dx * p.in.w + tap.c * p.in.c;
#pragma unroll
    for (int i = 0; i < kRows; i += kRowStep) {
      const RowEntry entry = tables.rows[my_row + i];
      const bool valid = k + my_k < reduction && inside(p, entry, dy, dx);
      stage.pixels[my_k][my_row + i] = valid ? input[entry.base + shift] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kFmaChannels; i += kRowStep) {
      const int row = my_row + i;
      const bool valid = k + my_k < reduction && row < limit;
      stage.weights[my_k][row] =
          valid ? weight[static_cast<int64_t>(row) * reduction + k + my_k] : 0.0f;
    }
    tap.advance(kFmaDepth, channels, static_cast<int>(p.kernel_w));
  };

  // ... and computes 8 rows x 4 channels.
  const int row = threadIdx.x / 16 * 8, column = threadIdx.x % 16 * 4;
  float sums[8][4] = {}, partial[8][4] = {};
  load(stages[0], 0);
  int which = 0;
  for (int k = 0; k < reduction; k += kFmaDepth) {
    ptx::sync_threads();
    if (k + kFmaDepth < reduction) load(stages[which ^ 1], k + kFmaDepth);
    const FmaStage& stage = stages[which];
#pragma unroll
    for (int i = 0; i < kFmaDepth; ++i) {
      const Four<float> upper = *reinterpret_cast<const Four<float>*>(&stage.pixels[i][row]);
      const Four<float> lower = *reinterpret_cast<const Four<float>*>(&stage.pixels[i][row + 4]);
      const Four<float> weights = *reinterpret_cast<const Four<float>*>(&stage.weights[i][column]);
#pragma unroll
      for (int r = 0; r < 8; ++r) {
        const float pixel = r < 4 ? upper.at[r % 4] : lower.at[r % 4];
#pragma unroll
        for (int c = 0; c < 4; ++c) partial[r][c] += pixel * weights.at[c];
      }
    }
    if ((k + kFmaDepth) % kFmaPartial == 0 || k + kFmaDepth >= reduction) {
#pragma unroll
      for (int r = 0; r < 8; ++r) {
#pragma unroll
        for (int c = 0; c < 4; ++c) sums[r][c] += partial[r][c], partial[r][c] = 0.0f;
      }
    }
    which ^= 1;
  }
  ptx::sync_threads();

  float* finished = reinterpret_cast<float*>(stages);
#pragma unroll
  for (int r = 0; r < 8; ++r) {
#pragma unroll
    for (int c = 0; c < 4; ++c) finished[(row + r) * kFmaPitch + column + c] = sums[r][c];
  }
  ptx::sync_threads();
  finish_tile<float>(p, t, tables, finished, kFmaPitch, nullptr, false, channel, kFmaChannels,
                     limit, kFmaThreads);
}

}  // namespace pyops::cuda::conv

namespace pyops::cuda {

bool conv_relu_pool_forward_fma_supports(const ConvPoolForward& p) {
  return p.dtype == DType::kFloat && p.device.capability >= 80 && conv::sizes_fit(p);
}

void conv_relu_pool_forward_fma(const ConvPoolForward& p, cudaStream_t stream) {
  const conv::Tiling t = conv::make_tiling(p, conv::kFmaChannels, false);
  const unsigned blocks = static_cast<unsigned>(t.tiles * t.channel_blocks * p.groups);
  launch({"conv_relu_pool_forward_fma", blocks, conv::kFmaThreads, 1, conv::kFmaSmem, stream},
         planned<conv::conv_relu_pool_forward_fma_kernel, conv::kFmaThreads, conv::kFmaSmem>(), p,
         t);
}

}  // namespace pyops::cuda
