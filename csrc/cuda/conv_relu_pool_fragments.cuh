// Operands in shared memory and their products by mma.sync, for the convolutions of sm_80 and
// later.
#pragma once

#include <cstring>

#include "conv_relu_pool_tile.cuh"

namespace pyops::cuda::conv {

constexpr int kRowBytes = 64;  // of k in a stage: 4 chunks of 16 bytes, 2 steps of mma

// Byte of chunk `chunk` of row `row`: eight rows of one chunk lie in different banks.
PYOPS_DEVICE int chunk_offset(int row, int chunk) {
  return row * kRowBytes + ((chunk ^ (row >> 1 & 3)) << 4);
}

template <class T>
struct alignas(16) Chunk {
  static constexpr int kElements = 16 / sizeof(T);
  T at[kElements];
};

template <class T>
PYOPS_DEVICE void multiply(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (sizeof(T) == 4) {
    ptx::mma_m16n8k8_tf32(sum, a, b);
  } else {
    ptx::mma_m16n8k16<T>(sum, a, b);
  }
}

// Loaded float32 bits become TF32 ones; 16-bit elements stay.
template <class T, int N>
PYOPS_DEVICE void round_operand(uint32_t (&bits)[N]) {
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      float value;
      memcpy(&value, &bits[i], 4);
      bits[i] = ptx::to_tf32(value);
    }
  }
}

// sums[m][n]: the warp's 64 rows x 32 channels in tiles of 16 x 8, as mma.sync lays them.
// row_of(m): the row of `pixels` that this lane (lane % 16) reads for tile m.
template <class T, class RowOf>
PYOPS_DEVICE void multiply_stage(float (&sums)[4][4][4], uint32_t pixels, const RowOf& row_of,
                                 uint32_t weights, int warp_channel) {
  const int lane = ptx::lane_id();
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    uint32_t b[2][4];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int channel = warp_channel + n * 16 + lane / 16 * 8 + lane % 8;
      ptx::ldmatrix(b[n], weights + chunk_offset(channel, step * 2 + lane / 8 % 2));
      round_operand<T>(b[n]);
    }
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      uint32_t a[4];
      ptx::ldmatrix(a, pixels + chunk_offset(row_of(m), step * 2 + lane / 16));
      round_operand<T>(a);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const uint32_t pair[2] = {b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]};
        multiply<T>(sums[m][n], a, pair);
      }
    }
  }
}

}  // namespace pyops::cuda::conv
