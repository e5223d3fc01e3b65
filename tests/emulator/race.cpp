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

using Lanes = std::vector<uint32_t>;
static void join(Lanes& to, const Lanes& from) {
  if (to.size() < from.size()) to.resize(from.size());
  for (size_t i = 0; i < from.size(); ++i) to[i] = std::max(to[i], from[i]);
}

void Clocks::join(const Clocks& other) {
  emu::join(seen, other.seen);
  emu::join(proxy, other.proxy);
  for (const auto& [wave, clocks] : other.past) emu::join(past[wave], clocks);
}

void tick(Fiber& fiber) {
  if (racing) ++fiber.clocks.seen[fiber.tid];
}

void release(Clocks& to, Fiber& fiber) {
  if (racing) to.join(fiber.clocks);
  tick(fiber);
}

void observe(Clocks& clocks, const Actor& done) {
  if (!racing) return;
  clocks.seen.resize(std::max<size_t>(clocks.seen.size(), done.lane + 1));
  clocks.seen[done.lane] = std::max(clocks.seen[done.lane], done.clock);
}

bool knows(const Fiber& fiber, const Actor& done) {
  return !racing || fiber.clocks.seen[done.lane] >= done.clock;
}

Actor as_thread(Fiber& fiber) {
  if (!racing) return {};
  const std::shared_ptr<Clocks> now{std::shared_ptr<void>(), &fiber.clocks};  // not to be kept
  return {fiber.tid, fiber.clocks.seen[fiber.tid], false, now};
}

static Actor issued_by(Fiber& fiber, int lane, uint32_t clock, bool async) {
  if (!racing) return {};
  const auto clocks = std::make_shared<Clocks>(fiber.clocks);
  tick(fiber);
  return {lane, clock, async, clocks};
}

Actor as_cp_async(Fiber& fiber) {
  return issued_by(fiber, machine.threads + fiber.tid, ++fiber.copy_clock, false);
}

Actor as_wgmma(Fiber& fiber, uint64_t number) {
  return issued_by(fiber, 2 * machine.threads + fiber.tid / 32, number, true);
}

Actor as_copy(Fiber& fiber) {
  const int lane = machine.next_copy_lane++ % kCopyLanes;
  return issued_by(fiber, first_copy_lane() + lane, ++machine.copy_clocks[lane], true);
}

/// An access to some bytes of a word.
struct Mark {
  uint64_t site;  // file << 16 | line
  uint32_t clock, wave;
  uint16_t lane;
  uint8_t bytes, access;  // of the asynchronous proxy: | kAsync
};
constexpr int kAsync = 4;
using Word = Mark[6];
using Page = std::array<Word, 256>;
static std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
static std::pair<uintptr_t, Page*> latest;  // page

static std::unordered_map<const void*, std::map<uint32_t, Lanes>> released;  // by atomics; of waves

void race_begin_wave() {
  if (!racing) return;
  std::fill(std::begin(machine.copy_clocks), std::end(machine.copy_clocks), 0);
  latest = {};
  if (machine.wave == 1) {
    pages.clear();
    released.clear();
  }
  for (const auto& block : machine.blocks)
    for (size_t offset = 0; offset <= machine.config.smem; offset += 1024)
      pages.erase(reinterpret_cast<uintptr_t>(block->smem + offset) / 1024);
  for (Fiber* fiber : machine.fibers) {
    fiber->clocks.seen.resize(first_copy_lane() + kCopyLanes);
    fiber->clocks.proxy.resize(first_copy_lane() + kCopyLanes);
    tick(*fiber);
  }
}

static Word& word_at(uintptr_t number) {
  if (latest.second == nullptr || latest.first != number / 256) {
    std::unique_ptr<Page>& page = pages[number / 256];
    if (page == nullptr) page = std::make_unique<Page>();
    latest = {number / 256, page.get()};
  }
  return (*latest.second)[number % 256];
}

static std::string describe(const Mark& mark) {
  const int threads = machine.threads;
  const auto who = [&]() -> std::string {
    if (mark.wave != machine.wave) return "another block's thread";
    if (mark.lane < threads) return text(*machine.fibers[mark.lane]);
    if (mark.lane < 2 * threads) return text(*machine.fibers[mark.lane - threads], "'s cp.async");
    if (mark.lane >= first_copy_lane()) return "an asynchronous copy";
    return text("a wgmma of warp ", mark.lane - 2 * threads);
  };
  const Site site{reinterpret_cast<const char*>(mark.site >> 16), static_cast<uint16_t>(mark.site)};
  return text(mark.access & kWrite ? "write by " : "read by ", who(), " at ", site);
}

static bool ordered(const Mark& earlier, const Clocks& clocks, int access) {
  const Lanes* seen = &clocks.seen;
  if (earlier.wave != machine.wave) {
    const auto found = clocks.past.find(earlier.wave);
    if (found == clocks.past.end()) return false;
    seen = &found->second;
  } else if ((access & kAsync) && (earlier.access & kWrite) && !(earlier.access & kAsync)) {
    seen = &clocks.proxy;  // a plain write, now read or overwritten by an asynchronous unit
  }
  return earlier.lane < seen->size() && (*seen)[earlier.lane] >= earlier.clock;
}

static void mark(Word& word, const Mark& now, const Clocks& clocks) {
  Mark* place = nullptr;
  for (Mark& mark : word) {
    if (mark.bytes == 0) {
      if (place == nullptr) place = &mark;
      continue;
    }
    if (!(mark.bytes & now.bytes)) continue;
    const bool same = mark.lane == now.lane && mark.wave == now.wave;
    const bool covered = (mark.bytes & ~now.bytes) == 0;
    if (!((mark.access | now.access) & kWrite)) {
      if (same && covered) place = &mark;
      continue;
    }
    if (!same && !(mark.access & now.access & kAtomic) && !ordered(mark, clocks, now.access)) {
      const bool fence = (now.access & kAsync) && ordered(mark, clocks, 0);
      machine.site = {};
      fail(fence ? "no proxy fence between: " : "race: ", describe(now), " against ",
           describe(mark));
    }
    if (covered && (now.access & kWrite)) {
      mark.bytes = 0;
      if (place == nullptr) place = &mark;
    }
  }
  *(place != nullptr ? place : &word[dice(6)]) = now;
}

void track(const void* address, size_t bytes, int access) {
  if (!racing || bytes == 0) return;
  const Actor own = machine.acting == nullptr ? as_thread(self()) : Actor{};
  const Actor& actor = machine.acting == nullptr ? own : *machine.acting;
  if (actor.async) access |= kAsync;
  Mark now{reinterpret_cast<uint64_t>(machine.site.file) << 16 | uint16_t(machine.site.line),
           actor.clock,
           machine.wave,
           uint16_t(actor.lane),
           0,
           uint8_t(access)};
  const auto start = reinterpret_cast<uintptr_t>(address), end = start + bytes;
  for (uintptr_t word = start / 4; word <= (end - 1) / 4; ++word) {
    now.bytes = 15;
    if (word * 4 < start) now.bytes &= 15 << (start - word * 4);
    if (word * 4 + 4 > end) now.bytes &= 15 >> (word * 4 + 4 - end);
    mark(word_at(word), now, *actor.clocks);
  }
}

void thread_fence() {
  interleave();
  self().clocks.join(self().atomics.acquired);
  release(self().atomics.fenced, self());
}

void atomic_access(const void* address, size_t bytes) {
  interleave();
  ++machine.idle;
  touch(address, bytes, kWrite | kAtomic);
  auto& [fenced, acquired] = self().atomics;
  auto& here = released[address];
  for (const auto& [wave, seen] : here)
    join(wave == machine.wave ? acquired.seen : acquired.past[wave], seen);
  join(here[machine.wave], fenced.seen);
  for (const auto& [wave, seen] : fenced.past) join(here[wave], seen);
}

extern "C" char __attribute__((visibility("hidden"))) __ehdr_start[], _end[];  // by the linker

/// Constants in this library, and the launch's arguments on the host's stack.
static bool harmless(const void* address) {
  const auto* p = static_cast<const char*>(address);
  return (p >= __ehdr_start && p < _end) ||
         (p >= machine.host_stack && p < machine.host_stack + 65536);
}

/// An access by the kernel's own code.
static void plain(const void* address, size_t bytes, int access, void* counter) {
  if (machine.current == nullptr || harmless(address)) return;
  const Fiber& fiber = self();
  machine.site = {static_cast<const char*>(counter), 0};
  if (on_stack(address)) {
    const auto* p = static_cast<const float*>(address);
    for (const Accumulator& accumulator : warp_of(fiber).accumulators)
      if (const float* d = accumulator.d[fiber.lane]; p >= d && p < d + accumulator.count)
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

// What the compiler inserts with -fsanitize=thread.
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
