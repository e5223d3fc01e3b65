/// CUDA's built-in variables and device functions for code that g++ compiles.
#pragma once

#include <algorithm>
#include <cmath>

// The running fiber's; the emulator sets them at every switch.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;
#undef __launch_bounds__
#define __launch_bounds__(...)

#define EMU_AT const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define EMU_HERE \
  ::emu::Site { file, line }

using std::max;
using std::min;

inline void __syncthreads(EMU_AT) { emu::sync_threads(EMU_HERE); }
inline void __syncwarp(unsigned mask = ~0u, EMU_AT) { emu::sync_warp(mask, EMU_HERE); }
inline void __threadfence(EMU_AT) { emu::thread_fence(EMU_HERE); }
inline void __threadfence_block(EMU_AT) { emu::thread_fence(EMU_HERE); }
inline void __nanosleep(unsigned, EMU_AT) { emu::pause(EMU_HERE); }
[[noreturn]] inline void __trap() { throw std::runtime_error("__trap()"); }

// ---- warps; `width` splits the warp into segments ----
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMU_AT) {
  return emu::shfl(
      value, [=](int lane) { return (lane & -width) + (source & (width - 1)); }, mask, EMU_HERE);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, EMU_AT) {
  const auto from = [=](int lane) {
    const int to = lane ^ bits;
    return to < (lane & -width) + width ? to : lane;
  };
  return emu::shfl(value, from, mask, EMU_HERE);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, EMU_AT) {
  const auto from = [=](int lane) {
    return (lane & (width - 1)) + static_cast<int>(delta) < width ? lane + static_cast<int>(delta)
                                                                  : lane;
  };
  return emu::shfl(value, from, mask, EMU_HERE);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, EMU_AT) {
  const auto from = [=](int lane) {
    return (lane & (width - 1)) >= static_cast<int>(delta) ? lane - static_cast<int>(delta) : lane;
  };
  return emu::shfl(value, from, mask, EMU_HERE);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, EMU_AT) {
  return emu::ballot(predicate != 0, mask, EMU_HERE);
}
inline int __any_sync(unsigned mask, int predicate, EMU_AT) {
  return emu::ballot(predicate != 0, mask, EMU_HERE) != 0;
}
inline int __all_sync(unsigned mask, int predicate, EMU_AT) {
  return emu::ballot(predicate != 0, mask, EMU_HERE) == mask;
}

// ---- memory ----
template <class T>
T __ldg(const T* address) {
  return *address;
}

// Without instrumentation: atomic_access tells the race detection about them.
#define EMU_UNTRACKED __attribute__((no_sanitize("thread")))
#define EMU_ATOMIC(name, expression)                                      \
  template <class T>                                                      \
  EMU_UNTRACKED T name(T* address, std::common_type_t<T> value, EMU_AT) { \
    emu::atomic_access(address, sizeof(T), EMU_HERE);                     \
    const T old = *address;                                               \
    *address = expression;                                                \
    return old;                                                           \
  }
EMU_ATOMIC(atomicAdd, old + value)
EMU_ATOMIC(atomicSub, old - value)
EMU_ATOMIC(atomicExch, value)
EMU_ATOMIC(atomicMax, old < value ? value : old)
EMU_ATOMIC(atomicMin, value < old ? value : old)
EMU_ATOMIC(atomicAnd, old& value)
EMU_ATOMIC(atomicOr, old | value)
EMU_ATOMIC(atomicXor, old ^ value)
EMU_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
template <class T>
EMU_UNTRACKED T atomicCAS(T* address, std::common_type_t<T> expected, std::common_type_t<T> value,
                          EMU_AT) {
  emu::atomic_access(address, sizeof(T), EMU_HERE);
  const T old = *address;
  if (old == expected) *address = value;
  return old;
}
#undef EMU_ATOMIC

// ---- arithmetic ----
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __uint_as_float(unsigned x) {
  float f;
  std::memcpy(&f, &x, 4);
  return f;
}
inline float __int_as_float(int x) { return __uint_as_float(static_cast<unsigned>(x)); }
inline unsigned __float_as_uint(float x) { return emu::bits(x); }
inline int __float_as_int(float x) { return static_cast<int>(emu::bits(x)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t both = static_cast<uint64_t>(high) << 32 | low;
  unsigned out = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned pick = selector >> 4 * i & 15;
    unsigned byte = both >> 8 * (pick & 7) & 255;
    if (pick & 8) byte = byte & 128 ? 255 : 0;
    out |= byte << 8 * i;
  }
  return out;
}
template <class T>
T __reduce_add_sync(unsigned mask, T value, EMU_AT) {
  T sum = 0;
  for (int lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) sum += emu::shfl(value, [lane](int) { return lane; }, mask, EMU_HERE);
  return sum;
}
