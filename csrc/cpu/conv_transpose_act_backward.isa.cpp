// The activation's gradient, told by the output, and its sum over the pixels, in one pass.
#include "conv_transpose_act.h"
#include "conv_transpose_act_tables.h"
#include "runtime.h"
#include "simd_lanes.h"

namespace pyops::cpu::PYOPS_ISA {
namespace {

constexpr int64_t kFlush = 64;  // additions in float before a sum goes on in double

template <OutputActivation kActivation>
PYOPS_INLINE Vec gradient(Vec g, Vec y, Vec slope) {
  switch (kActivation) {
    case OutputActivation::kRelu:
      return y <= Vec{} ? Vec{} : g;
    case OutputActivation::kLeakyRelu:
      return y > Vec{} ? g : g * slope;
    case OutputActivation::kTanh:
      return g * (splat(1.0f) - y * y);
    case OutputActivation::kSigmoid:
      return g * (y * (splat(1.0f) - y));
    default:
      return g;
  }
}

template <class T, OutputActivation kActivation>
void image(const ActivationGradParams& p, int64_t n, int64_t first, int64_t count) {
  const T* g = static_cast<const T*>(p.grad_output) + n * p.channels * p.pixels;
  const T* y = static_cast<const T*>(p.output) + n * p.channels * p.pixels;
  T* out = static_cast<T*>(p.grad) + n * p.channels * p.pixels;
  double* partial = p.partial + n * p.channels;
  const Vec slope = splat(static_cast<float>(p.negative_slope));
  if (!p.channels_last) {
    for (int64_t k = first; k < first + count; ++k) {
      double total = 0;
      for (int64_t i = 0; i < p.pixels;) {
        Vec sum = {};
        const int64_t end = min(p.pixels, i + kFlush * kLanes);
        for (; i < end; i += kLanes) {
          const int live = static_cast<int>(min(kLanes, end - i));
          const int64_t at = k * p.pixels + i;
          const Vec v =
              gradient<kActivation>(load_first(g + at, live), load_first(y + at, live), slope);
          store_first(out + at, v, live);
          sum += v;
        }
        for (int j = 0; j < kLanes; ++j) total += static_cast<double>(sum[j]);
      }
      partial[k] = total;
    }
    return;
  }
  for (int64_t k = first; k < first + count; k += kLanes) {
    const int live = static_cast<int>(min(kLanes, first + count - k));
    for (int j = 0; j < live; ++j) partial[k + j] = 0;
    for (int64_t i = 0; i < p.pixels;) {
      Vec sum = {};
      const int64_t end = min(p.pixels, i + kFlush);
      for (; i < end; ++i) {
        const int64_t at = i * p.channels + k;
        const Vec v =
            gradient<kActivation>(load_first(g + at, live), load_first(y + at, live), slope);
        store_first(out + at, v, live);
        sum += v;
      }
      for (int j = 0; j < live; ++j) partial[k + j] += static_cast<double>(sum[j]);
    }
  }
}

template <class T, OutputActivation kActivation>
void run(const ActivationGradParams& p) {
  constexpr int64_t kChannels = 4 * kLanes;
  const int64_t blocks = ceil_div(p.channels, kChannels);
  parallel_for(p.batch * blocks, [&](int64_t index) {
    const int64_t first = index % blocks * kChannels;
    image<T, kActivation>(p, index / blocks, first, min(kChannels, p.channels - first));
  });
}

template <class T>
void run(const ActivationGradParams& p) {
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
      return run<T, OutputActivation::kNone>(p);
  }
}

}  // namespace

void activation_gradient(const ActivationGradParams& p) {
  if (p.dtype == DType::kFloat) run<float>(p);
  if (p.dtype == DType::kBFloat16) run<BFloat16>(p);
  if (p.dtype == DType::kHalf) run<Half>(p);
}

}  // namespace pyops::cpu::PYOPS_ISA
