// What kernels need from the process: threads and scratch memory. Free of torch.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pyops::cpu {

// Threads that parallel_for may use (torch.get_num_threads()).
int num_threads();

// While one lives, num_threads() is 1 on this thread: for work too small to wake others.
class SingleThread {
 public:
  explicit SingleThread(bool on);
  ~SingleThread();
  SingleThread(const SingleThread&) = delete;
  SingleThread& operator=(const SingleThread&) = delete;

 private:
  bool previous_;
};

// Calls body(context, index) for every index in [0, count), in any order, on up to
// num_threads() threads; indices are handed out one at a time, so make them few
// and large. A result must not depend on which thread ran what: sums across indices
// go through one slot per index and a second pass in fixed order.
void parallel_for(int64_t count, void (*body)(void* context, int64_t index), void* context);

template <class F>
inline void parallel_for(int64_t count, const F& f) {
  parallel_for(
      count, [](void* context, int64_t index) { (*static_cast<const F*>(context))(index); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

// A buffer of the calling thread, 64-byte aligned, at least `bytes` long plus 64 readable bytes,
// reused between calls: it stays valid until the same thread asks for the same
// slot again. Contents are not kept. Throws std::bad_alloc. Slots 0-3 belong to the function that
// starts parallel_for (shared, read by the workers), 4-7 to the bodies.
void* scratch(int slot, size_t bytes);

}  // namespace pyops::cpu
