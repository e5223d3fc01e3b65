// The scalar path: every dtype and geometry, plain loops, correctness before speed.
#include <algorithm>
#include <cmath>
#include <limits>

#include "conv_relu_pool.h"
#include "runtime.h"

// For the 16-bit types and their conversions; this file is compiled for the baseline only.
#define PYOPS_ISA generic
#include "simd.h"

namespace pyops::cpu::generic {
namespace {

PYOPS_INLINE double to_float(double x) { return x; }
PYOPS_INLINE void from_float(double x, double* out) { *out = x; }

struct Strides {
  int64_t n, c, y, x;
};

Strides strides_of(int64_t channels, int64_t h, int64_t w, bool channels_last) {
  if (channels_last) return {channels * h * w, 1, w * channels, channels};
  return {channels * h * w, h * w, w, 1};
}

// Sums over this many channels are added up apart: one running sum over hundreds of
// channels would have several times the rounding error.
constexpr int64_t kChannelsPerSum = 16;

// conv[y][x] = bias + sum over channels and taps, one image and output channel.
template <class T, class Acc>
void convolve(const ConvReluPoolParams& p, int64_t n, int64_t k, Acc* conv, Acc* sum) {
  const int64_t channels = p.in_channels / p.groups;
  const int64_t group = k / (p.out_channels / p.groups);
  const Strides in = strides_of(p.in_channels, p.in_h, p.in_w, p.channels_last);
  const T* input = static_cast<const T*>(p.input) + n * in.n + group * channels * in.c;
  const T* weight = static_cast<const T*>(p.weight) + k * channels * p.kernel_h * p.kernel_w;
  const Acc bias = p.bias ? to_float(static_cast<const T*>(p.bias)[k]) : Acc(0);

  for (int64_t y = 0; y < p.conv_h; ++y, conv += p.conv_w) {
    std::fill(conv, conv + p.conv_w, Acc(0));
    for (int64_t c0 = 0; c0 < channels; c0 += kChannelsPerSum) {
      std::fill(sum, sum + p.conv_w, Acc(0));
      for (int64_t c = c0; c < std::min(channels, c0 + kChannelsPerSum); ++c) {
        for (int64_t r = 0; r < p.kernel_h; ++r) {
          const int64_t iy = y * p.stride_h - p.pad_h + r * p.dilation_h;
          if (iy < 0 || iy >= p.in_h) continue;
          for (int64_t s = 0; s < p.kernel_w; ++s) {
            const Acc w = to_float(weight[(c * p.kernel_h + r) * p.kernel_w + s]);
            // The x whose input column, x * stride_w + shift, lies inside the image.
            const int64_t shift = s * p.dilation_w - p.pad_w;
            const int64_t first = shift < 0 ? (-shift + p.stride_w - 1) / p.stride_w : 0;
            const int64_t last =
                shift < p.in_w ? std::min(p.conv_w, (p.in_w - 1 - shift) / p.stride_w + 1) : 0;
            const T* row = input + c * in.c + iy * in.y + shift * in.x;
            for (int64_t x = first; x < last; ++x)
              sum[x] += w * to_float(row[x * p.stride_w * in.x]);
          }
        }
      }
      for (int64_t x = 0; x < p.conv_w; ++x) conv[x] += sum[x];
    }
    for (int64_t x = 0; x < p.conv_w; ++x) conv[x] += bias;
  }
}

template <class Acc>
Acc activate(const ConvReluPoolParams& p, Acc v) {
  if (p.activation == Activation::kRelu) return v <= Acc(0) ? Acc(0) : v;
  if (p.activation == Activation::kLeakyRelu) return v > Acc(0) ? v : v * Acc(p.negative_slope);
  return v;
}

template <class Acc>
bool passes_gradient(const ConvReluPoolParams& p, Acc v) {
  if (p.activation == Activation::kRelu) return !(v <= Acc(0));
  if (p.activation == Activation::kLeakyRelu) return v > Acc(0);
  return true;
}

// Activates and pools one window of a conv plane; *code as ConvReluPoolParams::codes has it.
template <class Acc>
Acc pool_window(const ConvReluPoolParams& p, const Acc* conv, int64_t oy, int64_t ox, int* code) {
  const int64_t y0 = oy * p.pool_stride_h - p.pool_pad_h, x0 = ox * p.pool_stride_w - p.pool_pad_w;
  const int64_t y_begin = std::max<int64_t>(y0, 0), y_end = std::min(y0 + p.pool_h, p.conv_h);
  const int64_t x_begin = std::max<int64_t>(x0, 0), x_end = std::min(x0 + p.pool_w, p.conv_w);
  Acc best = -std::numeric_limits<Acc>::infinity(), sum = 0;
  bool first = true;
  *code = 0;
  for (int64_t y = y_begin; y < y_end; ++y) {
    for (int64_t x = x_begin; x < x_end; ++x) {
      const Acc before = conv[y * p.conv_w + x];
      const Acc value = activate(p, before);
      const int place = static_cast<int>((y - y0) * p.pool_w + (x - x0));
      const bool passes = passes_gradient(p, before);
      if (p.pool == Pool::kAvg) {
        sum += value;
        if (passes && place < 8) *code |= 1 << place;
      } else if (first || value > best || std::isnan(value)) {
        best = value;
        *code = p.pool == Pool::kNone ? passes : (place & 127) | (passes ? 128 : 0);
      }
      first = false;
    }
  }
  if (p.pool != Pool::kAvg) return best;
  // As torch: padding counts, what ceil_mode adds beyond it does not.
  const int64_t rows = std::min(y0 + p.pool_h, p.conv_h + p.pool_pad_h) - y0;
  const int64_t columns = std::min(x0 + p.pool_w, p.conv_w + p.pool_pad_w) - x0;
  return sum / static_cast<Acc>(rows * columns);
}

template <class T, class Acc>
void run(const ConvReluPoolParams& p) {
  const Strides out = strides_of(p.out_channels, p.out_h, p.out_w, p.channels_last);
  const int64_t plane = p.conv_h * p.conv_w;
  parallel_for(p.batch * p.out_channels, [&](int64_t index) {
    const int64_t n = index / p.out_channels, k = index % p.out_channels;
    Acc* conv = static_cast<Acc*>(scratch(4, (plane + p.conv_w) * sizeof(Acc)));
    convolve<T>(p, n, k, conv, conv + plane);
    for (int64_t oy = 0; oy < p.out_h; ++oy) {
      for (int64_t ox = 0; ox < p.out_w; ++ox) {
        int code;
        const Acc value = pool_window(p, conv, oy, ox, &code);
        const int64_t at = n * out.n + k * out.c + oy * out.y + ox * out.x;
        from_float(value, static_cast<T*>(p.output) + at);
        if (p.codes) p.codes[at] = static_cast<uint8_t>(code);
      }
    }
  });
}

}  // namespace
}  // namespace pyops::cpu::generic

namespace pyops::cpu {

void conv_relu_pool_generic(const ConvReluPoolParams& p) {
  if (p.dtype == DType::kDouble) return generic::run<double, double>(p);
  generic::with_type(p.dtype, [&](auto t) { generic::run<decltype(t), float>(p); });
}

}  // namespace pyops::cpu
