// Which instruction set runs. Every file named *.isa.cpp is compiled once per
// instruction set, with PYOPS_ISA naming the namespace its kernels live in, and
// the best one that this CPU has is taken at run time.
//
// A *.isa.cpp must not instantiate standard-library templates that could be emitted
// out of line (std::vector, std::sort, std::function): the linker keeps one copy
// of such a function for the whole library, possibly the AVX-512 one, and an older
// CPU would then meet instructions it does not have. Raw pointers, builtins and
// functions in an unnamed namespace are safe.
#pragma once

namespace pyops::cpu {

enum class Isa : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };

// The best instruction set of this CPU, or a lower one if PYOPS_CPU_ISA
// (baseline, avx2, avx512, avx512_bf16) asks for it. Read once.
Isa active_isa();
const char* isa_name(Isa isa);
bool cpu_supports(Isa isa);

}  // namespace pyops::cpu

#if defined(__x86_64__)
#define PYOPS_FOR_EACH_ISA(DO) DO(baseline) DO(avx2) DO(avx512) DO(avx512_bf16)
#else
#define PYOPS_FOR_EACH_ISA(DO) DO(baseline)
#endif

// Declares `ret name args` in the namespace of every instruction set.
#define PYOPS_DECLARE_IN_(isa, ret, name, args) \
  namespace isa {                               \
  ret name args;                                \
  }
#if defined(__x86_64__)
#define PYOPS_ISA_KERNEL(ret, name, args)      \
  PYOPS_DECLARE_IN_(baseline, ret, name, args) \
  PYOPS_DECLARE_IN_(avx2, ret, name, args)     \
  PYOPS_DECLARE_IN_(avx512, ret, name, args)   \
  PYOPS_DECLARE_IN_(avx512_bf16, ret, name, args)
// Selects the function pointer for the active instruction set.
#define PYOPS_ISA_SELECT(name)                                                       \
  (::pyops::cpu::active_isa() == ::pyops::cpu::Isa::kAvx512Bf16 ? &avx512_bf16::name \
   : ::pyops::cpu::active_isa() == ::pyops::cpu::Isa::kAvx512   ? &avx512::name      \
   : ::pyops::cpu::active_isa() == ::pyops::cpu::Isa::kAvx2     ? &avx2::name        \
                                                                : &baseline::name)
#else
#define PYOPS_ISA_KERNEL(ret, name, args) PYOPS_DECLARE_IN_(baseline, ret, name, args)
#define PYOPS_ISA_SELECT(name) (&baseline::name)
#endif
