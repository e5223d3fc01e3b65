// What follows the transposed convolution in registers: affine map and activation. Only for
// *.isa.cpp files.
#pragma once

#include "conv_transpose_act.h"
#include "simd_lanes.h"

namespace pyops::cpu::PYOPS_ISA {
namespace {

// exp(x) - 1 = *fraction * *power + (*power - 1), for x in [-87, 87].
PYOPS_INLINE void exp_parts(Vec x, Vec* fraction, Vec* power) {
  const Vec magic = splat(12582912.0f);  // adding it rounds to an integer in the low bits
  const Vec shifted = fma(x, splat(1.44269504f), magic);
  const Vec n = shifted - magic;
  // ln 2 in two parts, the first with trailing zeros, so that n times it is exact.
  const Vec r = fma(n, splat(-1.42860682e-6f), fma(n, splat(-0.693145752f), x));
  Vec p = splat(1.0f / 5040);
  p = fma(p, r, splat(1.0f / 720));
  p = fma(p, r, splat(1.0f / 120));
  p = fma(p, r, splat(1.0f / 24));
  p = fma(p, r, splat(1.0f / 6));
  p = fma(p, r, splat(0.5f));
  *fraction = fma(p * r, r, r);
  const VecInt exponent = reinterpret_cast<VecInt>(shifted) - reinterpret_cast<VecInt>(magic);
  *power = reinterpret_cast<Vec>((exponent + 127) << 23);
}

PYOPS_INLINE Vec absolute(Vec x) {
  return reinterpret_cast<Vec>(reinterpret_cast<VecInt>(x) & 0x7fffffff);
}

// By exp(2x) - 1, which loses no digits near 0.
PYOPS_INLINE Vec tanh(Vec x) {
  const Vec most = splat(9.02f);  // 1 from here on
  const Vec size = absolute(x);
  Vec fraction, power;
  exp_parts((size < most ? size : most) * splat(2.0f), &fraction, &power);
  const Vec e = fma(fraction, power, power - splat(1.0f));
  const VecInt sign = reinterpret_cast<VecInt>(x) & static_cast<int32_t>(0x80000000);
  const VecInt value = reinterpret_cast<VecInt>(e / (e + splat(2.0f))) | sign;
  return x == x ? reinterpret_cast<Vec>(value) : x;
}

PYOPS_INLINE Vec sigmoid(Vec x) {
  const Vec most = splat(87.0f);
  const Vec size = absolute(x);
  Vec fraction, power;
  exp_parts(size < most ? -size : -most, &fraction, &power);
  Vec e = fma(fraction, power, power);
  e = size < most ? e : Vec{};
  const Vec value = (x > Vec{} ? splat(1.0f) : e) / (e + splat(1.0f));
  return x == x ? value : x;
}

// By channel: one vector of channels, or one channel in all lanes.
struct Affine {
  Vec bias, scale, shift;
};
PYOPS_INLINE Affine affine_of_lanes(const ConvTransposeParams& p, int64_t channel) {
  return {load(p.bias + channel), load(p.scale + channel), load(p.shift + channel)};
}
PYOPS_INLINE Affine affine_of(const ConvTransposeParams& p, int64_t channel) {
  return {splat(p.bias[channel]), splat(p.scale[channel]), splat(p.shift[channel])};
}

struct Epilogue {
  OutputActivation activation;
  float slope;

  explicit Epilogue(const ConvTransposeParams& p)
      : activation(p.activation), slope(p.negative_slope) {}

  PYOPS_INLINE Vec operator()(Vec sum, const Affine& a) const {
    const Vec x = fma(sum + a.bias, a.scale, a.shift);
    switch (activation) {
      case OutputActivation::kRelu:
        return relu(x);
      case OutputActivation::kLeakyRelu:
        return x > Vec{} ? x : x * slope;
      case OutputActivation::kTanh:
        return tanh(x);
      case OutputActivation::kSigmoid:
        return sigmoid(x);
      default:
        return x;
    }
  }
};

}  // namespace
}  // namespace pyops::cpu::PYOPS_ISA
