/// wgmma: the warpgroup's matrix multiplication of Hopper, and its shared memory descriptors.
/// Part of ptx.cuh: include that.
#pragma once

namespace pyops::ptx {

/// Layouts of operands in shared memory; the value is the descriptor's two top bits.
enum class Swizzle : uint32_t { None = 0, B128 = 1, B64 = 2, B32 = 3 };

/// Major axis of an operand in shared memory: the contraction (K), or rows of A / columns of B.
enum Major : int { KMajor = 0, MNMajor = 1 };

/// Descriptor of an operand. In chunks of 16 bytes, S = 1, 2, 4, 8 chunks a row for None, B32, B64,
/// B128 (in TMA's swizzle of the same name):
///   KMajor:  8 rows (of M or N) of S chunks along K are contiguous, the next 8 rows are
///            `stride_bytes` further (None: the next chunk along K `leading_bytes`).
///   MNMajor: 8 rows (of K) of S chunks along M or N are contiguous, the next 8 rows are
///            `stride_bytes` further, the next S chunks `leading_bytes` (None: the reverse).
/// Within a KMajor row of a swizzled tile, K advances by adding its bytes to `addr`.
/// base_offset: (address of the pattern's start / 128) % 8 where that start is not aligned to the
/// pattern's size of 128 S bytes.
template <Swizzle S>
PTX_FN uint64_t smem_descriptor(uint32_t addr, uint32_t leading_bytes, uint32_t stride_bytes,
                                uint32_t base_offset = 0) {
  return static_cast<uint64_t>((addr & 0x3FFFF) >> 4) |
         static_cast<uint64_t>((leading_bytes & 0x3FFFF) >> 4) << 16 |
         static_cast<uint64_t>((stride_bytes & 0x3FFFF) >> 4) << 32 |
         static_cast<uint64_t>(base_offset & 7) << 49 |
         static_cast<uint64_t>(static_cast<uint32_t>(S)) << 62;
}

#if defined(PYOPS_EMULATE) || !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define PTX90A(host, ...) PTX(host, __VA_ARGS__)
#else
#define PTX90A(host, ...) __trap()
#endif

/// Orders the registers that wgmma reads and writes with other uses of them: before the first
/// wgmma (after mbar_wait), and whenever accumulators or A's registers were touched in between.
PTX_FN void wgmma_fence(PTX_ONLY_AT) {
  PTX90A(emu::wgmma_fence(), "wgmma.fence.sync.aligned;" :: : "memory");
}

PTX_FN void wgmma_commit(PTX_ONLY_AT) {
  PTX90A(emu::wgmma_commit(), "wgmma.commit_group.sync.aligned;" :: : "memory");
}

/// Waits until at most Pending groups of this warp are in flight; before that their accumulators
/// and A registers must not be touched, nor their shared memory overwritten.
template <int Pending>
PTX_FN void wgmma_wait(PTX_ONLY_AT) {
  PTX90A(emu::wgmma_wait(Pending), "wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

#ifndef PYOPS_EMULATE

template <int N>
struct Wgmma;  // the asm for N columns

// clang-format off
// The text of the first n registers, and the operands for them.
#define PTX_R8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define PTX_R16 PTX_R8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define PTX_R24 PTX_R16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define PTX_R32 PTX_R24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define PTX_R40 PTX_R32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define PTX_R48 PTX_R40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define PTX_R56 PTX_R48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define PTX_R64 PTX_R56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define PTX_R72 PTX_R64 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define PTX_R80 PTX_R72 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define PTX_R88 PTX_R80 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define PTX_R96 PTX_R88 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define PTX_R104 PTX_R96 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define PTX_R112 PTX_R104 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define PTX_R120 PTX_R112 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define PTX_R128 PTX_R120 ", %120, %121, %122, %123, %124, %125, %126, %127"
#define PTX_D(i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), \
  "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define PTX_D8 PTX_D(0)
#define PTX_D16 PTX_D8, PTX_D(8)
#define PTX_D24 PTX_D16, PTX_D(16)
#define PTX_D32 PTX_D24, PTX_D(24)
#define PTX_D40 PTX_D32, PTX_D(32)
#define PTX_D48 PTX_D40, PTX_D(40)
#define PTX_D56 PTX_D48, PTX_D(48)
#define PTX_D64 PTX_D56, PTX_D(56)
#define PTX_D72 PTX_D64, PTX_D(64)
#define PTX_D80 PTX_D72, PTX_D(72)
#define PTX_D88 PTX_D80, PTX_D(80)
#define PTX_D96 PTX_D88, PTX_D(88)
#define PTX_D104 PTX_D96, PTX_D(96)
#define PTX_D112 PTX_D104, PTX_D(104)
#define PTX_D120 PTX_D112, PTX_D(112)
#define PTX_D128 PTX_D120, PTX_D(120)

// TAIL: the majors of the operands in shared memory, for types that have them.
#define PTX_WGMMA_ASM(N, H, K, TYPE, A, B, ACCUMULATE, TAIL, ...)                          \
  PTX90A(, "{\n.reg .pred p;\nsetp.ne.b32 p, " ACCUMULATE ", 0;\n"                         \
           "wgmma.mma_async.sync.aligned.m64n" #N "k" K ".f32." TYPE "." TYPE              \
           " {" PTX_R##H "}, " A ", " B ", p, 1, 1" TAIL ";\n}"                            \
         : PTX_D##H : __VA_ARGS__)

// R0...: numbers of the operands after the H = N / 2 accumulators.
#define PTX_WGMMA(N, H, R0, R1, R2, R3, R4, R5, R6)                                        \
  template <>                                                                              \
  struct Wgmma<N> {                                                                        \
    template <class T, int A, int B>                                                       \
    static PTX_FN void run(float (&d)[H], uint64_t a, uint64_t b, int accumulate) {        \
      if constexpr (std::is_same_v<T, __nv_bfloat16>)                                      \
        PTX_WGMMA_ASM(N, H, "16", "bf16", "%" #R0, "%" #R1, "%" #R2, ", %" #R3 ", %" #R4,  \
                      "l"(a), "l"(b), "r"(accumulate), "n"(A), "n"(B));                    \
      else if constexpr (std::is_same_v<T, __half>)                                        \
        PTX_WGMMA_ASM(N, H, "16", "f16", "%" #R0, "%" #R1, "%" #R2, ", %" #R3 ", %" #R4,   \
                      "l"(a), "l"(b), "r"(accumulate), "n"(A), "n"(B));                    \
      else                                                                                 \
        PTX_WGMMA_ASM(N, H, "8", "tf32", "%" #R0, "%" #R1, "%" #R2, "",                    \
                      "l"(a), "l"(b), "r"(accumulate));                                    \
    }                                                                                      \
    template <class T, int B>                                                              \
    static PTX_FN void run(float (&d)[H], const uint32_t (&a)[4], uint64_t b,              \
                           int accumulate) {                                               \
      if constexpr (std::is_same_v<T, __nv_bfloat16>)                                      \
        PTX_WGMMA_ASM(N, H, "16", "bf16", "{%" #R0 ", %" #R1 ", %" #R2 ", %" #R3 "}",      \
                      "%" #R4, "%" #R5, ", %" #R6, "r"(a[0]), "r"(a[1]), "r"(a[2]),        \
                      "r"(a[3]), "l"(b), "r"(accumulate), "n"(B));                         \
      else if constexpr (std::is_same_v<T, __half>)                                        \
        PTX_WGMMA_ASM(N, H, "16", "f16", "{%" #R0 ", %" #R1 ", %" #R2 ", %" #R3 "}",       \
                      "%" #R4, "%" #R5, ", %" #R6, "r"(a[0]), "r"(a[1]), "r"(a[2]),        \
                      "r"(a[3]), "l"(b), "r"(accumulate), "n"(B));                         \
      else                                                                                 \
        PTX_WGMMA_ASM(N, H, "8", "tf32", "{%" #R0 ", %" #R1 ", %" #R2 ", %" #R3 "}",       \
                      "%" #R4, "%" #R5, "", "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]),    \
                      "l"(b), "r"(accumulate));                                            \
    }                                                                                      \
  };
PTX_WGMMA(16, 8, 8, 9, 10, 11, 12, 13, 14)
PTX_WGMMA(32, 16, 16, 17, 18, 19, 20, 21, 22)
PTX_WGMMA(48, 24, 24, 25, 26, 27, 28, 29, 30)
PTX_WGMMA(64, 32, 32, 33, 34, 35, 36, 37, 38)
PTX_WGMMA(80, 40, 40, 41, 42, 43, 44, 45, 46)
PTX_WGMMA(96, 48, 48, 49, 50, 51, 52, 53, 54)
PTX_WGMMA(112, 56, 56, 57, 58, 59, 60, 61, 62)
PTX_WGMMA(128, 64, 64, 65, 66, 67, 68, 69, 70)
PTX_WGMMA(144, 72, 72, 73, 74, 75, 76, 77, 78)
PTX_WGMMA(160, 80, 80, 81, 82, 83, 84, 85, 86)
PTX_WGMMA(176, 88, 88, 89, 90, 91, 92, 93, 94)
PTX_WGMMA(192, 96, 96, 97, 98, 99, 100, 101, 102)
PTX_WGMMA(208, 104, 104, 105, 106, 107, 108, 109, 110)
PTX_WGMMA(224, 112, 112, 113, 114, 115, 116, 117, 118)
PTX_WGMMA(240, 120, 120, 121, 122, 123, 124, 125, 126)
PTX_WGMMA(256, 128, 128, 129, 130, 131, 132, 133, 134)
// clang-format on
#endif  // PYOPS_EMULATE

/// d = a b (+ d if accumulate) in the background, by a warpgroup: a 64 x K, b K x N; T bf16 or half
/// (K = 16) or tf32 (K = 8, KMajor only). Warp w of the four holds rows 16w... of d: with
/// g = lane/4, t = lane%4, d[4j + i] is row g + 8(i/2), column 8j + 2t + i%2.
template <class T, int N, Major A = KMajor, Major B = KMajor>
PTX_FN void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate PTX_AT) {
  static_assert(!std::is_same_v<T, tf32> || (A == KMajor && B == KMajor));
#ifdef PYOPS_EMULATE
  PTX_HERE;
  emu::wgmma(d, N, emu::type_of<T>(), nullptr, a, b, A, B, accumulate);
#else
  Wgmma<N>::template run<T, A, B>(d, a, b, accumulate);
#endif
}

/// The same with a in registers, a warp's 16 rows as in mma_m16n8k16 / mma_m16n8k8_tf32.
template <class T, int N, Major B = KMajor>
PTX_FN void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate PTX_AT) {
  static_assert(!std::is_same_v<T, tf32> || B == KMajor);
#ifdef PYOPS_EMULATE
  PTX_HERE;
  emu::wgmma(d, N, emu::type_of<T>(), a, 0, b, KMajor, B, accumulate);
#else
  Wgmma<N>::template run<T, B>(d, a, b, accumulate);
#endif
}

}  // namespace pyops::ptx
