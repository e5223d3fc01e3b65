// The launch sizes of every kernel, for the table of what each uses (kernel_table.py).
#pragma once

#include <cstddef>

namespace pyops::cuda {

struct KernelPlan {
  const void* kernel;
  int threads;    // of a block
  size_t shared;  // dynamic shared memory of a block, in bytes
  const KernelPlan* next;

  KernelPlan(const void* kernel, int threads, size_t shared)
      : kernel(kernel), threads(threads), shared(shared), next(first()) {
    first() = this;
  }
  static const KernelPlan*& first() {
    static const KernelPlan* head = nullptr;
    return head;
  }
};

template <auto Kernel, int Threads, size_t Shared>
struct Planned {
  static const KernelPlan plan;
};
template <auto Kernel, int Threads, size_t Shared>
const KernelPlan Planned<Kernel, Threads, Shared>::plan(reinterpret_cast<const void*>(Kernel),
                                                        Threads, Shared);

// The kernel, to launch; that it is mentioned so puts it into the table.
template <auto Kernel, int Threads, size_t Shared = 0>
auto planned() {
  static_cast<void>(&Planned<Kernel, Threads, Shared>::plan);
  return Kernel;
}

}  // namespace pyops::cuda
