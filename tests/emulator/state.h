/// The emulator's inside: fibers, blocks, barriers and the asynchronous operations.
#pragma once

#include <array>
#include <list>
#include <map>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "emulator.h"

namespace emu {

constexpr uint32_t kSmemBase = 1024;  // address of a block's first byte of shared memory
constexpr int kCopyLanes = 64;
// Not a power of two, or the stacks' tops would all share the same few lines of the caches.
constexpr size_t kStack = 256 * 1024 + 4160;

/// Where in the kernel's source an operation stands; line 0: `file` is a program counter.
struct Site {
  const char* file;
  int line;
};

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
  bool async = false;                // its accesses go through the asynchronous proxy
  std::shared_ptr<Clocks> clocks{};  // at issue
};

struct Block;
struct Fiber;

/// What threads wait at: phases that arrivals (and bytes still to come) end.
struct Barrier {
  unsigned expected = 0, arrived = 0;
  int64_t bytes = 0;
  uint64_t phase = 0;
  Clocks arriving, complete;
  std::vector<Fiber*> waiting;
  void end_if_full();
};
struct NamedBarrier : Barrier {
  uint32_t lanes[32]{};  // that arrived, by warp
};
struct Mbarrier : Barrier {
  bool fenced = false;
  const Fiber* owner = nullptr;  // who initialised it
  Actor init{};
};
struct Cluster : Barrier {
  std::vector<Block*> blocks;
};

/// What a thread waits for, in a deadlock's report: a printf format of the two numbers.
struct Wait {
  const char* format;
  unsigned a = 0, b = 0;
};

/// An operation beside the threads, to act later.
struct Operation {
  Actor actor;
  Site site;
  std::function<void()> act;
};
using Chain = std::shared_ptr<std::list<Operation>>;  // those of one chain act in order
inline Chain make_chain() { return std::make_shared<std::list<Operation>>(); }

/// Copies that a thread waits for together: their reads [0] and their writes [1].
struct Group {
  bool used = false;
  int unfinished[2]{}, waited = 0;  // waited: for how many of the two
  Clocks done[2];
};
using Groups = std::vector<std::shared_ptr<Group>>;  // the last one open

struct Fiber {
  void* resume[5];  // of __builtin_setjmp
  unsigned char* stack = nullptr;
  Block* block = nullptr;
  int index = 0, lane = 0, warp = 0, tid = 0;  // in the block, in the warp, ..., in the wave
  uint3 thread_idx{};
  bool started = false, done = false;
  Wait waits_for{};
  Site site{};
  Clocks clocks;  // now
  struct {
    Clocks fenced, acquired;  // at the last __threadfence; since then
  } atomics;
  Groups copies[2]{{std::make_shared<Group>()}, {std::make_shared<Group>()}};  // cp.async; bulk
  std::vector<Fiber*> waits_copies;
  Chain chain = make_chain();  // of its cp.asyncs
  uint32_t copy_clock = 0;
  bool registers_fenced = false;  // by wgmma_fence
  uint64_t cluster_phase = 0;
  bool cluster_arrived = false;
};

/// Accumulators of wgmmas in flight: their registers hold NaN until wgmma_wait.
struct Accumulator {
  float* d[32];
  int count;                  // registers of a lane
  std::vector<float> values;  // of all lanes
  uint64_t last;              // number of the newest wgmma on it
};

struct Warp {
  // The lanes that meet.
  const char* what = nullptr;
  Site site{};
  uint32_t arrived = 0;
  void* own[32]{};
  std::vector<Fiber*> meeting;
  int registers = 0;  // a thread
  // wgmma: operations issued and executed, group ends, accumulators and A registers in flight
  uint64_t issued = 0, executed = 0;
  std::vector<uint64_t> groups;
  std::list<Accumulator> accumulators;
  struct Operand {
    const uint32_t* registers;
    uint32_t values[4];
    uint64_t last;
  };
  std::vector<Operand> operands;
  struct Call {
    int n;
    uint64_t a, b;
    bool accumulate;
    bool operator==(const Call&) const = default;
  };
  std::vector<Call> calls;
  Chain chain = make_chain();
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
  unsigned alive = 0;
  int free_registers = 0;
  std::vector<Fiber*> wants_registers;
};

/// One launch. The clusters that run at the same time are a wave.
struct Machine {
  enum { kEarly, kLate, kRandom } mode = kRandom;  // when operations act
  uint64_t seed = 0;
  unsigned resident = 1;  // clusters in a wave
  std::mt19937_64 random;
  Launch config{};
  const std::function<void()>* thread = nullptr;
  Fiber host;                        // the launching code, between waves
  const char* host_stack = nullptr;  // from there on it holds the arguments
  Fiber* current = nullptr;
  Site site{};                        // of what is done now
  const Actor* acting = nullptr;      // the operation that acts now, or null: the current thread
  std::vector<Fiber*> fibers, ready;  // of the wave; that can go on
  std::vector<Chain> chains;          // with operations to act
  std::vector<std::unique_ptr<Cluster>> clusters;
  std::vector<std::unique_ptr<Block>> blocks;
  uint32_t wave = 0;
  int alive = 0, threads = 0;  // fibers of the wave
  int idle = 0;                // spins without anything else happening
  uint32_t copy_clocks[kCopyLanes]{};
  int next_copy_lane = 0;
  std::string report;
  bool failed = false;
};
extern Machine machine;
inline Fiber& self() { return *machine.current; }
inline size_t dice(size_t sides) { return machine.random() % sides; }

std::ostream& operator<<(std::ostream& out, Site site);
std::ostream& operator<<(std::ostream& out, const Block& block);
std::ostream& operator<<(std::ostream& out, const Fiber& fiber);
std::string hex(uint64_t number);
template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}
/// Ends the launch with a report.
[[noreturn]] void report_failure(const std::string& what);
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  report_failure(text(parts...));
}
Warp& warp_of(const Fiber& fiber);
/// Blocks the current thread until its list is woken.
void wait_in(std::vector<Fiber*>& waiting, Wait wait);
void wake(std::vector<Fiber*>& fibers);
template <class Done>
void await(std::vector<Fiber*>& waiting, Wait wait, Done done) {
  while (!done()) wait_in(waiting, wait);
}
/// Gives way to another thread: now and then, or always.
void interleave(bool always = false);
void pause();  // in spin loops
/// Has `act` done by `actor` early, late or at random (Machine::mode).
void defer(const Chain& chain, Actor actor, std::function<void()> act);

void poison(void* memory, size_t bytes);
unsigned char* take_smem(size_t slot);
unsigned char* take_stack(size_t index);
bool on_stack(const void* address);
bool in_smem(const void* address);
Block& block_of(const unsigned char* smem);
uint32_t addr_of(const unsigned char* smem);
/// An access of the acting operation or the current thread: bounds of global memory, races.
enum Access { kRead = 0, kWrite = 1, kAtomic = 2 };
void touch(const void* address, size_t bytes, int access);

void race_begin_wave();
void track(const void* address, size_t bytes, int access);  // touch in shared memory
/// A new epoch of the fiber: what it does from now on is not covered by what it released so far.
void tick(Fiber& fiber);
void release(Clocks& to, Fiber& fiber);
void observe(Clocks& clocks, const Actor& done);
bool knows(const Fiber& fiber, const Actor& done);
Actor as_thread(Fiber& fiber);
Actor as_cp_async(Fiber& fiber);
Actor as_copy(Fiber& fiber);  // TMA, bulk copies
Actor as_wgmma(Fiber& fiber, uint64_t number);

void leave(const Fiber& fiber);  // checks at a thread's end

}  // namespace emu
