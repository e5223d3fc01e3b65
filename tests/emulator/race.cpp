/// Race detection: vector clocks, and a shadow of every word of shared and global memory.
///
/// Lanes of the clocks: the wave's threads, each thread's cp.asyncs, each warp's wgmmas, and
/// kCopyLanes for the other asynchronous operations, taken in turn.
#include <unordered_map>

#include "state.h"

namespace emu {

/// Whether the kernels were compiled with -fsanitize=thread, whose hooks are below.
static bool racing = false;

static int first_copy_lane() { return 2 * machine.threads + machine.threads / 32 + 1; }

static void join(std::vector<uint32_t>& to, const std::vector<uint32_t>& from) {
  if (to.size() < from.size()) to.resize(from.size());
  for (size_t i = 0; i < from.size(); ++i) to[i] = std::max(to[i], from[i]);
}

void Clocks::join(const Clocks& other) {
  emu::join(seen, other.seen);
  emu::join(proxy, other.proxy);
  for (const auto& [wave, clocks] : other.past) emu::join(past[wave], clocks);
}

void tick(Fiber& fiber) {
  if (racing) ++fiber.clocks.seen[static_cast<size_t>(fiber.tid)];
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
  const auto lane = static_cast<size_t>(done.lane);
  if (clocks.seen.size() <= lane) clocks.seen.resize(lane + 1);
  clocks.seen[lane] = std::max(clocks.seen[lane], done.clock);
}

bool knows(const Fiber& fiber, const Actor& done) {
  return !racing || fiber.clocks.seen[static_cast<size_t>(done.lane)] >= done.clock;
}

/// The fiber's present clocks, not to be kept.
static std::shared_ptr<const Clocks> now(const Fiber& fiber) {
  return {std::shared_ptr<void>(), &fiber.clocks};
}

Actor as_thread(Fiber& fiber) {
  if (!racing) return {};
  return {fiber.tid, fiber.clocks.seen[static_cast<size_t>(fiber.tid)], false, now(fiber)};
}

Actor as_cp_async(Fiber& fiber) {
  if (!racing) return {};
  return {machine.threads + fiber.tid, fiber.copy_clock + 1, false, now(fiber)};
}

Actor as_copy(Fiber& fiber) {
  if (!racing) return {};
  const int lane = machine.next_copy_lane++ % kCopyLanes;
  auto clocks = std::make_shared<Clocks>(fiber.clocks);
  tick(fiber);
  return {first_copy_lane() + lane, ++machine.copy_clocks[lane], true, std::move(clocks)};
}

Actor as_wgmma(const Fiber& fiber, uint64_t number) {
  if (!racing) return {};
  const int lane = 2 * machine.threads + fiber.tid / 32;
  return {lane, static_cast<uint32_t>(number), true, {}};
}

// ---- shadow memory ----

/// An access to some bytes of a word.
struct Mark {
  uint64_t site;  // file << 16 | line
  uint32_t clock, wave;
  uint16_t lane;
  uint8_t bytes, access;  // of the asynchronous proxy: | kAsync
};
constexpr int kAsync = 4;
struct Page {
  Mark words[256][6];
};
static std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
static Page* page = nullptr;  // the latest one
static uintptr_t page_number = 0;

void race_begin_wave() {
  if (!racing) return;
  std::fill(std::begin(machine.copy_clocks), std::end(machine.copy_clocks), 0);
  page = nullptr;
  if (machine.wave == 1) pages.clear();
  for (const auto& block : machine.blocks) {
    const auto start = reinterpret_cast<uintptr_t>(block->smem) / 1024;
    for (uintptr_t i = start; i <= start + machine.config.smem / 1024; ++i) pages.erase(i);
    for (const auto& fiber : block->fibers) {
      fiber->clocks.seen.resize(static_cast<size_t>(first_copy_lane() + kCopyLanes));
      fiber->clocks.proxy.resize(fiber->clocks.seen.size());
      tick(*fiber);
    }
  }
}

static std::string text(const Mark& mark) {
  const int threads = machine.threads;
  std::string who = "an asynchronous copy";
  if (mark.wave != machine.wave)
    who = "another block's thread";
  else if (mark.lane < 2 * threads) {
    for (const auto& block : machine.blocks)
      for (const auto& fiber : block->fibers)
        if (fiber->tid == mark.lane % threads)
          who = where(*fiber) + (mark.lane < threads ? "" : "'s cp.async");
  } else if (mark.lane < first_copy_lane())
    who = emu::text("wgmma of warp %d", mark.lane - 2 * threads);
  const Site site{reinterpret_cast<const char*>(mark.site >> 16),
                  static_cast<int>(mark.site & 0xFFFF)};
  return std::string(mark.access & kWrite ? "write" : "read") + " by " + who + " at " + text(site);
}

static bool ordered(const Mark& earlier, const Clocks& clocks, int access) {
  const std::vector<uint32_t>* seen = &clocks.seen;
  if (earlier.wave != machine.wave) {
    const auto found = clocks.past.find(earlier.wave);
    if (found == clocks.past.end()) return false;
    seen = &found->second;
  } else if ((access & kAsync) && (earlier.access & kWrite) && !(earlier.access & kAsync)) {
    seen = &clocks.proxy;  // a plain write, now read or overwritten by an asynchronous unit
  }
  return earlier.lane < seen->size() && (*seen)[earlier.lane] >= earlier.clock;
}

static void mark_word(const Actor& actor, uintptr_t word, uint8_t bytes, int access) {
  if (page == nullptr || page_number != word >> 8) {
    page_number = word >> 8;
    std::unique_ptr<Page>& place = pages[page_number];
    if (place == nullptr) place = std::make_unique<Page>();
    page = place.get();
  }
  const Mark now{reinterpret_cast<uint64_t>(here.file) << 16 | static_cast<uint16_t>(here.line),
                 actor.clock,
                 machine.wave,
                 static_cast<uint16_t>(actor.lane),
                 bytes,
                 static_cast<uint8_t>(access)};
  Mark* place = nullptr;
  auto& marks = page->words[word & 255];
  for (Mark& mark : marks) {
    if (mark.bytes == 0) {
      if (place == nullptr) place = &mark;
      continue;
    }
    if (!(mark.bytes & bytes)) continue;
    const bool same = mark.lane == now.lane && mark.wave == now.wave;
    const bool covered = (mark.bytes & ~bytes) == 0;
    if (!((mark.access | access) & kWrite)) {
      if (same && covered) place = &mark;
      continue;
    }
    if (!same && !(mark.access & access & kAtomic) && !ordered(mark, *actor.clocks, access)) {
      const bool fence = (access & kAsync) && ordered(mark, *actor.clocks, 0);
      here = {};
      fail("%s: %s against %s", fence ? "no proxy fence between" : "race", text(now).c_str(),
           text(mark).c_str());
    }
    if (covered && (access & kWrite)) {
      mark.bytes = 0;
      if (place == nullptr) place = &mark;
    }
  }
  *(place != nullptr ? place : &marks[dice(6)]) = now;
}

void track(const void* address, size_t bytes, int access) {
  if (!racing || bytes == 0) return;
  const Actor own = machine.acting == nullptr ? as_thread(self()) : Actor{};
  const Actor& actor = machine.acting == nullptr ? own : *machine.acting;
  if (actor.async) access |= kAsync;
  const auto start = reinterpret_cast<uintptr_t>(address), end = start + bytes;
  for (uintptr_t word = start / 4; word <= (end - 1) / 4; ++word) {
    uint8_t mask = 15;
    if (word * 4 < start) mask &= static_cast<uint8_t>(15 << (start - word * 4));
    if (word * 4 + 4 > end) mask &= static_cast<uint8_t>(15 >> (word * 4 + 4 - end));
    mark_word(actor, word, mask, access);
  }
}

// ---- atomics and fences in global memory ----

struct Synchronised {
  uint32_t wave = 0;
  Clocks clocks;
};
static std::unordered_map<const void*, Synchronised> synchronised;

void thread_fence() {
  interleave();
  Fiber& fiber = self();
  acquire(fiber, fiber.acquired);
  release(fiber.fenced, fiber);
}

void atomic_access(const void* address, size_t bytes) {
  interleave();
  ++machine.idle;
  touch(address, bytes, kWrite | kAtomic);
  if (!racing) return;
  auto& [wave, clocks] = synchronised[address];
  if (wave > machine.wave) clocks = {};  // of an earlier launch
  if (wave < machine.wave) {
    clocks.past[wave] = std::move(clocks.seen);
    clocks.seen = clocks.proxy = {};
  }
  wave = machine.wave;
  self().acquired.join(clocks);
  clocks.join(self().fenced);
}

// ---- what the compiler inserts with -fsanitize=thread ----

extern "C" char __attribute__((visibility("hidden"))) __ehdr_start[], _end[];  // by the linker

/// Constants in this library, and the launch's arguments on the host's stack.
static bool harmless(const void* address) {
  const auto* p = static_cast<const char*>(address);
  return (p >= __ehdr_start && p < _end) ||
         (p >= machine.host_frame && p < machine.host_frame + 65536);
}

static void plain(const void* address, size_t bytes, int access, void* counter) {
  if (machine.current == nullptr || harmless(address)) return;
  Fiber& fiber = self();
  here = {static_cast<const char*>(counter), 0};
  if (on_stack(address)) {
    const auto* p = static_cast<const float*>(address);
    for (const auto& accumulator : warp_of(fiber).accumulators)
      if (const float* d = accumulator->d[fiber.lane]; p >= d && p < d + accumulator->count)
        fail("an accumulator of a wgmma in flight is touched");
    return;
  }
  const auto* p = static_cast<const unsigned char*>(address);
  const unsigned char* smem = fiber.block->smem;
  if (in_smem(p) && (p < smem || p + bytes > smem + machine.config.smem))
    fail("access outside the block's shared memory");
  touch(address, bytes, access);
}

}  // namespace emu

#define EMU_HOOK(name, bytes, access) \
  void __tsan_##name(void* p) { emu::plain(p, bytes, access, __builtin_return_address(0)); }
#define EMU_HOOKS(bytes)                             \
  EMU_HOOK(read##bytes, bytes, emu::kRead)           \
  EMU_HOOK(write##bytes, bytes, emu::kWrite)         \
  EMU_HOOK(unaligned_read##bytes, bytes, emu::kRead) \
  EMU_HOOK(unaligned_write##bytes, bytes, emu::kWrite)
#define EMU_RANGE_HOOK(name, access) \
  void __tsan_##name(void* p, size_t n) { emu::plain(p, n, access, __builtin_return_address(0)); }
extern "C" {
EMU_HOOKS(1)
EMU_HOOKS(2)
EMU_HOOKS(4)
EMU_HOOKS(8)
EMU_HOOKS(16)
EMU_RANGE_HOOK(read_range, emu::kRead)
EMU_RANGE_HOOK(write_range, emu::kWrite)
void __tsan_init() { emu::racing = true; }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
// Guards of function-local statics in host code.
int8_t __tsan_atomic8_load(const volatile int8_t* p, int) { return *p; }
}
