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
  bool in_place;
  const int32_t *offsets, *copy_offsets;  // of each tap, in the input and in the scratch copy

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
  const int64_t plane = p.in_h * p.in_w;
  for (int64_t j = 0; j < plan.channels; ++j, dst += kLanes) {
    if (!p.channels_last) {
      for (int64_t x = 0; x < count; x += kLanes) {
        Vec m[kLanes];
        const int64_t pixels = min(kLanes, count - x);
        if (pixels == kLanes) {
#pragma GCC unroll 16
          for (int i = 0; i < kLanes; ++i) {
            const T* from = src + (lanes.channel[i] + j) * plane + x;
            __builtin_prefetch(from + p.in_w);
            m[i] = load(from);
          }
        } else {
          for (int i = 0; i < kLanes; ++i) {
            m[i] = load_part(src + (lanes.channel[i] + j) * plane + x, pixels);
          }
        }
        transpose(m);
        for (int64_t i = 0; i < pixels; ++i) store(dst + (x + i) * plan.column_stride, m[i]);
      }
    } else if (lanes.span <= kLanes) {
      const bool in_order = plan.channels == 1 && plan.out_channels == 1;
      const VecInt place = lanes.place + static_cast<int32_t>(j);
      for (int64_t x = 0; x < count; ++x) {
        const T* pixel = src + x * p.in_channels + lanes.first;
        __builtin_prefetch(pixel + p.in_w * p.in_channels);
        const Vec v = load_part(pixel, p.in_channels - lanes.first);
        store(dst + x * plan.column_stride, in_order ? v : __builtin_shuffle(v, place));
      }
    } else {
      for (int64_t x = 0; x < count; ++x) {
        for (int i = 0; i < kLanes; ++i) {
          dst[x * plan.column_stride + i] = to_float(src[x * p.in_channels + lanes.channel[i] + j]);
        }
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

// Depthwise, channels_last, float: lanes lie side by side in the input, so no copy is needed.
// Taps outside the image are left out: whole kernel rows are a run of taps, and at the sides the
// runs within a kernel row are taken one by one.
void convolve_in_place(const Plan& plan, const float* weight, const float* input, int64_t begin,
                       int64_t end, float* sums) {
  const ConvReluPoolParams& p = plan.p;
  const int64_t step = p.stride_w * p.in_channels;
  // Pixels [left, right) have all their columns inside.
  const int64_t reach = p.in_w - 1 + p.pad_w - (p.kernel_w - 1) * p.dilation_w;
  const int64_t left = min(p.conv_w, ceil_div(p.pad_w, p.stride_w));
  const int64_t right = max(left, reach < 0 ? 0 : min(p.conv_w, reach / p.stride_w + 1));
  ConvolveRows inner{weight, plan.offsets, 0, 1, right - left, step, 0};
  for (int64_t y = begin; y < end; ++y, sums += p.conv_w * kLanes) {
    const int64_t first_row = y * p.stride_h - p.pad_h;
    const int64_t r_begin = min(p.kernel_h, max(0, ceil_div(-first_row, p.dilation_h)));
    const int64_t r_end = max(r_begin, min(p.kernel_h, ceil_div(p.in_h - first_row, p.dilation_h)));
    const auto pixel = [&](int64_t x) {
      return input + (first_row * p.in_w + x * p.stride_w - p.pad_w) * p.in_channels;
    };
    for (int64_t x = 0; x < p.conv_w; x = x + 1 == left ? right : x + 1) {
      if (x == left && left < right) x = right;
      if (x >= p.conv_w) break;
      const int64_t first_column = x * p.stride_w - p.pad_w;
      const int64_t s_begin = min(p.kernel_w, max(0, ceil_div(-first_column, p.dilation_w)));
      const int64_t s_end =
          max(s_begin, min(p.kernel_w, ceil_div(p.in_w - first_column, p.dilation_w)));
      store(sums + x * kLanes, Vec{});
      for (int64_t r = r_begin; r < r_end; ++r) {
        const int64_t tap = r * p.kernel_w + s_begin;
        tile<Operand::kVector, 1, 1>(pixel(x), 0, plan.offsets + tap, s_end - s_begin,
                                     weight + tap * kLanes, sums + x * kLanes, true);
      }
    }
    if (left == right) continue;
    const int64_t tap = r_begin * p.kernel_w;
    inner.offsets = plan.offsets + tap;
    inner.weight = weight + tap * kLanes;
    inner.taps = (r_end - r_begin) * p.kernel_w;
    convolve_rows<Operand::kVector>(inner, pixel(left), 1, sums + left * kLanes);
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
  if (plan.in_place && lanes.valid == kLanes) {
    const float* first = static_cast<const float*>(static_cast<const void*>(image)) + k;
    finish_band<T>(p, channels, row_begin, row_end, [&](int64_t begin, int64_t end, float* sums) {
      convolve_in_place(plan, weight, first, begin, end, sums);
    });
    return;
  }
  const int64_t conv_begin = pool_begin(p, row_begin);
  const int64_t rows = plan.input_rows(pool_end(p, row_end - 1) - conv_begin);
  float* input = static_cast<float*>(scratch(4, rows * plan.row_stride * 4));
  pack_input<T>(plan, lanes, image, conv_begin, rows, input);

  const int64_t row_step = p.stride_h * plan.row_stride;
  const ConvolveRows convolve{
      weight, plan.copy_offsets, plan.taps, 1, p.conv_w, p.stride_w * plan.column_stride, row_step};
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
  const int64_t span = (p.kernel_h - 1) * p.dilation_h + 1;
  if (span * plan.row_stride >= int64_t{1} << 31) return false;
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

  plan.in_place = p.channels_last && p.dtype == DType::kFloat && plan.channels == 1 &&
                  plan.out_channels == 1 && span * p.in_w * p.in_channels < int64_t{1} << 31;
  int32_t* offsets = static_cast<int32_t*>(scratch(1, 2 * plan.taps * 4));
  plan.copy_offsets = offsets;
  plan.offsets = offsets + plan.taps;
  for (int64_t j = 0; j < plan.channels; ++j) {
    for (int64_t r = 0; r < p.kernel_h; ++r) {
      for (int64_t s = 0; s < p.kernel_w; ++s, ++offsets) {
        const int64_t y = r * p.dilation_h, x = s * p.dilation_w;
        offsets[0] =
            static_cast<int32_t>(j * kLanes + y * plan.row_stride + x * plan.column_stride);
        offsets[plan.taps] = static_cast<int32_t>((y * p.in_w + x) * p.in_channels);
      }
    }
  }
  if (p.dtype == DType::kFloat) run<float>(plan);
  if (p.dtype == DType::kBFloat16) run<BFloat16>(plan);
  if (p.dtype == DType::kHalf) run<Half>(plan);
  return true;
}

}  // namespace pyops::cpu::PYOPS_ISA
