// What the Hopper convolutions share: bias, activation and pooling of sums in registers, and the
// layouts that their launchers choose between.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "conv_relu_pool_wgmma.h"
#include "ptx.cuh"

namespace pyops::cuda {

// Two channels as they lie in memory.
template <class T>
PTX_FN uint32_t pack_pair(float low, float high) {
  union {
    T values[2];
    uint32_t bits;
  };
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    values[0] = __float2bfloat16_rn(low);
    values[1] = __float2bfloat16_rn(high);
  } else {
    values[0] = __float2half_rn(low);
    values[1] = __float2half_rn(high);
  }
  return bits;
}

PTX_FN float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
PTX_FN float to_float(__half value) { return __half2float(value); }

// Bias is added before, so that it and the activation follow the maximum: rounding is monotonic.
struct Finish {
  bool relu, leaky;
  bool places_of_dead;  // whether what the activation damps is told apart by it
  float factor;         // of values <= 0, unless relu

  PTX_FN float activate(float value) const {
    const float low = relu ? 0.0f : value * factor;
    return value <= 0.0f ? low : value;  // NaN stays
  }
  PTX_FN bool passes(float value) const { return relu ? !(value <= 0.0f) : !leaky || value > 0.0f; }
};

inline Finish make_finish(const ConvPoolForward& f) {
  Finish finish{};
  finish.relu = f.activation == Activation::kRelu;
  finish.leaky = f.activation == Activation::kLeakyRelu;
  finish.factor = finish.leaky ? static_cast<float>(f.negative_slope) : 1.0f;
  finish.places_of_dead = !finish.relu && finish.factor != 0.0f;
  return finish;
}

PTX_FN float max_of(float a, float b, float c, float d) {
  return ptx::max_nan(ptx::max_nan(a, b), ptx::max_nan(c, d));
}

// The code of a 2x2 window in row-major order: the first of equals wins, and the last NaN.
// `largest` is their maximum, `shifted` that and the bias.
PTX_FN uint32_t max_code(float a, float b, float c, float d, float largest, float shifted,
                         const Finish& finish) {
  uint32_t place = largest == a ? 0u : largest == b ? 1u : largest == c ? 2u : 3u;
  if (largest != largest) place = d != d ? 3u : c != c ? 2u : b != b ? 1u : 0u;
  const bool passes = finish.passes(shifted);
  if (!passes && !finish.places_of_dead) place = 0;  // all are equal after the activation
  return passes ? place | 128u : place;
}

}  // namespace pyops::cuda
