/// Fibers and what they wait for: launches, warps, barriers of blocks and clusters, deadlocks.
#include <dlfcn.h>

#include <cstdarg>
#include <cstdio>
#include <numeric>

#include "state.h"

// AddressSanitizer's, where it is loaded: it must know of every change of stacks.
extern "C" {
__attribute__((weak)) void __sanitizer_start_switch_fiber(void** save, const void* bottom,
                                                          size_t size);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void* saved, const void**, size_t*);
}

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emu {

Machine machine;

std::string text(const char* format, ...) {
  char buffer[512];
  va_list args;
  va_start(args, format);
  vsnprintf(buffer, sizeof buffer, format, args);
  va_end(args);
  return buffer;
}

std::string text(Site site) {
  const auto last = [](const std::string& path) { return path.substr(path.rfind('/') + 1); };
  if (site.line != 0) return last(site.file) + ":" + std::to_string(site.line);
  Dl_info info{};  // `file` is an address in the code
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

std::string where(const Fiber& fiber) {
  return text("block (%u, %u, %u) thread %d (warp %d lane %d)", fiber.block->idx.x,
              fiber.block->idx.y, fiber.block->idx.z, fiber.index, fiber.warp, fiber.lane);
}

// ---- switching ----

static void start_switch(void** save, const void* bottom) {
  if (__sanitizer_start_switch_fiber != nullptr)
    __sanitizer_start_switch_fiber(save, bottom, kStack);
}

static void finish_switch(void* saved) {
  if (__sanitizer_finish_switch_fiber != nullptr)
    __sanitizer_finish_switch_fiber(saved, nullptr, nullptr);
}

static void enter(Fiber* fiber) {
  machine.current = fiber;
  threadIdx = fiber->thread_idx;
  blockIdx = fiber->block->idx;
}

static void to_main() {
  start_switch(nullptr, nullptr);
  setcontext(&machine.main);
}

[[noreturn]] void fail(const std::string& what, Site site) {
  const std::string at = site.file != nullptr ? text(site) + ": " : "";
  const std::string who = machine.current != nullptr ? ", " + where(self()) : "";
  machine.report = at + what + who + text(" (seed %llu)", (unsigned long long)machine.seed);
  if (machine.current == nullptr) throw std::runtime_error(machine.report);
  machine.failed = true;
  to_main();
  __builtin_unreachable();
}

static void act_once() {
  auto& agents = machine.agents;
  size_t pick = dice(agents.size());
  if (const uint64_t chain = agents[pick].chain; chain != 0)
    for (size_t i = 0; i < pick; ++i)
      if (agents[i].chain == chain && agents[i].of == agents[pick].of) pick = i;
  const std::function<void()> act = std::move(agents[pick].act);
  agents.erase(agents.begin() + static_cast<std::ptrdiff_t>(pick));
  machine.idle = 0;
  act();
}

void defer(uint64_t chain, const void* of, std::function<void()> act) {
  machine.agents.push_back({chain, of, std::move(act)});
  if (machine.mode == Machine::kEarly)
    while (!machine.agents.empty()) act_once();
}

/// Everybody waits for somebody: who, where, for what.
[[noreturn]] static void deadlock() {
  std::map<std::string, std::vector<const Fiber*>> waiting;
  for (const auto& block : machine.blocks)
    for (const auto& fiber : block->fibers)
      if (!fiber->done)
        waiting[text("block (%u, %u, %u) warp %2d", block->idx.x, block->idx.y, block->idx.z,
                     fiber->warp) +
                " waits for " + text(fiber->waits_for, fiber->detail[0], fiber->detail[1]) +
                " at " + text(fiber->site)]
            .push_back(fiber.get());
  std::string report = "deadlock:";
  for (const auto& [what, fibers] : waiting) {
    uint32_t lanes = 0;
    for (const Fiber* fiber : fibers) lanes |= 1u << fiber->lane;
    report += "\n  " + what + text(" (%zu lanes, mask %08x)", fibers.size(), lanes);
  }
  for (const auto& block : machine.blocks)
    for (const auto& [offset, barrier] : block->mbarriers)
      if (!barrier.waiting.empty())
        report += text(
            "\n  mbarrier %#x of block (%u, %u, %u): %u of %u arrivals and %lld bytes "
            "missing in phase %llu",
            offset + kSmemBase, block->idx.x, block->idx.y, block->idx.z, barrier.pending,
            barrier.count, (long long)barrier.bytes, (unsigned long long)barrier.phase);
  machine.current = nullptr;
  machine.report = report + text("\n(seed %llu)", (unsigned long long)machine.seed);
  machine.failed = true;
  to_main();
  __builtin_unreachable();
}

/// Runs some ready fiber; the running one continues when it is picked again.
static void reschedule() {
  Fiber* from = machine.current;
  while (machine.mode == Machine::kRandom && !machine.agents.empty() && dice(4) == 0) act_once();
  while (machine.ready.empty()) {
    if (!machine.agents.empty())
      act_once();
    else if (machine.alive == 0)
      to_main();
    else
      deadlock();
  }
  const size_t pick = dice(machine.ready.size());
  Fiber* to = machine.ready[pick];
  machine.ready[pick] = machine.ready.back();
  machine.ready.pop_back();
  if (to == from) return;
  enter(to);
  start_switch(from->done ? nullptr : &from->fake_stack, to->stack);
  swapcontext(&from->context, &to->context);
  finish_switch(from->fake_stack);
}

void block(const char* waits_for, unsigned a, unsigned b, Site site) {
  Fiber& fiber = self();
  fiber.blocked = true;
  fiber.waits_for = waits_for;
  fiber.detail[0] = a;
  fiber.detail[1] = b;
  fiber.site = site;
  reschedule();
}

void wake(Fiber* fiber) {
  if (!fiber->blocked) return;
  fiber->blocked = false;
  machine.idle = 0;
  machine.ready.push_back(fiber);
}

void wake(std::vector<Fiber*>& fibers) {
  for (Fiber* fiber : fibers) wake(fiber);
  fibers.clear();
}

void pause(Site site) {
  if (++machine.idle > 100000 + 1000u * static_cast<unsigned>(machine.alive))
    fail("livelock: threads spin and nothing else happens", site);
  self().site = site;
  if (machine.ready.empty() && !machine.agents.empty()) act_once();
  machine.ready.push_back(&self());
  reschedule();
}

void interleave(Site site) {
  if (dice(8) != 0) return;
  self().site = site;
  machine.ready.push_back(&self());
  reschedule();
}

// ---- warps ----

int lane_id() { return self().lane; }

void collective(const char* what, uint32_t mask, void* own, void (*all)(Lanes), Site site) {
  Fiber& fiber = self();
  Warp& warp = my_warp();
  const int lanes = static_cast<int>(fiber.block->fibers.size()) - 32 * fiber.warp;
  if (lanes < 32) mask &= (1u << lanes) - 1;
  if (!(mask >> fiber.lane & 1)) fail(text("%s: the mask misses the calling lane", what), site);
  for (size_t i = 0; i < warp.collectives.size(); ++i) {
    Collective& other = warp.collectives[i];
    if ((other.mask & mask) == 0) continue;
    if (other.mask != mask || other.all != all || other.site.line != site.line)
      fail(text("%s: the warp's other lanes are at %s, ", what, other.what) + text(other.site) +
               text(" (masks %08x, %08x)", mask, other.mask),
           site);
    other.own[fiber.lane] = own;
    other.fibers[fiber.lane] = &fiber;
    other.arrived |= 1u << fiber.lane;
    if (other.arrived == mask) {
      const Collective complete = other;
      warp.collectives.erase(warp.collectives.begin() + static_cast<std::ptrdiff_t>(i));
      all(complete.own);
      for (Fiber* waiting : complete.fibers)
        if (waiting != nullptr && waiting != &fiber) wake(waiting);
      return;
    }
    return block("the other lanes of its warp at a collective (mask %08x)", mask, 0, site);
  }
  Collective first{what, all, mask, 1u << fiber.lane, {}, {}, site};
  first.own[fiber.lane] = own;
  first.fibers[fiber.lane] = &fiber;
  if (first.arrived == mask) return all(first.own);
  warp.collectives.push_back(first);
  block("the other lanes of its warp at a collective (mask %08x)", mask, 0, site);
}

void sync_warp(uint32_t mask, Site site) {
  collective(
      "syncwarp", mask, &self(),
      [](Lanes lanes) {
        if (!racing) return;
        Clocks clocks;
        for (void* lane : lanes)
          if (lane != nullptr) release(clocks, *static_cast<Fiber*>(lane));
        for (void* lane : lanes)
          if (lane != nullptr) acquire(*static_cast<Fiber*>(lane), clocks);
      },
      site);
}

bool elect_one(Site site) {
  collective("elect", ~0u, nullptr, [](Lanes) {}, site);
  return self().lane == 0;
}

uint32_t ballot(bool predicate, uint32_t mask, Site site) {
  uint32_t own = predicate;
  collective(
      "ballot", mask, &own,
      [](Lanes lanes) {
        uint32_t votes = 0;
        for (int i = 0; i < 32; ++i)
          if (lanes[i] != nullptr) votes |= *static_cast<uint32_t*>(lanes[i]) << i;
        for (void* lane : lanes)
          if (lane != nullptr) *static_cast<uint32_t*>(lane) = votes;
      },
      site);
  return own;
}

// ---- barriers ----

static void complete(Block& block, NamedBarrier& barrier, int id) {
  int lanes[32]{};
  for (const Fiber* fiber : barrier.arrived) ++lanes[fiber->warp];
  for (const Fiber* fiber : barrier.arrived) {
    const size_t first = 32u * static_cast<unsigned>(fiber->warp);
    int alive = 0;
    for (size_t i = first; i < std::min(first + 32, block.fibers.size()); ++i) {
      const Fiber* lane = block.fibers[i].get();
      // One that arrived without waiting may have ended since.
      alive += !lane->done || std::find(barrier.arrived.begin(), barrier.arrived.end(), lane) !=
                                  barrier.arrived.end();
    }
    if (lanes[fiber->warp] != alive)
      fail(text("barrier %d: only %d of the %d lanes of warp %d arrived", id, lanes[fiber->warp],
                alive, fiber->warp),
           barrier.site);
  }
  for (Fiber* fiber : barrier.waiting) acquire(*fiber, barrier.clocks);
  wake(barrier.waiting);
  barrier = {};
}

void named_barrier(int id, int threads, bool wait, Site site) {
  Fiber& fiber = self();
  interleave(site);
  NamedBarrier& barrier = fiber.block->barriers[id];
  if (id != 0 && !barrier.arrived.empty() && barrier.threads != threads)
    fail(text("barrier %d: %d threads here, %d at ", id, threads, barrier.threads) +
             text(barrier.site),
         site);
  barrier.threads = threads;
  barrier.site = site;
  release(barrier.clocks, fiber);
  barrier.arrived.push_back(&fiber);
  if (wait) barrier.waiting.push_back(&fiber);
  if (static_cast<int>(barrier.arrived.size()) >= threads)
    complete(*fiber.block, barrier, id);
  else if (wait)
    block("barrier %u of %u threads", static_cast<unsigned>(id), static_cast<unsigned>(threads),
          site);
}

void sync_threads(Site site) { named_barrier(0, self().block->alive, true, site); }

void setmaxnreg(int registers, bool more, Site site) {
  sync_warp(~0u, site);
  Block& block = *self().block;
  if (self().lane == 0) {
    Warp& warp = my_warp();
    if (more ? registers < warp.registers : registers > warp.registers)
      fail(text("setmaxnreg.%s %d, but the warp has %d", more ? "inc" : "dec", registers,
                warp.registers),
           site);
    while (block.free_registers < registers - warp.registers) {
      block.wants_registers.push_back(&self());
      emu::block("%u registers a thread that others give back (%u there)",
                 static_cast<unsigned>(registers), static_cast<unsigned>(block.free_registers),
                 site);
    }
    block.free_registers -= registers - warp.registers;
    warp.registers = registers;
    wake(block.wants_registers);
  }
  sync_warp(~0u, site);
}

uint32_t cluster_rank() { return self().block->rank; }
uint32_t cluster_size() { return static_cast<uint32_t>(self().block->cluster->blocks.size()); }

static void complete(Cluster& cluster) {
  cluster.arrived = 0;
  ++cluster.phase;
  cluster.complete.join(cluster.arriving);
  wake(cluster.waiting);
}

void cluster_arrive(Site site) {
  Fiber& fiber = self();
  interleave(site);
  if (fiber.cluster_arrived) fail("cluster_arrive twice without cluster_wait", site);
  fiber.cluster_arrived = true;
  Cluster& cluster = *fiber.block->cluster;
  fiber.cluster_phase = cluster.phase;
  release(cluster.arriving, fiber);
  if (++cluster.arrived == cluster.alive) complete(cluster);
}

void cluster_wait(Site site) {
  Fiber& fiber = self();
  if (!fiber.cluster_arrived) fail("cluster_wait without cluster_arrive", site);
  Cluster& cluster = *fiber.block->cluster;
  while (cluster.phase == fiber.cluster_phase) {
    cluster.waiting.push_back(&fiber);
    block("the cluster's barrier (%u of %u threads arrived)",
          static_cast<unsigned>(cluster.arrived), static_cast<unsigned>(cluster.alive), site);
  }
  fiber.cluster_arrived = false;
  acquire(fiber, cluster.complete);
}

// ---- launching ----

static void fiber_main() {
  finish_switch(nullptr);
  Fiber& fiber = self();
  std::string thrown;
  try {
    machine.thread(machine.data);
  } catch (const std::exception& error) {
    thrown = error.what();
  }
  if (!thrown.empty()) fail(thrown, {nullptr, 0});
  leave(fiber);
  fiber.done = true;
  --machine.alive;
  Block& block = *fiber.block;
  NamedBarrier& barrier = block.barriers[0];  // sync_threads waits for living threads only
  if (--block.alive > 0 && static_cast<int>(barrier.arrived.size()) == block.alive)
    complete(block, barrier, 0);
  if (--block.cluster->alive > 0 && block.cluster->arrived == block.cluster->alive)
    complete(*block.cluster);
  reschedule();
}

static void make_block(Cluster* cluster, uint3 idx, uint32_t rank) {
  const dim3 size = machine.config.block;
  const int threads = static_cast<int>(size.x * size.y * size.z);
  auto block = std::make_unique<Block>();
  block->idx = idx;
  block->cluster = cluster;
  block->rank = rank;
  block->slot = static_cast<int>(machine.blocks.size());
  block->smem = smem_slot(block->slot);
  block->alive = threads;
  block->warps.resize(static_cast<size_t>(threads + 31) / 32);
  for (Warp& warp : block->warps) warp.registers = std::min(65536 / threads, 255) & ~7;
  for (int i = 0; i < threads; ++i) {
    auto fiber = std::make_unique<Fiber>();
    fiber->block = block.get();
    fiber->index = i;
    fiber->lane = i % 32;
    fiber->warp = i / 32;
    fiber->tid = machine.threads++;
    const unsigned u = static_cast<unsigned>(i);
    fiber->thread_idx = {u % size.x, u / size.x % size.y, u / size.x / size.y};
    fiber->stack = take_stack(fiber->tid);
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack;
    fiber->context.uc_stack.ss_size = kStack;
    fiber->context.uc_link = nullptr;
    makecontext(&fiber->context, fiber_main, 0);
    fiber->context.uc_stack.ss_size = 0;  // or AddressSanitizer clears its marks at every switch
    machine.ready.push_back(fiber.get());
    block->fibers.push_back(std::move(fiber));
  }
  cluster->blocks.push_back(block.get());
  cluster->alive += threads;
  machine.blocks.push_back(std::move(block));
}

static void run_wave() {
  machine.alive = machine.threads;
  machine.idle = 0;
  race_begin_wave();
  for (const auto& block : machine.blocks) race_begin_block(*block);
  const size_t pick = dice(machine.ready.size());
  Fiber* first = machine.ready[pick];
  machine.ready.erase(machine.ready.begin() + static_cast<std::ptrdiff_t>(pick));
  enter(first);
  start_switch(&machine.main_fake_stack, first->stack);
  swapcontext(&machine.main, &first->context);
  finish_switch(machine.main_fake_stack);
  machine.current = nullptr;
}

void launch(const Launch& config, void (*thread)(const void*), const void* data) {
  const auto count = [](const dim3& d) { return d.x * d.y * d.z; };
  const dim3 grid = config.grid, cluster = config.cluster;
  const std::string refused = std::string(config.name) + ": refused by the emulator: ";
  if (count(config.block) == 0 || count(config.block) > 1024)
    throw std::runtime_error(refused + "block size");
  if (config.smem > static_cast<size_t>(kSmemMax))
    throw std::runtime_error(refused + "shared memory");
  if (count(cluster) > 8 || grid.x % cluster.x || grid.y % cluster.y || grid.z % cluster.z)
    throw std::runtime_error(refused + "cluster size");
  if (grid.y > 65535 || grid.z > 65535) throw std::runtime_error(refused + "grid size");
  machine.config = config;
  machine.thread = thread;
  machine.data = data;
  machine.failed = false;
  machine.wave = 0;
  blockDim = config.block;
  gridDim = grid;
  std::vector<uint32_t> order(count(grid) / count(cluster));
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), machine.random);
  const size_t resident = std::max<size_t>(
      1, std::min<size_t>(static_cast<size_t>(machine.resident), 64 / count(cluster)));
  for (size_t start = 0; start < order.size() && !machine.failed; start += resident) {
    ++machine.wave;
    machine.threads = 0;
    for (size_t i = start; i < std::min(start + resident, order.size()); ++i) {
      const dim3 across{grid.x / cluster.x, grid.y / cluster.y, grid.z / cluster.z};
      const uint3 at{order[i] % across.x * cluster.x, order[i] / across.x % across.y * cluster.y,
                     order[i] / across.x / across.y * cluster.z};
      machine.clusters.push_back(std::make_unique<Cluster>());
      for (uint32_t rank = 0; rank < count(cluster); ++rank)
        make_block(machine.clusters.back().get(),
                   {at.x + rank % cluster.x, at.y + rank / cluster.x % cluster.y,
                    at.z + rank / cluster.x / cluster.y},
                   rank);
    }
    run_wave();
    machine.ready.clear();
    machine.agents.clear();
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
