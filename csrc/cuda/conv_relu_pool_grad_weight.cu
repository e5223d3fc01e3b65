// conv_relu_pool2d's gradient of the weight: partial[part][channel, column] = sum over the part's
// pixels of expanded[pixel, channel] * input[pixel's tap, input channel], column = (tap, input
// channel). Both operands lie in shared memory with the pixels as rows; for the tensor cores
// ldmatrix transposes them. Parts are summed afterwards, in order: no atomics.
#include <algorithm>
#include <cstring>

#include "conv_relu_pool_backward.cuh"
#include "kernel_plan.h"
#include "launch.cuh"

namespace pyops::cuda::conv {
namespace {

constexpr int kThreads = 128;
constexpr int kChannels = 64;  // rows of the result in a block
constexpr int kColumns = 128;  // columns of it
constexpr int kStages = 3;

enum class Product : int { kTensor, kExact };  // tensor cores (float: TF32), or float32 as it is

// The same pixels of both operands; 8 elements more a row keep rows in different banks.
template <class T>
struct Stage {
  static constexpr int kPixels = 64 / sizeof(T);
  alignas(16) T gradients[kPixels][kChannels + 8];
  alignas(16) T inputs[kPixels][kColumns + 8];
};

struct Work {
  int channel_blocks, column_blocks;  // per group
  int64_t part_size, parts;           // in pixels, a multiple of a stage's
  bool wide_gradients, wide_inputs;   // 16 bytes at a time
};

// Pixels of the convolution's output in the order of memory.
struct Pixel {
  int n, y, x;

  PYOPS_DEVICE void advance(int step, int h, int w) {
    x += step;
    while (x >= w) {
      x -= w;
      if (++y == h) y = 0, ++n;
    }
  }
};

template <class T>
struct GradWeightLoader {
  using S = Stage<T>;
  static constexpr int kElements = 16 / sizeof(T);
  static constexpr int kGradientChunks = kChannels / kElements;
  static constexpr int kInputChunks = kColumns / kElements;
  static constexpr int kInputStep = kThreads / kInputChunks;  // of pixels between a thread's own

  const ConvPoolBackward& p;
  const Work& work;
  const T* expanded;               // of this block's first channel
  const T* input;                  // of this group
  int channels, limit, reduction;  // input channels of the group; channels and columns that exist
  int64_t next, end;               // first pixel of the next stage; the part's end
  Pixel pixel;                     // this thread's first of the next stage
  int column;                      // of this thread's chunk of the input
  Tap tap;                         // where that begins

  PYOPS_DEVICE void load(S& stage) {
    load_gradients(stage);
    load_inputs(stage);
    next += S::kPixels;
  }

  PYOPS_DEVICE void load_gradients(S& stage) {
    const int chunk = threadIdx.x % kGradientChunks * kElements;
    for (int row = threadIdx.x / kGradientChunks; row < S::kPixels;
         row += kThreads / kGradientChunks) {
      const T* from = expanded + (next + row) * p.out_channels + chunk;
      T* to = &stage.gradients[row][chunk];
      if (work.wide_gradients) {
        const bool valid = next + row < end && chunk < limit;
        ptx::cp_async<16>(ptx::smem_addr(to), valid ? from : expanded, valid ? 16 : 0);
      } else {
        for (int e = 0; e < kElements; ++e) {
          const bool valid = next + row < end && chunk + e < limit;
          to[e] = valid ? from[e] : T(0.0f);
        }
      }
    }
  }

  PYOPS_DEVICE void load_inputs(S& stage) {
    const int chunk = threadIdx.x % kInputChunks * kElements;
    const int conv_h = static_cast<int>(p.conv_h), conv_w = static_cast<int>(p.conv_w);
    Pixel at = pixel;
    for (int row = threadIdx.x / kInputChunks; row < S::kPixels; row += kInputStep) {
      const int y = static_cast<int>(at.y * p.stride_h - p.pad_h);
      const int x = static_cast<int>(at.x * p.stride_w - p.pad_w);
      const int64_t base = at.n * p.in.n + y * p.in.h + x * p.in.w;
      const bool exists = next + row < end;
      T* to = &stage.inputs[row][chunk];
      if (work.wide_inputs) {
        const int64_t shift = offset(tap);
        const bool valid = exists && column < reduction && inside(tap, y, x);
        ptx::cp_async<16>(ptx::smem_addr(to), valid ? input + base + shift : input, valid ? 16 : 0);
      } else {
        Tap each = tap;
        for (int e = 0; e < kElements; ++e) {
          const bool valid = exists && column + e < reduction && inside(each, y, x);
          to[e] = valid ? input[base + offset(each)] : T(0.0f);
          each.advance(1, channels, static_cast<int>(p.kernel_w));
        }
      }
      at.advance(kInputStep, conv_h, conv_w);
    }
    pixel.advance(S::kPixels, conv_h, conv_w);
  }

  PYOPS_DEVICE int64_t offset(const Tap& t) const {
    return t.r * p.dilation_h * p.in.h + t.s * p.dilation_w * p.in.w + t.c * p.in.c;
  }

  PYOPS_DEVICE bool inside(const Tap& t, int y, int x) const {
    const int iy = y + t.r * static_cast<int>(p.dilation_h);
    const int ix = x + t.s * static_cast<int>(p.dilation_w);
    return static_cast<unsigned>(iy) < static_cast<unsigned>(p.in_h) &&
           static_cast<unsigned>(ix) < static_cast<unsigned>(p.in_w);
  }
};

// A thread's 64 sums of the warp's 32 channels x 64 columns, in tiles of 16 x 8 as mma.sync lays
// them.
struct TensorSums {
  float at[2][8][4] = {};
  int warp = ptx::warp_id();

  PYOPS_DEVICE int row(int m, int i) const {
    return warp % 2 * 32 + m * 16 + ptx::lane_id() / 4 + i / 2 * 8;
  }
  PYOPS_DEVICE int column(int n, int i) const {
    return warp / 2 * 64 + n * 8 + ptx::lane_id() % 4 * 2 + i % 2;
  }

  template <class T>
  PYOPS_DEVICE void add(const Stage<T>& stage) {
    const int lane = ptx::lane_id();
    const int first_row = warp % 2 * 32, first_column = warp / 2 * 64;
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      uint32_t a[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        if constexpr (sizeof(T) == 2) {
          const int pixel = step * 16 + lane / 16 * 8 + lane % 8;
          const int channel = first_row + m * 16 + lane / 8 % 2 * 8;
          ptx::ldmatrix<true>(a[m], ptx::smem_addr(&stage.gradients[pixel][channel]));
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int channel = first_row + m * 16 + lane / 4 + i % 2 * 8;
            a[m][i] = ptx::to_tf32(stage.gradients[step * 8 + lane % 4 + i / 2 * 4][channel]);
          }
        }
      }
#pragma unroll
      for (int n = 0; n < 8; n += 2) {
        uint32_t b[4];
        if constexpr (sizeof(T) == 2) {
          const int pixel = step * 16 + lane / 8 % 2 * 8 + lane % 8;
          const int at_column = first_column + n * 8 + lane / 16 * 8;
          ptx::ldmatrix<true>(b, ptx::smem_addr(&stage.inputs[pixel][at_column]));
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int at_column = first_column + (n + i / 2) * 8 + lane / 4;
            b[i] = ptx::to_tf32(stage.inputs[step * 8 + lane % 4 + i % 2 * 4][at_column]);
          }
        }
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
          if constexpr (sizeof(T) == 2) {
            ptx::mma_m16n8k16<T>(at[m][n], a[m], low);
            ptx::mma_m16n8k16<T>(at[m][n + 1], a[m], high);
          } else {
            ptx::mma_m16n8k8_tf32(at[m][n], a[m], low);
            ptx::mma_m16n8k8_tf32(at[m][n + 1], a[m], high);
          }
        }
      }
    }
  }
};

// ... of 8 channels x 8 columns, each stage added up apart for the sake of rounding.
struct ExactSums {
  float at[2][8][4] = {};

  PYOPS_DEVICE static int row(int m, int i) {
    return static_cast<int>(threadIdx.x) / 16 * 8 + m * 4 + i;
  }
  PYOPS_DEVICE static int column(int n, int) {
    return static_cast<int>(threadIdx.x) % 16 * 4 + n / 4 * 64 + n % 4;
  }

  PYOPS_DEVICE void add(const Stage<float>& stage) {
    float partial[2][8][4] = {};
#pragma unroll 4
    for (int pixel = 0; pixel < Stage<float>::kPixels; ++pixel) {
      const float* gradients = &stage.gradients[pixel][row(0, 0)];
      Four<float> g[2], x[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        g[half] = *reinterpret_cast<const Four<float>*>(gradients + half * 4);
        x[half] = *reinterpret_cast<const Four<float>*>(&stage.inputs[pixel][column(half * 4, 0)]);
      }
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int n = 0; n < 8; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) partial[m][n][i] += g[m].at[i] * x[n / 4].at[n % 4];
        }
      }
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) at[m][n][i] += partial[m][n][i];
      }
    }
  }
};

template <class T, Product kProduct>
__global__ void __launch_bounds__(kThreads)
    conv_relu_pool_grad_weight_kernel(const __grid_constant__ ConvPoolBackward p,
                                      const __grid_constant__ Work work) {
  using S = Stage<T>;
  DYN_SMEM(smem);
  S* stages = reinterpret_cast<S*>(smem);

  int64_t block = blockIdx.x;
  const int column_block = divide(block, work.column_blocks);
  const int channel_block = divide(block, work.channel_blocks);
  const int group = divide(block, p.groups);
  const int64_t part = block;
  const int group_out = static_cast<int>(p.out_channels / p.groups);
  const int first_channel = channel_block * kChannels;
  const int64_t channel = static_cast<int64_t>(group) * group_out + first_channel;

  GradWeightLoader<T> loader{p, work};
  loader.channels = static_cast<int>(p.in_channels / p.groups);
  loader.limit = group_out - first_channel;
  loader.reduction = static_cast<int>(p.kernel_h * p.kernel_w) * loader.channels;
  loader.expanded = static_cast<const T*>(p.expanded) + channel;
  loader.input =
      static_cast<const T*>(p.input) + static_cast<int64_t>(group) * loader.channels * p.in.c;
  const int64_t pixels = p.batch * p.conv_h * p.conv_w;
  loader.next = part * work.part_size;
  loader.end = loader.next + work.part_size < pixels ? loader.next + work.part_size : pixels;
  int64_t rest = loader.next + threadIdx.x / loader.kInputChunks;
  loader.pixel.x = divide(rest, p.conv_w);
  loader.pixel.y = divide(rest, p.conv_h);
  loader.pixel.n = static_cast<int>(rest);
  const int first_column = column_block * kColumns;
  loader.column = first_column + threadIdx.x % loader.kInputChunks * loader.kElements;
  loader.tap.advance(loader.column, loader.channels, static_cast<int>(p.kernel_w));

  const int steps = static_cast<int>((loader.end - loader.next + S::kPixels - 1) / S::kPixels);
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (stage < steps) loader.load(stages[stage]);
    ptx::cp_async_commit();
  }
  std::conditional_t<kProduct == Product::kExact, ExactSums, TensorSums> sums;
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<kStages - 2>();
    ptx::sync_threads();  // this stage is complete, and the one before it read by all
    const int next = step + kStages - 1;
    if (next < steps) loader.load(stages[next % kStages]);
    ptx::cp_async_commit();
    sums.add(stages[step % kStages]);
  }

  float* partial =
      static_cast<float*>(p.workspace) + (part * p.out_channels + channel) * loader.reduction;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = sums.row(m, i), column = first_column + sums.column(n, i);
        if (row < loader.limit && column < loader.reduction) {
          partial[static_cast<int64_t>(row) * loader.reduction + column] = sums.at[m][n][i];
        }
      }
    }
  }
}

template <class T>
Work make_work(const ConvPoolBackward& p) {
  const auto parts_of = [](int64_t size, int64_t part) { return (size + part - 1) / part; };
  const int64_t chunk = 16 / sizeof(T), pixels = p.batch * p.conv_h * p.conv_w;
  const int64_t channels = p.in_channels / p.groups, group_out = p.out_channels / p.groups;
  const auto aligned = [](const void* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; };
  Work work{};
  work.channel_blocks = static_cast<int>(parts_of(group_out, kChannels));
  work.column_blocks = static_cast<int>(parts_of(p.kernel_h * p.kernel_w * channels, kColumns));
  // As many parts as fill the device twice, but none of fewer than 8 stages.
  const int64_t blocks = work.channel_blocks * work.column_blocks * p.groups;
  const int64_t wanted = parts_of(2 * std::max(p.device.multiprocessors, 1), blocks);
  const int64_t least = 8 * Stage<T>::kPixels;
  const int64_t size = std::max(least, parts_of(pixels, wanted));
  work.part_size = parts_of(size, Stage<T>::kPixels) * Stage<T>::kPixels;
  work.parts = parts_of(pixels, work.part_size);
  work.wide_gradients = group_out % chunk == 0 && aligned(p.expanded);
  work.wide_inputs = p.in.c == 1 && channels % chunk == 0 && p.in.w % chunk == 0 &&
                     p.in.h % chunk == 0 && p.in.n % chunk == 0 && aligned(p.input);
  return work;
}

template <class T, Product kProduct>
void run(const ConvPoolBackward& p, cudaStream_t stream) {
  const Work work = make_work<T>(p);
  constexpr size_t kSmem = kStages * sizeof(Stage<T>);
  const unsigned blocks =
      static_cast<unsigned>(work.column_blocks * work.channel_blocks * p.groups * work.parts);
  launch({"conv_relu_pool_grad_weight", blocks, kThreads, 1, kSmem, stream},
         planned<conv_relu_pool_grad_weight_kernel<T, kProduct>, kThreads, kSmem>(), p, work);
  sum_parts(p, static_cast<const float*>(p.workspace), work.parts, p.kernel_h * p.kernel_w,
            p.in_channels / p.groups, p.grad_weight, stream);
}

}  // namespace
}  // namespace pyops::cuda::conv

namespace pyops::cuda {

using namespace conv;

size_t conv_relu_pool_grad_weight_workspace(const ConvPoolBackward& p) {
  const int64_t parts =
      p.dtype == DType::kFloat ? make_work<float>(p).parts : make_work<__half>(p).parts;
  return parts * p.out_channels * p.kernel_h * p.kernel_w * (p.in_channels / p.groups) *
         sizeof(float);
}

void conv_relu_pool_grad_weight(const ConvPoolBackward& p, cudaStream_t stream) {
  if (p.dtype == DType::kBFloat16) return run<__nv_bfloat16, Product::kTensor>(p, stream);
  if (p.dtype == DType::kHalf) return run<__half, Product::kTensor>(p, stream);
  if (p.allow_tf32) return run<float, Product::kTensor>(p, stream);
  run<float, Product::kExact>(p, stream);
}

}  // namespace pyops::cuda
