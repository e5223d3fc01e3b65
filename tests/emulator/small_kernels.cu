/// Small kernels to try the emulator on. Matrix products: c[M x N] = a[M x K] b[N x K]^T.
#include "launch.cuh"

namespace small {
using namespace pyops;
using namespace pyops::ptx;

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

/// TMA, mbarriers, wgmma, TMA store. A block: 128 x 64 of c, two warpgroups of 64 rows and one that
/// loads; a stage: 64 of K.
constexpr int RING = 3;
constexpr int TILE = 64 * 64 * 2;  // bytes of 64 rows in the 128-byte swizzle
__global__ void __launch_bounds__(384, 1)
    gemm_hopper_kernel(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b,
                       const __grid_constant__ CUtensorMap c, int k) {
  DYN_SMEM(smem);
  const uint32_t stages = smem_addr(smem), out = stages + RING * 3 * TILE;
  const uint32_t full = out + 2 * TILE, empty = full + 8 * RING;
  const int warp = warp_id(), lane = lane_id(), steps = k / 64;
  const int row0 = blockIdx.y * 128, column0 = blockIdx.x * 64;
  if (threadIdx.x == 0) {
    for (int i = 0; i < RING; ++i) {
      mbar_init(full + 8 * i, 1);
      mbar_init(empty + 8 * i, 8);
    }
    fence_mbarrier_init();
  }
  sync_threads();
  if (warp >= 8) {
    setmaxnreg_dec<24>();
    if (warp == 8 && elect_one()) {
      for (int step = 0; step < steps; ++step) {
        const int i = step % RING, phase = step / RING % 2;
        const uint32_t stage = stages + i * 3 * TILE;
        mbar_wait(empty + 8 * i, phase ^ 1);
        mbar_arrive_expect_tx(full + 8 * i, 3 * TILE);
        tma_load<2>(stage, &a, full + 8 * i, {step * 64, row0});
        tma_load<2>(stage + 2 * TILE, &b, full + 8 * i, {step * 64, column0});
      }
    }
    return;
  }
  setmaxnreg_inc<240>();
  const int group = warp / 4;
  float sums[32];
  for (int step = 0; step < steps; ++step) {
    const int i = step % RING, phase = step / RING % 2;
    const uint32_t stage = stages + i * 3 * TILE;
    mbar_wait(full + 8 * i, phase);
    wgmma_fence();
    for (int kk = 0; kk < 4; ++kk)
      wgmma<__nv_bfloat16, 64>(
          sums, smem_descriptor<Swizzle::B128>(stage + group * TILE + kk * 32, 0, 1024),
          smem_descriptor<Swizzle::B128>(stage + 2 * TILE + kk * 32, 0, 1024), step > 0 || kk > 0);
    wgmma_commit();
    wgmma_wait<0>();
    if (lane == 0) mbar_arrive(empty + 8 * i);
  }
  const uint32_t own = out + group * TILE;
  for (int j = 0; j < 8; ++j)
    for (int half = 0; half < 2; ++half) {
      const int row = warp % 4 * 16 + lane / 4 + 8 * half;
      __nv_bfloat162 pair{__float2bfloat16(sums[4 * j + 2 * half]),
                          __float2bfloat16(sums[4 * j + 2 * half + 1])};
      st_shared(own + row * 128 + (j ^ row % 8) * 16 + lane % 4 * 4, pair);
    }
  fence_proxy_async_shared();
  if (group == 0)
    named_barrier_sync<1, 128>();
  else
    named_barrier_sync<2, 128>();
  if (threadIdx.x % 128 == 0) {
    tma_store<2>(&c, own, {column0, row0 + group * 64});
    bulk_commit();
    bulk_wait_read<0>();
  }
}

/// Clusters of two blocks. Each loads half of 64 rows of 32 floats for both, sums 16 columns of
/// every row, and sends the sums to the other: sums[cluster][block][row], then once more by plain
/// stores to `mirror` of the same shape.
__global__ void cluster_kernel(const __grid_constant__ CUtensorMap x, float* sums, float* mirror) {
  DYN_SMEM(smem);
  const uint32_t rows = smem_addr(smem), inbox = rows + 8192, second = inbox + 256;
  const uint32_t loaded = second + 256, arrived = loaded + 8;
  const uint32_t rank = cluster_rank(), other = rank ^ 1;
  const int row = threadIdx.x, cluster = blockIdx.x / 2;
  if (row == 0) {
    mbar_init(loaded, 1);
    mbar_init(arrived, 1);
    fence_mbarrier_init();
    mbar_arrive_expect_tx(loaded, 8192);
    mbar_arrive_expect_tx(arrived, 256);
  }
  cluster_sync();
  if (row == 0)
    tma_load_multicast<2>(rows + rank * 4096, &x, loaded,
                          {0, cluster * 64 + static_cast<int>(rank) * 32}, 3);
  mbar_wait(loaded, 0);
  float sum = 0;
  for (int i = 0; i < 16; ++i) sum += ld_shared<float>(rows + (row * 32 + rank * 16 + i) * 4);
  st_async(map_cluster(inbox + 4 * row, other), sum, map_cluster(arrived, other));
  mbar_wait_cluster(arrived, 0);
  sum += ld_shared<float>(inbox + 4 * row);
  const int at = (cluster * 2 + static_cast<int>(rank)) * 64 + row;
  sums[at] = sum;
  st_cluster(map_cluster(second + 4 * row, other), sum);
  cluster_sync();
  mirror[at] = ld_shared<float>(second + 4 * (63 - row));
}

/// Sum of x by blocks of 64 threads; the last one to finish adds their sums up in order.
__global__ void last_block_kernel(const float* x, float* partial, unsigned* finished, float* sum) {
  DYN_SMEM(smem);
  float* own = reinterpret_cast<float*>(smem);
  unsigned* last = reinterpret_cast<unsigned*>(smem + 256);
  const int thread = threadIdx.x;
  own[thread] = x[blockIdx.x * 64 + thread];
  sync_threads();
  for (int half = 32; half > 0; half /= 2) {
    if (thread < half) own[thread] += own[thread + half];
    sync_threads();
  }
  if (thread == 0) {
    partial[blockIdx.x] = own[0];
    __threadfence();
    *last = atomicAdd(finished, 1u) == gridDim.x - 1;
    __threadfence();
  }
  sync_threads();
  if (thread == 32 && *last) {
    float all = 0;
    for (unsigned block = 0; block < gridDim.x; ++block) all += partial[block];
    *sum = all;
  }
}

}  // namespace small

using namespace pyops;
using namespace small;

extern "C" const char* gemm_ampere(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c,
                                   int64_t m, int64_t n, int64_t k) {
  return emu::run([&] {
    const dim3 grid(static_cast<unsigned>(n) / 64, static_cast<unsigned>(m) / 64);
    launch({"gemm_ampere_kernel", grid, dim3(128), dim3(1), STAGES * 2 * 64 * 24 * 2},
           gemm_ampere_kernel, a, b, c, static_cast<int>(n), static_cast<int>(k));
  });
}

static CUtensorMap matrix_map(const void* base, int64_t rows, int64_t columns, uint32_t box_rows) {
  return make_tensor_map({tensor_map_type<__nv_bfloat16>(),
                          2,
                          base,
                          {static_cast<uint64_t>(columns), static_cast<uint64_t>(rows)},
                          {static_cast<uint64_t>(columns) * 2},
                          {64, box_rows},
                          {1, 1, 1, 1, 1},
                          CU_TENSOR_MAP_SWIZZLE_128B});
}

extern "C" const char* gemm_hopper(const __nv_bfloat16* a, const __nv_bfloat16* b, __nv_bfloat16* c,
                                   int64_t m, int64_t n, int64_t k) {
  return emu::run([&] {
    const dim3 grid(static_cast<unsigned>(n + 63) / 64, static_cast<unsigned>(m + 127) / 128);
    launch({"gemm_hopper_kernel", grid, dim3(384), dim3(1), (RING * 3 + 2) * TILE + 16 * RING},
           gemm_hopper_kernel, matrix_map(a, m, k, 128), matrix_map(b, n, k, 64),
           matrix_map(c, m, n, 64), static_cast<int>(k));
  });
}

extern "C" const char* cluster_sums(const float* x, float* sums, float* mirror, int64_t clusters) {
  return emu::run([&] {
    const CUtensorMap map = make_tensor_map({tensor_map_type<float>(),
                                             2,
                                             x,
                                             {32, static_cast<uint64_t>(clusters) * 64},
                                             {128},
                                             {32, 32}});
    launch({"cluster_kernel", dim3(static_cast<unsigned>(clusters) * 2), dim3(64), dim3(2), 8720},
           cluster_kernel, map, sums, mirror);
  });
}

extern "C" const char* last_block_sum(const float* x, float* partial, unsigned* finished,
                                      float* sum, int64_t blocks) {
  return emu::run([&] {
    launch({"last_block_kernel", dim3(static_cast<unsigned>(blocks)), dim3(64), dim3(1), 260},
           last_block_kernel, x, partial, finished, sum);
  });
}
