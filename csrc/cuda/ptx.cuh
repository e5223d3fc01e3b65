/// Every PTX instruction that the kernels use: one wrapper each, and no asm anywhere else.
///
/// With PYOPS_EMULATE the same functions call the emulator of tests/emulator, so that g++ compiles
/// the very same kernels for the CPU. PTX(host, device asm...) holds both forms side by side;
/// PTX_AT hands the emulator the caller's file and line. Shared memory is addressed by 32 bits
/// (smem_addr); shared memory is only ever dynamic (DYN_SMEM).
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#ifdef PYOPS_EMULATE
#include "emulator.h"
#define PTX_FN inline
#define PTX_AT , const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define PTX_ONLY_AT const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define PTX_HERE \
  ::emu::Site { file, line }
#define PTX(host, ...) host
#define PTX90(host, ...) host
#define DYN_SMEM(name) unsigned char* const name = ::emu::dynamic_smem()
#else
#define PTX_FN __device__ __forceinline__
#define PTX_AT
#define PTX_ONLY_AT
#define PTX(host, ...) asm volatile(__VA_ARGS__)
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define PTX90(host, ...) asm volatile(__VA_ARGS__)
#else
#define PTX90(host, ...) __trap()  // the launcher must not start a Hopper kernel here
#endif
#define DYN_SMEM(name) extern __shared__ __align__(1024) unsigned char name[]
#endif

namespace pyops::ptx {

struct tf32 {};  // operand type tag: 32-bit elements whose low 13 bits the tensor cores ignore

// ---- threads, warps, the block --------------------------------------------------------------

/// 32-bit address of a pointer into this block's shared memory.
PTX_FN uint32_t smem_addr(const void* pointer) {
#ifdef PYOPS_EMULATE
  return emu::smem_addr(pointer);
#else
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
#endif
}

/// Barrier of all threads of the block.
PTX_FN void sync_threads(PTX_ONLY_AT) {
#ifdef PYOPS_EMULATE
  emu::sync_threads(PTX_HERE);
#else
  __syncthreads();
#endif
}

PTX_FN void sync_warp(PTX_ONLY_AT) {
#ifdef PYOPS_EMULATE
  emu::sync_warp(~0u, PTX_HERE);
#else
  __syncwarp();
#endif
}

/// The value of lane `source`.
template <class T>
PTX_FN T shfl(T value, int source PTX_AT) {
#ifdef PYOPS_EMULATE
  return emu::shfl(value, [source](int) { return source & 31; }, ~0u, PTX_HERE);
#else
  return __shfl_sync(~0u, value, source);
#endif
}

/// The value of lane `own lane ^ mask`.
template <class T>
PTX_FN T shfl_xor(T value, int mask PTX_AT) {
#ifdef PYOPS_EMULATE
  return emu::shfl(value, [mask](int lane) { return lane ^ mask; }, ~0u, PTX_HERE);
#else
  return __shfl_xor_sync(~0u, value, mask);
#endif
}

PTX_FN int lane_id() { return threadIdx.x & 31; }

/// threadIdx.x / 32 in a form that the compiler knows to be the same in the whole warp.
PTX_FN int warp_id(PTX_ONLY_AT) {
#ifdef PYOPS_EMULATE
  return shfl(static_cast<int>(threadIdx.x / 32), 0, file, line);
#else
  return shfl(static_cast<int>(threadIdx.x / 32), 0);
#endif
}

/// True in one lane of the (converged) warp.
PTX_FN bool elect_one(PTX_ONLY_AT) {
  uint32_t elected = 0;
  PTX90(elected = emu::elect_one(PTX_HERE),
        "{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(elected));
  return elected != 0;
}

/// Barrier number Id of Threads threads (a multiple of 32), other than sync_threads' number 0.
template <int Id, int Threads>
PTX_FN void named_barrier_sync(PTX_ONLY_AT) {
  static_assert(Id > 0 && Id < 16 && Threads % 32 == 0);
  PTX(emu::named_barrier(Id, Threads, true, PTX_HERE), "bar.sync %0, %1;" ::"n"(Id),
      "n"(Threads) : "memory");
}

/// Arrives at barrier Id without waiting: the others wait for these threads, too.
template <int Id, int Threads>
PTX_FN void named_barrier_arrive(PTX_ONLY_AT) {
  static_assert(Id > 0 && Id < 16 && Threads % 32 == 0);
  PTX(emu::named_barrier(Id, Threads, false, PTX_HERE), "bar.arrive %0, %1;" ::"n"(Id),
      "n"(Threads) : "memory");
}

/// Gives registers back / takes more, by the whole warpgroup; Registers is a multiple of 8.
template <int Registers>
PTX_FN void setmaxnreg_dec(PTX_ONLY_AT) {
  static_assert(Registers % 8 == 0 && Registers >= 24 && Registers <= 256);
#if defined(PYOPS_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  PTX90(emu::setmaxnreg(Registers, false, PTX_HERE),
        "setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
#endif
}

template <int Registers>
PTX_FN void setmaxnreg_inc(PTX_ONLY_AT) {
  static_assert(Registers % 8 == 0 && Registers >= 24 && Registers <= 256);
#if defined(PYOPS_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  PTX90(emu::setmaxnreg(Registers, true, PTX_HERE),
        "setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
#endif
}

// ---- arithmetic -----------------------------------------------------------------------------

/// The larger; NaN if either is NaN (fmaxf loses it).
PTX_FN float max_nan(float a, float b) {
  float d;
  PTX(d = a != a ? a : (b != b || b > a ? b : a), "max.NaN.f32 %0, %1, %2;" : "=f"(d) : "f"(a),
      "f"(b));
  return d;
}

/// 2^x, log2(x), 1/x: about 22 bits, subnormals flushed to zero.
PTX_FN float ex2(float x) {
  float d;
  PTX(d = emu::flush(__builtin_exp2f(emu::flush(x))),
      "ex2.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(x));
  return d;
}
PTX_FN float lg2(float x) {
  float d;
  PTX(d = __builtin_log2f(emu::flush(x)), "lg2.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(x));
  return d;
}
PTX_FN float rcp(float x) {
  float d;
  PTX(d = emu::flush(1.0f / emu::flush(x)), "rcp.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(x));
  return d;
}
PTX_FN float tanh_approx(float x) {
  float d;
  PTX(d = __builtin_tanhf(x), "tanh.approx.f32 %0, %1;" : "=f"(d) : "f"(x));
  return d;
}

/// float rounded to TF32 (nearest, ties away), as bits for mma.
PTX_FN uint32_t to_tf32(float x) {
  uint32_t d;
  PTX(d = emu::to_tf32(x), "cvt.rna.tf32.f32 %0, %1;" : "=r"(d) : "f"(x));
  return d;
}

// ---- shared memory by 32-bit address --------------------------------------------------------

/// 4, 8 or 16 bytes of this block's shared memory.
template <class T>
PTX_FN T ld_shared(uint32_t addr PTX_AT) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  union {
    uint32_t words[sizeof(T) / 4];
    T value;
  };
#ifdef PYOPS_EMULATE
  emu::ld_shared(words, sizeof(T), addr, PTX_HERE);
#else
  if constexpr (sizeof(T) == 4)
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(words[0]) : "r"(addr));
  else if constexpr (sizeof(T) == 8)
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "r"(addr));
  else
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(addr));
#endif
  return value;
}

template <class T>
PTX_FN void st_shared(uint32_t addr, T const& stored PTX_AT) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  union {
    T value;
    uint32_t words[sizeof(T) / 4];
  };
  value = stored;
#ifdef PYOPS_EMULATE
  emu::st_shared(addr, words, sizeof(T), PTX_HERE);
#else
  if constexpr (sizeof(T) == 4)
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(addr), "r"(words[0]) : "memory");
  else if constexpr (sizeof(T) == 8)
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(addr), "r"(words[0]), "r"(words[1])
                 : "memory");
  else
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(addr), "r"(words[0]),
                 "r"(words[1]), "r"(words[2]), "r"(words[3])
                 : "memory");
#endif
}

// ---- warp matrices (sm_80) ------------------------------------------------------------------

/// N (1, 2, 4) 8x8 matrices of 16-bit elements; lane 8i + r gives the address of row r of matrix i.
/// d[i]: lane holds elements (lane/4, 2(lane%4)) and (.., +1) of matrix i; Trans: of its transpose.
template <bool Trans = false, int N>
PTX_FN void ldmatrix(uint32_t (&d)[N], uint32_t addr PTX_AT) {
  static_assert(N == 1 || N == 2 || N == 4);
#ifdef PYOPS_EMULATE
  emu::ldmatrix(d, N, Trans, addr, PTX_HERE);
#else
#define PTX_LDMATRIX(COUNT, REGS, ADDR, ...)                                                     \
  if constexpr (Trans)                                                                           \
    asm volatile("ldmatrix.sync.aligned.m8n8." COUNT ".trans.shared.b16 {" REGS "}, [" ADDR "];" \
                 : __VA_ARGS__                                                                   \
                 : "r"(addr)                                                                     \
                 : "memory");                                                                    \
  else                                                                                           \
    asm volatile("ldmatrix.sync.aligned.m8n8." COUNT ".shared.b16 {" REGS "}, [" ADDR "];"       \
                 : __VA_ARGS__                                                                   \
                 : "r"(addr)                                                                     \
                 : "memory")
  if constexpr (N == 1)
    PTX_LDMATRIX("x1", "%0", "%1", "=r"(d[0]));
  else if constexpr (N == 2)
    PTX_LDMATRIX("x2", "%0, %1", "%2", "=r"(d[0]), "=r"(d[1]));
  else
    PTX_LDMATRIX("x4", "%0, %1, %2, %3", "%4", "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]));
#undef PTX_LDMATRIX
#endif
}

/// The inverse of ldmatrix (sm_90).
template <bool Trans = false, int N>
PTX_FN void stmatrix(uint32_t addr, const uint32_t (&s)[N] PTX_AT) {
  static_assert(N == 1 || N == 2 || N == 4);
#ifdef PYOPS_EMULATE
  emu::stmatrix(s, N, Trans, addr, PTX_HERE);
#else
#define PTX_STMATRIX(COUNT, REGS, ...)                                                             \
  if constexpr (Trans)                                                                             \
    PTX90(, "stmatrix.sync.aligned.m8n8." COUNT ".trans.shared.b16 [%0], {" REGS "};" ::"r"(addr), \
          __VA_ARGS__ : "memory");                                                                 \
  else                                                                                             \
    PTX90(, "stmatrix.sync.aligned.m8n8." COUNT ".shared.b16 [%0], {" REGS "};" ::"r"(addr),       \
          __VA_ARGS__ : "memory")
  if constexpr (N == 1)
    PTX_STMATRIX("x1", "%1", "r"(s[0]));
  else if constexpr (N == 2)
    PTX_STMATRIX("x2", "%1, %2", "r"(s[0]), "r"(s[1]));
  else
    PTX_STMATRIX("x4", "%1, %2, %3, %4", "r"(s[0]), "r"(s[1]), "r"(s[2]), "r"(s[3]));
#undef PTX_STMATRIX
#endif
}

/// d[16x8] += a[16x16] b[16x8], T bf16 or half. Lane with g = lane/4, t = lane%4 holds
/// a[i]: row g + 8(i%2), columns 2t + 8(i/2), +1; b[i]: rows 2t + 8i, +1, column g;
/// d[i]: row g + 8(i/2), column 2t + i%2.
template <class T>
PTX_FN void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] PTX_AT) {
  constexpr bool is_bf16 = std::is_same_v<T, __nv_bfloat16>;
  static_assert(is_bf16 || std::is_same_v<T, __half>);
#ifdef PYOPS_EMULATE
  emu::mma_sync(d, a, b, emu::type_of<T>(), PTX_HERE);
#else
#define PTX_MMA(TYPE)                                                                 \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                 \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  if constexpr (is_bf16)
    PTX_MMA("bf16");
  else
    PTX_MMA("f16");
#undef PTX_MMA
#endif
}

/// d[16x8] += a[16x8] b[8x8] of TF32 bits. a[i]: row g + 8(i%2), column t + 4(i/2);
/// b[i]: row t + 4i, column g; d as above.
PTX_FN void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] PTX_AT) {
  PTX(emu::mma_sync(d, a, b, emu::TF32, PTX_HERE),
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};" : "+f"(d[0]),
      "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]),
      "r"(b[1]));
}

// ---- cp.async (sm_80) -----------------------------------------------------------------------

/// Copies Bytes (4, 8, 16) global to shared in the background: the first `valid` from src, the
/// rest zeros; nothing is read where valid is 0. Both addresses aligned to Bytes.
template <int Bytes>
PTX_FN void cp_async(uint32_t dst, const void* src, uint32_t valid PTX_AT) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
#ifdef PYOPS_EMULATE
  emu::cp_async(dst, src, Bytes, valid, PTX_HERE);
#else
  if constexpr (Bytes == 16)  // .cg: past L1
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst),
                 "l"(__cvta_generic_to_global(src)), "r"(valid)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(dst),
                 "l"(__cvta_generic_to_global(src)), "n"(Bytes), "r"(valid)
                 : "memory");
#endif
}

template <int Bytes>
PTX_FN void cp_async(uint32_t dst, const void* src PTX_AT) {
#ifdef PYOPS_EMULATE
  cp_async<Bytes>(dst, src, Bytes, file, line);
#else
  cp_async<Bytes>(dst, src, Bytes);
#endif
}

PTX_FN void cp_async_commit(PTX_ONLY_AT) {
  PTX(emu::cp_async_commit(PTX_HERE), "cp.async.commit_group;" :: : "memory");
}

/// Waits until at most Pending of this thread's newest groups are in flight.
template <int Pending>
PTX_FN void cp_async_wait(PTX_ONLY_AT) {
  PTX(emu::cp_async_wait(Pending, PTX_HERE), "cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

/// An arrival at the mbarrier once this thread's cp.asyncs so far are done; counted by its init.
PTX_FN void cp_async_mbar_arrive(uint32_t bar PTX_AT) {
  PTX(emu::cp_async_mbar_arrive(bar, PTX_HERE),
      "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(bar) : "memory");
}

// ---- mbarrier (sm_90) -----------------------------------------------------------------------

/// A barrier of `count` arrivals a phase, 8 bytes in shared memory; needs fence_mbarrier_init and
/// a barrier of the threads before others use it.
PTX_FN void mbar_init(uint32_t bar, uint32_t count PTX_AT) {
  PTX90(emu::mbar_init(bar, count, PTX_HERE), "mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar),
        "r"(count) : "memory");
}

PTX_FN void mbar_inval(uint32_t bar PTX_AT) {
  PTX90(emu::mbar_inval(bar, PTX_HERE),
        "mbarrier.inval.shared::cta.b64 [%0];" ::"r"(bar) : "memory");
}

PTX_FN void mbar_arrive(uint32_t bar PTX_AT) {
  PTX90(emu::mbar_arrive(bar, 0, false, PTX_HERE),
        "mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}

/// Arrives, and makes the phase wait for `bytes` more of asynchronous copies.
PTX_FN void mbar_arrive_expect_tx(uint32_t bar, uint32_t bytes PTX_AT) {
  PTX90(emu::mbar_arrive(bar, bytes, false, PTX_HERE),
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}

PTX_FN void mbar_expect_tx(uint32_t bar, uint32_t bytes PTX_AT) {
  PTX90(emu::mbar_expect_tx(bar, bytes, PTX_HERE),
        "mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(bar),
        "r"(bytes) : "memory");
}

/// Arrives at a barrier of any block of the cluster; `bar` from map_cluster.
PTX_FN void mbar_arrive_cluster(uint32_t bar PTX_AT) {
  PTX90(emu::mbar_arrive(bar, 0, true, PTX_HERE),
        "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(bar) : "memory");
}

/// Whether the phase of that parity (0, 1, 0, ...) is over; waits a short while for it.
PTX_FN bool mbar_try_wait(uint32_t bar, uint32_t phase PTX_AT) {
  uint32_t done = 0;
  PTX90(done = emu::mbar_try_wait(bar, phase, PTX_HERE),
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}" : "=r"(done) : "r"(bar),
        "r"(phase) : "memory");
  return done != 0;
}

/// Waits until the phase of that parity is over. A fresh barrier counts as past parity 1.
PTX_FN void mbar_wait(uint32_t bar, uint32_t phase PTX_AT) {
#ifdef PYOPS_EMULATE
  emu::mbar_wait(bar, phase, PTX_HERE);
#else
  while (!mbar_try_wait(bar, phase)) {
  }
#endif
}

/// mbar_wait that also acquires what other blocks of the cluster did before arriving.
PTX_FN void mbar_wait_cluster(uint32_t bar, uint32_t phase PTX_AT) {
#ifdef PYOPS_EMULATE
  emu::mbar_wait(bar, phase, PTX_HERE);
#else
  uint32_t done = 0;
  while (!done)
    PTX90(,
          "{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], "
          "%2;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(done) : "r"(bar),
          "r"(phase) : "memory");
#endif
}

// ---- fences ---------------------------------------------------------------------------------

/// Makes mbar_init visible to the cluster and to the asynchronous units.
PTX_FN void fence_mbarrier_init(PTX_ONLY_AT) {
  PTX90(emu::fence_mbarrier_init(PTX_HERE), "fence.mbarrier_init.release.cluster;" :: : "memory");
}

/// Orders this thread's accesses with those of TMA and wgmma to the same memory: after writing
/// shared memory, before the barrier that precedes the asynchronous use.
PTX_FN void fence_proxy_async(PTX_ONLY_AT) {
  PTX90(emu::fence_proxy_async(PTX_HERE), "fence.proxy.async;" :: : "memory");
}

/// The same for shared memory only (cheaper).
PTX_FN void fence_proxy_async_shared(PTX_ONLY_AT) {
  PTX90(emu::fence_proxy_async(PTX_HERE), "fence.proxy.async.shared::cta;" :: : "memory");
}

// ---- TMA (sm_90) ----------------------------------------------------------------------------

// One asm per rank; operands: %0 shared address, %1 tensor map, %2 mbarrier, %3 cache policy,
// %4 block mask, %5... coordinates.
#define PTX_TMA_RANK(R, NAME, MIDDLE, COORDS, TAIL, ...)                                   \
  PTX90(, NAME "." #R "d" MIDDLE COORDS TAIL ::"r"(smem), "l"(map), "r"(bar), "l"(policy), \
        "h"(mask), __VA_ARGS__ : "memory")
#define PTX_TMA(NAME, MIDDLE, TAIL)                                                             \
  if constexpr (Rank == 1)                                                                      \
    PTX_TMA_RANK(1, NAME, MIDDLE, "{%5}", TAIL, "r"(at[0]));                                    \
  else if constexpr (Rank == 2)                                                                 \
    PTX_TMA_RANK(2, NAME, MIDDLE, "{%5, %6}", TAIL, "r"(at[0]), "r"(at[1]));                    \
  else if constexpr (Rank == 3)                                                                 \
    PTX_TMA_RANK(3, NAME, MIDDLE, "{%5, %6, %7}", TAIL, "r"(at[0]), "r"(at[1]), "r"(at[2]));    \
  else if constexpr (Rank == 4)                                                                 \
    PTX_TMA_RANK(4, NAME, MIDDLE, "{%5, %6, %7, %8}", TAIL, "r"(at[0]), "r"(at[1]), "r"(at[2]), \
                 "r"(at[3]));                                                                   \
  else                                                                                          \
    PTX_TMA_RANK(5, NAME, MIDDLE, "{%5, %6, %7, %8, %9}", TAIL, "r"(at[0]), "r"(at[1]),         \
                 "r"(at[2]), "r"(at[3]), "r"(at[4]))

// What L2 does with the lines of a TMA load (the encoded policies of createpolicy).
constexpr uint64_t kEvictFirst = 0x12F0000000000000;
constexpr uint64_t kEvictLast = 0x14F0000000000000;

/// Loads the map's box at coordinates `at` (innermost first, may lie outside: zeros) into shared
/// memory (aligned to 128 bytes; 1024 with the 128-byte swizzle) and counts its bytes at `bar`.
template <int Rank>
PTX_FN void tma_load(uint32_t smem, const CUtensorMap* map, uint32_t bar,
                     const int (&at)[Rank] PTX_AT) {
#ifdef PYOPS_EMULATE
  emu::tma_load(smem, map, bar, at, Rank, 0, PTX_HERE);
#else
  [[maybe_unused]] constexpr uint64_t policy = 0;
  [[maybe_unused]] constexpr uint16_t mask = 0;
  PTX_TMA("cp.async.bulk.tensor",
          ".shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, ", "], [%2];");
#endif
}

/// tma_load with an L2 policy, kEvictFirst or kEvictLast.
template <int Rank>
PTX_FN void tma_load_hint(uint32_t smem, const CUtensorMap* map, uint32_t bar,
                          const int (&at)[Rank], uint64_t policy PTX_AT) {
#ifdef PYOPS_EMULATE
  (void)policy;
  emu::tma_load(smem, map, bar, at, Rank, 0, PTX_HERE);
#else
  [[maybe_unused]] constexpr uint16_t mask = 0;
  PTX_TMA("cp.async.bulk.tensor",
          ".shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, ",
          "], [%2], %3;");
#endif
}

/// tma_load into the same place of every block of the cluster whose bit is in `mask`; each block's
/// barrier at the place of `bar` counts the bytes.
template <int Rank>
PTX_FN void tma_load_multicast(uint32_t smem, const CUtensorMap* map, uint32_t bar,
                               const int (&at)[Rank], uint16_t mask PTX_AT) {
#ifdef PYOPS_EMULATE
  emu::tma_load(smem, map, bar, at, Rank, mask, PTX_HERE);
#else
  [[maybe_unused]] constexpr uint64_t policy = 0;
  PTX_TMA("cp.async.bulk.tensor",
          ".shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, ",
          "], [%2], %4;");
#endif
}

/// Stores a box from shared memory; parts outside the tensor are dropped. In this thread's bulk
/// group: bulk_commit, then bulk_wait_read before the shared memory is written again.
template <int Rank>
PTX_FN void tma_store(const CUtensorMap* map, uint32_t smem, const int (&at)[Rank] PTX_AT) {
#ifdef PYOPS_EMULATE
  emu::tma_store(map, smem, at, Rank, false, PTX_HERE);
#else
  [[maybe_unused]] constexpr uint64_t policy = 0;
  [[maybe_unused]] constexpr uint16_t mask = 0;
  [[maybe_unused]] constexpr uint32_t bar = 0;
  PTX_TMA("cp.async.bulk.tensor", ".global.shared::cta.bulk_group [%1, ", "], [%0];");
#endif
}

/// tma_store that adds to what is there (atomically an element; the order is not fixed).
template <int Rank>
PTX_FN void tma_reduce_add(const CUtensorMap* map, uint32_t smem, const int (&at)[Rank] PTX_AT) {
#ifdef PYOPS_EMULATE
  emu::tma_store(map, smem, at, Rank, true, PTX_HERE);
#else
  [[maybe_unused]] constexpr uint64_t policy = 0;
  [[maybe_unused]] constexpr uint16_t mask = 0;
  [[maybe_unused]] constexpr uint32_t bar = 0;
  PTX_TMA("cp.reduce.async.bulk.tensor", ".global.shared::cta.add.tile.bulk_group [%1, ",
          "], [%0];");
#endif
}
#undef PTX_TMA
#undef PTX_TMA_RANK

PTX_FN void prefetch_tensor_map(const CUtensorMap* map) {
  PTX90((void)map, "prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

/// Copies `bytes` (a multiple of 16, both addresses too) global to shared, counted at `bar`.
PTX_FN void bulk_load(uint32_t smem, const void* src, uint32_t bytes, uint32_t bar PTX_AT) {
  PTX90(emu::bulk_load(smem, src, bytes, bar, PTX_HERE),
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
        "[%3];" ::"r"(smem),
        "l"(__cvta_generic_to_global(src)), "r"(bytes), "r"(bar) : "memory");
}

/// Copies shared memory to a block of the cluster; `dst` and `bar` there, from map_cluster.
PTX_FN void bulk_copy_cluster(uint32_t dst, uint32_t src, uint32_t bytes, uint32_t bar PTX_AT) {
  PTX90(emu::bulk_copy_cluster(dst, src, bytes, bar, PTX_HERE),
        "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, "
        "[%3];" ::"r"(dst),
        "r"(src), "r"(bytes), "r"(bar) : "memory");
}

PTX_FN void bulk_store(void* dst, uint32_t smem, uint32_t bytes PTX_AT) {
  PTX90(emu::bulk_store(dst, smem, bytes, false, PTX_HERE),
        "cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(
            __cvta_generic_to_global(dst)),
        "r"(smem), "r"(bytes) : "memory");
}

/// dst[i] += smem[i], float32.
PTX_FN void bulk_reduce_add(float* dst, uint32_t smem, uint32_t bytes PTX_AT) {
  PTX90(emu::bulk_store(dst, smem, bytes, true, PTX_HERE),
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(
            __cvta_generic_to_global(dst)),
        "r"(smem), "r"(bytes) : "memory");
}

PTX_FN void bulk_commit(PTX_ONLY_AT) {
  PTX90(emu::bulk_commit(PTX_HERE), "cp.async.bulk.commit_group;" :: : "memory");
}

/// Waits until at most Pending of this thread's newest bulk groups are unfinished.
template <int Pending>
PTX_FN void bulk_wait(PTX_ONLY_AT) {
  PTX90(emu::bulk_wait(Pending, false, PTX_HERE),
        "cp.async.bulk.wait_group %0;" ::"n"(Pending) : "memory");
}

/// ... have not yet read their shared memory.
template <int Pending>
PTX_FN void bulk_wait_read(PTX_ONLY_AT) {
  PTX90(emu::bulk_wait(Pending, true, PTX_HERE),
        "cp.async.bulk.wait_group.read %0;" ::"n"(Pending) : "memory");
}

// ---- clusters (sm_90) -----------------------------------------------------------------------

PTX_FN uint32_t cluster_rank() {
  uint32_t rank = 0;
  PTX90(rank = emu::cluster_rank(), "mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

PTX_FN uint32_t cluster_size() {
  uint32_t size = 1;
  PTX90(size = emu::cluster_size(), "mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

/// The two halves of the barrier of all threads of the cluster (release, acquire).
PTX_FN void cluster_arrive(PTX_ONLY_AT) {
  PTX90(emu::cluster_arrive(PTX_HERE), "barrier.cluster.arrive.release.aligned;" :: : "memory");
}
PTX_FN void cluster_wait(PTX_ONLY_AT) {
  PTX90(emu::cluster_wait(PTX_HERE), "barrier.cluster.wait.acquire.aligned;" :: : "memory");
}
PTX_FN void cluster_sync(PTX_ONLY_AT) {
#ifdef PYOPS_EMULATE
  cluster_arrive(file, line);
  cluster_wait(file, line);
#else
  cluster_arrive();
  cluster_wait();
#endif
}

/// The address that `addr` of this block has in block `rank` of the cluster.
PTX_FN uint32_t map_cluster(uint32_t addr, uint32_t rank PTX_AT) {
  uint32_t mapped = 0;
  PTX90(mapped = emu::map_cluster(addr, rank, PTX_HERE),
        "mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(addr), "r"(rank));
  return mapped;
}

/// 4 bytes of another block's shared memory; `addr` from map_cluster.
template <class T>
PTX_FN T ld_cluster(uint32_t addr PTX_AT) {
  static_assert(sizeof(T) == 4);
  union {
    uint32_t word;
    T value;
  };
  PTX90(emu::ld_cluster(&word, 4, addr, PTX_HERE),
        "ld.shared::cluster.b32 %0, [%1];" : "=r"(word) : "r"(addr) : "memory");
  return value;
}

template <class T>
PTX_FN void st_cluster(uint32_t addr, T stored PTX_AT) {
  static_assert(sizeof(T) == 4);
  union {
    T value;
    uint32_t word;
  };
  value = stored;
  PTX90(emu::st_cluster(addr, &word, 4, PTX_HERE), "st.shared::cluster.b32 [%0], %1;" ::"r"(addr),
        "r"(word) : "memory");
}

/// st_cluster in the background, its 4 bytes counted at `bar` (of the same block as addr).
template <class T>
PTX_FN void st_async(uint32_t addr, T stored, uint32_t bar PTX_AT) {
  static_assert(sizeof(T) == 4);
  union {
    T value;
    uint32_t word;
  };
  value = stored;
  PTX90(
      emu::st_async(addr, &word, 4, bar, PTX_HERE),
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(addr),
      "r"(word), "r"(bar) : "memory");
}

}  // namespace pyops::ptx

#include "wgmma.cuh"
