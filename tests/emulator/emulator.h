/// What a kernel sees of the emulator: the host side of csrc/cuda/ptx.cuh and launch.cuh, and those
/// of CUDA's built-in variables and functions that kernels use.
///
/// Every CUDA thread is a fiber of one host thread. Fibers switch only inside these functions, in
/// an order drawn from the seed. A violation (race, deadlock, misuse) ends the launch with a
/// report.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <type_traits>

namespace emu {

/// Names the place in the kernel's source of what the thread does next.
void at(const char* file, int line);

struct Launch {
  const char* name;
  dim3 grid, block, cluster;
  size_t smem;
};
/// Runs `thread` in every thread of the grid.
void launch(const Launch& config, const std::function<void()>& thread);
/// Runs host code that launches kernels; the report of what went wrong, or null.
const char* run(const std::function<void()>& host);

unsigned char* dynamic_smem();
uint32_t smem_addr(const void* pointer);
/// Where `bytes` at a shared memory address lie; `cluster`: perhaps in another block.
unsigned char* resolve(uint32_t addr, size_t bytes, size_t alignment, bool cluster = false);
int lane_id();
void sync_threads();
void sync_warp();
void named_barrier(int id, unsigned threads, bool wait);
void setmaxnreg(int registers, bool more);
uint32_t cluster_rank();
uint32_t cluster_size();
void cluster_arrive();
void cluster_wait();
uint32_t map_cluster(uint32_t addr, uint32_t rank);

/// Meets the other lanes of the warp: null, after waiting, but for the last one to come, which gets
/// the `own` of all (null beyond the end of the block) until the next such call.
void* const* gather(const char* what, void* own);
/// The last lane to come calls all(of), where of(lane) is that lane's `own` or null.
template <class Own, class All>
void collective(const char* what, Own& own, All all) {
  if (void* const* lanes = gather(what, &own))
    all([lanes](int lane) { return static_cast<Own*>(lanes[lane]); });
}
/// The value of lane `from`.
template <class T>
T shfl(T value, int from) {
  struct Own {
    T value, result;
    int from;
  } own{value, value, from & 31};
  collective("shfl", own, [](auto of) {
    for (int lane = 0; lane < 32 && of(lane) != nullptr; ++lane) {
      if (of(of(lane)->from) == nullptr) throw std::runtime_error("shfl from a lane that is not");
      of(lane)->result = of(of(lane)->from)->value;
    }
  });
  return own.result;
}

enum Type { BF16, F16, TF32 };
template <class T>
constexpr Type type_of() {
  return std::is_same_v<T, __nv_bfloat16> ? BF16 : std::is_same_v<T, __half> ? F16 : TF32;
}
void move_shared(void* registers, size_t bytes, uint32_t addr, bool store, bool cluster);
void atomic_access(const void* address, size_t bytes);  // called before an atomic operation
void thread_fence();
/// ldmatrix, or stmatrix.
void move_matrices(uint32_t* registers, int count, bool transpose, uint32_t addr, bool store);
void mma_sync(float* d, const uint32_t* a, const uint32_t* b, Type type);
void wgmma(float* d, int n, Type type, const uint32_t* a_registers, uint64_t a, uint64_t b,
           int a_major, int b_major, bool accumulate);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(size_t pending);

void mbar_init(uint32_t bar, uint32_t count);
void mbar_arrive(uint32_t bar, uint32_t expect_bytes, bool cluster);
bool mbar_wait(uint32_t bar, uint32_t parity, bool only_try);
void fence(bool proxy);  // fence.mbarrier_init, or fence.proxy.async
void cp_async(uint32_t dst, const void* src, size_t bytes, uint32_t valid);
/// cp.async's groups, or those of bulk and TMA stores.
void copies_commit(bool bulk);
void copies_wait(bool bulk, size_t pending, bool only_read);
void cp_async_mbar_arrive(uint32_t bar);
/// mask: blocks of the cluster; 0: this one.
void tma_load(uint32_t dst, const CUtensorMap* map, uint32_t bar, const int* at, int rank,
              uint16_t mask);
void tma_store(const CUtensorMap* map, uint32_t src, const int* at, int rank, bool add);
void bulk_load(uint32_t dst, const void* src, uint32_t bytes, uint32_t bar);
void bulk_store(void* dst, uint32_t src, uint32_t bytes, bool add);
void st_async(uint32_t addr, uint32_t word, uint32_t bar);

/// Subnormals become zeros.
inline float flush(float x) { return __builtin_fabsf(x) < 1.17549435e-38f ? 0.0f * x : x; }
/// Nearest of TF32's 10 bits of fraction, ties away from zero.
inline uint32_t to_tf32(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return (bits & 0x7F800000) == 0x7F800000 ? bits : (bits + 0x1000) & ~0x1FFFu;
}

}  // namespace emu

// The running fiber's; the emulator sets them at every switch.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
#undef __launch_bounds__
#define __launch_bounds__(...)
#define EMU_AT const char *file = __builtin_FILE(), int line = __builtin_LINE()

using std::max;
using std::min;

[[noreturn]] inline void __trap() { throw std::runtime_error("__trap()"); }

inline void __threadfence(EMU_AT) {
  emu::at(file, line);
  emu::thread_fence();
}

// Without instrumentation: atomic_access tells the race detection about it.
template <class T>
__attribute__((no_sanitize("thread"))) T atomicAdd(T* address, std::common_type_t<T> value,
                                                   EMU_AT) {
  emu::at(file, line);
  emu::atomic_access(address, sizeof(T));
  const T old = *address;
  *address = old + value;
  return old;
}

inline float __uint_as_float(unsigned x) {
  float f;
  std::memcpy(&f, &x, 4);
  return f;
}

inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t both = static_cast<uint64_t>(high) << 32 | low;
  unsigned out = 0;
  for (int i = 0; i < 32; i += 8, selector >>= 4) {
    const unsigned byte = both >> 8 * (selector & 7) & 255;
    out |= (selector & 8 ? (byte & 128 ? 255 : 0) : byte) << i;
  }
  return out;
}
