// A launch that cannot succeed, with a GPU or without one: prints what launch() throws.
#include <cstdio>

#include "launch.cuh"

__global__ void some_kernel() {}

int main() {
  pyops::LaunchConfig config{"some_kernel", dim3(7), dim3(2048)};  // too many threads
  try {
    pyops::launch(config, some_kernel);
  } catch (const std::runtime_error& error) {
    std::puts(error.what());
    return 0;
  }
  return 1;
}
