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
#include <type_traits>

namespace emu {

/// Where in the kernel's source an operation stands; line 0: `file` is a program counter.
struct Site {
  const char* file;
  int line;
};
extern Site here;  // of the operation at work
void at(const char* file, int line);
/// Ends the launch with a report.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// ---- launching ----
struct Launch {
  const char* name;
  dim3 grid, block, cluster;
  size_t smem;
};
/// Runs `thread` in every thread of the grid.
void launch(const Launch& config, const std::function<void()>& thread);
/// Runs host code that launches kernels; the report of what went wrong, or null.
const char* run(const std::function<void()>& host);

// ---- threads, warps, blocks ----
unsigned char* dynamic_smem();
uint32_t smem_addr(const void* pointer);
int lane_id();
void sync_threads();
void sync_warp();
bool elect_one();
void named_barrier(int id, int threads, bool wait);
void setmaxnreg(int registers, bool more);

/// Meets the lanes of `mask`: null, after waiting, but for the last one to come, which gets the
/// `own` of all (null outside the mask) until the next such call.
void* const* gather(const char* what, uint32_t mask, void* own);
/// The last lane to come calls all(of), where of(lane) is that lane's `own` or null.
template <class Own, class All>
void collective(const char* what, uint32_t mask, Own& own, All all) {
  if (void* const* lanes = gather(what, mask, &own))
    all([lanes](int lane) { return static_cast<Own*>(lanes[lane]); });
}

/// The value of lane `from`.
template <class T>
T shfl(T value, uint32_t mask, int from) {
  struct Own {
    T value, result;
    int from;
  } own{value, value, from};
  collective("shfl", mask, own, [](auto of) {
    for (int lane = 0; lane < 32; ++lane) {
      Own* const to = of(lane);
      if (to == nullptr) continue;
      if (of(to->from) == nullptr) fail("shfl from lane %d, which is not in the mask", to->from);
      to->result = of(to->from)->value;
    }
  });
  return own.result;
}

// ---- memory and matrices ----
enum Type { BF16, F16, TF32 };
template <class T>
constexpr Type type_of() {
  return std::is_same_v<T, __nv_bfloat16> ? BF16 : std::is_same_v<T, __half> ? F16 : TF32;
}
/// `cluster`: the address may be that of another block.
void ld_shared(void* to, int bytes, uint32_t addr, bool cluster);
void st_shared(uint32_t addr, const void* from, int bytes, bool cluster);
void atomic_access(const void* address, size_t bytes);  // called before an atomic operation
void thread_fence();

void ldmatrix(uint32_t* d, int count, bool transpose, uint32_t addr);
void stmatrix(const uint32_t* s, int count, bool transpose, uint32_t addr);
void mma_sync(float* d, const uint32_t* a, const uint32_t* b, Type type);

void wgmma(float* d, int n, Type type, const uint32_t* a_registers, uint64_t a, uint64_t b,
           int a_major, int b_major, bool accumulate);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int pending);

// ---- mbarriers, fences, copies, clusters ----
void mbar_init(uint32_t bar, uint32_t count);
void mbar_arrive(uint32_t bar, uint32_t expect_bytes, bool cluster);
bool mbar_try_wait(uint32_t bar, uint32_t parity);
void mbar_wait(uint32_t bar, uint32_t parity);
void fence_mbarrier_init();
void fence_proxy_async();

void cp_async(uint32_t dst, const void* src, int bytes, uint32_t valid);
void cp_async_commit();
void cp_async_wait(int pending);
void cp_async_mbar_arrive(uint32_t bar);

/// mask: blocks of the cluster; 0: this one.
void tma_load(uint32_t dst, const CUtensorMap* map, uint32_t bar, const int* at, int rank,
              uint16_t mask);
void tma_store(const CUtensorMap* map, uint32_t src, const int* at, int rank, bool add);
void bulk_load(uint32_t dst, const void* src, uint32_t bytes, uint32_t bar);
void bulk_copy_cluster(uint32_t dst, uint32_t src, uint32_t bytes, uint32_t bar);
void bulk_store(void* dst, uint32_t src, uint32_t bytes, bool add);
void st_async(uint32_t addr, uint32_t word, uint32_t bar);
void bulk_commit();
void bulk_wait(int pending, bool only_read);

uint32_t cluster_rank();
uint32_t cluster_size();
void cluster_arrive();
void cluster_wait();
uint32_t map_cluster(uint32_t addr, uint32_t rank);

}  // namespace emu

#include "cuda_builtins.h"
