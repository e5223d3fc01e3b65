// Interface between the op linear_act and its CPU kernel. Free of torch.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "isa.h"
#include "output_activation.h"

namespace pyops::cpu {

struct ActivationParams {
  OutputActivation activation;
  float negative_slope;
  DType dtype;  // not double
  int64_t count;
  void* values;  // (count,), overwritten
};

PYOPS_ISA_KERNEL(void, activate, (const ActivationParams&))

}  // namespace pyops::cpu
