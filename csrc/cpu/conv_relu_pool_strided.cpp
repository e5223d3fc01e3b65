#include "conv_relu_pool_strided.h"

#include <algorithm>
#include <vector>

#include "conv_transpose_act.h"
#include "strided_conv_winograd.h"

#define PYOPS_ISA baseline  // plain loops; simd.h only for the 16-bit types
#include "simd.h"

namespace pyops::cpu {
namespace {

constexpr int64_t kVectorFloats = 16;  // the widest vector

OutputActivation output_activation(Activation activation) {
  if (activation == Activation::kRelu) return OutputActivation::kRelu;
  if (activation == Activation::kLeakyRelu) return OutputActivation::kLeakyRelu;
  return OutputActivation::kNone;
}

bool is_strided(const ConvReluPoolParams& p) {
  return p.dtype != DType::kDouble && p.pool == Pool::kNone && std::max(p.stride_h, p.stride_w) > 1;
}

}  // namespace

bool suits_strided_forward(const ConvReluPoolParams& p) {
  return p.pool == Pool::kNone && p.codes == nullptr &&
         suits_strided_winograd(p, p.in_channels, p.out_channels);
}

bool strided_forward(const ConvReluPoolParams& p) {
  if (!suits_strided_forward(p)) return false;
  const std::vector<float> zeros(p.out_channels, 0.0f), ones(p.out_channels, 1.0f);
  StridedConvParams s{};
  s.batch = p.batch, s.in_channels = p.in_channels, s.in_h = p.in_h, s.in_w = p.in_w;
  s.out_channels = p.out_channels, s.out_h = p.out_h, s.out_w = p.out_w;
  s.activation = output_activation(p.activation);
  s.negative_slope = static_cast<float>(p.negative_slope);
  s.channels_last = p.channels_last;
  s.input = static_cast<const float*>(p.input);
  s.weight = static_cast<const float*>(p.weight);
  s.bias = p.bias != nullptr ? static_cast<const float*>(p.bias) : zeros.data();
  s.scale = ones.data(), s.shift = zeros.data();
  s.output = static_cast<float*>(p.output);
  return PYOPS_ISA_SELECT(strided_conv_winograd)(s);
}

bool activation_gradient(const ConvReluPoolGradParams& g, const void* output, void* expanded) {
  const ConvReluPoolParams& p = g.p;
  if (p.dtype == DType::kDouble || p.pool != Pool::kNone || p.codes != nullptr) return false;
  // A slope that rounds to 0 stops NaN and infinity.
  const bool leaky = p.activation == Activation::kLeakyRelu;
  if (leaky && !(static_cast<float>(p.negative_slope) > 0)) return false;
  std::vector<double> partial(p.batch * p.out_channels), sums(p.out_channels);
  const ActivationGradParams a{p.batch,
                               p.out_channels,
                               p.conv_h * p.conv_w,
                               output_activation(p.activation),
                               p.negative_slope,
                               p.dtype,
                               p.channels_last,
                               g.grad_output,
                               p.activation == Activation::kNone ? g.grad_output : output,
                               expanded,
                               partial.data()};
  PYOPS_ISA_SELECT(activation_gradient)(a);
  if (g.grad_bias == nullptr) return true;
  for (int64_t i = 0; i < p.batch * p.out_channels; ++i) sums[i % p.out_channels] += partial[i];
  baseline::with_type(p.dtype, [&](auto type) {
    auto* to = static_cast<decltype(type)*>(g.grad_bias);
    for (const double sum : sums) baseline::from_float(static_cast<float>(sum), to++);
  });
  return true;
}

bool strided_grad_input(const ConvReluPoolParams& p, const void* expanded, void* grad_input) {
  if (!is_strided(p)) return false;
  const std::vector<float> zeros(p.in_channels + kVectorFloats, 0.0f);
  const std::vector<float> ones(p.in_channels + kVectorFloats, 1.0f);
  ConvTransposeParams t{};
  t.batch = p.batch, t.groups = p.groups;
  t.in_channels = p.out_channels, t.in_h = p.conv_h, t.in_w = p.conv_w;
  t.out_channels = p.in_channels, t.out_h = p.in_h, t.out_w = p.in_w;
  t.kernel_h = p.kernel_h, t.kernel_w = p.kernel_w;
  t.stride_h = p.stride_h, t.stride_w = p.stride_w;
  t.pad_h = p.pad_h, t.pad_w = p.pad_w;
  t.dilation_h = p.dilation_h, t.dilation_w = p.dilation_w;
  t.activation = OutputActivation::kNone;
  t.dtype = p.dtype, t.channels_last = p.channels_last;
  t.input = expanded, t.weight = p.weight, t.output = grad_input;
  t.bias = t.shift = zeros.data(), t.scale = ones.data();
  return PYOPS_ISA_SELECT(conv_transpose_winograd)(t) ||
         PYOPS_ISA_SELECT(conv_transpose_planar)(t) || PYOPS_ISA_SELECT(conv_transpose_direct)(t);
}

bool strided_grad_weight(const ConvReluPoolParams& p, const void* expanded, void* grad_weight) {
  if (!is_strided(p)) return false;
  StridedWgradParams w{};
  w.batch = p.batch, w.groups = p.groups;
  w.low_channels = p.out_channels, w.low_h = p.conv_h, w.low_w = p.conv_w;
  w.high_channels = p.in_channels, w.high_h = p.in_h, w.high_w = p.in_w;
  w.kernel_h = p.kernel_h, w.kernel_w = p.kernel_w;
  w.stride_h = p.stride_h, w.stride_w = p.stride_w;
  w.pad_h = p.pad_h, w.pad_w = p.pad_w;
  w.dilation_h = p.dilation_h, w.dilation_w = p.dilation_w;
  w.dtype = p.dtype, w.channels_last = p.channels_last;
  w.low = expanded, w.high = p.input, w.grad_weight = grad_weight;
  return PYOPS_ISA_SELECT(strided_wgrad_winograd)(w) || PYOPS_ISA_SELECT(strided_conv_wgrad)(w);
}

}  // namespace pyops::cpu
