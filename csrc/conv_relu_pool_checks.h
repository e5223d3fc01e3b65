// What the CPU's and CUDA's registrations of conv_relu_pool2d share: checks of the arguments
// and sizes.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <string>

#include "checks.h"
#include "conv_relu_pool_geometry.h"

namespace pyops {

inline Activation activation_of(const std::string& name) {
  if (name == "relu") return Activation::kRelu;
  if (name == "leaky_relu") return Activation::kLeakyRelu;
  STD_TORCH_CHECK(name == "none", "activation: expected relu, leaky_relu or none, got ", name);
  return Activation::kNone;
}

inline Pool pool_of(const std::string& name) {
  if (name == "max") return Pool::kMax;
  if (name == "avg") return Pool::kAvg;
  STD_TORCH_CHECK(name == "none", "pool: expected max, avg or none, got ", name);
  return Pool::kNone;
}

inline int64_t conv_extent(int64_t in, int64_t pad, int64_t dilation, int64_t kernel,
                           int64_t stride) {
  const int64_t room = in + 2 * pad - dilation * (kernel - 1) - 1;
  return room < 0 ? 0 : room / stride + 1;
}

inline int64_t pool_extent(int64_t in, int64_t window, int64_t stride, int64_t pad,
                           bool ceil_mode) {
  const int64_t room = in + 2 * pad - window + (ceil_mode ? stride - 1 : 0);
  if (room < 0) return 0;
  int64_t out = room / stride + 1;
  if (ceil_mode && (out - 1) * stride >= in + pad) --out;  // no window may start in the far padding
  return out;
}

// (y, x) of a window.
struct Pair {
  int64_t h, w;
};

// The schema's arguments between the tensors and with_codes or output_mask.
struct ConvPoolOptions {
  Pair stride, padding, dilation;
  int64_t groups;
  const std::string& activation;
  double negative_slope;
  const std::string& pool;
  Pair pool_size, pool_stride, pool_padding;
  bool ceil_mode;
};

// The same as parameters of an op, and gathered.
#define PYOPS_CONV_POOL_PARAMETERS                                                              \
  int64_t stride_h, int64_t stride_w, int64_t padding_h, int64_t padding_w, int64_t dilation_h, \
      int64_t dilation_w, int64_t groups, std::string activation, double negative_slope,        \
      std::string pool, int64_t pool_h, int64_t pool_w, int64_t pool_stride_h,                  \
      int64_t pool_stride_w, int64_t pool_padding_h, int64_t pool_padding_w, bool ceil_mode
#define PYOPS_CONV_POOL_OPTIONS                                                                 \
  ::pyops::ConvPoolOptions {                                                                    \
    {stride_h, stride_w}, {padding_h, padding_w}, {dilation_h, dilation_w}, groups, activation, \
        negative_slope, pool, {pool_h, pool_w}, {pool_stride_h, pool_stride_w},                 \
        {pool_padding_h, pool_padding_w}, ceil_mode                                             \
  }

inline void check_pair(const char* name, const Pair& pair, int64_t least) {
  STD_TORCH_CHECK(std::min(pair.h, pair.w) >= least && std::max(pair.h, pair.w) < (1LL << 31), name,
                  ": expected integers of at least ", least, " and below 2^31, got (", pair.h, ", ",
                  pair.w, ")");
}

// Checks what both ops share.
inline ConvPoolGeometry make_geometry(const Tensor& input, const Tensor& weight,
                                      const ConvPoolOptions& g) {
  check_rank("input", input, 4);
  check_rank("weight", weight, 4);
  check_same("weight", weight, "input", input);
  check_pair("stride", g.stride, 1);
  check_pair("padding", g.padding, 0);
  check_pair("dilation", g.dilation, 1);
  check_pair("pool_size", g.pool_size, 1);
  check_pair("pool_stride", g.pool_stride, 1);
  check_pair("pool_padding", g.pool_padding, 0);
  STD_TORCH_CHECK(
      g.groups >= 1 && weight.size(1) * g.groups == input.size(1) && weight.size(0) % g.groups == 0,
      "groups: ", g.groups, " does not fit input ", shape_of(input), " and weight ",
      shape_of(weight));
  ConvPoolGeometry p{};
  p.batch = input.size(0), p.in_channels = input.size(1);
  p.in_h = input.size(2), p.in_w = input.size(3);
  p.out_channels = weight.size(0), p.kernel_h = weight.size(2), p.kernel_w = weight.size(3);
  STD_TORCH_CHECK(p.kernel_h > 0 && p.kernel_w > 0 && p.in_channels > 0 && p.out_channels > 0,
                  "weight: expected no dimension of size 0, got ", shape_of(weight));
  p.stride_h = g.stride.h, p.stride_w = g.stride.w;
  p.pad_h = g.padding.h, p.pad_w = g.padding.w;
  p.dilation_h = g.dilation.h, p.dilation_w = g.dilation.w;
  p.groups = g.groups;
  p.conv_h = conv_extent(p.in_h, p.pad_h, p.dilation_h, p.kernel_h, p.stride_h);
  p.conv_w = conv_extent(p.in_w, p.pad_w, p.dilation_w, p.kernel_w, p.stride_w);
  p.activation = activation_of(g.activation);
  p.negative_slope = g.negative_slope;
  p.pool = pool_of(g.pool);
  if (p.pool == Pool::kNone) {
    p.pool_h = p.pool_w = p.pool_stride_h = p.pool_stride_w = 1;
    p.out_h = p.conv_h, p.out_w = p.conv_w;
  } else {
    p.pool_h = g.pool_size.h, p.pool_w = g.pool_size.w;
    p.pool_stride_h = g.pool_stride.h, p.pool_stride_w = g.pool_stride.w;
    p.pool_pad_h = g.pool_padding.h, p.pool_pad_w = g.pool_padding.w;
    STD_TORCH_CHECK(2 * p.pool_pad_h <= p.pool_h && 2 * p.pool_pad_w <= p.pool_w,
                    "pool_padding: expected at most half of pool_size");
    p.out_h = pool_extent(p.conv_h, p.pool_h, p.pool_stride_h, p.pool_pad_h, g.ceil_mode);
    p.out_w = pool_extent(p.conv_w, p.pool_w, p.pool_stride_w, p.pool_pad_w, g.ceil_mode);
  }
  STD_TORCH_CHECK(p.conv_h > 0 && p.conv_w > 0 && p.out_h > 0 && p.out_w > 0,
                  "input: ", shape_of(input), " is too small for its windows");
  return p;
}

// With no pool, the output's sign tells which elements pass the gradient, so no codes are
// stored, unless the slope makes negative values positive or zero.
inline bool stores_codes(const ConvPoolGeometry& p) {
  return p.pool != Pool::kNone ||
         (p.activation == Activation::kLeakyRelu && !(p.negative_slope > 0));
}

// Whether codes can describe this window (max: at most 128 places, avg: 8). Else the
// Python side takes the reference when gradients are needed.
inline bool codes_fit(const ConvPoolGeometry& p) {
  const int64_t places = p.pool_h * p.pool_w;
  return p.pool == Pool::kNone || (p.pool == Pool::kMax ? places <= 128 : places <= 8);
}

}  // namespace pyops
