// Parts of one scratch buffer. Free of torch.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pyops::cpu {

// Hands out 64-byte aligned parts of a buffer; without one it gives null and only counts.
class Arena {
 public:
  explicit Arena(void* base = nullptr) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(int64_t count) {
    T* part = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return part;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

}  // namespace pyops::cpu
