// The launch sizes of every kernel, for tables of what it uses (kernel_table.py). Free of CUDA.
#pragma once

#include <cstddef>

namespace pyops::cuda {

// One a kernel, a static in its source file:
//   const KernelPlan plan{reinterpret_cast<const void*>(&kernel<64>), 128, 49152, "kernel 64"};
struct KernelPlan {
  const void* kernel;
  int threads;    // of a block
  size_t shared;  // most dynamic shared memory of a block, in bytes
  const char* name;
  const KernelPlan* next;

  KernelPlan(const void* kernel, int threads, size_t shared, const char* name)
      : kernel(kernel), threads(threads), shared(shared), name(name), next(first()) {
    first() = this;
  }
  static const KernelPlan*& first() {
    static const KernelPlan* head = nullptr;
    return head;
  }
};

}  // namespace pyops::cuda
