/// Fibers and what they wait for: warps, barriers of blocks and clusters, launches, deadlocks.
#include <dlfcn.h>
#include <ucontext.h>

#include <iomanip>
#include <numeric>

#include "state.h"

// AddressSanitizer's, where it is loaded: it must know of every change of stacks. Without fake
// stacks (detect_stack_use_after_return) there is nothing to save.
extern "C" {
__attribute__((weak)) void __sanitizer_start_switch_fiber(void**, const void* stack, size_t);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
}

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emu {

Machine machine;

void at(const char* file, int line) { machine.site = {file, line}; }
int lane_id() { return self().lane; }
uint32_t cluster_rank() { return self().block->rank; }
uint32_t cluster_size() { return self().block->cluster->blocks.size(); }
Warp& warp_of(const Fiber& fiber) { return fiber.block->warps[fiber.warp]; }

std::string hex(uint64_t number) { return text("0x", std::hex, number); }

std::ostream& operator<<(std::ostream& out, Site site) {
  const auto name = [](const std::string& path) { return path.substr(path.rfind('/') + 1); };
  if (site.line != 0) return out << name(site.file) << ":" << site.line;
  Dl_info info{};
  if (dladdr(site.file, &info) == 0) return out << "?";
  const size_t offset = site.file - static_cast<const char*>(info.dli_fbase) - 1;
  char line[512] = "?";
  if (FILE* pipe = popen(text("addr2line -e '", info.dli_fname, "' ", hex(offset)).c_str(), "r")) {
    if (fgets(line, sizeof line, pipe) == nullptr) line[0] = '?';
    pclose(pipe);
  }
  line[strcspn(line, " \n")] = 0;
  return out << name(line);
}

std::ostream& operator<<(std::ostream& out, const Block& block) {
  return out << "block (" << block.idx.x << ", " << block.idx.y << ", " << block.idx.z << ")";
}

std::ostream& operator<<(std::ostream& out, const Fiber& fiber) {
  return out << *fiber.block << " thread " << fiber.index << " (warp " << fiber.warp << " lane "
             << fiber.lane << ")";
}

static void fiber_main();

static void finish_switch() {
  if (__sanitizer_finish_switch_fiber != nullptr)
    __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
}

/// Continues `to`; returns when something continues the caller. (swapcontext would make a system
/// call each time.)
static void switch_to(Fiber& to) {
  Fiber& from = machine.current != nullptr ? *machine.current : machine.host;
  const bool to_host = &to == &machine.host;
  from.site = machine.site;
  machine.site = to.site;
  machine.current = to_host ? nullptr : &to;
  threadIdx = to.thread_idx;
  if (!to_host) blockIdx = to.block->idx;
  if (__sanitizer_start_switch_fiber != nullptr)
    __sanitizer_start_switch_fiber(nullptr, to.stack, kStack);
  if (__builtin_setjmp(from.resume) == 0) {
    if (to.started || to_host) __builtin_longjmp(to.resume, 1);
    to.started = true;
    static ucontext_t fresh;
    getcontext(&fresh);
    fresh.uc_stack.ss_sp = to.stack;
    fresh.uc_stack.ss_size = kStack;
    makecontext(&fresh, fiber_main, 0);
    setcontext(&fresh);
  }
  finish_switch();
}

void report_failure(const std::string& what) {
  const std::string place = machine.site.file != nullptr ? text(machine.site, ": ") : "";
  const std::string who = machine.acting == nullptr ? text(", ", self()) : "";
  machine.report = text(place, what, who, " (seed ", machine.seed, ")");
  machine.failed = true;
  switch_to(machine.host);
  __builtin_unreachable();
}

/// Everybody waits for somebody: who, where, for what.
[[noreturn]] static void deadlock() {
  std::map<std::string, uint32_t> waiting;  // lanes
  std::ostringstream report;
  for (const Fiber* fiber : machine.fibers) {
    if (fiber->done) continue;
    char what[256];
    snprintf(what, sizeof what, fiber->waits_for.format, fiber->waits_for.a, fiber->waits_for.b);
    waiting[text(*fiber->block, " warp ", std::setw(2), fiber->warp, " waits for ", what, " at ",
                 fiber->site)] |= 1u << fiber->lane;
  }
  for (const auto& [what, lanes] : waiting)
    report << "\n  " << what << " (" << __builtin_popcount(lanes) << " lanes, mask " << std::hex
           << lanes << std::dec << ")";
  for (const auto& block : machine.blocks)
    for (const auto& [place, barrier] : block->mbarriers)
      if (!barrier.waiting.empty())
        report << "\n  mbarrier " << hex(addr_of(place)) << " of " << *block << ": "
               << barrier.arrived << " of " << barrier.expected << " arrivals, " << barrier.bytes
               << " bytes missing in phase " << barrier.phase << "\n";
  machine.site = {};
  fail("deadlock:", report.str());
}

static void act_once() {
  auto& chains = machine.chains;
  std::swap(chains[dice(chains.size())], chains.back());
  const Chain chain = chains.back();
  const Operation now = std::move(chain->front());
  chain->pop_front();
  if (chain->empty()) chains.pop_back();
  machine.idle = 0;
  const Site site = std::exchange(machine.site, now.site);
  const Actor* const actor = std::exchange(machine.acting, &now.actor);
  now.act();
  machine.acting = actor;
  machine.site = site;
}

void defer(const Chain& chain, Actor actor, std::function<void()> act) {
  if (chain->empty()) machine.chains.push_back(chain);
  chain->push_back({std::move(actor), machine.site, std::move(act)});
  while (machine.mode == Machine::kEarly && !machine.chains.empty()) act_once();
}

/// Runs some ready thread; the current one continues when it is picked again.
static void reschedule() {
  auto& ready = machine.ready;
  while (machine.mode == Machine::kRandom && !machine.chains.empty() && dice(4) == 0) act_once();
  while (ready.empty()) {
    if (!machine.chains.empty())
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

void wait_in(std::vector<Fiber*>& waiting, Wait wait) {
  waiting.push_back(&self());
  self().waits_for = wait;
  reschedule();
}

void wake(std::vector<Fiber*>& fibers) {
  machine.idle = 0;
  machine.ready.insert(machine.ready.end(), fibers.begin(), fibers.end());
  fibers.clear();
}

void interleave(bool always) {
  if (!always && dice(8) != 0) return;
  machine.ready.push_back(&self());
  reschedule();
}

void pause() {
  if (++machine.idle > 100000 + 1000 * machine.alive)
    fail("livelock: threads spin and nothing else happens");
  if (machine.ready.empty() && !machine.chains.empty()) act_once();
  interleave(true);
}

void* const* gather(const char* what, void* own) {
  static void* complete[32];
  const Fiber& fiber = self();
  Warp& warp = warp_of(fiber);
  const size_t lanes = std::min<size_t>(32, fiber.block->fibers.size() - 32 * fiber.warp);
  if (warp.arrived == 0) {
    warp.what = what;
    warp.site = machine.site;
  } else if (std::strcmp(warp.what, what) != 0 || warp.site.line != machine.site.line) {
    fail(what, ": the warp's other lanes are at ", warp.what, ", ", warp.site);
  }
  warp.own[fiber.lane] = own;
  warp.arrived |= 1u << fiber.lane;
  if (warp.arrived != ~0u >> (32 - lanes)) {
    wait_in(warp.meeting, {"the other lanes of its warp"});
    return nullptr;
  }
  warp.arrived = 0;
  std::copy(warp.own, warp.own + 32, complete);
  wake(warp.meeting);
  return complete;
}

void sync_warp() {
  collective("syncwarp", self(), [](auto of) {
    Clocks clocks;
    for (int lane = 0; lane < 32 && of(lane) != nullptr; ++lane) release(clocks, *of(lane));
    for (int lane = 0; lane < 32 && of(lane) != nullptr; ++lane) of(lane)->clocks.join(clocks);
  });
}

void Barrier::end_if_full() {
  if (arrived < expected || bytes != 0) return;
  arrived = 0;
  ++phase;
  complete.join(arriving);
  for (Fiber* fiber : waiting) fiber->clocks.join(complete);
  wake(waiting);
}

static void end_if_full(const Block& block, NamedBarrier& barrier) {
  if (barrier.arrived < barrier.expected) return;
  for (const auto& fiber : block.fibers) {
    const uint32_t lanes = barrier.lanes[fiber->warp];
    // One that arrived without waiting may have ended since.
    if (lanes != 0 && !(lanes >> fiber->lane & 1) && !fiber->done)
      fail("barrier ", &barrier - block.barriers, ": only some lanes of warp ", fiber->warp,
           " arrived (mask ", hex(lanes), ")");
  }
  barrier.end_if_full();
}

void named_barrier(int id, unsigned threads, bool wait) {
  interleave();
  Fiber& fiber = self();
  NamedBarrier& barrier = fiber.block->barriers[id];
  if (barrier.arrived == 0)
    barrier.arriving = barrier.complete = {}, std::fill_n(barrier.lanes, 32, 0);
  else if (id != 0 && barrier.expected != threads)
    fail("barrier ", id, ": ", threads, " threads here, ", barrier.expected, " before");
  uint32_t& lanes = barrier.lanes[fiber.warp];
  if (lanes >> fiber.lane & 1) fail("barrier ", id, ": this thread has arrived already");
  lanes |= 1u << fiber.lane;
  ++barrier.arrived;
  barrier.expected = threads;
  release(barrier.arriving, fiber);
  const uint64_t phase = barrier.phase;
  end_if_full(*fiber.block, barrier);
  if (barrier.phase != phase)
    fiber.clocks.join(barrier.complete);
  else if (wait)
    await(barrier.waiting, {"barrier %u of %u threads", static_cast<unsigned>(id), threads},
          [&] { return barrier.phase != phase; });
}

void sync_threads() { named_barrier(0, self().block->alive, true); }

void setmaxnreg(int registers, bool more) {
  sync_warp();
  Block& block = *self().block;
  Warp& warp = warp_of(self());
  if (self().lane == 0) {
    const int taken = registers - warp.registers;
    if (more ? taken < 0 : taken > 0)
      fail("setmaxnreg to ", registers, " registers, but the warp has ", warp.registers);
    await(block.wants_registers, {"%u registers a thread that others give back", unsigned(taken)},
          [&] { return block.free_registers >= taken; });
    block.free_registers -= taken;
    warp.registers = registers;
    wake(block.wants_registers);
  }
  sync_warp();
}

void cluster_arrive() {
  interleave();
  Fiber& fiber = self();
  if (std::exchange(fiber.cluster_arrived, true)) fail("cluster_arrive twice without cluster_wait");
  Cluster& cluster = *fiber.block->cluster;
  fiber.cluster_phase = cluster.phase;
  release(cluster.arriving, fiber);
  ++cluster.arrived;
  cluster.end_if_full();
}

void cluster_wait() {
  Fiber& fiber = self();
  if (!std::exchange(fiber.cluster_arrived, false)) fail("cluster_wait without cluster_arrive");
  Cluster& cluster = *fiber.block->cluster;
  await(cluster.waiting, {"the cluster's barrier"},
        [&] { return cluster.phase != fiber.cluster_phase; });
  fiber.clocks.join(cluster.complete);
}

static void fiber_main() {
  finish_switch();
  Fiber& fiber = self();
  std::string thrown;
  try {
    (*machine.thread)();
  } catch (const std::exception& error) {
    thrown = error.what();
  }
  if (!thrown.empty()) fail(thrown);
  leave(fiber);
  fiber.done = true;
  --machine.alive;
  Block& block = *fiber.block;
  block.barriers[0].expected = --block.alive;  // sync_threads waits for living threads only
  end_if_full(block, block.barriers[0]);
  --block.cluster->expected;
  block.cluster->end_if_full();
  reschedule();
}

static void make_block(Cluster& cluster, uint3 idx) {
  const dim3 size = machine.config.block;
  const unsigned threads = size.x * size.y * size.z;
  Block& block = *machine.blocks.emplace_back(std::make_unique<Block>());
  block.idx = idx;
  block.cluster = &cluster;
  block.rank = cluster.blocks.size();
  block.smem = take_smem(machine.blocks.size() - 1);
  block.alive = threads;
  block.warps.resize((threads + 31) / 32);
  for (Warp& warp : block.warps) warp.registers = std::min(65536 / threads, 255u) & ~7;
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = *block.fibers.emplace_back(std::make_unique<Fiber>());
    fiber.block = &block;
    fiber.index = i;
    fiber.lane = i % 32;
    fiber.warp = i / 32;
    fiber.tid = machine.threads++;
    fiber.thread_idx = {i % size.x, i / size.x % size.y, i / size.x / size.y};
    fiber.stack = take_stack(fiber.tid);
    machine.fibers.push_back(&fiber);
  }
  cluster.blocks.push_back(&block);
  cluster.expected += threads;
}

void launch(const Launch& config, const std::function<void()>& thread) {
  const auto count = [](const dim3& d) { return size_t{d.x} * d.y * d.z; };
  const dim3 grid = config.grid, size = config.cluster;
  const dim3 across{grid.x / size.x, grid.y / size.y, grid.z / size.z};
  if (count(config.block) == 0 || count(config.block) > 1024 || config.smem > 227 * 1024 ||
      grid.y > 65535 || grid.z > 65535 || count(size) > 8 ||
      count(across) * count(size) != count(grid))
    throw std::runtime_error(text(config.name, ": sizes that the driver refuses"));
  machine.config = config;
  machine.thread = &thread;
  machine.host_stack = static_cast<const char*>(__builtin_frame_address(0));
  machine.failed = false;
  machine.wave = 0;
  blockDim = config.block;
  gridDim = grid;
  std::vector<uint32_t> order(count(across));
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), machine.random);
  const size_t resident = std::clamp<size_t>(machine.resident, 1, 64 / count(size));
  for (size_t start = 0; start < order.size() && !machine.failed; start += resident) {
    ++machine.wave;
    machine.threads = machine.idle = 0;
    for (size_t i = start; i < std::min(start + resident, order.size()); ++i) {
      Cluster& cluster = *machine.clusters.emplace_back(std::make_unique<Cluster>());
      const uint3 first{order[i] % across.x * size.x, order[i] / across.x % across.y * size.y,
                        order[i] / across.x / across.y * size.z};
      for (uint32_t rank = 0; rank < count(size); ++rank)
        make_block(cluster, {first.x + rank % size.x, first.y + rank / size.x % size.y,
                             first.z + rank / size.x / size.y});
    }
    machine.alive = machine.threads;
    machine.ready = machine.fibers;
    race_begin_wave();
    reschedule();
    machine.acting = nullptr;  // a launch that failed leaves all this behind
    machine.fibers.clear();
    machine.chains.clear();
    machine.blocks.clear();
    machine.clusters.clear();
  }
  if (machine.failed) throw std::runtime_error(text(config.name, ": ", machine.report));
}

const char* run(const std::function<void()>& host) {
  static std::string report;
  machine.random.seed(machine.seed);
  try {
    host();
  } catch (const std::exception& error) {
    report = error.what();
    return report.c_str();
  }
  return nullptr;
}

}  // namespace emu

extern "C" void emu_configure(uint64_t seed, int mode, unsigned resident) {
  emu::machine.seed = seed;
  emu::machine.mode = static_cast<decltype(emu::machine.mode)>(mode);
  emu::machine.resident = resident;
}
