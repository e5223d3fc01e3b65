// What follows the transposed convolution in registers: affine map and activation. Only for
// *.isa.cpp files.
#pragma once

#include "conv_transpose_act.h"
#include "output_activation_lanes.h"

namespace pyops::cpu::PYOPS_ISA {
namespace {

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
  OutputFunction function;

  explicit Epilogue(const ConvTransposeParams& p) : function{p.activation, p.negative_slope} {}

  PYOPS_INLINE Vec operator()(Vec sum, const Affine& a) const {
    return function(fma(sum + a.bias, a.scale, a.shift));
  }
};

}  // namespace
}  // namespace pyops::cpu::PYOPS_ISA
