/// CUDA's built-in variables and device functions for code that g++ compiles: those that kernels
/// and tests use.
#pragma once

#include <algorithm>
#include <cmath>

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

// ---- warps; `width` splits the warp into segments, a segment starts at lane `first` ----
#define EMU_SHFL(name, source)                                                   \
  template <class T>                                                             \
  T name(unsigned mask, T value, int by, int width = 32, EMU_AT) {               \
    emu::at(file, line);                                                         \
    const int lane = emu::lane_id(), first = lane & -width, end = first + width; \
    const int from = source;                                                     \
    return emu::shfl(value, mask, from >= first && from < end ? from : lane);    \
  }
EMU_SHFL(__shfl_sync, first + (by & (width - 1)))
EMU_SHFL(__shfl_xor_sync, lane ^ by)
EMU_SHFL(__shfl_down_sync, lane + by)
EMU_SHFL(__shfl_up_sync, lane - by)
#undef EMU_SHFL

inline unsigned __ballot_sync(unsigned mask, int predicate, EMU_AT) {
  emu::at(file, line);
  struct Own {
    unsigned votes;
  } own{predicate != 0};
  emu::collective("ballot", mask, own, [](auto of) {
    unsigned votes = 0;
    for (int lane = 0; lane < 32; ++lane)
      if (of(lane) != nullptr) votes |= of(lane)->votes << lane;
    for (int lane = 0; lane < 32; ++lane)
      if (of(lane) != nullptr) of(lane)->votes = votes;
  });
  return own.votes;
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

// ---- arithmetic ----
inline float __uint_as_float(unsigned x) {
  float f;
  std::memcpy(&f, &x, 4);
  return f;
}
inline unsigned __float_as_uint(float x) {
  unsigned b;
  std::memcpy(&b, &x, 4);
  return b;
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

namespace emu {
/// Subnormals become zeros.
inline float flush(float x) { return __builtin_fabsf(x) < 1.17549435e-38f ? 0.0f * x : x; }
/// Nearest of TF32's 10 bits of fraction, ties away from zero.
inline unsigned to_tf32(float x) {
  const unsigned bits = __float_as_uint(x);
  return (bits & 0x7F800000) == 0x7F800000 ? bits : (bits + 0x1000) & ~0x1FFFu;
}
}  // namespace emu
