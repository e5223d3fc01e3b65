// Output activations on Vec; NaN stays NaN. Only for *.isa.cpp files.
#pragma once

#include "output_activation.h"
#include "vector_math.h"

namespace pyops::cpu::PYOPS_ISA {
namespace {

// e^-|x| never overflows and loses nothing on either side.
PYOPS_INLINE Vec sigmoid(Vec x) {
  const Vec e = exp(x > Vec{} ? -x : x);
  return (x > Vec{} ? splat(1.0f) : e) / (e + 1.0f);
}

struct OutputFunction {
  OutputActivation activation;
  float slope;

  PYOPS_INLINE Vec operator()(Vec x) const {
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
