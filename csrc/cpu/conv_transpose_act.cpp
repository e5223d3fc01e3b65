// conv_transpose2d_act on the CPU: checks, memory formats, choice of kernel, registration.
#include "conv_transpose_act.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <cmath>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#define PYOPS_ISA baseline  // plain loops; simd.h only for the 16-bit types
#include "../checks.h"
#include "runtime.h"
#include "simd.h"
#include "strided_conv_winograd.h"
#include "tensors.h"

namespace pyops::cpu {
namespace {

using baseline::BFloat16;
using baseline::Half;
using torch::headeronly::MemoryFormat;
using IntList = std::vector<int64_t>;
using MaybeTensor = std::optional<Tensor>;

constexpr int64_t kVectorFloats = 16;  // what kernels may read beyond bias, scale and shift

double widen(double x) { return x; }
float widen(float x) { return x; }
float widen(BFloat16 x) { return baseline::to_float(x); }
float widen(Half x) { return baseline::to_float(x); }
void narrow(double value, double* out) { *out = value; }
template <class T>
void narrow(float value, T* out) {
  baseline::from_float(value, out);
}

// Calls f with a null pointer of the element type.
template <class F>
void with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat:
      return f(static_cast<float*>(nullptr));
    case DType::kBFloat16:
      return f(static_cast<BFloat16*>(nullptr));
    case DType::kHalf:
      return f(static_cast<Half*>(nullptr));
    case DType::kDouble:
      return f(static_cast<double*>(nullptr));
  }
}

struct Geometry {
  int64_t stride_h, stride_w, pad_h, pad_w, output_pad_h, output_pad_w, dilation_h, dilation_w;
  int64_t groups;
};

void check_range(const char* name, int64_t a, int64_t b, int64_t least) {
  const int64_t most = (1LL << 31) - 1;
  STD_TORCH_CHECK(a >= least && b >= least && a <= most && b <= most, name,
                  ": expected integers of at least ", least, " and below 2^31, got (", a, ", ", b,
                  ")");
}

// What the two ops share. Pointers are set by the caller.
ConvTransposeParams make_params(const Tensor& input, const Tensor& weight, const Geometry& g,
                                const std::string& activation, double negative_slope) {
  check_rank("input", input, 4);
  check_rank("weight", weight, 4);
  check_same("weight", weight, "input", input);
  check_range("stride", g.stride_h, g.stride_w, 1);
  check_range("padding", g.pad_h, g.pad_w, 0);
  check_range("output_padding", g.output_pad_h, g.output_pad_w, 0);
  check_range("dilation", g.dilation_h, g.dilation_w, 1);
  STD_TORCH_CHECK((g.output_pad_h < g.stride_h || g.output_pad_h < g.dilation_h) &&
                      (g.output_pad_w < g.stride_w || g.output_pad_w < g.dilation_w),
                  "output_padding: expected less than stride or dilation");
  STD_TORCH_CHECK(g.groups >= 1 && weight.size(0) == input.size(1) && input.size(1) % g.groups == 0,
                  "groups: ", g.groups, " does not fit input ", shape_of(input), " and weight ",
                  shape_of(weight));
  ConvTransposeParams p{};
  p.batch = input.size(0), p.in_channels = input.size(1);
  p.in_h = input.size(2), p.in_w = input.size(3);
  p.out_channels = weight.size(1) * g.groups;
  p.kernel_h = weight.size(2), p.kernel_w = weight.size(3);
  STD_TORCH_CHECK(p.kernel_h > 0 && p.kernel_w > 0 && p.in_channels > 0 && p.out_channels > 0,
                  "weight: expected no dimension of size 0, got ", shape_of(weight));
  STD_TORCH_CHECK(p.in_h > 0 && p.in_w > 0, "input: expected no dimension of size 0, got ",
                  shape_of(input));
  p.stride_h = g.stride_h, p.stride_w = g.stride_w;
  p.pad_h = g.pad_h, p.pad_w = g.pad_w;
  p.dilation_h = g.dilation_h, p.dilation_w = g.dilation_w;
  p.groups = g.groups;
  p.out_h = (p.in_h - 1) * g.stride_h - 2 * g.pad_h + g.dilation_h * (p.kernel_h - 1) +
            g.output_pad_h + 1;
  p.out_w = (p.in_w - 1) * g.stride_w - 2 * g.pad_w + g.dilation_w * (p.kernel_w - 1) +
            g.output_pad_w + 1;
  STD_TORCH_CHECK(p.out_h > 0 && p.out_w > 0, "input: ", shape_of(input),
                  " is too small for its padding");
  p.activation = output_activation_of(activation);
  p.negative_slope = static_cast<float>(negative_slope);
  p.dtype = dtype_of("input", input);
  p.channels_last = lies_channels_last(input);
  return p;
}

void check_vector(const char* name, const MaybeTensor& t, const Tensor& input, int64_t channels) {
  if (!t) return;
  check_shape(name, *t, {channels});
  check_same(name, *t, "input", input);
}

MaybeTensor contiguous_vector(const MaybeTensor& t) {
  if (!t || t->is_contiguous()) return t;
  return torch::stable::contiguous(*t);
}

template <class T>
const T* data_of(const MaybeTensor& t) {
  return t ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

// A vector of that length as floats or doubles, `otherwise` where there is none.
template <class Acc, class T>
void widen_vector(const T* values, int64_t length, double otherwise, Acc* to) {
  for (int64_t k = 0; k < length; ++k) to[k] = values ? Acc(widen(values[k])) : Acc(otherwise);
}

double activate(const ConvTransposeParams& p, double slope, double x) {
  switch (p.activation) {
    case OutputActivation::kRelu:
      return x <= 0 ? 0 : x;
    case OutputActivation::kLeakyRelu:
      return x > 0 ? x : x * slope;
    case OutputActivation::kTanh:
      return std::tanh(x);
    case OutputActivation::kSigmoid:
      return 1 / (1 + std::exp(-x));
    default:
      return x;
  }
}

// The library's transposed convolution, then the rest in place.
Tensor forward_double(const ConvTransposeParams& p, const Geometry& g, double slope,
                      const Tensor& input, const Tensor& weight, const MaybeTensor& bias,
                      const MaybeTensor& scale, const MaybeTensor& shift) {
  using torch::stable::detail::from;
  std::array<StableIValue, 9> stack{from(input),
                                    from(weight),
                                    from(MaybeTensor()),
                                    from(IntList{g.stride_h, g.stride_w}),
                                    from(IntList{g.pad_h, g.pad_w}),
                                    from(IntList{g.dilation_h, g.dilation_w}),
                                    from(true),
                                    from(IntList{g.output_pad_h, g.output_pad_w}),
                                    from(g.groups)};
  PYOPS_SHIM_CHECK(torch_call_dispatcher("aten::convolution", "", stack.data(), TORCH_ABI_VERSION));
  Tensor output = as_dense(torch::stable::detail::to<Tensor>(stack[0]), p.channels_last);
  std::vector<double> b(p.out_channels), s(p.out_channels), t(p.out_channels);
  widen_vector(data_of<double>(bias), p.out_channels, 0, b.data());
  widen_vector(data_of<double>(scale), p.out_channels, 1, s.data());
  widen_vector(data_of<double>(shift), p.out_channels, 0, t.data());
  double* out = static_cast<double*>(output.mutable_data_ptr());
  const int64_t area = p.out_h * p.out_w;
  for (int64_t i = 0; i < p.batch * p.out_channels * area; ++i) {
    const int64_t k = p.channels_last ? i % p.out_channels : i / area % p.out_channels;
    out[i] = activate(p, slope, (out[i] + b[k]) * s[k] + t[k]);
  }
  return output;
}

// Waking another thread costs some microseconds: about what this many multiplications take.
bool is_small(const ConvTransposeParams& p) {
  const int64_t products = p.batch * p.in_channels * p.in_h * p.in_w * p.kernel_h * p.kernel_w *
                           (p.out_channels / p.groups);
  return products < 200000;
}

Tensor forward(const Tensor& input, const Tensor& weight, const MaybeTensor& bias,
               const MaybeTensor& scale, const MaybeTensor& shift, int64_t stride_h,
               int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t output_pad_h,
               int64_t output_pad_w, int64_t dilation_h, int64_t dilation_w, int64_t groups,
               std::string activation, double negative_slope) {
  const Geometry g{stride_h,     stride_w,   pad_h,      pad_w, output_pad_h,
                   output_pad_w, dilation_h, dilation_w, groups};
  ConvTransposeParams p = make_params(input, weight, g, activation, negative_slope);
  check_vector("bias", bias, input, p.out_channels);
  check_vector("scale", scale, input, p.out_channels);
  check_vector("shift", shift, input, p.out_channels);
  const MaybeTensor b = contiguous_vector(bias), s = contiguous_vector(scale),
                    t = contiguous_vector(shift);
  const Tensor x = as_dense(input, p.channels_last);
  const Tensor w = as_dense(weight, false);
  if (p.dtype == DType::kDouble && p.batch > 0) {
    return forward_double(p, g, negative_slope, x, w, b, s, t);
  }
  Tensor output = empty_dense({p.batch, p.out_channels, p.out_h, p.out_w}, p.channels_last,
                              input.scalar_type());
  if (p.batch == 0) return output;
  const int64_t pitch = p.out_channels + kVectorFloats;
  float* const affine = static_cast<float*>(scratch(3, 3 * pitch * sizeof(float)));
  with_type(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    widen_vector(data_of<T>(b), p.out_channels, 0, affine);
    widen_vector(data_of<T>(s), p.out_channels, 1, affine + pitch);
    widen_vector(data_of<T>(t), p.out_channels, 0, affine + 2 * pitch);
  });
  p.bias = affine;
  p.scale = affine + pitch;
  p.shift = affine + 2 * pitch;
  p.input = x.const_data_ptr();
  p.weight = w.const_data_ptr();
  p.output = output.mutable_data_ptr();
  const SingleThread scope(is_small(p));
  PYOPS_ISA_SELECT(conv_transpose_winograd)(p) || PYOPS_ISA_SELECT(conv_transpose_planar)(p) ||
      PYOPS_ISA_SELECT(conv_transpose_direct)(p);
  return output;
}

// ---- backward

// As activation_gradient, for double.
void activation_gradient_double(const ActivationGradParams& p) {
  const auto* g = static_cast<const double*>(p.grad_output);
  const auto* y = static_cast<const double*>(p.output);
  auto* out = static_cast<double*>(p.grad);
  for (int64_t i = 0; i < p.batch * p.channels; ++i) p.partial[i] = 0;
  for (int64_t i = 0; i < p.batch * p.channels * p.pixels; ++i) {
    switch (p.activation) {
      case OutputActivation::kRelu:
        out[i] = y[i] <= 0 ? 0 : g[i];
        break;
      case OutputActivation::kLeakyRelu:
        out[i] = y[i] > 0 ? g[i] : g[i] * p.negative_slope;
        break;
      case OutputActivation::kTanh:
        out[i] = g[i] * (1 - y[i] * y[i]);
        break;
      case OutputActivation::kSigmoid:
        out[i] = g[i] * (y[i] * (1 - y[i]));
        break;
      default:
        out[i] = g[i];
    }
    const int64_t n = i / (p.channels * p.pixels);
    const int64_t k = p.channels_last ? i % p.channels : i / p.pixels % p.channels;
    p.partial[n * p.channels + k] += out[i];
  }
}

// weight * scale, by output channel; (in_channels, outputs, taps) in one group.
template <class T>
void scale_weight(const T* weight, const T* scale, int64_t in_channels, int64_t outputs,
                  int64_t taps, int64_t groups, T* result) {
  for (int64_t c = 0; c < in_channels; ++c) {
    const T* by = scale + c / (in_channels / groups) * outputs;
    for (int64_t k = 0; k < outputs; ++k) {
      const auto factor = widen(by[k]);
      for (int64_t i = 0; i < taps; ++i, ++weight) narrow(widen(*weight) * factor, result++);
    }
  }
}

// sums[k] += <weight, gradient> of output channel k.
template <class T>
void weight_products(const T* weight, const T* gradient, int64_t in_channels, int64_t outputs,
                     int64_t taps, int64_t groups, double* sums) {
  for (int64_t c = 0; c < in_channels; ++c) {
    double* to = sums + c / (in_channels / groups) * outputs;
    for (int64_t k = 0; k < outputs; ++k) {
      double sum = 0;
      for (int64_t i = 0; i < taps; ++i) {
        sum += static_cast<double>(widen(*weight++)) * static_cast<double>(widen(*gradient++));
      }
      to[k] += sum;
    }
  }
}

// The correlation of x and du by our own kernel, if it takes them. `accurate`: the gradient of
// scale is a sum over it.
bool weight_gradient(const ConvTransposeParams& p, const Tensor& x, const Tensor& du, bool accurate,
                     Tensor* grad_weight) {
  if (p.dtype == DType::kDouble) return false;
  Tensor result = empty_contiguous<4>(
      {p.in_channels, p.out_channels / p.groups, p.kernel_h, p.kernel_w}, x.scalar_type());
  const StridedWgradParams w{p.batch,
                             p.groups,
                             p.in_channels,
                             p.in_h,
                             p.in_w,
                             p.out_channels,
                             p.out_h,
                             p.out_w,
                             p.kernel_h,
                             p.kernel_w,
                             p.stride_h,
                             p.stride_w,
                             p.pad_h,
                             p.pad_w,
                             p.dilation_h,
                             p.dilation_w,
                             p.dtype,
                             p.channels_last,
                             accurate,
                             x.const_data_ptr(),
                             du.const_data_ptr(),
                             result.mutable_data_ptr()};
  if (!PYOPS_ISA_SELECT(strided_wgrad_winograd)(w) && !PYOPS_ISA_SELECT(strided_conv_wgrad)(w)) {
    return false;
  }
  *grad_weight = result;
  return true;
}

// The convolution of du with the weight (times scale), by our own kernel, if it takes them.
bool input_gradient(const ConvTransposeParams& p, const Tensor& du, const Tensor& weight,
                    Tensor* grad_input) {
  if (!suits_strided_winograd(p, p.in_channels, p.out_channels)) return false;
  Tensor result =
      empty_dense({p.batch, p.in_channels, p.in_h, p.in_w}, p.channels_last, du.scalar_type());
  const std::vector<float> zeros(p.in_channels, 0.0f), ones(p.in_channels, 1.0f);
  const StridedConvParams c{p.batch,
                            p.out_channels,
                            p.out_h,
                            p.out_w,
                            p.in_channels,
                            p.in_h,
                            p.in_w,
                            OutputActivation::kNone,
                            0.0f,
                            p.channels_last,
                            static_cast<const float*>(du.const_data_ptr()),
                            static_cast<const float*>(weight.const_data_ptr()),
                            zeros.data(),
                            ones.data(),
                            zeros.data(),
                            static_cast<float*>(result.mutable_data_ptr())};
  if (!PYOPS_ISA_SELECT(strided_conv_winograd)(c)) return false;
  *grad_input = result;
  return true;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// With u = (conv(x, w) + bias) * scale + shift and du its gradient: the convolution is linear in
// each output channel's weights, so that sum(du * conv(x, w)) = <w, dw of du>. No gradient needs
// the convolution's own output.
Gradients backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                   const MaybeTensor& bias, const MaybeTensor& scale, const Tensor& output,
                   int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w,
                   int64_t output_pad_h, int64_t output_pad_w, int64_t dilation_h,
                   int64_t dilation_w, int64_t groups, std::string activation,
                   double negative_slope, std::vector<bool> output_mask) {
  const Geometry g{stride_h,     stride_w,   pad_h,      pad_w, output_pad_h,
                   output_pad_w, dilation_h, dilation_w, groups};
  const ConvTransposeParams p = make_params(input, weight, g, activation, negative_slope);
  STD_TORCH_CHECK(output_mask.size() == 5, "output_mask: expected five booleans, got ",
                  output_mask.size());
  STD_TORCH_CHECK(p.activation != OutputActivation::kLeakyRelu || negative_slope >= 0,
                  "negative_slope: expected at least 0 when gradients are needed, got ",
                  negative_slope);
  check_vector("bias", bias, input, p.out_channels);
  check_vector("scale", scale, input, p.out_channels);
  for (const auto& [name, t] :
       {std::pair<const char*, const Tensor*>{"grad_output", &grad_output}, {"output", &output}}) {
    check_shape(name, *t, {p.batch, p.out_channels, p.out_h, p.out_w});
    check_same(name, *t, "input", input);
  }
  const bool wants_input = output_mask[0], wants_scale = output_mask[3];
  const bool wants_weight = output_mask[1] || wants_scale;
  const ScalarType dtype = input.scalar_type();
  const auto vector_if = [&](bool wanted) {
    return empty_vector(wanted ? p.out_channels : 0, dtype);
  };
  Tensor grad_input = empty_vector(0, dtype), grad_weight = empty_vector(0, dtype);
  Tensor grad_bias = vector_if(output_mask[2]), grad_scale = vector_if(wants_scale),
         grad_shift = vector_if(output_mask[4]);
  if (p.batch == 0) {
    if (wants_input) {
      grad_input = empty_dense({p.batch, p.in_channels, p.in_h, p.in_w}, p.channels_last, dtype);
    }
    if (output_mask[1]) grad_weight = torch::stable::new_zeros(weight, weight.sizes());
    for (Tensor* t : {&grad_bias, &grad_scale, &grad_shift}) {
      *t = torch::stable::new_zeros(weight, {t->size(0)});
    }
    return {grad_input, grad_weight, grad_bias, grad_scale, grad_shift};
  }

  const SingleThread scope(is_small(p));
  const Tensor dy = as_dense(grad_output, p.channels_last), y = as_dense(output, p.channels_last);
  const Tensor x = as_dense(input, p.channels_last), w = as_dense(weight, false);
  const MaybeTensor b = contiguous_vector(bias), s = contiguous_vector(scale);
  Tensor du = empty_dense({p.batch, p.out_channels, p.out_h, p.out_w}, p.channels_last, dtype);
  std::vector<double> partial(p.batch * p.out_channels), sums(p.out_channels),
      products(p.out_channels);
  const ActivationGradParams a{p.batch,
                               p.out_channels,
                               p.out_h * p.out_w,
                               p.activation,
                               negative_slope,
                               p.dtype,
                               p.channels_last,
                               dy.const_data_ptr(),
                               y.const_data_ptr(),
                               du.mutable_data_ptr(),
                               partial.data()};
  if (p.dtype == DType::kDouble) {
    activation_gradient_double(a);
  } else {
    PYOPS_ISA_SELECT(activation_gradient)(a);
  }
  for (int64_t i = 0; i < p.batch * p.out_channels; ++i) sums[i % p.out_channels] += partial[i];

  const int64_t outputs = p.out_channels / p.groups, taps = p.kernel_h * p.kernel_w;
  if (wants_input || wants_weight) {
    Tensor scaled = w;  // the gradient of the weight does not depend on it
    if (s && wants_input) {
      scaled = empty_contiguous<4>({p.in_channels, outputs, p.kernel_h, p.kernel_w}, dtype);
      with_type(p.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        scale_weight(static_cast<const T*>(w.const_data_ptr()), data_of<T>(s), p.in_channels,
                     outputs, taps, p.groups, static_cast<T*>(scaled.mutable_data_ptr()));
      });
    }
    const bool native = wants_weight && weight_gradient(p, x, du, wants_scale, &grad_weight);
    const bool found = wants_input && input_gradient(p, du, scaled, &grad_input);
    const bool wanted[3] = {wants_input && !found, wants_weight && !native, false};
    if (wanted[0] || wanted[1]) {
      using torch::stable::detail::from;
      std::array<StableIValue, 11> stack{
          from(du),
          from(x),
          from(scaled),
          from(std::optional<IntList>()),
          from(IntList{stride_h, stride_w}),
          from(IntList{pad_h, pad_w}),
          from(IntList{dilation_h, dilation_w}),
          from(true),
          from(IntList{output_pad_h, output_pad_w}),
          from(p.groups),
          from(torch::headeronly::HeaderOnlyArrayRef<bool>(wanted, 3))};
      PYOPS_SHIM_CHECK(
          torch_call_dispatcher("aten::convolution_backward", "", stack.data(), TORCH_ABI_VERSION));
      Tensor results[3];
      for (int i = 0; i < 3; ++i) results[i] = torch::stable::detail::to<Tensor>(stack[i]);
      if (wanted[0]) grad_input = as_dense(results[0], p.channels_last);
      if (wanted[1]) grad_weight = as_dense(results[1], false);
    }
    if (wants_weight) {
      with_type(p.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        T* dw = static_cast<T*>(grad_weight.mutable_data_ptr());
        if (wants_scale) {
          weight_products(static_cast<const T*>(w.const_data_ptr()), static_cast<const T*>(dw),
                          p.in_channels, outputs, taps, p.groups, products.data());
        }
        if (s && output_mask[1]) {
          scale_weight(static_cast<const T*>(dw), data_of<T>(s), p.in_channels, outputs, taps,
                       p.groups, dw);
        }
      });
      if (!output_mask[1]) grad_weight = empty_vector(0, dtype);
    }
  }
  with_type(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Acc = decltype(widen(T{}));
    const T *bias_data = data_of<T>(b), *scale_data = data_of<T>(s);
    T* to_bias = static_cast<T*>(grad_bias.mutable_data_ptr());
    T* to_scale = static_cast<T*>(grad_scale.mutable_data_ptr());
    T* to_shift = static_cast<T*>(grad_shift.mutable_data_ptr());
    for (int64_t k = 0; k < p.out_channels; ++k) {
      const double by = s ? static_cast<double>(widen(scale_data[k])) : 1;
      const double more = b ? static_cast<double>(widen(bias_data[k])) * sums[k] : 0;
      if (output_mask[2]) narrow(static_cast<Acc>(sums[k] * by), to_bias + k);
      if (wants_scale) narrow(static_cast<Acc>(products[k] + more), to_scale + k);
      if (output_mask[4]) narrow(static_cast<Acc>(sums[k]), to_shift + k);
    }
  });
  return {grad_input, grad_weight, grad_bias, grad_scale, grad_shift};
}

}  // namespace
}  // namespace pyops::cpu

STABLE_TORCH_LIBRARY_IMPL(pyops, CPU, m) {
  m.impl("conv_transpose2d_act", TORCH_BOX(&pyops::cpu::forward));
  m.impl("conv_transpose2d_act_backward", TORCH_BOX(&pyops::cpu::backward));
}
