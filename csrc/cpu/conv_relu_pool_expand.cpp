#include "conv_relu_pool_expand.h"

#include <algorithm>

#define PYOPS_ISA baseline  // plain loops; simd.h only for the 16-bit types
#include "runtime.h"
#include "simd.h"

namespace pyops::cpu {
namespace {

using baseline::BFloat16;
using baseline::Half;

double widen(double x) { return x; }
float widen(float x) { return x; }
float widen(BFloat16 x) { return baseline::to_float(x); }
float widen(Half x) { return baseline::to_float(x); }
void narrow(double value, double* out) { *out = value; }
template <class T>
void narrow(float value, T* out) {
  baseline::from_float(value, out);
}

// One (image, channel) plane; `step` is the distance between neighbouring pixels.
template <class T>
void expand_plane(const ConvReluPoolParams& p, int64_t step, const T* grad, const uint8_t* codes,
                  const T* output_sign, T* expanded) {
  using Acc = decltype(widen(T{}));
  const Acc damped = p.activation == Activation::kRelu        ? Acc(0)
                     : p.activation == Activation::kLeakyRelu ? Acc(p.negative_slope)
                                                              : Acc(1);
  // A dead ReLU gives 0 even where the incoming gradient is NaN or infinite.
  const auto passed = [&](Acc g, bool whole) {
    return whole ? g : damped == Acc(0) ? Acc(0) : g * damped;
  };
  if (p.pool == Pool::kNone) {
    for (int64_t i = 0; i < p.out_h * p.out_w; ++i) {
      bool whole = true;
      if (codes != nullptr) {
        whole = codes[i * step] & 1;
      } else if (p.activation != Activation::kNone) {
        const Acc out = widen(output_sign[i * step]);
        whole = p.activation == Activation::kRelu ? !(out <= 0) : out > 0;
      }
      narrow(passed(widen(grad[i * step]), whole), expanded + i * step);
    }
    return;
  }
  const int64_t conv_size = p.conv_h * p.conv_w;
  Acc* plane = static_cast<Acc*>(scratch(4, conv_size * sizeof(Acc)));
  std::fill(plane, plane + conv_size, Acc(0));
  for (int64_t oy = 0; oy < p.out_h; ++oy) {
    const int64_t y0 = oy * p.pool_stride_h - p.pool_pad_h;
    for (int64_t ox = 0; ox < p.out_w; ++ox) {
      const int64_t x0 = ox * p.pool_stride_w - p.pool_pad_w;
      const int64_t at = (oy * p.out_w + ox) * step;
      const Acc g = widen(grad[at]);
      const int code = codes[at];
      if (p.pool == Pool::kMax) {
        const int64_t place = code & 127;
        const int64_t y = y0 + place / p.pool_w, x = x0 + place % p.pool_w;
        if (y < 0 || y >= p.conv_h || x < 0 || x >= p.conv_w) continue;  // codes are user input
        plane[y * p.conv_w + x] += passed(g, code & 128);
        continue;
      }
      const int64_t y_end = std::min(y0 + p.pool_h, p.conv_h + p.pool_pad_h);
      const int64_t x_end = std::min(x0 + p.pool_w, p.conv_w + p.pool_pad_w);
      const Acc share = g / Acc((y_end - y0) * (x_end - x0));
      for (int64_t y = std::max<int64_t>(y0, 0); y < std::min(y_end, p.conv_h); ++y) {
        for (int64_t x = std::max<int64_t>(x0, 0); x < std::min(x_end, p.conv_w); ++x) {
          const int64_t place = (y - y0) * p.pool_w + (x - x0);
          plane[y * p.conv_w + x] += passed(share, (code >> place) & 1);
        }
      }
    }
  }
  for (int64_t i = 0; i < conv_size; ++i) narrow(plane[i], expanded + i * step);
}

template <class T>
void expand(const ConvReluPoolGradParams& g, const void* output_sign, void* expanded) {
  const ConvReluPoolParams& p = g.p;
  const int64_t out_size = p.out_h * p.out_w, conv_size = p.conv_h * p.conv_w;
  const int64_t step = p.channels_last ? p.out_channels : 1;
  parallel_for(p.batch * p.out_channels, [&](int64_t index) {
    const int64_t image = index / p.out_channels, channel = index % p.out_channels;
    const auto start = [&](int64_t size) {
      return image * p.out_channels * size + channel * (p.channels_last ? 1 : size);
    };
    expand_plane<T>(
        p, step, static_cast<const T*>(g.grad_output) + start(out_size),
        p.codes == nullptr ? nullptr : p.codes + start(out_size),
        output_sign == nullptr ? nullptr : static_cast<const T*>(output_sign) + start(out_size),
        static_cast<T*>(expanded) + start(conv_size));
  });
}

template <class T>
void sum_channels_of(const ConvReluPoolParams& p, const T* expanded, T* grad_bias) {
  constexpr int64_t kBlock = 32;
  const int64_t pixels = p.conv_h * p.conv_w;
  const int64_t channel_step = p.channels_last ? 1 : pixels;
  const int64_t pixel_step = p.channels_last ? p.out_channels : 1;
  parallel_for((p.out_channels + kBlock - 1) / kBlock, [&](int64_t block) {
    const int64_t first = block * kBlock, count = std::min(kBlock, p.out_channels - first);
    double sums[kBlock] = {};
    for (int64_t n = 0; n < p.batch; ++n) {
      const T* image = expanded + n * p.out_channels * pixels + first * channel_step;
      if (p.channels_last) {
        for (int64_t i = 0; i < pixels; ++i) {
          for (int64_t k = 0; k < count; ++k) sums[k] += widen(image[i * pixel_step + k]);
        }
      } else {
        for (int64_t k = 0; k < count; ++k) {
          for (int64_t i = 0; i < pixels; ++i) sums[k] += widen(image[k * channel_step + i]);
        }
      }
    }
    using Acc = decltype(widen(T{}));
    for (int64_t k = 0; k < count; ++k) narrow(static_cast<Acc>(sums[k]), grad_bias + first + k);
  });
}

template <class F>
void with_any_type(DType dtype, const F& f) {
  if (dtype == DType::kDouble) return f(double{});
  baseline::with_type(dtype, f);
}

}  // namespace

void expand_gradient(const ConvReluPoolGradParams& g, const void* output_sign, void* expanded) {
  with_any_type(g.p.dtype, [&](auto t) { expand<decltype(t)>(g, output_sign, expanded); });
}

void sum_channels(const ConvReluPoolParams& p, const void* expanded, void* grad_bias) {
  with_any_type(p.dtype, [&](auto t) {
    using T = decltype(t);
    sum_channels_of(p, static_cast<const T*>(expanded), static_cast<T*>(grad_bias));
  });
}

}  // namespace pyops::cpu
