/// Fibers and what they wait for: warps, barriers of blocks and clusters, launches, deadlocks.
#include <dlfcn.h>
#include <ucontext.h>

#include <cstdarg>
#include <cstdio>
#include <numeric>

#include "state.h"

// AddressSanitizer's, where it is loaded: it must know of every change of stacks.
extern "C" {
__attribute__((weak)) void __sanitizer_start_switch_fiber(void** save, const void*, size_t);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void* saved, const void**, size_t*);
}

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emu {

Machine machine;
Site here{};

void at(const char* file, int line) { here = {file, line}; }

static std::string text(const char* format, va_list args) {
  char buffer[512];
  vsnprintf(buffer, sizeof buffer, format, args);
  return buffer;
}

std::string text(const char* format, ...) {
  va_list args;
  va_start(args, format);
  const std::string out = text(format, args);
  va_end(args);
  return out;
}

std::string text(Site site) {
  const auto last = [](const std::string& path) { return path.substr(path.rfind('/') + 1); };
  if (site.line != 0) return last(site.file) + ":" + std::to_string(site.line);
  Dl_info info{};
  if (dladdr(site.file, &info) == 0) return "?";
  const auto offset = static_cast<size_t>(site.file - static_cast<const char*>(info.dli_fbase));
  char line[512] = "?";
  if (FILE* pipe = popen(text("addr2line -e '%s' %#zx", info.dli_fname, offset - 1).c_str(), "r")) {
    if (fgets(line, sizeof line, pipe) == nullptr) line[0] = '?';
    pclose(pipe);
  }
  line[strcspn(line, " \n")] = 0;
  return last(line);
}

static std::string where(const Block& block) {
  return text("block (%u, %u, %u)", block.idx.x, block.idx.y, block.idx.z);
}
std::string where(const Fiber& fiber) {
  return where(*fiber.block) +
         text(" thread %d (warp %d lane %d)", fiber.index, fiber.warp, fiber.lane);
}

// ---- switching ----

static void fiber_main();

static void finish_switch(void* saved) {
  if (__sanitizer_finish_switch_fiber != nullptr)
    __sanitizer_finish_switch_fiber(saved, nullptr, nullptr);
}

/// Continues `to`; returns when something continues the caller. (swapcontext would make a system
/// call each time.)
static void switch_to(Fiber& to) {
  Fiber& from = machine.current != nullptr ? *machine.current : machine.host;
  const bool back = &to == &machine.host;
  from.site = here;
  machine.current = back ? nullptr : &to;
  threadIdx = to.thread_idx;
  if (!back) blockIdx = to.block->idx;
  if (__sanitizer_start_switch_fiber != nullptr)
    __sanitizer_start_switch_fiber(back || from.done ? nullptr : &from.fake_stack, to.stack,
                                   kStack);
  if (__builtin_setjmp(from.resume) == 0) {
    if (to.started || back) __builtin_longjmp(to.resume, 1);
    to.started = true;
    static ucontext_t fresh;
    getcontext(&fresh);
    fresh.uc_stack.ss_sp = to.stack;
    fresh.uc_stack.ss_size = kStack;
    makecontext(&fresh, fiber_main, 0);
    setcontext(&fresh);
  }
  const Fiber& now = machine.current != nullptr ? *machine.current : machine.host;
  finish_switch(now.fake_stack);
  here = now.site;
}

[[noreturn]] static void end_launch(const std::string& report) {
  machine.report = report + text(" (seed %zu)", static_cast<size_t>(machine.seed));
  if (machine.current == nullptr) throw std::runtime_error(machine.report);
  machine.failed = true;
  switch_to(machine.host);
  __builtin_unreachable();
}

void fail(const char* format, ...) {
  va_list args;
  va_start(args, format);
  std::string report = text(format, args);
  va_end(args);
  if (here.file != nullptr) report = text(here) + ": " + report;
  if (machine.current != nullptr && machine.acting == nullptr) report += ", " + where(self());
  end_launch(report);
}

static void act_once() {
  auto& operations = machine.operations;
  auto pick = operations.begin() + static_cast<std::ptrdiff_t>(dice(operations.size()));
  if (pick->chain != nullptr)
    pick = std::find_if(operations.begin(), pick,
                        [&](const Operation& other) { return other.chain == pick->chain; });
  const Operation now = std::move(*pick);
  operations.erase(pick);
  machine.idle = 0;
  const Site site = std::exchange(here, now.site);
  const Actor* const actor = std::exchange(machine.acting, &now.actor);
  now.act();
  machine.acting = actor;
  here = site;
}

void defer(const void* chain, Actor actor, std::function<void()> act) {
  machine.operations.push_back({chain, std::move(actor), here, std::move(act)});
  if (machine.mode == Machine::kEarly)
    while (!machine.operations.empty()) act_once();
}

/// Everybody waits for somebody: who, where, for what.
[[noreturn]] static void deadlock() {
  std::map<std::string, uint32_t> waiting;  // lanes
  std::string lacking;
  for (const auto& block : machine.blocks) {
    for (const auto& fiber : block->fibers)
      if (!fiber->done)
        waiting[where(*block) + text(" warp %2d waits for ", fiber->warp) +
                text(fiber->waits_for, fiber->detail[0], fiber->detail[1]) + " at " +
                text(fiber->site)] |= 1u << fiber->lane;
    for (const auto& [place, barrier] : block->mbarriers)
      if (!barrier.waiting.empty())
        lacking += text("\n  mbarrier %#x of ", addr_of(place)) + where(*block) +
                   text(": %u of %u arrivals and %lld bytes missing in phase %zu", barrier.pending,
                        barrier.count, static_cast<long long>(barrier.bytes),
                        static_cast<size_t>(barrier.phase));
  }
  std::string report = "deadlock:";
  for (const auto& [what, lanes] : waiting)
    report += "\n  " + what + text(" (%d lanes, mask %08x)", __builtin_popcount(lanes), lanes);
  end_launch(report + lacking + "\n");
}

/// Runs some ready thread; the current one continues when it is picked again.
static void reschedule() {
  auto& ready = machine.ready;
  while (machine.mode == Machine::kRandom && !machine.operations.empty() && dice(4) == 0)
    act_once();
  while (ready.empty()) {
    if (!machine.operations.empty())
      act_once();
    else if (machine.alive == 0)
      switch_to(machine.host);
    else
      deadlock();
  }
  std::swap(ready[dice(ready.size())], ready.back());
  Fiber* const to = ready.back();
  ready.pop_back();
  if (to != machine.current) switch_to(*to);
}

void block(const char* waits_for, unsigned a, unsigned b) {
  Fiber& fiber = self();
  fiber.blocked = true;
  fiber.waits_for = waits_for;
  fiber.detail[0] = a;
  fiber.detail[1] = b;
  reschedule();
}

static void wake(Fiber* fiber) {
  if (!fiber->blocked) return;
  fiber->blocked = false;
  machine.idle = 0;
  machine.ready.push_back(fiber);
}

void wake(std::vector<Fiber*>& fibers) {
  for (Fiber* fiber : fibers) wake(fiber);
  fibers.clear();
}

void pause() {
  if (++machine.idle > 100000 + 1000u * static_cast<unsigned>(machine.alive))
    fail("livelock: threads spin and nothing else happens");
  if (machine.ready.empty() && !machine.operations.empty()) act_once();
  machine.ready.push_back(&self());
  reschedule();
}

void interleave() {
  if (dice(8) != 0) return;
  machine.ready.push_back(&self());
  reschedule();
}

// ---- warps ----

int lane_id() { return self().lane; }

void* const* gather(const char* what, uint32_t mask, void* own) {
  static Collective complete;
  const Fiber& fiber = self();
  auto& collectives = warp_of(fiber).collectives;
  const int first = 32 * fiber.warp, lanes = static_cast<int>(fiber.block->fibers.size()) - first;
  if (lanes < 32) mask &= (1u << lanes) - 1;
  const uint32_t bit = 1u << fiber.lane;
  if (!(mask & bit)) fail("%s: the mask misses the calling lane", what);
  auto found = std::find_if(collectives.begin(), collectives.end(),
                            [=](const Collective& other) { return (other.mask & mask) != 0; });
  if (found == collectives.end())
    found = collectives.insert(found, {what, mask, 0, here, {}});
  else if (found->mask != mask || std::strcmp(found->what, what) != 0 ||
           found->site.line != here.line)
    fail("%s: the warp's other lanes are at %s, %s (masks %08x, %08x)", what, found->what,
         text(found->site).c_str(), mask, found->mask);
  found->own[fiber.lane] = own;
  found->arrived |= bit;
  if (found->arrived != mask) {
    block("the other lanes of its warp at a collective (mask %08x)", mask);
    return nullptr;
  }
  complete = *found;
  collectives.erase(found);
  for (int lane = 0; lane < std::min(lanes, 32); ++lane)
    if (mask & ~bit & 1u << lane)
      wake(fiber.block->fibers[static_cast<size_t>(first + lane)].get());
  return complete.own;
}

void sync_warp() {
  collective("syncwarp", ~0u, self(), [](auto of) {
    Clocks clocks;
    for (int lane = 0; lane < 32; ++lane)
      if (of(lane) != nullptr) release(clocks, *of(lane));
    for (int lane = 0; lane < 32; ++lane)
      if (of(lane) != nullptr) acquire(*of(lane), clocks);
  });
}

bool elect_one() {
  collective("elect", ~0u, self(), [](auto) {});
  return self().lane == 0;
}

// ---- barriers ----

void Barrier::end_phase() {
  ++phase;
  complete.join(arriving);
  for (Fiber* fiber : waiting) acquire(*fiber, complete);
  wake(waiting);
}

static void end_if_full(Block& block, int id) {
  NamedBarrier& barrier = block.barriers[id];
  if (barrier.arrived < barrier.threads) return;
  for (const auto& fiber : block.fibers) {
    const uint32_t lanes = barrier.lanes[fiber->warp];
    // One that arrived without waiting may have ended since.
    if (lanes == 0 || fiber->done || (lanes >> fiber->lane & 1)) continue;
    here = barrier.site;
    fail("barrier %d: of warp %d only the lanes %08x arrived", id, fiber->warp, lanes);
  }
  barrier.arrived = 0;
  barrier.end_phase();
}

void named_barrier(int id, int threads, bool wait) {
  interleave();
  Fiber& fiber = self();
  NamedBarrier& barrier = fiber.block->barriers[id];
  if (barrier.arrived == 0) {
    std::fill(std::begin(barrier.lanes), std::end(barrier.lanes), 0);
    barrier.arriving = barrier.complete = {};
  } else if (id != 0 && barrier.threads != threads) {
    fail("barrier %d: %d threads here, %d at %s", id, threads, barrier.threads,
         text(barrier.site).c_str());
  }
  uint32_t& lanes = barrier.lanes[fiber.warp];
  if (lanes >> fiber.lane & 1) fail("barrier %d: this thread has arrived already", id);
  lanes |= 1u << fiber.lane;
  ++barrier.arrived;
  barrier.threads = threads;
  barrier.site = here;
  release(barrier.arriving, fiber);
  const uint64_t phase = barrier.phase;
  end_if_full(*fiber.block, id);
  if (barrier.phase != phase)
    acquire(fiber, barrier.complete);
  else if (wait)
    await(
        barrier.waiting, [&] { return barrier.phase != phase; }, "barrier %u of %u threads",
        static_cast<unsigned>(id), static_cast<unsigned>(threads));
}

void sync_threads() { named_barrier(0, self().block->alive, true); }

void setmaxnreg(int registers, bool more) {
  sync_warp();
  Block& block = *self().block;
  Warp& warp = warp_of(self());
  if (self().lane == 0) {
    const int taken = registers - warp.registers;
    if (more ? taken < 0 : taken > 0)
      fail("setmaxnreg.%s %d, but the warp has %d", more ? "inc" : "dec", registers,
           warp.registers);
    await(
        block.wants_registers, [&] { return block.free_registers >= taken; },
        "%u registers a thread that others give back (%u there)", static_cast<unsigned>(registers),
        static_cast<unsigned>(block.free_registers));
    block.free_registers -= taken;
    warp.registers = registers;
    wake(block.wants_registers);
  }
  sync_warp();
}

uint32_t cluster_rank() { return self().block->rank; }
uint32_t cluster_size() { return static_cast<uint32_t>(self().block->cluster->blocks.size()); }

static void end_if_full(Cluster& cluster) {
  if (cluster.arrived < cluster.alive) return;
  cluster.arrived = 0;
  cluster.end_phase();
}

void cluster_arrive() {
  interleave();
  Fiber& fiber = self();
  if (std::exchange(fiber.cluster_arrived, true)) fail("cluster_arrive twice without cluster_wait");
  Cluster& cluster = *fiber.block->cluster;
  fiber.cluster_phase = cluster.phase;
  release(cluster.arriving, fiber);
  ++cluster.arrived;
  end_if_full(cluster);
}

void cluster_wait() {
  Fiber& fiber = self();
  if (!std::exchange(fiber.cluster_arrived, false)) fail("cluster_wait without cluster_arrive");
  Cluster& cluster = *fiber.block->cluster;
  await(
      cluster.waiting, [&] { return cluster.phase != fiber.cluster_phase; },
      "the cluster's barrier (%u of %u threads arrived)", static_cast<unsigned>(cluster.arrived),
      static_cast<unsigned>(cluster.alive));
  acquire(fiber, cluster.complete);
}

// ---- launching ----

static void fiber_main() {
  finish_switch(nullptr);
  Fiber& fiber = self();
  std::string thrown;
  try {
    (*machine.thread)();
  } catch (const std::exception& error) {
    thrown = error.what();
  }
  if (!thrown.empty()) fail("%s", thrown.c_str());
  leave(fiber);
  fiber.done = true;
  --machine.alive;
  Block& block = *fiber.block;
  NamedBarrier& barrier = block.barriers[0];  // sync_threads waits for living threads only
  barrier.threads = --block.alive;
  if (barrier.arrived > 0) end_if_full(block, 0);
  if (--block.cluster->alive > 0) end_if_full(*block.cluster);
  reschedule();
}

static void make_block(Cluster& cluster, uint3 idx) {
  const dim3 size = machine.config.block;
  const unsigned threads = size.x * size.y * size.z;
  Block& block = *machine.blocks.emplace_back(std::make_unique<Block>());
  block.idx = idx;
  block.cluster = &cluster;
  block.rank = static_cast<uint32_t>(cluster.blocks.size());
  block.smem = smem_slot(machine.blocks.size() - 1);
  block.alive = static_cast<int>(threads);
  block.warps.resize((threads + 31) / 32);
  for (Warp& warp : block.warps) warp.registers = std::min(65536 / block.alive, 255) & ~7;
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = *block.fibers.emplace_back(std::make_unique<Fiber>());
    fiber.block = &block;
    fiber.index = static_cast<int>(i);
    fiber.lane = fiber.index % 32;
    fiber.warp = fiber.index / 32;
    fiber.tid = machine.threads++;
    fiber.thread_idx = {i % size.x, i / size.x % size.y, i / size.x / size.y};
    fiber.stack = take_stack(static_cast<size_t>(fiber.tid));
    machine.ready.push_back(&fiber);
  }
  cluster.blocks.push_back(&block);
  cluster.alive += block.alive;
}

void launch(const Launch& config, const std::function<void()>& thread) {
  const auto count = [](const dim3& d) { return d.x * d.y * d.z; };
  const dim3 grid = config.grid, cluster = config.cluster;
  const dim3 across{grid.x / cluster.x, grid.y / cluster.y, grid.z / cluster.z};
  const char* const refused = count(config.block) == 0 || count(config.block) > 1024 ? "block size"
                              : config.smem > 227 * 1024         ? "shared memory"
                              : grid.y > 65535 || grid.z > 65535 ? "grid size"
                              : count(cluster) > 8 || count(across) * count(cluster) != count(grid)
                                  ? "cluster size"
                                  : nullptr;
  if (refused != nullptr)
    throw std::runtime_error(text("%s: refused by the emulator: %s", config.name, refused));
  here = {};
  machine.config = config;
  machine.thread = &thread;
  machine.host_frame = static_cast<const char*>(__builtin_frame_address(0));
  machine.failed = false;
  machine.wave = 0;
  blockDim = config.block;
  gridDim = grid;
  std::vector<uint32_t> order(count(across));
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), machine.random);
  const size_t resident =
      static_cast<size_t>(std::clamp(machine.resident, 1, static_cast<int>(64 / count(cluster))));
  for (size_t start = 0; start < order.size() && !machine.failed; start += resident) {
    ++machine.wave;
    machine.threads = 0;
    machine.idle = 0;
    for (size_t i = start; i < std::min(start + resident, order.size()); ++i) {
      Cluster& made = *machine.clusters.emplace_back(std::make_unique<Cluster>());
      const uint3 at{order[i] % across.x * cluster.x, order[i] / across.x % across.y * cluster.y,
                     order[i] / across.x / across.y * cluster.z};
      for (uint32_t rank = 0; rank < count(cluster); ++rank)
        make_block(made, {at.x + rank % cluster.x, at.y + rank / cluster.x % cluster.y,
                          at.z + rank / cluster.x / cluster.y});
    }
    machine.alive = machine.threads;
    race_begin_wave();
    reschedule();
    machine.acting = nullptr;  // a launch that failed may leave all this
    machine.ready.clear();
    machine.operations.clear();
    machine.blocks.clear();
    machine.clusters.clear();
  }
  if (machine.failed) throw std::runtime_error(std::string(config.name) + ": " + machine.report);
}

const char* run(const std::function<void()>& host) {
  static std::string report;
  try {
    machine.random.seed(machine.seed);
    host();
  } catch (const std::exception& error) {
    report = error.what();
    return report.c_str();
  }
  return nullptr;
}

}  // namespace emu

extern "C" void emu_configure(uint64_t seed, int mode, int resident) {
  emu::machine.seed = seed;
  emu::machine.mode = mode;
  emu::machine.resident = resident;
}
