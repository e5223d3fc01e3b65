/// Small kernels to try the emulator on: matrix products c[M x N] = a[M x K] b[N x K]^T.
#include "launch.cuh"

namespace pyops {
using namespace ptx;

/// cp.async ring of three stages, ldmatrix, mma.sync. A block: 64 x 64 of c, four warps of 16 rows;
/// a stage: 16 of K. M, N multiples of 64, K of 16.
constexpr int STAGES = 3;
__global__ void gemm_ampere_kernel(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c, int n,
                                   int k) {
  DYN_SMEM(smem);
  constexpr int PITCH = 24;  // elements of a row, 48 bytes: ldmatrix without bank conflicts
  constexpr int STAGE = 2 * 64 * PITCH * 2;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int row0 = blockIdx.y * 64, column0 = blockIdx.x * 64, steps = k / 16;
  const auto load = [&](int step) {
    if (step < steps) {
      for (int i = thread; i < 256; i += 128) {
        const int matrix = i / 128, row = i / 2 % 64, half = i % 2;
        const __nv_bfloat16* from = matrix == 0 ? a + (row0 + row) * k : b + (column0 + row) * k;
        cp_async<16>(
            smem_addr(smem + step % STAGES * STAGE) + ((matrix * 64 + row) * PITCH + half * 8) * 2,
            from + step * 16 + half * 8);
      }
    }
    cp_async_commit();
  };
  float sums[8][4] = {};
  for (int step = 0; step < STAGES - 1; ++step) load(step);
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<STAGES - 2>();
    sync_threads();
    load(step + STAGES - 1);
    const uint32_t stage = smem_addr(smem + step % STAGES * STAGE);
    uint32_t rows[4];
    ldmatrix(rows, stage + ((warp * 16 + lane % 16) * PITCH + lane / 16 * 8) * 2);
    for (int j = 0; j < 8; ++j) {
      uint32_t columns[2];
      ldmatrix(columns, stage + ((64 + j * 8 + lane % 8) * PITCH + lane / 8 % 2 * 8) * 2);
      mma_m16n8k16<__nv_bfloat16>(sums[j], rows, columns);
    }
  }
  for (int j = 0; j < 8; ++j)
    for (int i = 0; i < 4; ++i)
      c[static_cast<int64_t>(row0 + warp * 16 + lane / 4 + 8 * (i / 2)) * n + column0 + j * 8 +
        lane % 4 * 2 + i % 2] = sums[j][i];
}

}  // namespace pyops

extern "C" const char* gemm_ampere(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c,
                                   int64_t m, int64_t n, int64_t k) {
  return emu::run([&] {
    using namespace pyops;
    const dim3 grid(n / 64, m / 64);
    launch({"gemm_ampere_kernel", grid, dim3(128), dim3(1), STAGES * 2 * 64 * 24 * 2},
           gemm_ampere_kernel, a, b, c, static_cast<int>(n), static_cast<int>(k));
  });
}
