#include "runtime.h"

#include <torch/csrc/stable/ops.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <atomic>
#include <cstdlib>
#include <new>

namespace pyops::cpu {
namespace {

constexpr int kSlots = 8;
constexpr size_t kAlignment = 64;
constexpr size_t kReadableTail = 64;
constexpr size_t kHugePage = size_t{2} << 20;

struct ScratchSlots {
  void* data[kSlots] = {};
  size_t size[kSlots] = {};
  ~ScratchSlots() {
    for (void* p : data) std::free(p);
  }
};

thread_local bool single_thread = false;

}  // namespace

int num_threads() { return single_thread ? 1 : static_cast<int>(torch::stable::get_num_threads()); }

SingleThread::SingleThread(bool on) : previous_(single_thread) { single_thread |= on; }
SingleThread::~SingleThread() { single_thread = previous_; }

void parallel_for(int64_t count, void (*body)(void* context, int64_t index), void* context) {
  const int64_t threads = count < num_threads() ? count : num_threads();
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) body(context, i);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(context, i);
  });
}

void* scratch(int slot, size_t bytes) {
  thread_local ScratchSlots slots;
  if (slots.size[slot] < bytes) {
    std::free(slots.data[slot]);
    slots.data[slot] = nullptr;
    slots.size[slot] = 0;
    const size_t alignment = bytes < kHugePage / 4 ? kAlignment : kHugePage;
    const size_t rounded = (bytes + kReadableTail + alignment - 1) / alignment * alignment;
    void* data = std::aligned_alloc(alignment, rounded);
    if (data == nullptr) throw std::bad_alloc();
#if defined(__linux__)
    if (alignment == kHugePage) madvise(data, rounded, MADV_HUGEPAGE);  // fewer TLB misses
#endif
    slots.data[slot] = data;
    slots.size[slot] = bytes;
  }
  return slots.data[slot];
}

}  // namespace pyops::cpu
