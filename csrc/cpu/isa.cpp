#include "isa.h"

#include <cstdlib>
#include <cstring>

namespace pyops::cpu {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "avx512_bf16"};

Isa choose() {
  int best = static_cast<int>(Isa::kBaseline);
  for (int isa = best + 1; isa <= static_cast<int>(Isa::kAvx512Bf16); ++isa) {
    if (!cpu_supports(static_cast<Isa>(isa))) break;
    best = isa;
  }
  if (const char* wanted = std::getenv("PYOPS_CPU_ISA")) {
    for (int isa = 0; isa <= best; ++isa) {
      if (std::strcmp(wanted, kNames[isa]) == 0) return static_cast<Isa>(isa);
    }
  }
  return static_cast<Isa>(best);
}

}  // namespace

bool cpu_supports(Isa isa) {
#if defined(__x86_64__)
  switch (isa) {
    case Isa::kBaseline:
      return true;
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
    case Isa::kAvx512:
      return cpu_supports(Isa::kAvx2) && __builtin_cpu_supports("avx512f") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd");
    case Isa::kAvx512Bf16:
      return cpu_supports(Isa::kAvx512) && __builtin_cpu_supports("avx512bf16") &&
             __builtin_cpu_supports("avx512vnni");
  }
#endif
  return isa == Isa::kBaseline;
}

Isa active_isa() {
  static const Isa isa = choose();
  return isa;
}

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

}  // namespace pyops::cpu
