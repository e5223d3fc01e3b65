/// The emulator's inside: fibers, blocks, barriers and the asynchronous operations.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "emulator.h"

namespace emu {

constexpr uint32_t kSmemBase = 1024;  // address of a block's first byte of shared memory
constexpr int kCopyLanes = 64;
// Not a power of two, or the stacks' tops would all share the same few lines of the caches.
constexpr size_t kStack = 256 * 1024 + 4160;

/// Vector clocks over the lanes of a wave (see Machine): what happened before, and what of that a
/// proxy fence made visible to the asynchronous units. Empty without race detection.
struct Clocks {
  std::vector<uint32_t> seen, proxy;
  std::map<uint32_t, std::vector<uint32_t>> past;  // of earlier waves, learnt through atomics
  void join(const Clocks& other);
};

/// Who accesses memory: a thread or an asynchronous operation, as a lane of the clocks.
struct Actor {
  int lane = 0;
  uint32_t clock = 0;
  bool async = false;                      // its accesses go through the asynchronous proxy
  std::shared_ptr<const Clocks> clocks{};  // at issue
};

struct Block;
struct Fiber;

/// What threads wait at: phases that arrivals end.
struct Barrier {
  uint64_t phase = 0;
  Clocks arriving, complete;
  std::vector<Fiber*> waiting;
  void end_phase();
};

struct NamedBarrier : Barrier {
  int threads = 0, arrived = 0;
  uint32_t lanes[32]{};  // that arrived, by warp
  Site site{};
};

struct Mbarrier : Barrier {
  uint32_t count = 0, pending = 0;
  int64_t bytes = 0;  // still to come
  bool fenced = false;
  const Fiber* owner = nullptr;  // who initialised it
  Actor init{};
};

struct Cluster : Barrier {
  std::vector<Block*> blocks;
  int arrived = 0, alive = 0;
};

struct Fiber {
  void* resume[5];  // of __builtin_setjmp
  char* stack = nullptr;
  void* fake_stack = nullptr;  // of AddressSanitizer
  Block* block = nullptr;
  int index = 0, lane = 0, warp = 0, tid = 0;  // in the block, in the warp, ..., in the wave
  uint3 thread_idx{};
  bool started = false, done = false, blocked = false;
  const char* waits_for = nullptr;  // printf format of detail[0], detail[1]
  unsigned detail[2]{};
  Site site{};
  Clocks clocks, fenced, acquired;  // now; at the last __threadfence; by atomics since then

  struct Copy {
    unsigned char* to;
    const void* from;
    size_t bytes, valid;
    Site site;
  };
  std::deque<std::vector<Copy>> copies{1};  // cp.async groups, the last one open
  uint32_t copy_clock = 0;
  /// Bulk stores: their reads of shared memory [0] and their writes [1].
  struct Group {
    int unfinished[2]{};
    Clocks done[2];
    bool used = false, waited = false;
  };
  std::vector<std::shared_ptr<Group>> bulk{std::make_shared<Group>()};  // the last one open
  std::vector<Fiber*> waits_bulk;
  bool registers_fenced = false;  // by wgmma_fence
  uint64_t cluster_phase = 0;
  bool cluster_arrived = false;
};

/// Lanes of a warp that meet.
struct Collective {
  const char* what;
  uint32_t mask, arrived = 0;
  Site site;
  void* own[32]{};
};

/// Accumulators of wgmmas in flight: their registers hold NaN until wgmma_wait.
struct Accumulator {
  float* d[32];
  int count;  // registers of a lane
  std::vector<float> values;
  uint64_t last;  // number of the newest wgmma on it
};

struct Warp {
  std::vector<Collective> collectives;
  int registers = 0;  // a thread
  // wgmma: operations issued and executed, group ends, accumulators and A registers in flight
  uint64_t issued = 0, executed = 0;
  std::vector<uint64_t> groups;
  std::vector<std::unique_ptr<Accumulator>> accumulators;
  struct Operand {
    const uint32_t* registers;
    uint32_t values[4];
    uint64_t last;
  };
  std::vector<Operand> operands;
  struct Call {
    int n;
    uint64_t a, b;
    bool operator==(const Call&) const = default;
  };
  std::vector<Call> calls;
  std::vector<Fiber*> waiting;
};

struct Block {
  uint3 idx{};
  Cluster* cluster = nullptr;
  uint32_t rank = 0;
  unsigned char* smem = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  NamedBarrier barriers[16];
  std::map<const unsigned char*, Mbarrier> mbarriers;
  int alive = 0, free_registers = 0;
  std::vector<Fiber*> wants_registers;
};

/// An operation beside the threads, to act later.
struct Operation {
  const void* chain;  // those of one chain act in order; null: of none
  Actor actor;
  Site site;
  std::function<void()> act;
};

/// One launch. The clusters that run at the same time are a wave.
struct Machine {
  enum { kEarly, kLate, kRandom };
  uint64_t seed = 0;
  int mode = kRandom;  // when operations act
  int resident = 1;    // clusters in a wave
  std::mt19937_64 random;
  Launch config{};
  const std::function<void()>* thread = nullptr;
  Fiber host;                        // the launching code, between waves
  const char* host_frame = nullptr;  // its stack from there on holds the arguments
  Fiber* current = nullptr;
  const Actor* acting = nullptr;  // the operation that acts now, or null: the current thread
  std::vector<Fiber*> ready;
  std::vector<Operation> operations;
  std::vector<std::unique_ptr<Cluster>> clusters;
  std::vector<std::unique_ptr<Block>> blocks;
  uint32_t wave = 0;
  int alive = 0, threads = 0;  // fibers of the wave
  uint64_t idle = 0;           // spins without anything else happening
  uint32_t copy_clocks[kCopyLanes]{};
  int next_copy_lane = 0;
  std::string report;
  bool failed = false;
};
extern Machine machine;

// ---- scheduler.cpp ----
std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string text(Site site);
std::string where(const Fiber& fiber);
inline Fiber& self() { return *machine.current; }
inline Warp& warp_of(const Fiber& fiber) {
  return fiber.block->warps[static_cast<size_t>(fiber.warp)];
}
inline size_t dice(size_t sides) { return machine.random() % sides; }
/// Blocks the current thread until wake(); the format and its numbers are for the deadlock report.
void block(const char* waits_for, unsigned a = 0, unsigned b = 0);
void wake(std::vector<Fiber*>& fibers);
/// Waits, woken through `waiting`, until done().
template <class Done>
void await(std::vector<Fiber*>& waiting, Done done, const char* format, unsigned a = 0,
           unsigned b = 0) {
  while (!done()) {
    waiting.push_back(&self());
    block(format, a, b);
  }
}
/// Gives way to another thread: always, in spin loops; now and then.
void pause();
void interleave();
/// Has `act` done by `actor` early, late or at random (Machine::mode).
void defer(const void* chain, Actor actor, std::function<void()> act);

// ---- memory.cpp ----
void poison(void* memory, size_t bytes);
unsigned char* smem_slot(size_t slot);
char* take_stack(size_t index);
bool on_stack(const void* address);
bool in_smem(const void* address);
Block& block_of(const unsigned char* smem);
uint32_t addr_of(const unsigned char* smem);
/// Where `bytes` at a shared memory address lie; `cluster`: perhaps in another block.
unsigned char* resolve(uint32_t addr, size_t bytes, size_t alignment, bool cluster = false);
/// An access of the acting operation or the current thread: bounds of global memory, races.
void touch(const void* address, size_t bytes, int access);

// ---- race.cpp: nothing of this does anything without race detection ----
enum Access { kRead = 0, kWrite = 1, kAtomic = 2 };
void race_begin_wave();
void track(const void* address, size_t bytes, int access);
/// A new epoch of the fiber: what it does from now on is not covered by what it released so far.
void tick(Fiber& fiber);
void release(Clocks& to, Fiber& fiber);
void acquire(Fiber& fiber, const Clocks& from);
void observe(Clocks& clocks, const Actor& done);
bool knows(const Fiber& fiber, const Actor& done);
Actor as_thread(Fiber& fiber);
Actor as_cp_async(Fiber& fiber);
Actor as_copy(Fiber& fiber);                          // TMA, bulk copies
Actor as_wgmma(const Fiber& fiber, uint64_t number);  // of its warp; without clocks

// ---- agents.cpp ----
/// A run of bytes that moves between shared memory and memory of either kind.
struct Run {
  unsigned char *shared, *other;
  size_t bytes;
};
/// Fills shared memory at `to` (poisoned from now on) with `bytes`, then with the runs; counted at
/// the mbarrier `bar` of the same block.
void counted_load(unsigned char* to, std::vector<unsigned char> bytes, std::vector<Run> runs,
                  uint32_t bar);
/// Stores the runs, in the thread's bulk group; with `add` elements are added to what is there.
using Add = void (*)(unsigned char* to, const unsigned char* from, size_t bytes);
void grouped_store(std::vector<Run> runs, Add add);
template <class T>
void add_elements(unsigned char* to, const unsigned char* from, size_t bytes) {
  for (size_t i = 0; i < bytes; i += sizeof(T)) {
    T a, b;
    std::memcpy(&a, to + i, sizeof(T));
    std::memcpy(&b, from + i, sizeof(T));
    a = static_cast<T>(static_cast<float>(a) + static_cast<float>(b));
    std::memcpy(to + i, &a, sizeof(T));
  }
}
void leave(Fiber& fiber);  // what happens and is checked at a thread's end

}  // namespace emu
