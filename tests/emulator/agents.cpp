/// What runs beside the threads: mbarriers, cp.async, TMA and bulk copies.
///
/// An operation is recorded when it is issued and acts early, late or at random (Machine::mode).
/// Where it will write is poisoned at once: it may be overwritten at any time from then on.
#include "state.h"

namespace emu {

// ---- mbarriers ----

constexpr uint64_t kMbarrierBits = 0xB0B0B0B0C1C1C1C1;  // what an mbarrier's 8 bytes hold here

static Mbarrier& barrier_of(Block& block, uint32_t offset, uint32_t addr, Site site) {
  const auto found = block.mbarriers.find(offset);
  if (found == block.mbarriers.end())
    fail(text("shared memory %#x holds no initialised mbarrier", addr), site);
  uint64_t bits;
  std::memcpy(&bits, block.smem + offset, 8);
  if (bits != kMbarrierBits) fail(text("the mbarrier at %#x was overwritten", addr), site);
  return found->second;
}

Mbarrier& barrier_at(uint32_t addr, bool cluster, Site site, Block** owner) {
  Block* block = nullptr;
  const unsigned char* place = resolve(addr, 8, 8, cluster, site, &block);
  Mbarrier& barrier = barrier_of(*block, static_cast<uint32_t>(place - block->smem), addr, site);
  if (machine.current != nullptr && !initialised_for(self(), barrier))
    fail(text("race: nothing orders the init of mbarrier %#x before this use", addr), site);
  if (owner != nullptr) *owner = block;
  return barrier;
}

void check_counter(uint32_t bar, const Block* destination, Site site) {
  Block* block = nullptr;
  if (!barrier_at(bar, true, site, &block).fenced)
    fail(text("no fence_mbarrier_init between the init of mbarrier %#x and its use by a copy", bar),
         site);
  if (block != destination) fail("the mbarrier is in another block than the destination", site);
}

static void complete_if_done(Mbarrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.pending = barrier.count;
  barrier.complete.join(barrier.arriving);
  wake(barrier.waiting);
}

void mbar_init(uint32_t bar, uint32_t count, Site site) {
  unsigned char* place = resolve(bar, 8, 8, false, site);
  Fiber& fiber = self();
  const auto offset = static_cast<uint32_t>(place - fiber.block->smem);
  if (count == 0 || count >= 1u << 20) fail(text("mbarrier of %u arrivals", count), site);
  if (fiber.block->mbarriers.count(offset))
    fail(text("mbar_init of %#x, which is an mbarrier already", bar), site);
  track(as_thread(fiber), place, 8, kWrite, site);
  std::memcpy(place, &kMbarrierBits, 8);
  Mbarrier& barrier = fiber.block->mbarriers[offset];
  barrier.count = barrier.pending = count;
  barrier.owner = &fiber;
  barrier.init_clock = as_thread(fiber).clock;
}

void mbar_inval(uint32_t bar, Site site) {
  Mbarrier& barrier = barrier_at(bar, false, site);
  if (!barrier.waiting.empty()) fail("mbar_inval while threads wait there", site);
  poison(resolve(bar, 8, 8, false, site), 8);
  self().block->mbarriers.erase((bar & 0xFFFFFF) - kSmemBase);
}

static void arrive(Mbarrier& barrier, uint32_t bar, Site site) {
  if (barrier.pending == 0) fail(text("more arrivals at mbarrier %#x than its count", bar), site);
  --barrier.pending;
  complete_if_done(barrier);
}

void mbar_arrive(uint32_t bar, uint32_t expect_bytes, bool cluster, Site site) {
  interleave(site);
  Mbarrier& barrier = barrier_at(bar, cluster, site);
  release(barrier.arriving, self());
  barrier.bytes += expect_bytes;
  arrive(barrier, bar, site);
}

void mbar_expect_tx(uint32_t bar, uint32_t bytes, Site site) {
  barrier_at(bar, false, site).bytes += bytes;
}

bool mbar_try_wait(uint32_t bar, uint32_t phase, Site site) {
  Mbarrier& barrier = barrier_at(bar, false, site);
  if (phase > 1) fail(text("mbarrier parity %u", phase), site);
  if ((barrier.phase & 1) == phase) {
    pause(site);
    return false;
  }
  acquire(self(), barrier.complete);
  return true;
}

void mbar_wait(uint32_t bar, uint32_t phase, Site site) {
  if (phase > 1) fail(text("mbarrier parity %u", phase), site);
  interleave(site);
  Mbarrier* barrier = &barrier_at(bar, false, site);
  while ((barrier->phase & 1) == phase) {
    barrier->waiting.push_back(&self());
    block("mbarrier %#x, parity %u", bar, phase, site);
    barrier = &barrier_at(bar, false, site);
  }
  acquire(self(), barrier->complete);
}

static void fence_barriers() {
  for (auto& [offset, barrier] : self().block->mbarriers)
    if (barrier.owner == &self()) barrier.fenced = true;
}

void fence_mbarrier_init(Site site) {
  interleave(site);
  fence_barriers();
}

void fence_proxy_async(Site site) {
  interleave(site);
  fence_barriers();
  if (!racing) return;
  self().clocks.proxy = self().clocks.seen;
  tick(self());
}

// ---- cp.async ----

static void copy(Fiber& fiber, const Fiber::Copy& copy) {
  Actor actor = as_copy(fiber);
  track(actor, copy.src, static_cast<size_t>(copy.valid), kRead, copy.site);
  track(actor, copy.dst, static_cast<size_t>(copy.bytes), kWrite, copy.site);
  if (copy.valid > 0) std::memcpy(copy.dst, copy.src, static_cast<size_t>(copy.valid));
  std::memset(copy.dst + copy.valid, 0, static_cast<size_t>(copy.bytes - copy.valid));
}

void cp_async(uint32_t dst, const void* src, int bytes, uint32_t valid, Site site) {
  interleave(site);
  if (valid > static_cast<uint32_t>(bytes)) fail(text("cp.async of %u bytes", valid), site);
  const auto size = static_cast<size_t>(bytes);
  unsigned char* to = resolve(dst, size, bytes, false, site);
  if (valid > 0) check_global(src, valid, site);
  if (reinterpret_cast<uintptr_t>(src) % size != 0)
    fail(text("cp.async from an address that is not aligned to %d", bytes), site);
  const Fiber::Copy now{to, src, bytes, static_cast<int>(valid), site};
  poison(to, size);
  if (machine.mode == Machine::kEarly || (machine.mode == Machine::kRandom && dice(2) == 0))
    copy(self(), now);
  else
    self().copies.back().push_back(now);
}

void cp_async_commit(Site site) {
  interleave(site);
  self().copies.emplace_back();
}

static void finish_copies(Fiber& fiber, size_t groups) {
  for (size_t i = 0; i < groups; ++i) {
    for (const Fiber::Copy& pending : fiber.copies[i]) copy(fiber, pending);
    fiber.copies[i].clear();
  }
}

void cp_async_wait(int pending, Site site) {
  Fiber& fiber = self();
  interleave(site);
  const size_t committed = fiber.copies.size() - 1;
  if (committed <= static_cast<size_t>(pending)) return;
  const size_t groups = committed - static_cast<size_t>(pending);
  finish_copies(fiber, groups);
  fiber.copies.erase(fiber.copies.begin(),
                     fiber.copies.begin() + static_cast<std::ptrdiff_t>(groups));
  // Copies of later groups that acted already count as seen, too: a group is one epoch.
  if (!racing) return;
  observe(fiber.clocks, {machine.threads + fiber.tid, ++fiber.copy_clock, nullptr});
}

void cp_async_mbar_arrive(uint32_t bar, Site site) {
  Fiber& fiber = self();
  barrier_at(bar, false, site);
  defer(reinterpret_cast<uint64_t>(&fiber) | 1, &fiber, [=, &fiber] {
    finish_copies(fiber, fiber.copies.size());
    Mbarrier& barrier = barrier_of(*fiber.block, (bar & 0xFFFFFF) - kSmemBase, bar, site);
    if (racing)
      observe(barrier.arriving, {machine.threads + fiber.tid, ++fiber.copy_clock, nullptr});
    arrive(barrier, bar, site);
  });
}

// ---- copies that an mbarrier counts ----

static void complete_bytes(Block& block, uint32_t bar, size_t bytes, const Actor& actor,
                           Site site) {
  Mbarrier& barrier = barrier_of(block, (bar & 0xFFFFFF) - kSmemBase, bar, site);
  observe(barrier.arriving, actor);
  barrier.bytes -= static_cast<int64_t>(bytes);
  complete_if_done(barrier);
}

void deferred_load(std::vector<Piece> pieces, uint32_t bar,
                   std::function<void(const Actor&, const Piece&)> fill, Site site) {
  for (const Piece& piece : pieces) poison(piece.block->smem + piece.offset, piece.bytes);
  Actor actor = as_operation(self().clocks);
  tick(self());
  defer(0, nullptr, [=] {
    for (const Piece& piece : pieces) {
      track(actor, piece.block->smem + piece.offset, piece.bytes, kWrite | kAsync, site);
      fill(actor, piece);
      complete_bytes(*piece.block, bar, piece.bytes, actor, site);
    }
  });
}

static void check_bulk(const void* global, uint32_t bytes, Site site) {
  if (bytes == 0 || bytes % 16 != 0) fail(text("bulk copy of %u bytes", bytes), site);
  if (global != nullptr && reinterpret_cast<uintptr_t>(global) % 16 != 0)
    fail("bulk copy: the global address is not aligned to 16", site);
  if (global != nullptr) check_global(global, bytes, site);
}

/// A load of contiguous bytes.
static void load(uint32_t dst, const void* src, size_t bytes, int alignment, uint32_t bar,
                 Site site) {
  Block* block = nullptr;
  const unsigned char* to = resolve(dst, bytes, alignment, true, site, &block);
  check_counter(bar, block, site);
  deferred_load(
      {{block, static_cast<uint32_t>(to - block->smem), bytes}}, bar,
      [=](const Actor& actor, const Piece& piece) {
        track(actor, src, bytes, kRead | kAsync, site);
        std::memcpy(piece.block->smem + piece.offset, src, bytes);
      },
      site);
}

void bulk_load(uint32_t dst, const void* src, uint32_t bytes, uint32_t bar, Site site) {
  interleave(site);
  check_bulk(src, bytes, site);
  load(dst, src, bytes, 16, bar, site);
}

void bulk_copy_cluster(uint32_t dst, uint32_t src, uint32_t bytes, uint32_t bar, Site site) {
  interleave(site);
  check_bulk(nullptr, bytes, site);
  load(dst, resolve(src, bytes, 16, false, site), bytes, 16, bar, site);
}

void st_async(uint32_t addr, const void* from, int bytes, uint32_t bar, Site site) {
  interleave(site);
  Block* block = nullptr;
  const auto size = static_cast<size_t>(bytes);
  const unsigned char* to = resolve(addr, size, bytes, true, site, &block);
  check_counter(bar, block, site);
  const std::string value(static_cast<const char*>(from), size);
  deferred_load(
      {{block, static_cast<uint32_t>(to - block->smem), size}}, bar,
      [=](const Actor&, const Piece& piece) {
        std::memcpy(piece.block->smem + piece.offset, value.data(), size);
      },
      site);
}

// ---- bulk groups: copies out of shared memory ----

template <class T>
static void add(unsigned char* to, const unsigned char* from, size_t bytes) {
  for (size_t i = 0; i < bytes; i += sizeof(T)) {
    T a, b;
    std::memcpy(&a, to + i, sizeof(T));
    std::memcpy(&b, from + i, sizeof(T));
    a = static_cast<T>(static_cast<float>(a) + static_cast<float>(b));
    std::memcpy(to + i, &a, sizeof(T));
  }
}

void deferred_store(std::function<std::vector<Run>(const Actor&)> read, char element, Site site) {
  Fiber* fiber = &self();
  const auto group = fiber->bulk.back();
  const Actor reader = as_operation(fiber->clocks), writer = as_operation(fiber->clocks);
  tick(*fiber);
  ++group->unread;
  ++group->unfinished;
  group->reads.push_back(reader);
  group->writes.push_back(writer);
  const auto wake_waiter = [fiber] {
    if (fiber->waits_bulk) wake(fiber);
  };
  defer(0, nullptr, [=] {
    auto runs = std::make_shared<std::vector<Run>>(read(reader));
    --group->unread;
    wake_waiter();
    defer(0, nullptr, [=] {
      for (const Run& run : *runs) {
        const int atomic = element != 0 ? kAtomic : 0;
        track(writer, run.to, run.bytes.size(), kWrite | kAsync | atomic, site);
        if (element == 'f') add<float>(run.to, run.bytes.data(), run.bytes.size());
        if (element == 'h') add<__half>(run.to, run.bytes.data(), run.bytes.size());
        if (element == 'b') add<__nv_bfloat16>(run.to, run.bytes.data(), run.bytes.size());
        if (element == 0) std::memcpy(run.to, run.bytes.data(), run.bytes.size());
      }
      --group->unfinished;
      wake_waiter();
    });
  });
}

void bulk_store(void* dst, uint32_t src, uint32_t bytes, bool add, Site site) {
  interleave(site);
  check_bulk(dst, bytes, site);
  const unsigned char* from = resolve(src, bytes, 16, false, site);
  deferred_store(
      [=](const Actor& actor) {
        track(actor, from, bytes, kRead | kAsync, site);
        return std::vector<Run>{{static_cast<unsigned char*>(dst), {from, from + bytes}}};
      },
      add ? 'f' : 0, site);
}

void bulk_commit(Site site) {
  interleave(site);
  self().bulk.push_back(std::make_shared<Fiber::Group>());
}

void bulk_wait(int pending, bool only_read, Site site) {
  Fiber& fiber = self();
  const int committed = static_cast<int>(fiber.bulk.size()) - 1;
  for (int i = 0; i < committed - pending; ++i) {
    const auto group = fiber.bulk[static_cast<size_t>(i)];
    while ((only_read ? group->unread : group->unfinished) > 0) {
      fiber.waits_bulk = true;
      block("its bulk stores, all but %u groups", static_cast<unsigned>(pending), 0, site);
      fiber.waits_bulk = false;
    }
    group->waited = true;
    for (const Actor& actor : group->reads) observe(fiber.clocks, actor);
    if (only_read) continue;
    for (const Actor& actor : group->writes) observe(fiber.clocks, actor);
  }
}

void leave(Fiber& fiber) {
  for (const auto& group : fiber.bulk)
    if (!group->reads.empty() && !group->waited)
      fail("the thread ends, but nothing waited until its bulk stores had read shared memory",
           fiber.site);
  const Warp& warp = fiber.block->warps[static_cast<size_t>(fiber.warp)];
  if (!warp.accumulators.empty()) fail("the thread ends with a wgmma in flight", fiber.site);
  if (fiber.block->alive > 1) return;
  for (const auto& [offset, barrier] : fiber.block->mbarriers)
    if (barrier.bytes != 0)
      fail(text("the block ends while its mbarrier %#x still lacks %lld bytes", offset + kSmemBase,
                (long long)barrier.bytes),
           fiber.site);
}

}  // namespace emu
