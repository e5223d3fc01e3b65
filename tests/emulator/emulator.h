/// What a kernel sees of the emulator: the host side of csrc/cuda/ptx.cuh and launch.cuh.
///
/// Every CUDA thread is a fiber of one host thread. Fibers switch only inside these functions, in
/// an order drawn from the seed. A violation (race, deadlock, misuse) ends the launch with a
/// report.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace emu {

/// Where in the kernel's source an operation stands.
struct Site {
  const char* file;
  int line;
};

enum Type { BF16, F16, TF32 };
template <class T>
constexpr Type type_of() {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return BF16;
  if constexpr (std::is_same_v<T, __half>) return F16;
  return TF32;
}

// ---- launching ----
struct Launch {
  const char* name;
  dim3 grid, block, cluster;
  size_t smem;
};
/// Runs thread(data) in every thread of the grid.
void launch(const Launch& config, void (*thread)(const void*), const void* data);
template <class Thread>
void launch(const Launch& config, const Thread& thread) {
  launch(config, [](const void* data) { (*static_cast<const Thread*>(data))(); }, &thread);
}
/// Runs host code that launches kernels; the report of what went wrong, or null.
const char* run(const std::function<void()>& host);

// ---- threads and warps ----
unsigned char* dynamic_smem();
uint32_t smem_addr(const void* pointer);
void sync_threads(Site site);
void named_barrier(int id, int threads, bool wait, Site site);
void setmaxnreg(int registers, bool more, Site site);
bool elect_one(Site site);
/// Gives way to another thread: in spin loops.
void pause(Site site);

/// A collective of the lanes in `mask`: once all are here, `all` is called once with every lane's
/// `own` (null outside the mask).
using Lanes = void* const (&)[32];
void collective(const char* what, uint32_t mask, void* own, void (*all)(Lanes), Site site);
void sync_warp(uint32_t mask, Site site);
int lane_id();

template <class T, class Source>
T shfl(T value, Source source, uint32_t mask, Site site) {
  struct Own {
    T value, result;
    int from;
  } own{value, value, source(lane_id())};
  collective(
      "shfl", mask, &own,
      [](Lanes lanes) {
        for (void* lane : lanes) {
          if (lane == nullptr) continue;
          Own& to = *static_cast<Own*>(lane);
          if (to.from < 0 || to.from > 31) continue;
          if (lanes[to.from] == nullptr)
            throw std::runtime_error("shfl from a lane not in the mask");
          to.result = static_cast<Own*>(lanes[to.from])->value;
        }
      },
      site);
  return own.result;
}
uint32_t ballot(bool predicate, uint32_t mask, Site site);

// ---- memory ----
void ld_shared(void* to, int bytes, uint32_t addr, Site site);
void st_shared(uint32_t addr, const void* from, int bytes, Site site);
/// Called before an atomic operation on memory of either kind.
void atomic_access(const void* address, size_t bytes, Site site);
void thread_fence(Site site);

void ldmatrix(uint32_t* d, int count, bool transpose, uint32_t addr, Site site);
void stmatrix(const uint32_t* s, int count, bool transpose, uint32_t addr, Site site);
void mma_sync(float* d, const uint32_t* a, const uint32_t* b, Type type, Site site);

void cp_async(uint32_t dst, const void* src, int bytes, uint32_t valid, Site site);
void cp_async_commit(Site site);
void cp_async_wait(int pending, Site site);
void cp_async_mbar_arrive(uint32_t bar, Site site);

// ---- mbarriers and fences ----
void mbar_init(uint32_t bar, uint32_t count, Site site);
void mbar_inval(uint32_t bar, Site site);
void mbar_arrive(uint32_t bar, uint32_t expect_bytes, bool cluster, Site site);
void mbar_expect_tx(uint32_t bar, uint32_t bytes, Site site);
bool mbar_try_wait(uint32_t bar, uint32_t phase, Site site);
void mbar_wait(uint32_t bar, uint32_t phase, Site site);
void fence_mbarrier_init(Site site);
void fence_proxy_async(Site site);

// ---- TMA and bulk copies ----
void tma_load(uint32_t dst, const CUtensorMap* map, uint32_t bar, const int* at, int rank,
              uint16_t mask, Site site);
void tma_store(const CUtensorMap* map, uint32_t src, const int* at, int rank, bool add, Site site);
void bulk_load(uint32_t dst, const void* src, uint32_t bytes, uint32_t bar, Site site);
void bulk_copy_cluster(uint32_t dst, uint32_t src, uint32_t bytes, uint32_t bar, Site site);
void bulk_store(void* dst, uint32_t src, uint32_t bytes, bool add, Site site);
void bulk_commit(Site site);
void bulk_wait(int pending, bool only_read, Site site);

// ---- clusters ----
uint32_t cluster_rank();
uint32_t cluster_size();
void cluster_arrive(Site site);
void cluster_wait(Site site);
uint32_t map_cluster(uint32_t addr, uint32_t rank, Site site);
void ld_cluster(void* to, int bytes, uint32_t addr, Site site);
void st_cluster(uint32_t addr, const void* from, int bytes, Site site);
void st_async(uint32_t addr, const void* from, int bytes, uint32_t bar, Site site);

// ---- wgmma ----
void wgmma(float* d, int n, Type type, const uint32_t* a_registers, uint64_t a, uint64_t b,
           int a_major, int b_major, bool accumulate, Site site);
void wgmma_fence(Site site);
void wgmma_commit(Site site);
void wgmma_wait(int pending, Site site);

// ---- arithmetic ----
inline uint32_t bits(float x) {
  uint32_t b;
  std::memcpy(&b, &x, 4);
  return b;
}
inline float flush(float x) { return __builtin_fabsf(x) < 1.17549435e-38f ? 0.0f * x : x; }
inline uint32_t to_tf32(float x) {
  return (bits(x) & 0x7F800000) == 0x7F800000 ? bits(x) : (bits(x) + 0x1000) & ~0x1FFFu;
}

}  // namespace emu

#include "cuda_builtins.h"
