/// What runs beside the threads: mbarriers, cp.async, bulk copies.
///
/// An operation is recorded when it is issued and acts early, late or at random (Machine::mode).
/// Where it will write is poisoned at once: it may be overwritten at any time from then on.
#include "state.h"

namespace emu {

// ---- mbarriers ----

constexpr uint64_t kMbarrierBits = 0xB0B0B0B0C1C1C1C1;  // what an mbarrier's 8 bytes hold here

static Mbarrier& barrier_at(const unsigned char* place) {
  auto& barriers = block_of(place).mbarriers;
  const auto found = barriers.find(place);
  if (found == barriers.end())
    fail("shared memory %#x holds no initialised mbarrier", addr_of(place));
  if (std::memcmp(place, &kMbarrierBits, 8) != 0)
    fail("the mbarrier at %#x was overwritten", addr_of(place));
  return found->second;
}

/// For the current thread.
static Mbarrier& barrier_at(uint32_t addr, bool cluster = false) {
  Mbarrier& barrier = barrier_at(resolve(addr, 8, 8, cluster));
  if (!knows(self(), barrier.init))
    fail("race: nothing orders the init of mbarrier %#x before this use", addr);
  return barrier;
}

static void end_if_full(Mbarrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  barrier.pending = barrier.count;
  barrier.end_phase();
}

static void arrive(Mbarrier& barrier) {
  if (barrier.pending == 0) fail("more arrivals at an mbarrier than its count");
  --barrier.pending;
  end_if_full(barrier);
}

void mbar_init(uint32_t bar, uint32_t count) {
  Fiber& fiber = self();
  unsigned char* const place = resolve(bar, 8, 8);
  if (count == 0 || count >= 1u << 20) fail("mbarrier of %u arrivals", count);
  const auto [made, fresh] = fiber.block->mbarriers.try_emplace(place);
  if (!fresh) fail("mbar_init of %#x, which is an mbarrier already", bar);
  track(place, 8, kWrite);
  std::memcpy(place, &kMbarrierBits, 8);
  Mbarrier& barrier = made->second;
  barrier.count = barrier.pending = count;
  barrier.owner = &fiber;
  barrier.init = as_thread(fiber);
}

void mbar_arrive(uint32_t bar, uint32_t expect_bytes, bool cluster) {
  interleave();
  Mbarrier& barrier = barrier_at(bar, cluster);
  release(barrier.arriving, self());
  barrier.bytes += expect_bytes;
  arrive(barrier);
}

static bool passed(uint32_t bar, uint32_t parity) {
  if (parity > 1) fail("mbarrier parity %u", parity);
  return (barrier_at(bar).phase & 1) != parity;
}

bool mbar_try_wait(uint32_t bar, uint32_t parity) {
  const bool done = passed(bar, parity);
  if (done)
    acquire(self(), barrier_at(bar).complete);
  else
    pause();
  return done;
}

void mbar_wait(uint32_t bar, uint32_t parity) {
  interleave();
  Mbarrier& barrier = barrier_at(bar);
  await(
      barrier.waiting, [=] { return passed(bar, parity); }, "mbarrier %#x, parity %u", bar, parity);
  acquire(self(), barrier.complete);
}

void fence_mbarrier_init() {
  interleave();
  for (auto& [place, barrier] : self().block->mbarriers)
    if (barrier.owner == &self()) barrier.fenced = true;
}

void fence_proxy_async() {
  fence_mbarrier_init();
  self().clocks.proxy = self().clocks.seen;
  tick(self());
}

// ---- cp.async ----

static void finish(Fiber& fiber, std::vector<Fiber::Copy>& copies) {
  const Actor actor = as_cp_async(fiber);
  const Actor* const was = std::exchange(machine.acting, &actor);
  const Site site = here;
  for (const auto& [to, from, bytes, valid, issued] : copies) {
    here = issued;
    if (valid > 0) touch(from, valid, kRead);
    track(to, bytes, kWrite);
    std::memset(to, 0, bytes);
    std::memcpy(to, from, valid);
  }
  copies.clear();
  here = site;
  machine.acting = was;
}

void cp_async(uint32_t dst, const void* src, int bytes, uint32_t valid) {
  interleave();
  const auto size = static_cast<size_t>(bytes);
  if (valid > size) fail("cp.async of %u bytes", valid);
  unsigned char* const to = resolve(dst, size, size);
  if (reinterpret_cast<uintptr_t>(src) % size != 0)
    fail("cp.async from an address that is not aligned to %zu", size);
  poison(to, size);
  std::vector<Fiber::Copy> copy{{to, src, size, valid, here}};
  if (machine.mode == Machine::kEarly || (machine.mode == Machine::kRandom && dice(2) == 0))
    finish(self(), copy);
  else
    self().copies.back().push_back(copy[0]);
}

void cp_async_commit() {
  interleave();
  self().copies.emplace_back();
}

void cp_async_wait(int pending) {
  interleave();
  Fiber& fiber = self();
  while (fiber.copies.size() > static_cast<size_t>(pending) + 1) {
    finish(fiber, fiber.copies.front());
    fiber.copies.pop_front();
    // Copies of later groups that acted already count as seen, too: a group is one epoch.
    observe(fiber.clocks, as_cp_async(fiber));
    ++fiber.copy_clock;
  }
}

void cp_async_mbar_arrive(uint32_t bar) {
  Fiber& fiber = self();
  barrier_at(bar);
  defer(&fiber, {}, [&fiber, place = resolve(bar, 8, 8)] {
    for (auto& group : fiber.copies) finish(fiber, group);
    Mbarrier& barrier = barrier_at(place);
    observe(barrier.arriving, as_cp_async(fiber));
    ++fiber.copy_clock;
    arrive(barrier);
  });
}

// ---- copies that an mbarrier counts ----

void counted_load(unsigned char* to, std::vector<unsigned char> bytes, std::vector<Run> runs,
                  uint32_t bar) {
  if (!barrier_at(bar, true).fenced)
    fail("no fence_mbarrier_init between the init of mbarrier %#x and its use by a copy", bar);
  const unsigned char* const place = resolve(bar, 8, 8, true);
  if (&block_of(place) != &block_of(to))
    fail("the mbarrier is in another block than the destination");
  poison(to, bytes.size());
  defer(nullptr, as_copy(self()), [=] {
    track(to, bytes.size(), kWrite);
    std::memcpy(to, bytes.data(), bytes.size());
    for (const Run& run : runs) {
      touch(run.other, run.bytes, kRead);
      std::memcpy(run.shared, run.other, run.bytes);
    }
    Mbarrier& barrier = barrier_at(place);
    observe(barrier.arriving, *machine.acting);
    barrier.bytes -= static_cast<int64_t>(bytes.size());
    end_if_full(barrier);
  });
}

static void check_bulk(uint32_t bytes, const void* address) {
  if (bytes == 0 || bytes % 16 != 0) fail("bulk copy of %u bytes", bytes);
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0)
    fail("bulk copy: the global address is not aligned to 16");
}

static void bulk_fill(uint32_t dst, unsigned char* src, uint32_t bytes, uint32_t bar) {
  interleave();
  check_bulk(bytes, src);
  unsigned char* const to = resolve(dst, bytes, 16, true);
  counted_load(to, std::vector<unsigned char>(bytes), {{to, src, bytes}}, bar);
}

void bulk_load(uint32_t dst, const void* src, uint32_t bytes, uint32_t bar) {
  bulk_fill(dst, static_cast<unsigned char*>(const_cast<void*>(src)), bytes, bar);
}

void bulk_copy_cluster(uint32_t dst, uint32_t src, uint32_t bytes, uint32_t bar) {
  bulk_fill(dst, resolve(src, bytes, 16), bytes, bar);
}

void st_async(uint32_t addr, uint32_t word, uint32_t bar) {
  interleave();
  std::vector<unsigned char> bytes(4);
  std::memcpy(bytes.data(), &word, 4);
  counted_load(resolve(addr, 4, 4, true), bytes, {}, bar);
}

// ---- bulk groups: copies out of shared memory ----

void grouped_store(std::vector<Run> runs, Add add) {
  Fiber& fiber = self();
  const auto group = fiber.bulk.back();
  group->used = true;
  ++group->unfinished[0];
  ++group->unfinished[1];
  const auto finished = [group, &fiber](int half) {
    observe(group->done[half], *machine.acting);
    --group->unfinished[half];
    wake(fiber.waits_bulk);
  };
  const Actor reader = as_copy(fiber), writer = as_copy(fiber);
  defer(nullptr, reader, [=] {
    std::vector<unsigned char> data;
    for (const Run& run : runs) {
      track(run.shared, run.bytes, kRead);
      data.insert(data.end(), run.shared, run.shared + run.bytes);
    }
    finished(0);
    defer(nullptr, writer, [=] {
      const unsigned char* from = data.data();
      for (const Run& run : runs) {
        touch(run.other, run.bytes, add != nullptr ? kWrite | kAtomic : kWrite);
        add != nullptr ? add(run.other, from, run.bytes)
                       : static_cast<void>(std::memcpy(run.other, from, run.bytes));
        from += run.bytes;
      }
      finished(1);
    });
  });
}

void bulk_store(void* dst, uint32_t src, uint32_t bytes, bool add) {
  interleave();
  check_bulk(bytes, dst);
  grouped_store({{resolve(src, bytes, 16), static_cast<unsigned char*>(dst), bytes}},
                add ? add_elements<float> : nullptr);
}

void bulk_commit() {
  interleave();
  self().bulk.push_back(std::make_shared<Fiber::Group>());
}

void bulk_wait(int pending, bool only_read) {
  Fiber& fiber = self();
  for (size_t i = 0; i + 1 + static_cast<size_t>(pending) < fiber.bulk.size(); ++i) {
    const auto group = fiber.bulk[i];
    for (int half = 0; half < (only_read ? 1 : 2); ++half) {
      await(
          fiber.waits_bulk, [&] { return group->unfinished[half] == 0; },
          "its bulk stores, all but %u groups", static_cast<unsigned>(pending));
      acquire(fiber, group->done[half]);
    }
    group->waited = true;
  }
}

void leave(Fiber& fiber) {
  for (auto& group : fiber.copies) finish(fiber, group);
  for (const auto& group : fiber.bulk)
    if (group->used && !group->waited)
      fail("the thread ends, but nothing waited until its bulk stores had read shared memory");
  if (!warp_of(fiber).accumulators.empty()) fail("the thread ends with a wgmma in flight");
  if (fiber.block->alive > 1) return;
  for (const auto& [place, barrier] : fiber.block->mbarriers)
    if (barrier.bytes != 0)
      fail("the block ends while its mbarrier %#x still lacks %lld bytes", addr_of(place),
           static_cast<long long>(barrier.bytes));
}

}  // namespace emu
