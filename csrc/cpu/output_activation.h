// What an op does to its output last. Free of torch.
#pragma once

namespace pyops::cpu {

enum class OutputActivation : int { kNone, kRelu, kLeakyRelu, kTanh, kSigmoid };

}  // namespace pyops::cpu
