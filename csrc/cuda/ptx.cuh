/// Every PTX instruction that the kernels use, one wrapper each; with tma.cuh and wgmma.cuh, which
/// it includes, the only place with asm.
///
/// With PYOPS_EMULATE the same functions call the emulator of tests/emulator, so that g++ compiles
/// the very same kernels for the CPU. PTX(host, device asm...) holds both forms side by side, as do
/// PTX_MATH for arithmetic and PTX_CALL for an expression; PTX_AT and PTX_PASS hand the caller's
/// file and line on to the emulator. Shared memory is addressed by 32 bits (smem_addr); shared
/// memory is only ever dynamic (DYN_SMEM).
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
#define PTX_PASS , file, line
#define PTX_ONLY_PASS file, line
#define PTX_HERE ::emu::at(file, line)
#define PTX(host, ...) \
  PTX_HERE;            \
  host
#define PTX90(host, ...) PTX(host, )
#define PTX_MATH(host, ...) host
#define PTX_CALL(host, ...) (PTX_HERE, host)
#define DYN_SMEM(name) unsigned char* const name = ::emu::dynamic_smem()
#else
#define PTX_FN __device__ __forceinline__
#define PTX_AT
#define PTX_ONLY_AT
#define PTX_PASS
#define PTX_ONLY_PASS
#define PTX(host, ...) asm volatile(__VA_ARGS__)
#define PTX_MATH(host, ...) asm volatile(__VA_ARGS__)
#define PTX_CALL(host, ...) __VA_ARGS__
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
PTX_FN uint32_t smem_addr(const void* pointer PTX_AT) {
  return PTX_CALL(emu::smem_addr(pointer),
                  static_cast<uint32_t>(__cvta_generic_to_shared(pointer)));
}

/// Barrier of all threads of the block.
PTX_FN void sync_threads(PTX_ONLY_AT) { PTX_CALL(emu::sync_threads(), __syncthreads()); }

PTX_FN void sync_warp(PTX_ONLY_AT) { PTX_CALL(emu::sync_warp(), __syncwarp()); }

/// The value of lane `source`.
template <class T>
PTX_FN T shfl(T value, int source PTX_AT) {
  return PTX_CALL(emu::shfl(value, source), __shfl_sync(~0u, value, source));
}

/// The value of lane `own lane ^ mask`.
template <class T>
PTX_FN T shfl_xor(T value, int mask PTX_AT) {
  return PTX_CALL(emu::shfl(value, emu::lane_id() ^ mask), __shfl_xor_sync(~0u, value, mask));
}

PTX_FN int lane_id() { return threadIdx.x & 31; }

/// threadIdx.x / 32 in a form that the compiler knows to be the same in the whole warp.
PTX_FN int warp_id(PTX_ONLY_AT) { return shfl(static_cast<int>(threadIdx.x / 32), 0 PTX_PASS); }

/// True in one lane of the (converged) warp.
PTX_FN bool elect_one(PTX_ONLY_AT) {
  uint32_t elected = 0;
  PTX90(emu::gather("elect", nullptr);
        elected = emu::lane_id() == 0,
        "{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(elected));
  return elected != 0;
}

/// Barrier number Id of Threads threads (a multiple of 32), other than sync_threads' number 0.
template <int Id, int Threads>
PTX_FN void named_barrier_sync(PTX_ONLY_AT) {
  static_assert(Id > 0 && Id < 16 && Threads % 32 == 0);
  PTX(emu::named_barrier(Id, Threads, true), "bar.sync %0, %1;" ::"n"(Id), "n"(Threads) : "memory");
}

/// Arrives at barrier Id without waiting: the others wait for these threads, too.
template <int Id, int Threads>
PTX_FN void named_barrier_arrive(PTX_ONLY_AT) {
  static_assert(Id > 0 && Id < 16 && Threads % 32 == 0);
  PTX(emu::named_barrier(Id, Threads, false), "bar.arrive %0, %1;" ::"n"(Id),
      "n"(Threads) : "memory");
}

/// Gives registers back / takes more, by the whole warpgroup; Registers is a multiple of 8.
template <int Registers>
PTX_FN void setmaxnreg_dec(PTX_ONLY_AT) {
  static_assert(Registers % 8 == 0 && Registers >= 24 && Registers <= 256);
#if defined(PYOPS_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  PTX90(emu::setmaxnreg(Registers, false), "setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
#endif
}

template <int Registers>
PTX_FN void setmaxnreg_inc(PTX_ONLY_AT) {
  static_assert(Registers % 8 == 0 && Registers >= 24 && Registers <= 256);
#if defined(PYOPS_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  PTX90(emu::setmaxnreg(Registers, true), "setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
#endif
}

// ---- arithmetic -----------------------------------------------------------------------------

/// The larger; NaN if either is NaN (fmaxf loses it).
PTX_FN float max_nan(float a, float b) {
  float d;
  PTX_MATH(d = a != a ? a : (b != b || b > a ? b : a), "max.NaN.f32 %0, %1, %2;" : "=f"(d) : "f"(a),
           "f"(b));
  return d;
}

/// 2^x, log2(x), 1/x: about 22 bits, subnormals flushed to zero.
PTX_FN float ex2(float x) {
  float d;
  PTX_MATH(d = emu::flush(__builtin_exp2f(emu::flush(x))),
           "ex2.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(x));
  return d;
}
PTX_FN float lg2(float x) {
  float d;
  PTX_MATH(d = __builtin_log2f(emu::flush(x)), "lg2.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(x));
  return d;
}
PTX_FN float rcp(float x) {
  float d;
  PTX_MATH(d = emu::flush(1.0f / emu::flush(x)), "rcp.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(x));
  return d;
}
PTX_FN float tanh_approx(float x) {
  float d;
  PTX_MATH(d = __builtin_tanhf(x), "tanh.approx.f32 %0, %1;" : "=f"(d) : "f"(x));
  return d;
}

/// float rounded to TF32 (nearest, ties away), as bits for mma.
PTX_FN uint32_t to_tf32(float x) {
  uint32_t d;
  PTX_MATH(d = emu::to_tf32(x), "cvt.rna.tf32.f32 %0, %1;" : "=r"(d) : "f"(x));
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
  PTX_HERE;
  emu::move_shared(words, sizeof(T), addr, false, false);
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
  PTX_HERE;
  emu::move_shared(words, sizeof(T), addr, true, false);
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
  PTX_HERE;
  emu::move_matrices(d, N, Trans, addr, false);
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
  PTX_HERE;
  emu::move_matrices(const_cast<uint32_t*>(s), N, Trans, addr, true);
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
  PTX_HERE;
  emu::mma_sync(d, a, b, emu::type_of<T>());
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
  PTX(emu::mma_sync(d, a, b, emu::TF32),
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
  PTX_HERE;
  emu::cp_async(dst, src, Bytes, valid);
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
  cp_async<Bytes>(dst, src, Bytes PTX_PASS);
}

PTX_FN void cp_async_commit(PTX_ONLY_AT) {
  PTX(emu::copies_commit(false), "cp.async.commit_group;" :: : "memory");
}

/// Waits until at most Pending of this thread's newest groups are in flight.
template <int Pending>
PTX_FN void cp_async_wait(PTX_ONLY_AT) {
  PTX(emu::copies_wait(false, Pending, false), "cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

/// An arrival at the mbarrier once this thread's cp.asyncs so far are done; counted by its init.
PTX_FN void cp_async_mbar_arrive(uint32_t bar PTX_AT) {
  PTX(emu::cp_async_mbar_arrive(bar),
      "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(bar) : "memory");
}

// ---- mbarrier (sm_90) -----------------------------------------------------------------------

/// A barrier of `count` arrivals a phase, 8 bytes in shared memory; needs fence_mbarrier_init and
/// a barrier of the threads before others use it.
PTX_FN void mbar_init(uint32_t bar, uint32_t count PTX_AT) {
  PTX90(emu::mbar_init(bar, count), "mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar),
        "r"(count) : "memory");
}

PTX_FN void mbar_arrive(uint32_t bar PTX_AT) {
  PTX90(emu::mbar_arrive(bar, 0, false),
        "mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}

/// Arrives, and makes the phase wait for `bytes` more of asynchronous copies.
PTX_FN void mbar_arrive_expect_tx(uint32_t bar, uint32_t bytes PTX_AT) {
  PTX90(emu::mbar_arrive(bar, bytes, false),
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}

/// Arrives at a barrier of any block of the cluster; `bar` from map_cluster.
PTX_FN void mbar_arrive_cluster(uint32_t bar PTX_AT) {
  PTX90(emu::mbar_arrive(bar, 0, true),
        "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(bar) : "memory");
}

/// Whether the phase of that parity (0, 1, 0, ...) is over; waits a short while for it.
PTX_FN bool mbar_try_wait(uint32_t bar, uint32_t phase PTX_AT) {
  uint32_t done = 0;
  PTX90(done = emu::mbar_wait(bar, phase, true),
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}" : "=r"(done) : "r"(bar),
        "r"(phase) : "memory");
  return done != 0;
}

/// Waits until the phase of that parity is over. A fresh barrier counts as past parity 1.
PTX_FN void mbar_wait(uint32_t bar, uint32_t phase PTX_AT) {
#ifdef PYOPS_EMULATE
  PTX_HERE;
  emu::mbar_wait(bar, phase, false);
#else
  while (!mbar_try_wait(bar, phase)) {
  }
#endif
}

/// mbar_wait that also acquires what other blocks of the cluster did before arriving.
PTX_FN void mbar_wait_cluster(uint32_t bar, uint32_t phase PTX_AT) {
#ifdef PYOPS_EMULATE
  PTX_HERE;
  emu::mbar_wait(bar, phase, false);
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
  PTX90(emu::fence(false), "fence.mbarrier_init.release.cluster;" :: : "memory");
}

/// Orders this thread's accesses with those of TMA and wgmma to the same memory: after writing
/// shared memory, before the barrier that precedes the asynchronous use.
PTX_FN void fence_proxy_async(PTX_ONLY_AT) {
  PTX90(emu::fence(true), "fence.proxy.async;" :: : "memory");
}

/// The same for shared memory only (cheaper).
PTX_FN void fence_proxy_async_shared(PTX_ONLY_AT) {
  PTX90(emu::fence(true), "fence.proxy.async.shared::cta;" :: : "memory");
}

}  // namespace pyops::ptx

#include "tma.cuh"
#include "wgmma.cuh"
