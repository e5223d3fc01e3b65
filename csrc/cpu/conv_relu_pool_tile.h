// The inner kernel of the direct convolutions: a tile of pixels x channels in registers.
// Only for *.isa.cpp files.
#pragma once

#include "conv_relu_pool_finish.h"
#include "simd.h"

namespace pyops::cpu::PYOPS_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kMaxPixels = 14;  // pixels x kVectors accumulators fill the register file
#elif defined(__AVX2__)
constexpr int kMaxPixels = 6;
#else
constexpr int kMaxPixels = 4;
#endif
constexpr int kVectors = 2;
constexpr int kBlock = kVectors * kLanes;  // output channels in a block
// Taps summed in registers from zero before they are added to the sum in memory: bounds the
// rounding error of long sums, and keeps a block's weights for them in the first-level cache.
// Kernels of few taps get shorter sums: the libraries that accuracy is compared with sum each
// tap's channels apart.
PYOPS_INLINE int64_t taps_per_sum(int64_t kernel_area) {
  return kernel_area == 1 || kernel_area >= 9 ? 160 : 80;
}
constexpr int64_t kAhead = 16;  // taps whose weights are prefetched

// What a weight vector is multiplied by: one float or one pair of bfloat16, the same in every
// lane, or a vector.
enum class Operand { kFloat, kPair, kVector };

typedef int32_t WordInt __attribute__((may_alias));

template <Operand kOperand>
PYOPS_INLINE Vec multiply_add(const float* x, Vec w, Vec sum) {
#if defined(__AVX512BF16__)
  if (kOperand == Operand::kPair) {
    const __m512i word = _mm512_set1_epi32(*reinterpret_cast<const WordInt*>(x));
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(word));
  }
#endif
  return sum + (kOperand == Operand::kVector ? load(x) : splat(*x)) * w;
}

// sums[pixel][channel] (+)= sum over taps of x[pixel * step + offsets[tap]] * weight[tap][channel]
using Tile = void (*)(const float* x, int64_t step, const int32_t* offsets, int64_t taps,
                      const float* weight, float* sums, bool add);

template <Operand kOperand, int V, int P>
void tile(const float* x, int64_t step, const int32_t* offsets, int64_t taps, const float* weight,
          float* sums, bool add) {
  Vec acc[P][V] = {};
  const int64_t step3 = 3 * step;
  for (int64_t t = 0; t < taps; ++t) {
    Vec w[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      w[v] = load(weight + v * kLanes);
      __builtin_prefetch(weight + (kAhead * V + v) * kLanes);
    }
    weight += V * kLanes;
    const float* at = x + offsets[t];
#pragma GCC unroll 16
    for (int i = 0; i < P; ++i) {
      const float* pixel = i % 4 == 3 ? at + step3 : at + (i % 4) * step;
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) acc[i][v] = multiply_add<kOperand>(pixel, w[v], acc[i][v]);
      if (i % 4 == 3) at += 4 * step;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < P; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      float* sum = sums + (i * V + v) * kLanes;
      store(sum, add ? load(sum) + acc[i][v] : acc[i][v]);
    }
  }
}

template <int... kInts>
struct Ints {};
template <int kCount, int... kInts>
struct Range : Range<kCount - 1, kCount, kInts...> {};
template <int... kInts>
struct Range<0, kInts...> {
  using type = Ints<kInts...>;
};

template <Operand kOperand, int... kPixels>
Tile select_tile(int64_t vectors, int64_t pixels, Ints<kPixels...>) {
  static constexpr Tile kOne[kMaxPixels] = {&tile<kOperand, 1, kPixels>...};
  if constexpr (kOperand != Operand::kVector) {
    static constexpr Tile kTwo[kMaxPixels] = {&tile<kOperand, 2, kPixels>...};
    if (vectors == 2) return kTwo[pixels - 1];
  }
  return kOne[pixels - 1];
}

struct ConvolveRows {
  const float* weight;     // [tap][vectors * kLanes]
  const int32_t* offsets;  // [tap], in floats from a pixel's place in the input
  int64_t taps, taps_per_sum, vectors;
  int64_t width, pixel_step, row_step;  // pixels in a row; from one pixel or row to the next
};

// sums[row][pixel][vectors * kLanes]
template <Operand kOperand>
void convolve_rows(const ConvolveRows& c, const float* input, int64_t rows, float* sums) {
  using Pixels = typename Range<kMaxPixels>::type;
  const int64_t tiles = ceil_div(c.width, kMaxPixels), pixels = c.width / tiles;
  const int64_t wide_tiles = c.width % tiles;
  const Tile wide = select_tile<kOperand>(c.vectors, min(pixels + 1, kMaxPixels), Pixels());
  const Tile narrow = select_tile<kOperand>(c.vectors, pixels, Pixels());
  const int64_t parts = ceil_div(c.taps, c.taps_per_sum), channels = c.vectors * kLanes;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t tap = c.taps * part / parts, taps = c.taps * (part + 1) / parts - tap;
    for (int64_t y = 0; y < rows; ++y) {
      const float* x = input + y * c.row_step;
      float* sum = sums + y * c.width * channels;
      for (int64_t i = 0; i < tiles; ++i) {
        const bool is_wide = i < wide_tiles;
        (is_wide ? wide : narrow)(x, c.pixel_step, c.offsets + tap, taps, c.weight + tap * channels,
                                  sum, part > 0);
        x += (pixels + is_wide) * c.pixel_step;
        sum += (pixels + is_wide) * channels;
      }
    }
  }
}

// count elements of src, every step-th, to floats.
template <class T>
void copy_words(const T* src, int64_t step, int64_t count, float* dst) {
  int64_t i = 0;
  if (step == 1) {
    for (; i + kLanes <= count; i += kLanes) store(dst + i, load(src + i));
  }
  if (step == 2) {
    VecInt even;
    for (int j = 0; j < kLanes; ++j) even[j] = 2 * j;
    // Not the last vector, which would read beyond the last element.
    for (; i + kLanes < count; i += kLanes) {
      const Vec low = load(src + 2 * i), high = load(src + 2 * i + kLanes);
      store(dst + i, __builtin_shuffle(low, high, even));
    }
  }
  for (; i < count; ++i) dst[i] = to_float(src[i * step]);
}

}  // namespace
}  // namespace pyops::cpu::PYOPS_ISA
