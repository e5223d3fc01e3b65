// pyops._C: facts about the build, this CPU and the CUDA kernels. The ops do not depend on it.
#include <pybind11/pybind11.h>

#include "cpu/isa.h"

namespace py = pybind11;
using pyops::cpu::Isa;

namespace {

// What a CUDA kernel uses on one architecture; the rows come from the build.
struct CudaKernel {
  const char* name;
  int arch, registers, stack_bytes, spill_bytes, shared_bytes, threads;
  double occupancy;
};
// The last row ends it: without nvcc there is no other.
const CudaKernel kCudaKernels[] = {
#include "cuda_kernels.h"
    {}};

py::list cuda_kernels() {
  py::list rows;
  for (const CudaKernel* kernel = kCudaKernels; kernel->name; ++kernel) {
    py::dict row;
    row["kernel"] = kernel->name;
    row["arch"] = kernel->arch;
    row["registers"] = kernel->registers;
    row["stack_bytes"] = kernel->stack_bytes;
    row["spill_bytes"] = kernel->spill_bytes;
    row["shared_bytes"] = kernel->shared_bytes;
    row["threads"] = kernel->threads;
    row["occupancy"] = kernel->occupancy;
    rows.append(row);
  }
  return rows;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Facts about how pyops was built and what this CPU offers.";
  m.def(
      "cuda_kernels", &cuda_kernels,
      "Of each CUDA kernel and architecture: registers a thread; bytes of stack, spills and shared "
      "memory; threads a block; the part of a multiprocessor's threads that can be resident.");
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
