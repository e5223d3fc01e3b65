// Convolution in many small groups, depthwise above all: lanes are output channels, each with
// input channels of its own.
//
// A task is a band of output rows of one image and kLanes output channels. Its input is copied to
// scratch as [row][column][channel of the group][lane], padded and converted; a channel that
// several outputs of its group read is repeated. Taps are then vector products.
#include "conv_relu_pool.h"
#include "conv_relu_pool_finish.h"
#include "conv_relu_pool_tile.h"
#include "runtime.h"
#include "simd.h"

namespace pyops::cpu::PYOPS_ISA {
namespace {

constexpr int64_t kInputBytes = 256 << 10;  // of a task, to stay in the second-level cache

struct Plan {
  ConvReluPoolParams p;
  int64_t channels, out_channels;  // of one group
  int64_t taps, blocks, bands, band_rows;
  int64_t columns, column_stride, row_stride;  // of the scratch copy
  const int32_t* offsets;                      // of each tap in the scratch copy

  int64_t input_rows(int64_t conv_rows) const {
    return (conv_rows - 1) * p.stride_h + (p.kernel_h - 1) * p.dilation_h + 1;
  }
};

template <class T>
PYOPS_INLINE Vec load_part(const T* src, int64_t count) {
  if (count >= kLanes) return load(src);
  T part[kLanes] = {};
  std::memcpy(part, src, count * sizeof(T));
  return load(part);
}

// The kLanes output channels of a task, and what each reads.
struct Lanes {
  int64_t k, valid;
  int64_t first, span;      // the input channels that they read
  int64_t channel[kLanes];  // first one of each; spare lanes read what the last valid one does
  VecInt place;             // channel - first

  Lanes(const Plan& plan, int64_t k) : k(k), valid(min(kLanes, plan.p.out_channels - k)) {
    for (int i = 0; i < kLanes; ++i) {
      channel[i] = (k + min(i, valid - 1)) / plan.out_channels * plan.channels;
      place[i] = static_cast<int32_t>(channel[i] - channel[0]);
    }
    first = channel[0];
    span = channel[kLanes - 1] + plan.channels - first;
  }
};

// Copies `count` pixels of one input row; `src` is the first's in channel 0. The next row is
// prefetched: channels are too many streams, and too far apart, for the hardware.
template <class T>
void copy_pixels(const Plan& plan, const Lanes& lanes, const T* src, int64_t count, float* dst) {
  const ConvReluPoolParams& p = plan.p;
  const int64_t plane = p.channels_last ? 1 : p.in_h * p.in_w;
  const int64_t pixel = p.channels_last ? p.in_channels : 1;
  if (lanes.span > kLanes) {
    for (int64_t x = 0; x < count; ++x, dst += plan.column_stride) {
      for (int64_t j = 0; j < plan.channels; ++j) {
        for (int i = 0; i < kLanes; ++i) {
          dst[j * kLanes + i] = to_float(src[(lanes.channel[i] + j) * plane + x * pixel]);
        }
      }
    }
    return;
  }
  const bool in_order = plan.channels == 1 && plan.out_channels == 1;
  const T* first = src + lanes.first * plane;
  for (int64_t x = 0; x < count; x += kLanes) {
    const int64_t pixels = min(kLanes, count - x);
    Vec m[kLanes] = {};  // the channels of each pixel
    if (p.channels_last) {
      for (int64_t i = 0; i < pixels; ++i) {
        const T* at = first + (x + i) * pixel;
        __builtin_prefetch(at + p.in_w * pixel);
        m[i] = load_part(at, p.in_channels - lanes.first);
      }
    } else {
      if (lanes.span == kLanes && pixels == kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          __builtin_prefetch(first + i * plane + x + p.in_w);
          m[i] = load(first + i * plane + x);
        }
      } else {
        for (int64_t i = 0; i < lanes.span; ++i) m[i] = load_part(first + i * plane + x, pixels);
      }
      transpose(m);
    }
    for (int64_t i = 0; i < pixels; ++i, dst += plan.column_stride) {
      if (in_order) {
        store(dst, m[i]);
        continue;
      }
      VecInt place = lanes.place;
      for (int64_t j = 0; j < plan.channels; ++j, place += 1) {
        store(dst + j * kLanes, __builtin_shuffle(m[i], place));
      }
    }
  }
}

template <class T>
void pack_input(const Plan& plan, const Lanes& lanes, const T* image, int64_t conv_row,
                int64_t rows, float* dst) {
  const ConvReluPoolParams& p = plan.p;
  const int64_t begin = min(plan.columns, p.pad_w);
  const int64_t end = max(begin, min(plan.columns, p.in_w + p.pad_w));
  for (int64_t j = 0; j < rows; ++j, dst += plan.row_stride) {
    const int64_t y = conv_row * p.stride_h - p.pad_h + j;
    if (y < 0 || y >= p.in_h) {
      std::memset(dst, 0, plan.row_stride * 4);
      continue;
    }
    std::memset(dst, 0, begin * plan.column_stride * 4);
    copy_pixels(plan, lanes, image + y * p.in_w * (p.channels_last ? p.in_channels : 1),
                end - begin, dst + begin * plan.column_stride);
    std::memset(dst + end * plan.column_stride, 0, (plan.columns - end) * plan.column_stride * 4);
  }
}

template <class T>
void run_task(const Plan& plan, int64_t index) {
  const ConvReluPoolParams& p = plan.p;
  const int64_t band = index % plan.bands, block = index / plan.bands % plan.blocks;
  const int64_t n = index / plan.bands / plan.blocks, k = block * kLanes;
  const int64_t row_begin = band * plan.band_rows;
  const int64_t row_end = min(p.out_h, row_begin + plan.band_rows);
  const Lanes lanes(plan, k);

  float* weight = static_cast<float*>(scratch(6, plan.taps * kLanes * 4));
  std::memset(weight, 0, plan.taps * kLanes * 4);
  const T* src = static_cast<const T*>(p.weight) + k * plan.taps;
  for (int64_t i = 0; i < lanes.valid; ++i) {
    for (int64_t t = 0; t < plan.taps; ++t) {
      weight[t * kLanes + i] = to_float(src[i * plan.taps + t]);
    }
  }
  const T* image = static_cast<const T*>(p.input) + n * p.in_channels * p.in_h * p.in_w;
  const Channels channels{n, k, lanes.valid, 1};
  const int64_t conv_begin = pool_begin(p, row_begin);
  const int64_t rows = plan.input_rows(pool_end(p, row_end - 1) - conv_begin);
  float* input = static_cast<float*>(scratch(4, rows * plan.row_stride * 4));
  pack_input<T>(plan, lanes, image, conv_begin, rows, input);

  const int64_t row_step = p.stride_h * plan.row_stride;
  const ConvolveRows convolve{weight,
                              plan.offsets,
                              plan.taps,
                              taps_per_sum(p.kernel_h * p.kernel_w),
                              1,
                              p.conv_w,
                              p.stride_w * plan.column_stride,
                              row_step};
  finish_band<T>(p, channels, row_begin, row_end, [&](int64_t begin, int64_t end, float* sums) {
    convolve_rows<Operand::kVector>(convolve, input + (begin - conv_begin) * row_step, end - begin,
                                    sums);
  });
}

template <class T>
void run(const Plan& plan) {
  parallel_for(plan.p.batch * plan.blocks * plan.bands,
               [&](int64_t index) { run_task<T>(plan, index); });
}

}  // namespace

bool conv_relu_pool_depthwise(const ConvReluPoolParams& p) {
  Plan plan;
  plan.p = p;
  plan.channels = p.in_channels / p.groups;
  plan.out_channels = p.out_channels / p.groups;
  const int64_t area = p.kernel_h * p.kernel_w;
  // Groups that fill more of a vector are better off with lanes of their own.
  const int64_t most = area >= 9 ? kLanes / 2 : kLanes / 4;
  if (p.dtype == DType::kDouble || p.groups == 1 || plan.out_channels > most) return false;
  plan.taps = plan.channels * area;
  plan.columns = (p.conv_w - 1) * p.stride_w + (p.kernel_w - 1) * p.dilation_w + 1;
  plan.column_stride = plan.channels * kLanes;
  plan.row_stride = plan.columns * plan.column_stride;
  if (((p.kernel_h - 1) * p.dilation_h + 1) * plan.row_stride >= int64_t{1} << 31) return false;
  if (p.batch == 0 || p.out_channels == 0 || p.out_h == 0 || p.out_w == 0) return true;

  plan.blocks = ceil_div(p.out_channels, kLanes);
  plan.band_rows = p.out_h;
  const auto input_bytes = [&](int64_t rows) {
    const int64_t conv_rows = min(p.conv_h, (rows - 1) * p.pool_stride_h + p.pool_h);
    return plan.input_rows(conv_rows) * plan.row_stride * 4;
  };
  // Halve bands until they fit the cache and there are enough for the threads.
  while (plan.band_rows > 1 &&
         (input_bytes(plan.band_rows) > kInputBytes ||
          (plan.band_rows > 8 &&
           p.batch * plan.blocks * ceil_div(p.out_h, plan.band_rows) < 2 * num_threads()))) {
    plan.band_rows = ceil_div(plan.band_rows, 2);
  }
  plan.bands = ceil_div(p.out_h, plan.band_rows);

  int32_t* offsets = static_cast<int32_t*>(scratch(1, plan.taps * 4));
  for (int64_t j = 0, t = 0; j < plan.channels; ++j) {
    for (int64_t r = 0; r < p.kernel_h; ++r) {
      for (int64_t s = 0; s < p.kernel_w; ++s, ++t) {
        offsets[t] = static_cast<int32_t>(j * kLanes + r * p.dilation_h * plan.row_stride +
                                          s * p.dilation_w * plan.column_stride);
      }
    }
  }
  plan.offsets = offsets;
  with_type(p.dtype, [&](auto t) { run<decltype(t)>(plan); });
  return true;
}

}  // namespace pyops::cpu::PYOPS_ISA
