/// One kernel for each instruction: registers and shared memory in and out, for
/// test_instructions.py.
#include "launch.cuh"

namespace pyops {
using namespace ptx;

/// The block's shared memory := image, visible to TMA and wgmma.
PTX_FN void fill(unsigned char* smem, const unsigned char* image, int bytes) {
  for (int i = threadIdx.x; i < bytes; i += blockDim.x) smem[i] = image[i];
  fence_proxy_async_shared();
  sync_threads();
}

PTX_FN void dump(unsigned char* image, const unsigned char* smem, int bytes) {
  sync_threads();
  for (int i = threadIdx.x; i < bytes; i += blockDim.x) image[i] = smem[i];
}

template <int N, bool Trans>
__global__ void ldmatrix_kernel(const unsigned char* image, const int* offsets, uint32_t* out) {
  DYN_SMEM(smem);
  fill(smem, image, 1024);
  uint32_t d[N];
  ldmatrix<Trans>(d, smem_addr(smem) + offsets[threadIdx.x]);
  for (int i = 0; i < N; ++i) out[threadIdx.x * N + i] = d[i];
}

template <int N, bool Trans>
__global__ void stmatrix_kernel(const uint32_t* in, const int* offsets, unsigned char* image) {
  DYN_SMEM(smem);
  uint32_t s[N];
  for (int i = 0; i < N; ++i) s[i] = in[threadIdx.x * N + i];
  stmatrix<Trans>(smem_addr(smem) + offsets[threadIdx.x], s);
  dump(image, smem, N * 128);
}

template <class T>
__global__ void mma_kernel(const uint32_t* a_in, const uint32_t* b_in, float* d_io) {
  uint32_t a[4], b[2];
  float d[4];
  for (int i = 0; i < 4; ++i) a[i] = a_in[threadIdx.x * 4 + i];
  for (int i = 0; i < 2; ++i) b[i] = b_in[threadIdx.x * 2 + i];
  for (int i = 0; i < 4; ++i) d[i] = d_io[threadIdx.x * 4 + i];
  if constexpr (std::is_same_v<T, tf32>)
    mma_m16n8k8_tf32(d, a, b);
  else
    mma_m16n8k16<T>(d, a, b);
  for (int i = 0; i < 4; ++i) d_io[threadIdx.x * 4 + i] = d[i];
}

/// Thread i copies 16 bytes, of which valid[i] come from `in`.
__global__ void cp_async_kernel(const unsigned char* in, const int* valid, unsigned char* image) {
  DYN_SMEM(smem);
  cp_async<16>(smem_addr(smem) + threadIdx.x * 16, in + threadIdx.x * 16, valid[threadIdx.x]);
  cp_async_commit();
  cp_async_wait<0>();
  dump(image, smem, 32 * 16);
}

template <int Rank>
__global__ void tma_load_kernel(const __grid_constant__ CUtensorMap map, const int* at_in,
                                int bytes, unsigned char* image) {
  DYN_SMEM(smem);
  const uint32_t bar = smem_addr(smem) + 8192;
  int at[Rank];
  for (int i = 0; i < Rank; ++i) at[i] = at_in[i];
  if (threadIdx.x == 0) {
    mbar_init(bar, 1);
    fence_mbarrier_init();
    mbar_arrive_expect_tx(bar, bytes);
    tma_load(smem_addr(smem), &map, bar, at);
  }
  sync_threads();
  mbar_wait(bar, 0);
  dump(image, smem, bytes);
}

template <int Rank, bool Add>
__global__ void tma_store_kernel(const __grid_constant__ CUtensorMap map, const int* at_in,
                                 int bytes, const unsigned char* image) {
  DYN_SMEM(smem);
  fill(smem, image, bytes);
  int at[Rank];
  for (int i = 0; i < Rank; ++i) at[i] = at_in[i];
  if (threadIdx.x != 0) return;
  if constexpr (Add)
    tma_reduce_add(&map, smem_addr(smem), at);
  else
    tma_store(&map, smem_addr(smem), at);
  bulk_commit();
  bulk_wait<0>();
}

/// out := in, sum += in, by bulk copies through shared memory.
__global__ void bulk_kernel(const float* in, float* out, float* sum) {
  DYN_SMEM(smem);
  const uint32_t data = smem_addr(smem), bar = data + 256;
  if (threadIdx.x != 0) return;
  mbar_init(bar, 1);
  fence_mbarrier_init();
  mbar_arrive_expect_tx(bar, 256);
  bulk_load(data, in, 256, bar);
  mbar_wait(bar, 0);
  bulk_store(out, data, 256);
  bulk_commit();
  bulk_reduce_add(sum, data, 256);
  bulk_commit();
  bulk_wait_read<1>();
  bulk_wait<0>();
}

/// The answers of mbar_try_wait(parity 0), (parity 1) on a barrier of two arrivals: fresh, after
/// one arrival, after two, and in the next phase after two arrivals with 16 bytes to come, and
/// after.
__global__ void mbarrier_kernel(const float* in, int* out) {
  DYN_SMEM(smem);
  const uint32_t bar = smem_addr(smem) + 16;
  int i = 0;
  const auto ask = [&] {
    out[i++] = mbar_try_wait(bar, 0);
    out[i++] = mbar_try_wait(bar, 1);
  };
  mbar_init(bar, 2);
  fence_mbarrier_init();
  ask();
  mbar_arrive(bar);
  ask();
  mbar_arrive(bar);
  ask();
  mbar_arrive(bar);
  mbar_arrive_expect_tx(bar, 16);
  ask();
  bulk_load(smem_addr(smem), in, 16, bar);
  mbar_wait(bar, 1);
  ask();
}

/// d[64 x N] of each thread's registers; the descriptors count from the block's shared memory.
template <class T, int N, Major A, Major B, bool Registers>
__global__ void wgmma_kernel(const unsigned char* image, int bytes, uint64_t a, uint64_t b,
                             const uint32_t* a_in, bool accumulate, float* d_io) {
  DYN_SMEM(smem);
  fill(smem, image, bytes);
  float d[N / 2];
  uint32_t rows[4];
  for (int i = 0; i < N / 2; ++i) d[i] = d_io[threadIdx.x * (N / 2) + i];
  for (int i = 0; i < 4; ++i) rows[i] = a_in[threadIdx.x * 4 + i];
  a += smem_addr(smem) >> 4;
  b += smem_addr(smem) >> 4;
  wgmma_fence();
  if constexpr (Registers)
    wgmma<T, N, B>(d, rows, b, accumulate);
  else
    wgmma<T, N, A, B>(d, a, b, accumulate);
  wgmma_commit();
  wgmma_wait<0>();
  for (int i = 0; i < N / 2; ++i) d_io[threadIdx.x * (N / 2) + i] = d[i];
}

/// Each lane's: its neighbour's number by shfl_xor, lane 5's, whether it was elected, warp_id.
__global__ void warp_kernel(int* out) {
  int* own = out + threadIdx.x * 4;
  own[0] = shfl_xor(static_cast<int>(threadIdx.x), 1);
  own[1] = shfl(static_cast<int>(threadIdx.x), 5);
  own[2] = elect_one();
  own[3] = warp_id();
}

/// Warps 1... hand a number down from the last to the first, each by a barrier of its own with the
/// next; block 1 of the cluster reads what block 0 got.
__global__ void barriers_kernel(int* out) {
  DYN_SMEM(smem);
  int* number = reinterpret_cast<int*>(smem);
  const int warp = warp_id();
  if (warp == 2) {
    if (lane_id() == 0) *number = 7;
    named_barrier_arrive<1, 64>();
  } else if (warp == 1) {
    named_barrier_sync<1, 64>();
    if (lane_id() == 0) *number *= static_cast<int>(1 + cluster_size() + cluster_rank());
    named_barrier_sync<2, 64>();
  } else {
    named_barrier_sync<2, 64>();
    if (lane_id() == 0) out[cluster_rank()] = *number;
  }
  cluster_sync();
  if (threadIdx.x == 0)
    out[2 + cluster_rank()] = ld_cluster<int>(map_cluster(smem_addr(number), cluster_rank() ^ 1));
  cluster_sync();
}

/// Block 0 of two copies its numbers to block 1, by one bulk copy and by an mbarrier that each of
/// its threads arrives at; block 1 brings its own by cp.async, which arrives at an mbarrier, too.
/// sums[i] = in[i] + in[32 + i], twice.
__global__ void cluster_copies_kernel(const float* in, float* sums) {
  DYN_SMEM(smem);
  const uint32_t own = smem_addr(smem), theirs = own + 128, stored = own + 256;
  const uint32_t copied = own + 384, arrived = copied + 8, brought = copied + 16;
  const uint32_t rank = cluster_rank(), i = threadIdx.x;
  if (i == 0) {
    mbar_init(copied, 1);
    mbar_init(arrived, 32);
    mbar_init(brought, 32);
    fence_mbarrier_init();
    if (rank == 1) mbar_arrive_expect_tx(copied, 128);
  }
  cluster_sync();
  cp_async<4>(own + 4 * i, in + 32 * rank + i);
  cp_async_mbar_arrive(brought);
  mbar_wait(brought, 0);
  if (rank == 0) {
    st_cluster(map_cluster(stored + 4 * i, 1), ld_shared<float>(own + 4 * i));
    mbar_arrive_cluster(map_cluster(arrived, 1));
    fence_proxy_async();
    sync_warp();
    if (i == 0) bulk_copy_cluster(map_cluster(theirs, 1), own, 128, map_cluster(copied, 1));
  } else {
    mbar_wait_cluster(copied, 0);
    sums[i] = ld_shared<float>(own + 4 * i) + ld_shared<float>(theirs + 4 * i);
    mbar_wait_cluster(arrived, 0);
    sums[32 + i] = ld_shared<float>(own + 4 * i) + ld_shared<float>(stored + 4 * i);
  }
  cluster_sync();
}

/// Two products of one warpgroup in flight with A in registers; `bug` 1 overwrites those too early,
/// 2 gives both products the same accumulators but for one, 3 is another product in one warp.
__global__ void flights_kernel(int bug, float* out) {
  DYN_SMEM(smem);
  for (int i = threadIdx.x; i < 1024; i += 128) smem[i] = 0;
  fence_proxy_async_shared();
  sync_threads();
  float sums[24];
  uint32_t rows[4] = {0, 0, 0, 0};
  const uint64_t b = smem_descriptor<Swizzle::None>(smem_addr(smem), 128, 256);
  float (&first)[16] = reinterpret_cast<float (&)[16]>(sums[0]);
  float (&second)[8] = reinterpret_cast<float (&)[8]>(sums[bug == 2 ? 15 : 16]);
  wgmma_fence();
  wgmma<__nv_bfloat16, 32>(first, rows, b, false);
  wgmma<__nv_bfloat16, 16>(second, rows, bug == 3 && warp_id() == 1 ? b + 16 : b, false);
  wgmma_commit();
  if (bug == 1) rows[1] = threadIdx.x;
  wgmma_wait<0>();
  out[threadIdx.x] = sums[0] + sums[23] + static_cast<float>(rows[1]);
}

__global__ void arithmetic_kernel(const float* in, float* out, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const float x = in[i];
    float* const own = out + 7 * i;
    own[0] = max_nan(x, 1.0f);
    own[1] = max_nan(1.0f, x);
    own[2] = ex2(x);
    own[3] = lg2(x);
    own[4] = rcp(x);
    own[5] = tanh_approx(x);
    own[6] = __uint_as_float(to_tf32(x));
  }
}

}  // namespace pyops

using namespace pyops;

static LaunchConfig on(int threads, size_t smem, int blocks = 1) {
  const dim3 all(static_cast<unsigned>(blocks));
  return {"instruction", all, dim3(static_cast<unsigned>(threads)), all, smem};
}

extern "C" {

const char* run_ldmatrix(int64_t count, int64_t trans, const unsigned char* image,
                         const int* offsets, uint32_t* out) {
  const auto kernel = count == 1   ? trans ? ldmatrix_kernel<1, true> : ldmatrix_kernel<1, false>
                      : count == 2 ? trans ? ldmatrix_kernel<2, true> : ldmatrix_kernel<2, false>
                      : trans      ? ldmatrix_kernel<4, true>
                                   : ldmatrix_kernel<4, false>;
  return emu::run([&] { launch(on(32, 1024), kernel, image, offsets, out); });
}

const char* run_stmatrix(int64_t trans, const uint32_t* in, const int* offsets,
                         unsigned char* image) {
  const auto kernel = trans ? stmatrix_kernel<4, true> : stmatrix_kernel<4, false>;
  return emu::run([&] { launch(on(32, 512), kernel, in, offsets, image); });
}

const char* run_mma(int64_t type, const uint32_t* a, const uint32_t* b, float* d) {
  const auto kernel = type == 0   ? mma_kernel<__nv_bfloat16>
                      : type == 1 ? mma_kernel<__half>
                                  : mma_kernel<tf32>;
  return emu::run([&] { launch(on(32, 0), kernel, a, b, d); });
}

const char* run_cp_async(const unsigned char* in, const int* valid, unsigned char* image) {
  return emu::run([&] { launch(on(32, 512), cp_async_kernel, in, valid, image); });
}

/// tensor: rank, bytes of an element (2: bf16, 4: float), swizzle, sizes[5], strides[4] in bytes,
/// box[5], steps[5]; direction: 0 load, 1 store, 2 add.
const char* run_tma(int64_t direction, void* base, const int64_t* tensor, const int* at,
                    int64_t bytes, unsigned char* image) {
  return emu::run([&] {
    TensorMapConfig config{};
    config.type = tensor[1] == 2 ? tensor_map_type<__nv_bfloat16>() : tensor_map_type<float>();
    config.rank = static_cast<int>(tensor[0]);
    config.base = base;
    config.swizzle = static_cast<CUtensorMapSwizzle>(tensor[2]);
    for (int i = 0; i < 5; ++i) {
      config.sizes[i] = static_cast<uint64_t>(tensor[3 + i]);
      if (i < 4) config.strides[i] = static_cast<uint64_t>(tensor[8 + i]);
      config.box[i] = static_cast<uint32_t>(tensor[12 + i]);
      config.steps[i] = static_cast<uint32_t>(tensor[17 + i]);
    }
    const CUtensorMap map = make_tensor_map(config);
    const int count = static_cast<int>(bytes);
    const auto store = [&](auto loader, auto storer, auto adder) {
      if (direction == 0) launch(on(32, 8200), loader, map, at, count, image);
      if (direction == 1) launch(on(32, 8192), storer, map, at, count, image);
      if (direction == 2) launch(on(32, 8192), adder, map, at, count, image);
    };
    if (config.rank == 1)
      store(tma_load_kernel<1>, tma_store_kernel<1, false>, tma_store_kernel<1, true>);
    if (config.rank == 2)
      store(tma_load_kernel<2>, tma_store_kernel<2, false>, tma_store_kernel<2, true>);
    if (config.rank == 3)
      store(tma_load_kernel<3>, tma_store_kernel<3, false>, tma_store_kernel<3, true>);
    if (config.rank == 5)
      store(tma_load_kernel<5>, tma_store_kernel<5, false>, tma_store_kernel<5, true>);
  });
}

const char* run_bulk(const float* in, float* out, float* sum) {
  return emu::run([&] { launch(on(32, 272), bulk_kernel, in, out, sum); });
}

const char* run_mbarrier(const float* in, int* out) {
  return emu::run([&] { launch(on(1, 32), mbarrier_kernel, in, out); });
}

/// kind: type (0 bf16, 1 half, 2 tf32), majors of a and b, whether a is in registers.
const char* run_wgmma(const int64_t* kind, const unsigned char* image, int64_t bytes, int64_t a,
                      int64_t b, const uint32_t* a_in, int64_t accumulate, float* d) {
  return emu::run([&] {
    using bf16 = __nv_bfloat16;
    const auto go = [&](auto kernel) {
      launch(on(128, static_cast<size_t>(bytes)), kernel, image, static_cast<int>(bytes),
             static_cast<uint64_t>(a), static_cast<uint64_t>(b), a_in, accumulate != 0, d);
    };
    const int64_t key = kind[0] * 8 + kind[1] * 4 + kind[2] * 2 + kind[3];
    if (key == 0) go(wgmma_kernel<bf16, 32, KMajor, KMajor, false>);
    if (key == 1) go(wgmma_kernel<bf16, 32, KMajor, KMajor, true>);
    if (key == 2) go(wgmma_kernel<bf16, 32, KMajor, MNMajor, false>);
    if (key == 4) go(wgmma_kernel<bf16, 32, MNMajor, KMajor, false>);
    if (key == 6) go(wgmma_kernel<bf16, 32, MNMajor, MNMajor, false>);
    if (key == 8) go(wgmma_kernel<__half, 32, KMajor, KMajor, false>);
    if (key == 11) go(wgmma_kernel<__half, 32, KMajor, MNMajor, true>);
    if (key == 16) go(wgmma_kernel<tf32, 32, KMajor, KMajor, false>);
    if (key == 17) go(wgmma_kernel<tf32, 32, KMajor, KMajor, true>);
  });
}

const char* run_warp(int* out) {
  return emu::run([&] { launch(on(64, 0), warp_kernel, out); });
}

const char* run_barriers(int* out) {
  return emu::run([&] { launch(on(96, 16, 2), barriers_kernel, out); });
}

const char* run_cluster_copies(const float* in, float* sums) {
  return emu::run([&] { launch(on(32, 408, 2), cluster_copies_kernel, in, sums); });
}

const char* run_flights(int64_t bug, float* out) {
  return emu::run([&] { launch(on(128, 1024), flights_kernel, static_cast<int>(bug), out); });
}

const char* run_arithmetic(const float* in, float* out, int64_t count) {
  return emu::run([&] { launch(on(32, 0), arithmetic_kernel, in, out, static_cast<int>(count)); });
}

}  // extern "C"
