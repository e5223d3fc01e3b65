// Prints every kernel's launch sizes: linked with the kernels and run by the build
// (kernel_table.py).
#include <cstdio>

#include "kernel_plan.h"

int main() {
  for (auto plan = pyops::cuda::KernelPlan::first(); plan; plan = plan->next) {
    std::printf("%p %d %zu\n", plan->kernel, plan->threads, plan->shared);
  }
}
