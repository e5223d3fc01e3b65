// What follows the convolution in registers: activation, 2x2 pooling, codes, and the way from
// (window, channel) tiles to the output tensor. Only for *.isa.cpp files.
#pragma once

#include "conv_relu_pool.h"
#include "simd_lanes.h"

namespace pyops::cpu::PYOPS_ISA {
namespace {

constexpr int kBlockVecs = 2;  // vectors of output channels worked on at once
constexpr int kBlockChannels = kBlockVecs * kLanes;

struct Epilogue {
  Activation activation;
  Pool pool;
  bool with_codes;
  // max(activation(x)) == activation(max(x)): activate once a window.
  bool activate_last;
  float slope;

  explicit Epilogue(const ConvReluPoolParams& p)
      : activation(p.activation),
        pool(p.pool),
        with_codes(p.codes != nullptr),
        activate_last(p.activation != Activation::kLeakyRelu || p.negative_slope > 0),
        slope(p.negative_slope) {}

  PYOPS_INLINE Vec activate(Vec x) const {
    if (activation == Activation::kRelu) return relu(x);
    if (activation == Activation::kLeakyRelu) return x > Vec{} ? x : x * slope;
    return x;
  }

  // All ones where the element hands its gradient on whole.
  PYOPS_INLINE VecInt passes(Vec x) const {
    if (activation == Activation::kRelu) return ~(x <= Vec{});
    if (activation == Activation::kLeakyRelu) return x > Vec{};
    return VecInt{} - 1;
  }
};

// One 2x2 window, x in row-major order, before the activation. kFinite: no NaN among them.
template <bool kFinite>
PYOPS_INLINE Vec pool_window(const Epilogue& e, const Vec (&x)[4], VecInt* code) {
  if (e.pool == Pool::kAvg) {
    const Vec sum = e.activate(x[0]) + e.activate(x[1]) + e.activate(x[2]) + e.activate(x[3]);
    if (e.with_codes) {
      *code =
          (e.passes(x[0]) & 1) | (e.passes(x[1]) & 2) | (e.passes(x[2]) & 4) | (e.passes(x[3]) & 8);
    }
    return sum * 0.25f;
  }
  if (!e.with_codes && e.activate_last) {
    if constexpr (kFinite) {
      return e.activate(max_finite(max_finite(x[0], x[1]), max_finite(x[2], x[3])));
    } else {
      return e.activate(max_nan(x[0], x[1], x[2], x[3]));
    }
  }
  // As torch: the first of equal values wins, and a NaN over everything before it.
  Vec best = e.activate(x[0]), winner = x[0];
  VecInt place{};
#pragma GCC unroll 3
  for (int i = 1; i < 4; ++i) {
    const Vec value = e.activate(x[i]);
    VecInt take = value > best;
    if constexpr (!kFinite) take |= value != value;
    best = take ? value : best;
    winner = take ? x[i] : winner;
    place = take ? VecInt{} + i : place;
  }
  if (e.with_codes) *code = place | (e.passes(winner) & 128);
  return best;
}

// Pixels of one image that lie side by side both in the output plane and in the tile.
struct Run {
  int64_t image, pixel;
  int at, length;  // first row in the tile, rows
};

// kLanes rows of a (rows, kBlockChannels) tile, turned into kLanes columns.
PYOPS_INLINE void load_transposed(const float* tile, Vec (&columns)[kLanes]) {
#pragma GCC unroll 16
  for (int j = 0; j < kLanes; ++j) columns[j] = load(tile + j * kBlockChannels);
  transpose(columns);
}

// tile: (rows, kBlockChannels), codes likewise or null; writes the channels from k0 on. Both are
// read up to kLanes - 1 rows beyond the last.
template <class T>
void store_runs(const ConvReluPoolParams& p, const Run* runs, int num_runs, const float* tile,
                const int32_t* codes, int64_t k0) {
  const int64_t plane = p.out_h * p.out_w, channels = p.out_channels;
  T* const output = static_cast<T*>(p.output);
  for (int v = 0; v < kBlockVecs && k0 + v * kLanes < channels; ++v) {
    const int64_t k = k0 + v * kLanes;
    const int live = channels - k < kLanes ? static_cast<int>(channels - k) : kLanes;
    for (const Run* run = runs; run < runs + num_runs; ++run) {
      const int64_t first = run->at * static_cast<int64_t>(kBlockChannels) + v * kLanes;
      if (p.channels_last) {
        const int64_t to = (run->image * plane + run->pixel) * channels + k;
        for (int i = 0; i < run->length; ++i) {
          store_first(output + to + i * channels, load(tile + first + i * kBlockChannels), live);
        }
        for (int i = 0; codes != nullptr && i < run->length; ++i) {
          const Vec bits = load(reinterpret_cast<const float*>(codes) + first + i * kBlockChannels);
          store_bytes(p.codes + to + i * channels, reinterpret_cast<VecInt>(bits), live);
        }
        continue;
      }
      const int64_t to = (run->image * channels + k) * plane + run->pixel;
      for (int i = 0; i < run->length; i += kLanes) {
        const int count = run->length - i < kLanes ? run->length - i : kLanes;
        Vec columns[kLanes];
        load_transposed(tile + first + i * kBlockChannels, columns);
#pragma GCC unroll 16
        for (int j = 0; j < kLanes; ++j) {
          if (j < live) store_first(output + to + j * plane + i, columns[j], count);
        }
        if (codes == nullptr) continue;
        load_transposed(reinterpret_cast<const float*>(codes) + first + i * kBlockChannels,
                        columns);
#pragma GCC unroll 16
        for (int j = 0; j < kLanes; ++j) {
          if (j >= live) continue;
          store_bytes(p.codes + to + j * plane + i, reinterpret_cast<VecInt>(columns[j]), count);
        }
      }
    }
  }
}

}  // namespace
}  // namespace pyops::cpu::PYOPS_ISA
