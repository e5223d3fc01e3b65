// An output's activation in place.
#include "linear_act.h"

#include "output_activation_lanes.h"
#include "runtime.h"
#include "simd.h"

namespace pyops::cpu::PYOPS_ISA {
namespace {

template <class T, OutputActivation kActivation>
void run(const ActivationParams& p) {
  constexpr int64_t kPart = 16384;
  const int64_t parts = (p.count + kPart - 1) / kPart;
  parallel_for(parts, [&](int64_t part) {
    const OutputFunction function{kActivation, p.negative_slope};
    T* const values = static_cast<T*>(p.values) + part * kPart;
    const int64_t count = part + 1 < parts ? kPart : p.count - part * kPart;
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(values + i, function(load(values + i)));
    const int rest = static_cast<int>(count - i);
    if (rest > 0) store_first(values + i, function(load_first(values + i, rest)), rest);
  });
}

template <class T>
void run(const ActivationParams& p) {
  switch (p.activation) {
    case OutputActivation::kRelu:
      return run<T, OutputActivation::kRelu>(p);
    case OutputActivation::kLeakyRelu:
      return run<T, OutputActivation::kLeakyRelu>(p);
    case OutputActivation::kTanh:
      return run<T, OutputActivation::kTanh>(p);
    case OutputActivation::kSigmoid:
      return run<T, OutputActivation::kSigmoid>(p);
    default:
      return;
  }
}

}  // namespace

void activate(const ActivationParams& p) {
  if (p.dtype == DType::kFloat) run<float>(p);
  if (p.dtype == DType::kBFloat16) run<BFloat16>(p);
  if (p.dtype == DType::kHalf) run<Half>(p);
}

}  // namespace pyops::cpu::PYOPS_ISA
