// pyops._C: facts about the build and this CPU. The ops do not depend on it.
#include <pybind11/pybind11.h>

#include "cpu/isa.h"

namespace py = pybind11;
using pyops::cpu::Isa;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Facts about how pyops was built and what this CPU offers.";
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["compiler"] = __VERSION__;
        info["cxx_standard"] = static_cast<long>(__cplusplus);
        info["torch_built_against"] = PYOPS_TORCH_VERSION;
        info["torch_at_least"] = "2.11";
        info["cuda"] = PYOPS_CUDA_BUILD;
        return info;
      },
      "Compiler, C++ standard, torch headers, and the CUDA architectures built (or why none).");
  m.def(
      "cpu_features",
      [] {
        py::dict features;
        for (const Isa isa : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16}) {
          features[pyops::cpu::isa_name(isa)] = pyops::cpu::cpu_supports(isa);
        }
        return features;
      },
      "Which of the instruction sets that kernels were compiled for this CPU has.");
  m.def(
      "active_isa", [] { return pyops::cpu::isa_name(pyops::cpu::active_isa()); },
      "The instruction set the CPU kernels run with (PYOPS_CPU_ISA lowers it).");
}
