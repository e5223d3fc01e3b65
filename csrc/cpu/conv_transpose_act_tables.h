// Which taps of a transposed convolution meet which output, one axis at a time. Only for
// *.isa.cpp files.
//
// Output y takes tap r of input i where y + pad = i * stride + r * dilation. So the outputs of one
// phase (y mod stride) share their taps, and the input of tap r is y / stride + shift[r].
#pragma once

#include "conv_transpose_act.h"
#include "runtime.h"
#include "simd_lanes.h"

namespace pyops::cpu::PYOPS_ISA {
namespace {

PYOPS_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
PYOPS_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
PYOPS_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Axis {
  int64_t in, out, stride, kernel;
  int64_t phases;  // that have outputs
  int64_t before;  // inputs wanted before the first, and after the last
  int64_t after;
  int32_t* begin;  // (phases + 1,): the taps of a phase are tap[begin[f]] to tap[begin[f + 1] - 1]
  int32_t* tap;    // (kernel,), by phase
  int32_t* shift;  // (kernel,), likewise; falling within a phase

  static int64_t bytes(int64_t kernel, int64_t stride, int64_t out) {
    return (min(stride, out) + 1 + 2 * kernel) * static_cast<int64_t>(sizeof(int32_t));
  }

  Axis(int64_t in_, int64_t out_, int64_t kernel_, int64_t stride_, int64_t pad, int64_t dilation,
       int32_t* memory)
      : in(in_), out(out_), stride(stride_), kernel(kernel_) {
    phases = min(stride, out);
    before = after = 0;
    begin = memory;
    tap = begin + phases + 1;
    shift = tap + kernel;
    int32_t count = 0;
    for (int64_t f = 0; f < phases; ++f) {
      begin[f] = count;
      for (int64_t r = 0; r < kernel; ++r) {
        const int64_t from = f + pad - r * dilation;
        if (from % stride != 0) continue;
        tap[count] = static_cast<int32_t>(r);
        shift[count] = static_cast<int32_t>(from / stride);
        before = max(before, -from / stride);
        after = max(after, outputs(f) - 1 + from / stride - (in - 1));
        ++count;
      }
    }
    begin[phases] = count;
  }

  // Outputs of phase f.
  int64_t outputs(int64_t f) const { return (out - f + stride - 1) / stride; }
};

// One tap's input pixel and weights.
struct Segment {
  int64_t input, weight;  // in words
};

}  // namespace
}  // namespace pyops::cpu::PYOPS_ISA
