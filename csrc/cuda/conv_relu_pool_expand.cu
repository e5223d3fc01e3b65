// The small kernels of conv_relu_pool2d's backward: the gradient before activation and pool, the
// weights of the input gradient's convolutions, the bias' gradient, sums of parts.
#include <algorithm>
#include <numeric>

#include "conv_relu_pool_backward.cuh"
#include "conv_relu_pool_windows.cuh"
#include "kernel_plan.h"
#include "launch.cuh"

namespace pyops::cuda::conv {
namespace {

constexpr int kThreads = 256;

unsigned blocks_for(int64_t items) {
  return static_cast<unsigned>(std::clamp<int64_t>((items + kThreads - 1) / kThreads, 0, 1 << 20));
}

// The part of the gradient that the activation lets through.
PYOPS_DEVICE float damp(const ConvPoolBackward& p, float gradient, bool whole) {
  if (whole || p.activation == Activation::kNone) return gradient;
  return p.activation == Activation::kRelu ? 0.0f : gradient * static_cast<float>(p.negative_slope);
}

template <class T>
PYOPS_DEVICE bool passes(const ConvPoolBackward& p, int64_t at) {
  if (p.codes) return (p.codes[at] & 1) != 0;
  if (!p.output) return true;
  const float value = as_float(static_cast<const T*>(p.output)[at]);
  return p.activation == Activation::kRelu ? !(value <= 0.0f) : value > 0.0f;
}

// The gradient of element (n, y, x, channel) of the convolution's output.
template <class T>
PYOPS_DEVICE float expand(const ConvPoolBackward& p, int n, int y, int x, int channel) {
  const T* gradients = static_cast<const T*>(p.grad_output);
  if (p.pool == Pool::kNone) {
    const int64_t at = ((n * p.conv_h + y) * p.conv_w + x) * p.out_channels + channel;
    return damp(p, as_float(gradients[at]), passes<T>(p, at));
  }
  // The windows that hold it, in order.
  const int top = y + static_cast<int>(p.pool_pad_h), left = x + static_cast<int>(p.pool_pad_w);
  const int window_h = static_cast<int>(p.pool_h), window_w = static_cast<int>(p.pool_w);
  const int step_h = static_cast<int>(p.pool_stride_h), step_w = static_cast<int>(p.pool_stride_w);
  const int first_y = top < window_h ? 0 : (top - window_h) / step_h + 1;
  const int first_x = left < window_w ? 0 : (left - window_w) / step_w + 1;
  float sum = 0.0f;
  for (int oy = first_y; oy < p.out_h && oy * step_h <= top; ++oy) {
    for (int ox = first_x; ox < p.out_w && ox * step_w <= left; ++ox) {
      const int64_t at = ((n * p.out_h + oy) * p.out_w + ox) * p.out_channels + channel;
      const int place = (top - oy * step_h) * window_w + (left - ox * step_w);
      const int code = p.codes[at];
      const float gradient = as_float(gradients[at]);
      if (p.pool == Pool::kAvg) {
        const float size = average_size(p, oy * step_h - static_cast<int>(p.pool_pad_h),
                                        ox * step_w - static_cast<int>(p.pool_pad_w));
        sum += damp(p, gradient / size, (code >> place & 1) != 0);
      } else if ((code & 127) == place) {
        sum += damp(p, gradient, code >= 128);
      }
    }
  }
  return sum;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    conv_relu_pool_expand_kernel(const __grid_constant__ ConvPoolBackward p) {
  const int64_t count = p.batch * p.conv_h * p.conv_w * p.out_channels;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += step) {
    int64_t rest = i;
    const int channel = divide(rest, p.out_channels);
    const int x = divide(rest, p.conv_w);
    const int y = divide(rest, p.conv_h);
    store_as(static_cast<T*>(p.expanded) + i, expand<T>(p, static_cast<int>(rest), y, x, channel));
  }
}

// packed[c][j][i][k] = weight[k][r][s][c]: taps r = first + step * (taps - 1 - j), turned round.
struct TapRange {
  int first_h, step_h, taps_h, first_w, step_w, taps_w;
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    conv_relu_pool_flip_kernel(const __grid_constant__ ConvPoolBackward p, TapRange taps,
                               T* packed) {
  const int64_t group_in = p.in_channels / p.groups, group_out = p.out_channels / p.groups;
  const int64_t count = p.in_channels * taps.taps_h * taps.taps_w * group_out;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += step) {
    int64_t rest = i;
    const int k = divide(rest, group_out);
    const int s = taps.first_w + taps.step_w * (taps.taps_w - 1 - divide(rest, taps.taps_w));
    const int r = taps.first_h + taps.step_h * (taps.taps_h - 1 - divide(rest, taps.taps_h));
    const int64_t c = rest % group_in, group = rest / group_in;
    const int64_t from =
        (((group * group_out + k) * p.kernel_h + r) * p.kernel_w + s) * group_in + c;
    packed[i] = static_cast<const T*>(p.weight)[from];
  }
}

// What sums up the bias' gradient: a block adds 8 chunks of channels over a part of the pixels, or
// of the windows where they can stand for them.
constexpr int kBiasChunks = 8;
constexpr int kBiasRows = kThreads / kBiasChunks;

struct BiasWork {
  int64_t count, part_size, parts;  // of pixels or windows
  int64_t channel_blocks;
  bool fused, wide;
};

template <class T>
struct BiasTable {
  static constexpr int kElements = 16 / sizeof(T), kChannels = kBiasChunks * kElements;
  float sums[kBiasRows][kChannels];
};

// How much of the gradient of window `at`, with `code`, reaches the bias.
PYOPS_DEVICE float reaches(const ConvPoolBackward& p, float gradient, int code, int top, int left) {
  if (p.pool == Pool::kMax) return damp(p, gradient, code >= 128);
  const float share = gradient / average_size(p, top, left);
  float sum = 0.0f;
  for (int dy = 0; dy < p.pool_h; ++dy) {
    for (int dx = 0; dx < p.pool_w; ++dx) {
      const bool exists = static_cast<unsigned>(top + dy) < static_cast<unsigned>(p.conv_h) &&
                          static_cast<unsigned>(left + dx) < static_cast<unsigned>(p.conv_w);
      const int place = dy * static_cast<int>(p.pool_w) + dx;
      if (exists) sum += damp(p, share, (code >> place & 1) != 0);
    }
  }
  return sum;
}

// partial[part][channel], always added in the same order.
template <class T>
__global__ void __launch_bounds__(kThreads)
    conv_relu_pool_grad_bias_kernel(const __grid_constant__ ConvPoolBackward p, BiasWork work,
                                    float* partial) {
  using Table = BiasTable<T>;
  DYN_SMEM(smem);
  Table& table = *reinterpret_cast<Table*>(smem);
  int64_t part = blockIdx.x;
  const int64_t first = divide(part, work.channel_blocks) * static_cast<int64_t>(Table::kChannels);
  const int chunk = threadIdx.x % kBiasChunks * Table::kElements;
  const int left = static_cast<int>(p.out_channels - first) - chunk;
  const int64_t begin = part * work.part_size;
  const int64_t end = begin + work.part_size < work.count ? begin + work.part_size : work.count;
  float sums[Table::kElements] = {};
  for (int64_t i = begin + threadIdx.x / kBiasChunks; i < end; i += kBiasRows) {
    const int64_t at = i * p.out_channels + first + chunk;
    PooledChunk<T> loaded;
    loaded.load(work.fused ? p.grad_output : p.expanded, work.fused ? p.codes : nullptr, at, left,
                work.wide);
    int64_t rest = i;
    int top = 0, corner = 0;
    if (work.fused && p.pool == Pool::kAvg) {
      corner = static_cast<int>(divide(rest, p.out_w) * p.pool_stride_w - p.pool_pad_w);
      top = static_cast<int>(divide(rest, p.out_h) * p.pool_stride_h - p.pool_pad_h);
    }
    T elements[Table::kElements];
    memcpy(elements, &loaded.gradients, 16);
#pragma unroll
    for (int e = 0; e < Table::kElements; ++e) {
      const float gradient = as_float(elements[e]);
      const int code = static_cast<int>(loaded.codes[e / 4] >> e % 4 * 8 & 255);
      sums[e] += work.fused ? reaches(p, gradient, code, top, corner) : gradient;
    }
  }
#pragma unroll
  for (int e = 0; e < Table::kElements; ++e) {
    table.sums[threadIdx.x / kBiasChunks][chunk + e] = sums[e];
  }
  ptx::sync_threads();
  const int channel = static_cast<int>(threadIdx.x);
  if (channel < Table::kChannels && first + channel < p.out_channels) {
    float sum = 0.0f;
    for (int row = 0; row < kBiasRows; ++row) sum += table.sums[row][channel];
    partial[part * p.out_channels + first + channel] = sum;
  }
}

// result[k][c][tap] = sum over parts of partial[part][k][tap][c].
template <class T>
__global__ void __launch_bounds__(kThreads)
    conv_relu_pool_sum_parts_kernel(const float* partial, int64_t parts, int64_t rows, int64_t taps,
                                    int64_t channels, T* result) {
  const int64_t count = rows * taps * channels;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += step) {
    float sum = 0.0f;
    for (int64_t part = 0; part < parts; ++part) sum += partial[part * count + i];
    int64_t rest = i;
    const int c = divide(rest, channels);
    const int tap = divide(rest, taps);
    store_as(result + (rest * channels + c) * taps + tap, sum);
  }
}

BiasWork make_bias_work(const ConvPoolBackward& p) {
  const auto parts_of = [](int64_t size, int64_t part) { return (size + part - 1) / part; };
  const int64_t chunk = 16 / element_size(p.dtype);
  BiasWork work{};
  work.fused = fuses(p);
  work.count = p.batch * (work.fused ? p.out_h * p.out_w : p.conv_h * p.conv_w);
  work.wide = work.fused ? takes_wide_windows(p)
                         : p.out_channels % chunk == 0 && is_aligned(p.expanded, 16);
  work.channel_blocks = parts_of(p.out_channels, kBiasChunks * chunk);
  // A part is 8 rows a thread, or more where that would be more than four blocks a multiprocessor.
  const int64_t most = parts_of(4 * std::max(p.device.multiprocessors, 1), work.channel_blocks);
  work.part_size = std::max<int64_t>(8 * kBiasRows, parts_of(work.count, most));
  work.parts = parts_of(work.count, work.part_size);
  return work;
}

// One axis of the input gradient's convolution for input pixels first, first + stride, ...
struct AxisPart {
  int64_t first, count;         // of the pixels
  int64_t tap, tap_step, taps;  // that meet them
  int64_t dilation, pad;        // of the convolution of the expanded gradient
};

AxisPart axis_part(int64_t residue, int64_t in, int64_t kernel, int64_t stride, int64_t pad,
                   int64_t dilation) {
  AxisPart part{};
  part.first = residue;
  part.count = residue < in ? (in - residue - 1) / stride + 1 : 0;
  const int64_t common = std::gcd(stride, dilation);
  part.tap_step = stride / common;
  part.dilation = dilation / common;
  // Pixel and tap meet where pixel + pad - tap * dilation is a multiple of the stride.
  while (part.tap < part.tap_step && (residue + pad - part.tap * dilation) % stride != 0)
    ++part.tap;
  part.taps =
      part.tap < std::min(part.tap_step, kernel) ? (kernel - part.tap - 1) / part.tap_step + 1 : 0;
  const int64_t nearest = part.taps ? (residue + pad - part.tap * dilation) / stride : 0;
  part.pad = (std::max<int64_t>(part.taps, 1) - 1) * part.dilation - nearest;
  return part;
}

struct InputPart {
  AxisPart h, w;
};

InputPart input_part(const ConvPoolBackward& p, int64_t part) {
  return {axis_part(part / p.stride_w, p.in_h, p.kernel_h, p.stride_h, p.pad_h, p.dilation_h),
          axis_part(part % p.stride_w, p.in_w, p.kernel_w, p.stride_w, p.pad_w, p.dilation_w)};
}

}  // namespace

void sum_parts(const ConvPoolBackward& p, const float* partial, int64_t parts, int64_t taps,
               int64_t channels, void* result, cudaStream_t stream) {
  with_type(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    launch({"conv_relu_pool_sum_parts", blocks_for(p.out_channels * taps * channels), kThreads, 1,
            0, stream},
           planned<conv_relu_pool_sum_parts_kernel<T>, kThreads>(), partial, parts, p.out_channels,
           taps, channels, static_cast<T*>(result));
  });
}

}  // namespace pyops::cuda::conv

namespace pyops::cuda {

using namespace conv;

void conv_relu_pool_expand(const ConvPoolBackward& p, cudaStream_t stream) {
  const int64_t count = p.batch * p.conv_h * p.conv_w * p.out_channels;
  with_type(p.dtype, [&](auto zero) {
    launch({"conv_relu_pool_expand", blocks_for(count), kThreads, 1, 0, stream},
           planned<conv_relu_pool_expand_kernel<decltype(zero)>, kThreads>(), p);
  });
}

size_t conv_relu_pool_grad_input_workspace(const ConvPoolBackward& p) {
  return p.in_channels * p.kernel_h * p.kernel_w * (p.out_channels / p.groups) *
         element_size(p.dtype);
}

void conv_relu_pool_grad_input_pack(const ConvPoolBackward& p, int64_t part, cudaStream_t stream) {
  const auto [h, w] = input_part(p, part);
  const TapRange taps{static_cast<int>(h.tap),      static_cast<int>(h.tap_step),
                      static_cast<int>(h.taps),     static_cast<int>(w.tap),
                      static_cast<int>(w.tap_step), static_cast<int>(w.taps)};
  const int64_t count = p.in_channels * taps.taps_h * taps.taps_w * (p.out_channels / p.groups);
  with_type(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    launch({"conv_relu_pool_flip", blocks_for(count), kThreads, 1, 0, stream},
           planned<conv_relu_pool_flip_kernel<T>, kThreads>(), p, taps,
           static_cast<T*>(p.workspace));
  });
}

bool conv_relu_pool_grad_input_part(const ConvPoolBackward& p, int64_t part, ConvPoolForward& f) {
  const auto [h, w] = input_part(p, part);
  if (h.count == 0 || w.count == 0) return false;
  f = ConvPoolForward{};
  f.batch = p.batch, f.in_channels = p.out_channels, f.in_h = p.conv_h, f.in_w = p.conv_w;
  f.out_channels = p.in_channels, f.kernel_h = h.taps, f.kernel_w = w.taps;
  f.stride_h = f.stride_w = 1;
  f.pad_h = h.pad, f.pad_w = w.pad, f.dilation_h = h.dilation, f.dilation_w = w.dilation;
  f.groups = p.groups;
  f.conv_h = f.out_h = h.count, f.conv_w = f.out_w = w.count;
  f.activation = Activation::kNone, f.pool = Pool::kNone;
  f.pool_h = f.pool_w = f.pool_stride_h = f.pool_stride_w = 1;
  f.dtype = p.dtype, f.allow_tf32 = p.allow_tf32, f.device = p.device;
  f.input = p.expanded;
  f.in = {p.conv_h * p.conv_w * p.out_channels, 1, p.conv_w * p.out_channels, p.out_channels};
  f.weight = p.workspace;
  f.output = static_cast<char*>(p.grad_input) +
             (h.first * p.grad_in.h + w.first * p.grad_in.w) * element_size(p.dtype);
  f.out = {p.grad_in.n, p.grad_in.c, p.grad_in.h * p.stride_h, p.grad_in.w * p.stride_w};
  return true;
}

size_t conv_relu_pool_grad_bias_workspace(const ConvPoolBackward& p) {
  return make_bias_work(p).parts * p.out_channels * sizeof(float);
}

void conv_relu_pool_grad_bias(const ConvPoolBackward& p, cudaStream_t stream) {
  float* partial = static_cast<float*>(p.workspace);
  const BiasWork work = make_bias_work(p);
  with_type(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr size_t kSmem = sizeof(BiasTable<T>);
    launch({"conv_relu_pool_grad_bias", static_cast<unsigned>(work.parts * work.channel_blocks),
            kThreads, 1, kSmem, stream},
           planned<conv_relu_pool_grad_bias_kernel<T>, kThreads, kSmem>(), p, work, partial);
  });
  sum_parts(p, partial, work.parts, 1, 1, p.grad_bias, stream);
}

}  // namespace pyops::cuda
