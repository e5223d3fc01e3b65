// conv_relu_pool2d's gradient of the weight: partial[part][channel, column] = sum over the part's
// pixels of gradient[pixel, channel] * input[pixel's tap, input channel], column = (tap, input
// channel). Both operands lie in shared memory with the pixels as rows; for the tensor cores
// ldmatrix transposes them. Parts are summed afterwards, in order: no atomics.
//
// The pixels' order is free. Fused, a stage is some windows, four rows each, and the gradients are
// formed from grad_output and codes on their way through registers; else it is a run of pixels of
// the expanded gradient.
#include <algorithm>
#include <cstring>

#include "conv_relu_pool_backward.cuh"
#include "conv_relu_pool_windows.cuh"
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
  static constexpr int kWindows = kPixels / 4;  // row = (dy * 2 + dx) * kWindows + window
  alignas(16) T gradients[kPixels][kChannels + 8];
  alignas(16) T inputs[kPixels][kColumns + 8];
};

struct Work {
  int channel_blocks, column_blocks;  // per group
  int64_t part_size, parts;           // in pixels, or windows: a multiple of a stage's
  bool wide_gradients, wide_inputs;   // 16 bytes at a time
};

// Pixels of the convolution's output, or windows, in the order of memory.
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

template <class T, bool Fused>
struct GradWeightLoader {
  using S = Stage<T>;
  static constexpr int kElements = 16 / sizeof(T);
  static constexpr int kGradientChunks = kChannels / kElements;
  static constexpr int kInputChunks = kColumns / kElements;
  static constexpr int kInputStep = kThreads / kInputChunks;      // of rows between a thread's own
  static constexpr int kStep = Fused ? S::kWindows : S::kPixels;  // of `next` in a stage
  // Fused, the rows of a thread's input are the places of one window, whose gradients it spreads
  // with one thread for each line of the window and each chunk.
  static_assert(kInputStep == S::kWindows && kInputChunks == 2 * kGradientChunks);

  const ConvPoolBackward& p;
  const Work& work;
  const T* expanded;               // of this block's first channel
  const T* input;                  // of this group
  int64_t channel;                 // this block's first
  int channels, limit, reduction;  // input channels of the group; channels and columns that exist
  int64_t next, end;               // first pixel or window of the next stage; the part's end
  Pixel pixel;                     // this thread's first of the next stage
  int column;                      // of this thread's chunk of the input
  Tap tap;                         // where that begins
  PooledChunk<T> fetched;          // fused: on its way to the stage
  int present;                     // bit dx: that place of this thread's line exists
  float inverse;                   // of an average's size

  // Begins to bring a stage; complete() must follow, when there was time for the loads.
  PYOPS_DEVICE void load(S& stage) {
    if constexpr (Fused) {
      fetch_gradients();
      load_windows(stage);
      pixel.advance(S::kWindows, static_cast<int>(p.out_h), static_cast<int>(p.out_w));
    } else {
      load_gradients(stage);
      load_pixels(stage);
      pixel.advance(S::kPixels, static_cast<int>(p.conv_h), static_cast<int>(p.conv_w));
    }
    next += kStep;
  }

  PYOPS_DEVICE void complete(S& stage) {
    if constexpr (Fused) {
      const WindowGradient<T> gradient(p, fetched, inverse);
#pragma unroll
      for (int dx = 0; dx < 2; ++dx) {
        const int row = (line() * 2 + dx) * S::kWindows + window();
        Words words{};
        if (present >> dx & 1) words = gradient.at(line() * static_cast<int>(p.pool_w) + dx);
        *reinterpret_cast<Words*>(&stage.gradients[row][gradient_chunk()]) = words;
      }
    }
  }

  PYOPS_DEVICE static int window() { return static_cast<int>(threadIdx.x) / kInputChunks; }
  PYOPS_DEVICE static int line() { return static_cast<int>(threadIdx.x) / kGradientChunks % 2; }
  PYOPS_DEVICE static int gradient_chunk() {
    return static_cast<int>(threadIdx.x) % kGradientChunks * kElements;
  }

  // Where in the convolution's output a place of this thread's window lies; false if outside.
  PYOPS_DEVICE bool place(int dy, int dx, int& y, int& x) const {
    y = static_cast<int>(pixel.y * p.pool_stride_h - p.pool_pad_h) + dy;
    x = static_cast<int>(pixel.x * p.pool_stride_w - p.pool_pad_w) + dx;
    return next + window() < end && dy < p.pool_h && dx < p.pool_w &&
           static_cast<unsigned>(y) < static_cast<unsigned>(p.conv_h) &&
           static_cast<unsigned>(x) < static_cast<unsigned>(p.conv_w);
  }

  PYOPS_DEVICE void fetch_gradients() {
    int y, x;
    present = place(line(), 0, y, x) | place(line(), 1, y, x) << 1;
    if (p.pool == Pool::kAvg) inverse = average_inverse(p, y - line(), x - 1);
    const int left = present ? limit - gradient_chunk() : 0;
    fetched.load(p.grad_output, p.codes,
                 (next + window()) * p.out_channels + channel + gradient_chunk(), left,
                 work.wide_gradients);
  }

  PYOPS_DEVICE void load_gradients(S& stage) {
    const int chunk = gradient_chunk();
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

  PYOPS_DEVICE void load_windows(S& stage) {
#pragma unroll
    for (int slot = 0; slot < 4; ++slot) {
      int y, x;
      const bool exists = place(slot / 2, slot % 2, y, x);
      load_input(stage, slot * S::kWindows + window(), exists, pixel.n, y, x);
    }
  }

  PYOPS_DEVICE void load_pixels(S& stage) {
    Pixel at = pixel;
    for (int row = threadIdx.x / kInputChunks; row < S::kPixels; row += kInputStep) {
      load_input(stage, row, next + row < end, at.n, at.y, at.x);
      at.advance(kInputStep, static_cast<int>(p.conv_h), static_cast<int>(p.conv_w));
    }
  }

  // This thread's chunk of one row: the input under its tap of pixel (n, y, x).
  PYOPS_DEVICE void load_input(S& stage, int row, bool exists, int n, int y, int x) {
    y = static_cast<int>(y * p.stride_h - p.pad_h);
    x = static_cast<int>(x * p.stride_w - p.pad_w);
    const int64_t base = n * p.in.n + y * p.in.h + x * p.in.w;
    T* to = &stage.inputs[row][threadIdx.x % kInputChunks * kElements];
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

template <class T, Product kProduct, bool Fused>
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

  GradWeightLoader<T, Fused> loader{p, work};
  loader.channel = channel;
  loader.channels = static_cast<int>(p.in_channels / p.groups);
  loader.limit = group_out - first_channel;
  loader.reduction = static_cast<int>(p.kernel_h * p.kernel_w) * loader.channels;
  loader.expanded = static_cast<const T*>(p.expanded) + channel;
  loader.input =
      static_cast<const T*>(p.input) + static_cast<int64_t>(group) * loader.channels * p.in.c;
  const int64_t h = Fused ? p.out_h : p.conv_h, w = Fused ? p.out_w : p.conv_w;
  const int64_t all = p.batch * h * w;
  loader.next = part * work.part_size;
  loader.end = loader.next + work.part_size < all ? loader.next + work.part_size : all;
  int64_t rest = loader.next + threadIdx.x / loader.kInputChunks;
  loader.pixel.x = divide(rest, w);
  loader.pixel.y = divide(rest, h);
  loader.pixel.n = static_cast<int>(rest);
  const int first_column = column_block * kColumns;
  loader.column = first_column + threadIdx.x % loader.kInputChunks * loader.kElements;
  loader.tap.advance(loader.column, loader.channels, static_cast<int>(p.kernel_w));

  const int steps = static_cast<int>((loader.end - loader.next + loader.kStep - 1) / loader.kStep);
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (stage < steps) {
      loader.load(stages[stage]);
      loader.complete(stages[stage]);
    }
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
    if (next < steps) loader.complete(stages[next % kStages]);
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
  const bool fused = fuses(p);
  const int64_t chunk = 16 / sizeof(T);
  const int64_t all = p.batch * (fused ? p.out_h * p.out_w : p.conv_h * p.conv_w);
  const int64_t stage = fused ? Stage<T>::kWindows : Stage<T>::kPixels;
  const int64_t channels = p.in_channels / p.groups, group_out = p.out_channels / p.groups;
  Work work{};
  work.channel_blocks = static_cast<int>(parts_of(group_out, kChannels));
  work.column_blocks = static_cast<int>(parts_of(p.kernel_h * p.kernel_w * channels, kColumns));
  // As many parts as fill the device twice, but none of fewer than 8 stages.
  const int64_t blocks = work.channel_blocks * work.column_blocks * p.groups;
  const int64_t wanted = parts_of(2 * std::max(p.device.multiprocessors, 1), blocks);
  const int64_t size = std::max(8 * stage, parts_of(all, wanted));
  work.part_size = parts_of(size, stage) * stage;
  work.parts = parts_of(all, work.part_size);
  work.wide_gradients =
      fused ? takes_wide_windows(p) : group_out % chunk == 0 && is_aligned(p.expanded, 16);
  work.wide_inputs = p.in.c == 1 && channels % chunk == 0 && p.in.w % chunk == 0 &&
                     p.in.h % chunk == 0 && p.in.n % chunk == 0 && is_aligned(p.input, 16);
  return work;
}

template <class T, Product kProduct, bool Fused>
void run(const ConvPoolBackward& p, cudaStream_t stream) {
  const Work work = make_work<T>(p);
  constexpr size_t kSmem = kStages * sizeof(Stage<T>);
  const unsigned blocks =
      static_cast<unsigned>(work.column_blocks * work.channel_blocks * p.groups * work.parts);
  launch({"conv_relu_pool_grad_weight", blocks, kThreads, 1, kSmem, stream},
         planned<conv_relu_pool_grad_weight_kernel<T, kProduct, Fused>, kThreads, kSmem>(), p,
         work);
  sum_parts(p, static_cast<const float*>(p.workspace), work.parts, p.kernel_h * p.kernel_w,
            p.in_channels / p.groups, p.grad_weight, stream);
}

template <class T, Product kProduct>
void run(const ConvPoolBackward& p, cudaStream_t stream) {
  fuses(p) ? run<T, kProduct, true>(p, stream) : run<T, kProduct, false>(p, stream);
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
