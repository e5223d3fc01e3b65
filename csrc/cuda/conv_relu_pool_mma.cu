// conv_relu_pool2d forward as an implicit GEMM on the tensor cores of sm_80 and later, for any
// layout: sums[pixel, channel] = input[pixel, k] * weight[channel, k], k = (tap, input channel).
//
// Operands go through a ring of shared memory stages by cp.async (16 bytes where channels lie
// innermost in rows of multiples of 16 bytes; else element by element), fragments by ldmatrix, the
// products by mma.sync m16n8k16 (bf16, fp16) or m16n8k8 (TF32, rounded to nearest).
#include <algorithm>

#include "conv_relu_pool_fragments.cuh"
#include "kernel_plan.h"
#include "launch.cuh"

namespace pyops::cuda::conv {

constexpr int kStages = 4;

// Shared memory: tables, then the stages, over which the finished tile is laid.
template <int BlockChannels>
struct MmaShape {
  static constexpr int kThreads = 2 * BlockChannels;  // warps of 64 rows x 32 channels
  // Blocks a multiprocessor that registers must suffice for; more would spill element by element.
  static constexpr int resident(bool wide) { return (wide ? 512 : 256) / kThreads; }
  static constexpr int kStageBytes = (kRows + BlockChannels) * kRowBytes;
  static constexpr int kPitch = BlockChannels + 8;  // floats; 8 keeps rows in different banks
  static constexpr size_t kTables = sizeof(TileTables);
  static constexpr size_t kSmem =
      kTables + std::max<size_t>(kStages * kStageBytes, kRows * kPitch * sizeof(float));
};

template <class T>
PYOPS_DEVICE T zero() {
  return T(0.0f);
}

// Brings one stage of both operands into shared memory.
template <class T, int BlockChannels, bool Wide>
struct Loader {
  using Shape = MmaShape<BlockChannels>;
  static constexpr int kElements = 16 / sizeof(T);
  static constexpr int kDepth = 4 * kElements;  // of k in a stage
  static constexpr int kRowStep = Shape::kThreads / 4;

  const ConvPoolForward& p;
  const TileTables& tables;
  const T* input;   // of this group
  const T* weight;  // of this block's first channel
  int channels, reduction, block_channels;
  int chunk, row;  // this thread's chunk, and the first of its rows
  Tap tap;         // where its chunk of the next stage begins
  int k;           // the same in elements

  PYOPS_DEVICE Loader(const ConvPoolForward& p, const TileTables& tables, const T* input,
                      const T* weight, int block_channels)
      : p(p), tables(tables), input(input), weight(weight), block_channels(block_channels) {
    channels = static_cast<int>(p.in_channels / p.groups);
    reduction = static_cast<int>(p.kernel_h * p.kernel_w) * channels;
    chunk = threadIdx.x % 4, row = threadIdx.x / 4;
    k = chunk * kElements;
    tap.advance(k, channels, static_cast<int>(p.kernel_w));
  }

  PYOPS_DEVICE void load(unsigned char* stage) {
    if constexpr (Wide) {
      load_wide(ptx::smem_addr(stage));
    } else {
      load_elements(stage);
    }
    k += kDepth;
    tap.advance(kDepth, channels, static_cast<int>(p.kernel_w));
  }

  PYOPS_DEVICE void load_wide(uint32_t stage) {
    const int dy = tap.r * static_cast<int>(p.dilation_h);
    const int dx = tap.s * static_cast<int>(p.dilation_w);
    const int64_t shift = dy * p.in.h + dx * p.in.w + tap.c;
    const bool any = k < reduction;
#pragma unroll
    for (int i = 0; i < kRows; i += kRowStep) {
      const RowEntry entry = tables.rows[row + i];
      const bool valid = any && inside(p, entry, dy, dx);
      const T* from = valid ? input + entry.base + shift : input;
      ptx::cp_async<16>(stage + chunk_offset(row + i, chunk), from, valid ? 16 : 0);
    }
#pragma unroll
    for (int i = 0; i < BlockChannels; i += kRowStep) {
      const bool valid = any && row + i < block_channels;
      const T* from = valid ? weight + static_cast<int64_t>(row + i) * reduction + k : weight;
      ptx::cp_async<16>(stage + kRows * kRowBytes + chunk_offset(row + i, chunk), from,
                        valid ? 16 : 0);
    }
  }

  PYOPS_DEVICE void load_elements(unsigned char* stage) {
    constexpr int kMine = kRows / kRowStep;
    Chunk<T> pixels[kMine];
    Tap at = tap;
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      const int dy = at.r * static_cast<int>(p.dilation_h);
      const int dx = at.s * static_cast<int>(p.dilation_w);
      const int64_t shift = dy * p.in.h + dx * p.in.w + at.c * p.in.c;
#pragma unroll
      for (int i = 0; i < kMine; ++i) {
        const RowEntry& entry = tables.rows[row + i * kRowStep];
        const bool valid = k + e < reduction && inside(p, entry, dy, dx);
        pixels[i].at[e] = valid ? input[entry.base + shift] : zero<T>();
      }
      at.advance(1, channels, static_cast<int>(p.kernel_w));
    }
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      *reinterpret_cast<Chunk<T>*>(stage + chunk_offset(row + i * kRowStep, chunk)) = pixels[i];
    }
#pragma unroll
    for (int i = 0; i < BlockChannels; i += kRowStep) {
      const T* from = weight + static_cast<int64_t>(row + i) * reduction + k;
      Chunk<T> weights;
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        const bool valid = k + e < reduction && row + i < block_channels;
        weights.at[e] = valid ? from[e] : zero<T>();
      }
      *reinterpret_cast<Chunk<T>*>(stage + kRows * kRowBytes + chunk_offset(row + i, chunk)) =
          weights;
    }
  }
};

// Pools the 2x2 windows that this thread holds: sums[place][...] -> `tile` (outputs, pitch), codes.
template <class T>
PYOPS_DEVICE void fold(const ConvPoolForward& p, const TileTables& tables,
                       const float (&sums)[4][4][4], int warp_row, int warp_channel,
                       int64_t channel, int limit, float* tile, int pitch, uint8_t* codes,
                       int block_channels) {
  const int lane = ptx::lane_id();
  const T* bias = static_cast<const T*>(p.bias);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + half * 8;
    bool inside[4];
#pragma unroll
    for (int place = 0; place < 4; ++place) {
      inside[place] = tables.rows[warp_row + place * 16 + row].y != kOutside;
    }
    const int output = warp_row / 4 + row;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int column = warp_channel + n * 8 + lane % 4 * 2 + i;
        const float add = bias && column < limit ? as_float(bias[channel + column]) : 0.0f;
        Window window;
#pragma unroll
        for (int place = 0; place < 4; ++place) {
          if (inside[place]) window.add(p, sums[place][n][half * 2 + i], add, place);
        }
        tile[output * pitch + column] = window.value;
        if (p.codes) codes[output * block_channels + column] = static_cast<uint8_t>(window.code);
      }
    }
  }
}

template <class T, int BlockChannels, bool Wide>
__global__ void __launch_bounds__(MmaShape<BlockChannels>::kThreads,
                                  MmaShape<BlockChannels>::resident(Wide))
    conv_relu_pool_forward_mma_kernel(const __grid_constant__ ConvPoolForward p,
                                      const __grid_constant__ Tiling t) {
  using Shape = MmaShape<BlockChannels>;
  DYN_SMEM(smem);
  TileTables& tables = *reinterpret_cast<TileTables*>(smem);
  unsigned char* stages = smem + Shape::kTables;

  // Channel blocks vary fastest: the blocks that read one tile of the input run together.
  int64_t tile = blockIdx.x;
  const int block = divide(tile, t.channel_blocks);
  const int group = divide(tile, p.groups);
  const int group_channels = static_cast<int>(p.out_channels / p.groups);
  const int first = block * BlockChannels;
  const int64_t channel = static_cast<int64_t>(group) * group_channels + first;
  fill_tables(p, t, tile, Shape::kThreads, tables);
  ptx::sync_threads();

  const int64_t reduction = p.kernel_h * p.kernel_w * (p.in_channels / p.groups);
  Loader<T, BlockChannels, Wide> loader(
      p, tables, static_cast<const T*>(p.input) + group * (p.in_channels / p.groups) * p.in.c,
      static_cast<const T*>(p.weight) + channel * reduction, group_channels - first);
  const int steps = (loader.reduction + loader.kDepth - 1) / loader.kDepth;
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (stage < steps) loader.load(stages + stage * Shape::kStageBytes);
    ptx::cp_async_commit();
  }

  const int warp = ptx::warp_id();
  const int warp_row = warp % 2 * 64, warp_channel = warp / 2 * 32;
  float sums[4][4][4] = {};
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<kStages - 2>();
    ptx::sync_threads();  // this stage is complete, and the one before it read by all
    const int next = step + kStages - 1;
    if (next < steps) loader.load(stages + next % kStages * Shape::kStageBytes);
    ptx::cp_async_commit();
    const uint32_t stage = ptx::smem_addr(stages + step % kStages * Shape::kStageBytes);
    const auto row_of = [&](int m) { return warp_row + m * 16 + ptx::lane_id() % 16; };
    multiply_stage<T>(sums, stage, row_of, stage + kRows * kRowBytes, warp_channel);
  }
  ptx::cp_async_wait<0>();
  ptx::sync_threads();

  float* finished = reinterpret_cast<float*>(stages);
  uint8_t* codes = reinterpret_cast<uint8_t*>(finished + kRows / 4 * Shape::kPitch);
  const bool folded = t.rows == Rows::kFold;
  const int limit = group_channels - first;
  if (folded) {
    fold<T>(p, tables, sums, warp_row, warp_channel, channel, limit, finished, Shape::kPitch, codes,
            BlockChannels);
  } else {
    const int lane = ptx::lane_id();
#pragma unroll
    for (int m = 0; m < 4; ++m) {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = warp_row + m * 16 + lane / 4 + i / 2 * 8;
          const int column = warp_channel + n * 8 + lane % 4 * 2 + i % 2;
          finished[row * Shape::kPitch + column] = sums[m][n][i];
        }
      }
    }
  }
  ptx::sync_threads();
  finish_tile<T>(p, t, tables, finished, Shape::kPitch, codes, folded, channel, BlockChannels,
                 limit, Shape::kThreads);
}

namespace {

template <class T>
bool takes_wide(const ConvPoolForward& p) {
  const int64_t chunk = 16 / sizeof(T);
  const int64_t channels = p.in_channels / p.groups;
  return p.in.c == 1 && channels % chunk == 0 && p.in.w % chunk == 0 && p.in.h % chunk == 0 &&
         p.in.n % chunk == 0 && reinterpret_cast<uintptr_t>(p.input) % 16 == 0 &&
         reinterpret_cast<uintptr_t>(p.weight) % 16 == 0;
}

template <class T, int BlockChannels, bool Wide>
void run(const ConvPoolForward& p, const Tiling& t, cudaStream_t stream) {
  using Shape = MmaShape<BlockChannels>;
  const unsigned blocks = static_cast<unsigned>(t.tiles * t.channel_blocks * p.groups);
  launch({"conv_relu_pool_forward_mma", blocks, Shape::kThreads, 1, Shape::kSmem, stream},
         planned<conv_relu_pool_forward_mma_kernel<T, BlockChannels, Wide>, Shape::kThreads,
                 Shape::kSmem>(),
         p, t);
}

template <class T>
void dispatch(const ConvPoolForward& p, cudaStream_t stream) {
  // Twice the channels a block read the input half as often, if enough blocks remain.
  Tiling t = make_tiling(p, 128, true);
  const bool broad = p.out_channels / p.groups > 64 &&
                     t.tiles * t.channel_blocks * p.groups >= 2 * p.device.multiprocessors;
  if (!broad) t = make_tiling(p, 64, true);
  if (takes_wide<T>(p)) {
    broad ? run<T, 128, true>(p, t, stream) : run<T, 64, true>(p, t, stream);
  } else {
    broad ? run<T, 128, false>(p, t, stream) : run<T, 64, false>(p, t, stream);
  }
}

}  // namespace
}  // namespace pyops::cuda::conv

namespace pyops::cuda {

bool conv_relu_pool_forward_mma_supports(const ConvPoolForward& p) {
  return (p.dtype != DType::kFloat || p.allow_tf32) && p.device.capability >= 80 &&
         conv::sizes_fit(p);
}

void conv_relu_pool_forward_mma(const ConvPoolForward& p, cudaStream_t stream) {
  if (p.dtype == DType::kBFloat16) return conv::dispatch<__nv_bfloat16>(p, stream);
  if (p.dtype == DType::kHalf) return conv::dispatch<__half>(p, stream);
  conv::dispatch<float>(p, stream);
}

}  // namespace pyops::cuda
