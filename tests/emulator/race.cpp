/// Race detection: vector clocks, and a shadow of every word of shared and global memory.
///
/// Lanes of the clocks: the wave's threads, each thread's cp.asyncs, each warp's wgmmas, and
/// kTmaLanes for the other asynchronous operations, taken in turn.
#include <dlfcn.h>
#include <link.h>
#include <pthread.h>

#include <cstdio>

#include "state.h"

namespace emu {

bool racing = false;

bool on_stack(const void* address);
bool in_arena(const void* address);

void Clocks::join(const Clocks& other) {
  const auto larger = [](std::vector<uint32_t>& to, const std::vector<uint32_t>& from) {
    if (to.size() < from.size()) to.resize(from.size());
    for (size_t i = 0; i < from.size(); ++i) to[i] = std::max(to[i], from[i]);
  };
  larger(seen, other.seen);
  larger(proxy, other.proxy);
  if (other.past == nullptr || other.past == past) return;
  if (past == nullptr) {
    past = other.past;
    return;
  }
  auto both = *past;
  for (const auto& [wave, clocks] : *other.past) larger(both[wave], clocks);
  past = std::make_shared<const std::map<uint32_t, std::vector<uint32_t>>>(std::move(both));
}

Actor as_thread(Fiber& fiber) {
  if (!racing) return {};
  return {fiber.tid, fiber.clocks.seen[fiber.tid],
          std::shared_ptr<Clocks>(std::shared_ptr<void>(), &fiber.clocks)};
}

void tick(Fiber& fiber) {
  if (racing) ++fiber.clocks.seen[fiber.tid];
}

void release(Clocks& to, Fiber& fiber) {
  if (!racing) return;
  to.join(fiber.clocks);
  tick(fiber);
}

void acquire(Fiber& fiber, const Clocks& from) {
  if (racing) fiber.clocks.join(from);
}

void observe(Clocks& clocks, const Actor& done) {
  if (!racing) return;
  if (clocks.seen.size() < static_cast<size_t>(machine.lane_count()))
    clocks.seen.resize(machine.lane_count());
  clocks.seen[done.lane] = std::max(clocks.seen[done.lane], done.clock);
}

Actor as_operation(const Clocks& clocks) {
  if (!racing) return {};
  const int lane = machine.next_tma_lane++ % kTmaLanes;
  return {2 * machine.threads + machine.threads / 32 + 1 + lane, ++machine.tma_clocks[lane],
          std::make_shared<Clocks>(clocks)};
}

Actor as_copy(Fiber& fiber) {
  if (!racing) return {};
  return {machine.threads + fiber.tid, fiber.copy_clock + 1,
          std::make_shared<Clocks>(fiber.clocks)};
}

int wgmma_lane(const Block& block, int warp) {
  return 2 * machine.threads + block.fibers[0]->tid / 32 + warp;
}

Actor as_wgmma(Block& block, int warp) {
  if (!racing) return {};
  auto clocks = std::make_shared<Clocks>();
  const size_t first = 32u * static_cast<unsigned>(warp);
  for (size_t i = first; i < first + 32; ++i) release(*clocks, *block.fibers[i]);
  // The warp's wgmmas act in order: their clock is their number.
  return {wgmma_lane(block, warp), static_cast<uint32_t>(block.warps[warp].issued), clocks};
}

bool initialised_for(const Fiber& fiber, const Mbarrier& barrier) {
  return !racing || fiber.clocks.seen[barrier.owner->tid] >= barrier.init_clock;
}

// ---- shadow memory ----

/// An access to some bytes of a word.
struct Mark {
  uint64_t site;  // file << 16 | line, or program counter << 16
  uint32_t clock, wave;
  uint16_t lane;
  uint8_t bytes, access;
};
struct Word {
  Mark marks[6];
};
struct Page {
  Word words[256];
};
static std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;

void race_begin_wave() {
  if (!racing) return;
  std::fill(std::begin(machine.tma_clocks), std::end(machine.tma_clocks), 0);
  if (machine.wave == 1) pages.clear();
  for (const auto& block : machine.blocks)
    for (const auto& fiber : block->fibers) {
      fiber->clocks.seen.assign(machine.lane_count(), 0);
      fiber->clocks.proxy.assign(machine.lane_count(), 0);
      tick(*fiber);
    }
}

void race_begin_block(Block& block) {
  if (!racing) return;
  const auto start = reinterpret_cast<uintptr_t>(block.smem) / 1024;
  for (uintptr_t page = start; page <= start + machine.config.smem / 1024; ++page)
    pages.erase(page);
}

static std::string text(const Mark& mark) {
  const int threads = machine.threads;
  std::string who;
  if (mark.wave != machine.wave)
    who = "another block's thread";
  else if (mark.lane < 2 * threads) {
    int tid = mark.lane % threads;
    for (const auto& block : machine.blocks) {
      const int size = static_cast<int>(block->fibers.size());
      if (tid < size) {
        who = where(*block->fibers[tid]) + (mark.lane < threads ? "" : "'s cp.async");
        break;
      }
      tid -= size;
    }
  } else if (mark.lane <= 2 * threads + threads / 32)
    who = emu::text("wgmma of warp %d", mark.lane - 2 * threads);
  else
    who = "an asynchronous copy";
  return std::string(mark.access & kWrite ? "write" : "read") + " by " + who + " at " +
         text(Site{reinterpret_cast<const char*>(mark.site >> 16),
                   static_cast<int>(mark.site & 0xFFFF)});
}

static bool ordered(const Mark& earlier, const Actor& actor, int access) {
  const Clocks& clocks = *actor.clocks;
  const std::vector<uint32_t>* seen = &clocks.seen;
  if (earlier.wave != machine.wave) {
    if (clocks.past == nullptr) return false;
    const auto found = clocks.past->find(earlier.wave);
    if (found == clocks.past->end()) return false;
    seen = &found->second;
  } else if ((access & kAsync) && (earlier.access & kWrite) && !(earlier.access & kAsync)) {
    seen = &clocks.proxy;  // a plain write, now read or overwritten by an asynchronous unit
  }
  return earlier.lane < seen->size() && (*seen)[earlier.lane] >= earlier.clock;
}

static void mark_word(const Actor& actor, uintptr_t word, uint8_t bytes, int access, Site site) {
  std::unique_ptr<Page>& page = pages[word >> 8];
  if (page == nullptr) page = std::make_unique<Page>();
  const Mark now{reinterpret_cast<uint64_t>(site.file) << 16 | static_cast<uint16_t>(site.line),
                 actor.clock,
                 machine.wave,
                 static_cast<uint16_t>(actor.lane),
                 bytes,
                 static_cast<uint8_t>(access)};
  Mark* place = nullptr;
  for (Mark& mark : page->words[word & 255].marks) {
    if (mark.bytes == 0) {
      if (place == nullptr) place = &mark;
      continue;
    }
    const bool same = mark.lane == now.lane && mark.wave == now.wave;
    const bool covered = (mark.bytes & ~bytes) == 0;
    if (!(mark.bytes & bytes)) continue;
    if (!((mark.access | access) & kWrite)) {
      if (same && covered) place = &mark;
      continue;
    }
    if (!same && !(mark.access & access & kAtomic) && !ordered(mark, actor, access)) {
      const bool fence = (access & kAsync) && !(mark.access & kAsync) && ordered(mark, actor, 0);
      fail(std::string(fence ? "no proxy fence between: " : "race: ") + text(now) + " against " +
               text(mark),
           {nullptr, 0});
    }
    if (covered && (access & kWrite)) {
      mark.bytes = 0;
      if (place == nullptr) place = &mark;
    }
  }
  if (place == nullptr) place = &page->words[word & 255].marks[dice(6)];
  *place = now;
}

void track(const Actor& actor, const void* address, size_t bytes, int access, Site site) {
  if (!racing || bytes == 0) return;
  const auto start = reinterpret_cast<uintptr_t>(address), end = start + bytes;
  for (uintptr_t word = start / 4; word <= (end - 1) / 4; ++word) {
    uint8_t mask = 15;
    if (word * 4 < start) mask &= static_cast<uint8_t>(15 << (start - word * 4));
    if (word * 4 + 4 > end) mask &= static_cast<uint8_t>(15 >> (word * 4 + 4 - end));
    mark_word(actor, word, mask, access, site);
  }
}

// ---- atomics and fences in global memory ----

struct Synchronised {
  uint32_t wave = 0;
  Clocks clocks;
};
static std::unordered_map<const void*, Synchronised> synchronised;

void thread_fence(Site site) {
  interleave(site);
  Fiber& fiber = self();
  if (!racing) return;
  fiber.clocks.join(fiber.acquired);
  fiber.fenced = fiber.clocks;
  tick(fiber);
}

void atomic_access(const void* address, size_t bytes, Site site) {
  if (machine.current == nullptr) return;
  interleave(site);
  machine.idle += 1;
  if (!in_arena(address)) check_global(address, bytes, site);
  if (!racing) return;
  Fiber& fiber = self();
  track(as_thread(fiber), address, bytes, kWrite | kAtomic, site);
  Synchronised& at = synchronised[address];
  if (at.wave != machine.wave) {
    if (at.wave > machine.wave) at.clocks = {};  // of an earlier launch
    auto past = at.clocks.past ? *at.clocks.past : std::map<uint32_t, std::vector<uint32_t>>();
    if (!at.clocks.seen.empty()) past[at.wave] = at.clocks.seen;
    at.clocks = {};
    at.clocks.past = std::make_shared<const std::map<uint32_t, std::vector<uint32_t>>>(past);
    at.wave = machine.wave;
  }
  fiber.acquired.join(at.clocks);
  at.clocks.join(fiber.fenced);
}

// ---- what the compiler inserts with -fsanitize=thread ----

using Range = std::pair<uintptr_t, uintptr_t>;

/// Of the library that holds the kernels and this emulator.
static Range image_range() {
  Range range{0, 0};
  const auto visit = [](dl_phdr_info* info, size_t, void* data) {
    uintptr_t low = ~uintptr_t{0}, high = 0;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
      if (info->dlpi_phdr[i].p_type != PT_LOAD) continue;
      const uintptr_t start = info->dlpi_addr + info->dlpi_phdr[i].p_vaddr;
      low = std::min(low, start);
      high = std::max(high, start + info->dlpi_phdr[i].p_memsz);
    }
    const auto marker = reinterpret_cast<uintptr_t>(&machine);
    if (marker < low || marker >= high) return 0;
    *static_cast<Range*>(data) = {low, high};
    return 1;
  };
  dl_iterate_phdr(visit, &range);
  return range;
}

static Range stack_range() {
  pthread_attr_t attributes;
  void* start = nullptr;
  size_t size = 0;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &start, &size);
  pthread_attr_destroy(&attributes);
  return {reinterpret_cast<uintptr_t>(start), reinterpret_cast<uintptr_t>(start) + size};
}

/// Constants in the library, and the launch's arguments on the host's stack.
static bool harmless(const void* address) {
  static const Range image = image_range();
  static thread_local const Range stack = stack_range();
  const auto at = reinterpret_cast<uintptr_t>(address);
  return (at >= image.first && at < image.second) || (at >= stack.first && at < stack.second);
}

static void plain(const void* address, size_t bytes, bool write, void* counter) {
  if (machine.current == nullptr) return;
  const Site site{static_cast<const char*>(counter), 0};
  Fiber& fiber = self();
  if (on_stack(address)) {
    const auto* p = static_cast<const float*>(address);
    for (const auto& accumulator : my_warp().accumulators)
      if (const float* d = accumulator->d[fiber.lane]; p >= d && p < d + accumulator->count)
        fail("an accumulator of a wgmma in flight is touched", site);
    return;
  }
  if (harmless(address)) return;
  if (in_arena(address)) {
    const auto* p = static_cast<const unsigned char*>(address);
    const unsigned char* smem = fiber.block->smem;
    if (p < smem || p + bytes > smem + machine.config.smem)
      fail("access outside the block's shared memory", site);
  } else {
    check_global(address, bytes, site);
  }
  track(as_thread(fiber), address, bytes, write ? kWrite : kRead, site);
}

}  // namespace emu

#define EMU_HOOK(size)                                                                         \
  void __tsan_read##size(void* p) { emu::plain(p, size, false, __builtin_return_address(0)); } \
  void __tsan_write##size(void* p) { emu::plain(p, size, true, __builtin_return_address(0)); } \
  void __tsan_unaligned_read##size(void* p) {                                                  \
    emu::plain(p, size, false, __builtin_return_address(0));                                   \
  }                                                                                            \
  void __tsan_unaligned_write##size(void* p) {                                                 \
    emu::plain(p, size, true, __builtin_return_address(0));                                    \
  }
extern "C" {
EMU_HOOK(1)
EMU_HOOK(2)
EMU_HOOK(4)
EMU_HOOK(8)
EMU_HOOK(16)
void __tsan_read_range(void* p, size_t size) {
  emu::plain(p, size, false, __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t size) {
  emu::plain(p, size, true, __builtin_return_address(0));
}
void __tsan_init() { emu::racing = true; }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
// Guards of function-local statics in host code.
int8_t __tsan_atomic8_load(const volatile int8_t* p, int) { return *p; }
}
