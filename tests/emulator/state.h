/// The emulator's inside: fibers, blocks, barriers and the asynchronous agents.
#pragma once

#include <ucontext.h>

#include <map>
#include <memory>
#include <random>
#include <unordered_map>
#include <vector>

#include "emulator.h"

namespace emu {

/// Whether the kernels were compiled with -fsanitize=thread, whose hooks are in race.cpp.
extern bool racing;

constexpr int kSmemMax = 227 * 1024;
constexpr int kTmaLanes = 64;
constexpr uint32_t kSmemBase = 1024;  // address of a block's first byte of shared memory

/// Vector clocks over the lanes of a wave (see Machine): what happened before, and what of that a
/// proxy fence made visible to the asynchronous units. Empty without race detection.
struct Clocks {
  std::vector<uint32_t> seen, proxy;
  // What is known of earlier waves (through atomics in global memory), by wave.
  std::shared_ptr<const std::map<uint32_t, std::vector<uint32_t>>> past;
  void join(const Clocks& other);
};

/// Who accesses memory: a thread or an asynchronous operation, as a lane of the clocks.
struct Actor {
  int lane = 0;
  uint32_t clock = 0;
  std::shared_ptr<Clocks> clocks;  // at issue
};

enum Access { kRead = 0, kWrite = 1, kAtomic = 2, kAsync = 4 };

struct Block;

struct Fiber {
  ucontext_t context;
  char* stack = nullptr;
  void* fake_stack = nullptr;  // of AddressSanitizer
  Block* block = nullptr;
  int index = 0, lane = 0, warp = 0, tid = 0;  // in the block, in the warp, ..., in the wave
  uint3 thread_idx{};
  bool done = false, blocked = false;
  const char* waits_for = nullptr;  // printf format of detail[0], detail[1]
  unsigned detail[2]{};
  Site site{};
  Clocks clocks, fenced, acquired;  // now; at the last __threadfence; by atomics since then

  struct Copy {
    unsigned char* dst;
    const void* src;
    int bytes, valid;
    Site site;
  };
  std::vector<std::vector<Copy>> copies{1};  // cp.async groups, the last one open
  uint32_t copy_clock = 0;
  struct Group {
    int unread = 0, unfinished = 0;
    bool waited = false;
    std::vector<Actor> reads, writes;
  };
  std::vector<std::shared_ptr<Group>> bulk{std::make_shared<Group>()};  // the last one open
  bool waits_bulk = false;
  bool registers_fenced = false;  // by wgmma_fence
  uint64_t cluster_phase = 0;
  bool cluster_arrived = false;
};

struct Mbarrier {
  uint32_t count = 0, pending = 0;
  int64_t bytes = 0;  // still to come
  uint64_t phase = 0;
  bool fenced = false;
  const Fiber* owner = nullptr;
  uint32_t init_clock = 0;
  Clocks arriving, complete;
  std::vector<Fiber*> waiting;
};

struct NamedBarrier {
  int threads = 0;
  std::vector<Fiber*> arrived, waiting;
  Clocks clocks;
  Site site{};
};

struct Collective {
  const char* what;
  void (*all)(Lanes);
  uint32_t mask, arrived;
  void* own[32];
  Fiber* fibers[32];
  Site site;
};

/// Accumulators of wgmmas in flight: their registers hold NaN until wgmma_wait.
struct Accumulator {
  float* d[32];
  int count;  // registers of a lane
  std::vector<float> values;
  uint64_t last;  // number of the newest wgmma on it
};

struct WgmmaCall {
  int n;
  uint64_t a, b;
  bool registers;
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
    int lane;
    uint64_t last;
  };
  std::vector<Operand> operands;
  std::vector<WgmmaCall> calls;
  std::vector<Fiber*> waiting;
};

struct Cluster {
  std::vector<Block*> blocks;
  int arrived = 0, alive = 0;
  uint64_t phase = 0;
  Clocks arriving, complete;
  std::vector<Fiber*> waiting;
};

struct Block {
  uint3 idx{};
  Cluster* cluster = nullptr;
  uint32_t rank = 0;
  int slot = 0;
  unsigned char* smem = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  NamedBarrier barriers[16];
  std::map<uint32_t, Mbarrier> mbarriers;  // by offset
  int alive = 0;
  int free_registers = 0;
  std::vector<Fiber*> wants_registers;
};

struct Agent {
  uint64_t chain;  // agents of one chain (other than 0) run in order
  const void* of;
  std::function<void()> act;
};

/// One launch. The clusters that run at the same time are a wave.
struct Machine {
  enum { kEarly, kLate, kRandom };
  uint64_t seed = 0;
  int mode = kRandom;  // when agents act
  int resident = 1;    // clusters in a wave
  std::mt19937_64 random;
  Launch config{};
  void (*thread)(const void*) = nullptr;
  const void* data = nullptr;
  ucontext_t main;
  void* main_fake_stack = nullptr;
  Fiber* current = nullptr;
  std::vector<Fiber*> ready;
  std::vector<Agent> agents;
  std::vector<std::unique_ptr<Cluster>> clusters;
  std::vector<std::unique_ptr<Block>> blocks;
  uint32_t wave = 0;
  int alive = 0, threads = 0;  // fibers of the wave
  uint64_t idle = 0;           // spins without anything else happening
  uint32_t tma_clocks[kTmaLanes]{};
  int next_tma_lane = 0;
  std::string report;
  bool failed = false;

  int lane_count() const { return 2 * threads + threads / 32 + 1 + kTmaLanes; }
};
extern Machine machine;

// ---- scheduler.cpp ----
/// Ends the launch with a report.
[[noreturn]] void fail(const std::string& what, Site site);
/// file:line; a site of line 0 is a program counter.
std::string text(Site site);
std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string where(const Fiber& fiber);
inline Fiber& self() { return *machine.current; }
inline Warp& my_warp() { return self().block->warps[self().warp]; }
inline uint64_t dice(uint64_t sides) { return machine.random() % sides; }
/// Blocks the running fiber until wake(); the format and its numbers are for the deadlock report.
void block(const char* waits_for, unsigned a, unsigned b, Site site);
void wake(Fiber* fiber);
void wake(std::vector<Fiber*>& fibers);
/// Perhaps gives way to another fiber.
void interleave(Site site);
void defer(uint64_t chain, const void* of, std::function<void()> act);

// ---- memory.cpp ----
unsigned char* smem_slot(int slot);
void poison(void* memory, size_t bytes);
/// Host address of `bytes` at a shared memory address; `owner` gets its block.
unsigned char* resolve(uint32_t addr, size_t bytes, int alignment, bool cluster, Site site,
                       Block** owner = nullptr);
/// Reports an access outside the buffers that the test named.
void check_global(const void* address, size_t bytes, Site site);
char* take_stack(int index);
constexpr size_t kStack = 256 * 1024;

// ---- race.cpp: nothing of this does anything unless racing ----
void race_begin_wave();
void race_begin_block(Block& block);
Actor as_thread(Fiber& fiber);
/// A new epoch of the fiber: what it does from now on is not covered by what it released so far.
void tick(Fiber& fiber);
Actor as_operation(const Clocks& clocks);  // TMA, bulk copies
Actor as_copy(Fiber& fiber);               // cp.async
Actor as_wgmma(Block& block, int warp);
int wgmma_lane(const Block& block, int warp);
void observe(Clocks& clocks, const Actor& done);
void release(Clocks& to, Fiber& fiber);
void acquire(Fiber& fiber, const Clocks& from);
void track(const Actor& actor, const void* address, size_t bytes, int access, Site site);
/// Whether `fiber` may use a barrier that another thread initialised.
bool initialised_for(const Fiber& fiber, const Mbarrier& barrier);

// ---- agents.cpp ----
Mbarrier& barrier_at(uint32_t addr, bool cluster, Site site, Block** owner = nullptr);
void leave(Fiber& fiber);  // checks at a thread's end

/// Bytes that an operation fills in shared memory of `block`.
struct Piece {
  Block* block;
  uint32_t offset;
  size_t bytes;
};
/// An operation that fills `pieces`, counted at the mbarrier at `bar` of each piece's block.
void deferred_load(std::vector<Piece> pieces, uint32_t bar,
                   std::function<void(const Actor&, const Piece&)> fill, Site site);
/// Checks the mbarrier of a load into `destination`.
void check_counter(uint32_t bar, const Block* destination, Site site);
/// A run of bytes for global memory.
struct Run {
  unsigned char* to;
  std::vector<unsigned char> bytes;
};
/// An operation of the running thread's bulk group: `read` fetches what is to be written;
/// element 'f', 'h', 'b': added to elements of that type (float, half, bf16); 0: stored.
void deferred_store(std::function<std::vector<Run>(const Actor&)> read, char element, Site site);

}  // namespace emu
