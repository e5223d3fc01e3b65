// Memory formats of 4-D tensors: the ops' rule, strides, and copies into a format.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>

#include "checks.h"

namespace pyops {

// channels_last where the channels lie innermost; contiguous for all else.
inline bool lies_channels_last(const Tensor& t) {
  return t.size(1) > 1 && t.stride(1) == 1 && !t.is_contiguous();
}

inline std::array<int64_t, 4> dense_strides(const std::array<int64_t, 4>& size,
                                            bool channels_last) {
  if (channels_last) return {size[1] * size[2] * size[3], 1, size[3] * size[1], size[1]};
  return {size[1] * size[2] * size[3], size[2] * size[3], size[3], 1};
}

// The tensor itself if it already lies densely in that format, else a copy that does.
inline Tensor as_dense(const Tensor& t, bool channels_last) {
  const std::array<int64_t, 4> size = {t.size(0), t.size(1), t.size(2), t.size(3)};
  const auto strides = dense_strides(size, channels_last);
  bool dense = true;
  for (int64_t i = 0; i < 4; ++i) dense = dense && (size[i] == 1 || t.stride(i) == strides[i]);
  if (dense) return t;
  return torch::stable::contiguous(t, channels_last ? torch::headeronly::MemoryFormat::ChannelsLast
                                                    : torch::headeronly::MemoryFormat::Contiguous);
}

}  // namespace pyops
