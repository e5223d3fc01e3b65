/// What runs beside the threads: mbarriers, cp.async, bulk copies and TMA.
///
/// An operation is recorded when it is issued and acts early, late or at random (Machine::mode).
/// Where it will write is poisoned at once: it may be overwritten at any time from then on.
#include <numeric>

#include "state.h"

namespace emu {

constexpr uint64_t kMbarrierBits = 0xB0B0B0B0C1C1C1C1;  // what an mbarrier's 8 bytes hold here

static Mbarrier& barrier_at(const unsigned char* place) {
  auto& barriers = block_of(place).mbarriers;
  const auto found = barriers.find(place);
  if (found == barriers.end())
    fail("shared memory ", hex(addr_of(place)), " holds no initialised mbarrier");
  if (std::memcmp(place, &kMbarrierBits, 8) != 0)
    fail("the mbarrier at ", hex(addr_of(place)), " was overwritten");
  if (machine.acting == nullptr && !knows(self(), found->second.init))
    fail("race: nothing orders the init of mbarrier ", hex(addr_of(place)), " before this use");
  return found->second;
}

void mbar_init(uint32_t bar, uint32_t count) {
  unsigned char* const place = resolve(bar, 8, 8);
  if (count == 0 || count >= 1u << 20) fail("mbarrier of ", count, " arrivals");
  const auto [made, fresh] = self().block->mbarriers.try_emplace(place);
  if (!fresh) fail("mbar_init of ", hex(bar), ", which is an mbarrier already");
  track(place, 8, kWrite);
  std::memcpy(place, &kMbarrierBits, 8);
  made->second.expected = count;
  made->second.owner = &self();
  made->second.init = as_thread(self());
}

static void arrive(Mbarrier& barrier) {
  if (barrier.arrived == barrier.expected) fail("more arrivals at an mbarrier than its count");
  ++barrier.arrived;
  barrier.end_if_full();
}

void mbar_arrive(uint32_t bar, uint32_t expect_bytes, bool cluster) {
  interleave();
  Mbarrier& barrier = barrier_at(resolve(bar, 8, 8, cluster));
  release(barrier.arriving, self());
  barrier.bytes += expect_bytes;
  arrive(barrier);
}

bool mbar_wait(uint32_t bar, uint32_t parity, bool only_try) {
  interleave();
  if (parity > 1) fail("mbarrier parity ", parity);
  const unsigned char* const place = resolve(bar, 8, 8);
  const auto passed = [=] { return (barrier_at(place).phase & 1) != parity; };
  if (only_try && !passed()) {
    pause();
    return false;
  }
  await(barrier_at(place).waiting, {"mbarrier %#x, parity %u", bar, parity}, passed);
  self().clocks.join(barrier_at(place).complete);
  return true;
}

void fence(bool proxy) {
  interleave();
  for (auto& [place, barrier] : self().block->mbarriers) barrier.fenced |= barrier.owner == &self();
  if (!proxy) return;
  self().clocks.proxy = self().clocks.seen;
  tick(self());
}

void copies_commit(bool bulk) {
  interleave();
  self().copies[bulk].push_back(std::make_shared<Group>());
}

void copies_wait(bool bulk, size_t pending, bool only_read) {
  interleave();
  const Groups& groups = self().copies[bulk];
  for (size_t i = 0; i + 1 + pending < groups.size(); ++i)
    for (int& half = groups[i]->waited; half < (only_read ? 1 : 2); ++half) {
      await(self().waits_copies, {"its copies, all but %u groups", static_cast<unsigned>(pending)},
            [&] { return groups[i]->unfinished[half] == 0; });
      self().clocks.join(groups[i]->done[half]);
    }
}

/// Up to 16 bytes that move; where `from` is null, `data`.
struct Run {
  unsigned char* to;
  const unsigned char* from;
  size_t bytes;
  unsigned char data[16]{};
};
using Runs = std::vector<Run>;
using Add = void (*)(unsigned char* to, const unsigned char* from, size_t bytes);

/// The one operation that copies: finished(0) once all is read, finished(1) once it is written, or
/// with `add` its elements are added to what is there. Without a chain reads and writes act apart.
static void copy(const Chain& chain, const Actor& reader, const Actor& writer, Runs runs, Add add,
                 const std::function<void(int)>& finished) {
  const auto read = [=]() mutable {
    for (Run& run : runs) {
      if (run.from == nullptr) continue;
      touch(run.from, run.bytes, kRead);
      std::memcpy(run.data, run.from, run.bytes);
    }
    finished(0);
    const auto write = [=] {
      for (const Run& run : runs) {
        touch(run.to, run.bytes, add != nullptr ? kWrite | kAtomic : kWrite);
        add != nullptr ? add(run.to, run.data, run.bytes)
                       : void(std::memcpy(run.to, run.data, run.bytes));
      }
      finished(1);
    };
    chain != nullptr ? write() : defer(make_chain(), writer, write);
  };
  defer(chain != nullptr ? chain : make_chain(), reader, read);
}

/// Puts a copy into the thread's open group; to be called when a half of it is done.
static std::function<void(int)> start(bool bulk) {
  const auto group = self().copies[bulk].back();
  ++group->unfinished[0];
  ++group->unfinished[1];
  group->used = true;
  return [group, &fiber = self()](int half) {
    observe(group->done[half], *machine.acting);
    --group->unfinished[half];
    wake(fiber.waits_copies);
  };
}

void cp_async(uint32_t dst, const void* src, size_t bytes, uint32_t valid) {
  interleave();
  unsigned char* const to = resolve(dst, bytes, bytes);
  const auto* const from = static_cast<const unsigned char*>(src);
  if (valid > bytes) fail("cp.async of ", valid, " bytes");
  if (reinterpret_cast<uintptr_t>(src) % bytes != 0)
    fail("cp.async from an address that is not aligned to ", bytes);
  poison(to, bytes);
  const Actor actor = as_cp_async(self());
  const Runs runs{{to + valid, nullptr, bytes - valid}, {to, valid > 0 ? from : nullptr, valid}};
  copy(self().chain, actor, actor, runs, nullptr, start(false));
}

void cp_async_mbar_arrive(uint32_t bar) {
  const unsigned char* const place = resolve(bar, 8, 8);
  barrier_at(place);
  defer(self().chain, as_cp_async(self()), [place] {
    Mbarrier& barrier = barrier_at(place);
    observe(barrier.arriving, *machine.acting);
    arrive(barrier);
  });
}

/// Fills `bytes` at `to`, counted at the mbarrier `bar` of the same block.
static void counted_load(unsigned char* to, size_t bytes, const Runs& runs, uint32_t bar) {
  const unsigned char* const place = resolve(bar, 8, 8, true);
  if (!barrier_at(place).fenced)
    fail("no fence_mbarrier_init between the init of mbarrier ", hex(bar),
         " and its use by a copy");
  if (&block_of(place) != &block_of(to))
    fail("the mbarrier is in another block than the destination");
  poison(to, bytes);
  const Actor actor = as_copy(self());
  copy(make_chain(), actor, actor, runs, nullptr, [=](int half) {
    if (half == 0) return;
    Mbarrier& barrier = barrier_at(place);
    observe(barrier.arriving, *machine.acting);
    barrier.bytes -= bytes;
    barrier.end_if_full();
  });
}

template <class T>
static void add_elements(unsigned char* to, const unsigned char* from, size_t bytes) {
  for (size_t i = 0; i < bytes; i += sizeof(T)) {
    T& sum = reinterpret_cast<T&>(to[i]);
    sum = static_cast<T>(float(sum) + float(reinterpret_cast<const T&>(from[i])));
  }
}

static Runs bulk_runs(void* to, const void* from, uint32_t bytes) {
  if (bytes == 0 || bytes % 16 != 0) fail("bulk copy of ", bytes, " bytes");
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16 != 0)
    fail("bulk copy: the global address is not aligned to 16");
  Runs runs;
  for (uint32_t i = 0; i < bytes; i += 16)
    runs.push_back(
        {static_cast<unsigned char*>(to) + i, static_cast<const unsigned char*>(from) + i, 16});
  return runs;
}

void bulk_load(uint32_t dst, const void* src, uint32_t bytes, uint32_t bar) {
  interleave();
  unsigned char* const to = resolve(dst, bytes, 16, true);
  counted_load(to, bytes, bulk_runs(to, src, bytes), bar);
}

void st_async(uint32_t addr, uint32_t word, uint32_t bar) {
  interleave();
  Run run{resolve(addr, 4, 4, true), nullptr, 4};
  std::memcpy(run.data, &word, 4);
  counted_load(run.to, 4, {run}, bar);
}

static void grouped_store(const Runs& runs, Add add) {
  copy(nullptr, as_copy(self()), as_copy(self()), runs, add, start(true));
}

void bulk_store(void* dst, uint32_t src, uint32_t bytes, bool add) {
  interleave();
  grouped_store(bulk_runs(dst, resolve(src, bytes, 16), bytes),
                add ? add_elements<float> : nullptr);
}

/// The element types of pyops::tensor_map_type.
struct Element {
  CUtensorMapDataType type;
  size_t bytes;
  Add add;
};
constexpr Element kElements[] = {
    {CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, add_elements<__half>},
    {CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, add_elements<__nv_bfloat16>},
    {CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 4, add_elements<float>},
};

/// What the emulator keeps in a CUtensorMap.
struct TensorMap {
  const Element* element;
  unsigned char* base;
  uint64_t sizes[5], strides[4];
  uint16_t count[5], steps[5];  // elements taken along a dimension, and every how many
  uint8_t rank, swizzle;

  size_t bytes() const {
    return std::accumulate(count, count + rank, element->bytes, std::multiplies<size_t>());
  }
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));

static const TensorMap& read_map(const CUtensorMap* map, int rank) {
  const auto* own = reinterpret_cast<const TensorMap*>(map);
  if (reinterpret_cast<uintptr_t>(map) % 64 != 0) fail("the tensor map is not aligned to 64");
  if (own->element < kElements || own->element >= std::end(kElements))
    fail("this is no tensor map");
  if (own->rank != rank) fail(rank, " coordinates for a map of rank ", +own->rank);
  return *own;
}

/// The parts of the box at coordinates `at` that lie inside the tensor, up to 16 bytes each, to or
/// from `box` in shared memory; a load fills the rest with zeros.
static Runs runs_of(const TensorMap& map, const int* at, unsigned char* box, bool load) {
  Runs runs;
  const int64_t bytes = map.element->bytes, end = map.sizes[0] * bytes;
  const int64_t row_bytes = map.count[0] * bytes, rows = map.bytes() / row_bytes;
  for (int64_t row = 0; row < rows; ++row) {
    unsigned char* base = map.base;
    bool inside = true;
    int64_t rest = row;
    for (int dim = 1; dim < map.rank; rest /= map.count[dim++]) {
      const int64_t index = at[dim] + rest % map.count[dim] * map.steps[dim];
      inside &= index >= 0 && index < static_cast<int64_t>(map.sizes[dim]);
      base += index * static_cast<int64_t>(map.strides[dim - 1]);
    }
    for (int64_t byte = 0; byte < row_bytes; byte += 16) {
      const int64_t from = at[0] * bytes + byte;
      const int64_t first = std::max<int64_t>(-from, 0);
      const int64_t last = inside ? std::min<int64_t>(end - from, 16) : 0;
      // 16 bytes change places within 32, 64 or 128 by the address's bits from 7 on, which are
      // those of the host's address, too.
      auto place = reinterpret_cast<uintptr_t>(box) + row * row_bytes + byte;
      place ^= (place >> 7 & ((1 << map.swizzle) - 1)) << 4;
      auto* const shared = reinterpret_cast<unsigned char*>(place);
      if (load && last - first < 16) runs.push_back({shared, nullptr, 16});
      if (last <= first) continue;
      unsigned char *const near = shared + first, *const far = base + from + first;
      runs.push_back({load ? near : far, load ? far : near, size_t(last - first)});
    }
  }
  return runs;
}

void tma_load(uint32_t dst, const CUtensorMap* map_of, uint32_t bar, const int* at, int rank,
              uint16_t mask) {
  interleave();
  const TensorMap& map = read_map(map_of, rank);
  const auto to_block = [&](uint32_t to, uint32_t counter) {
    unsigned char* const box = resolve(to, map.bytes(), 128, true);
    counted_load(box, map.bytes(), runs_of(map, at, box, true), counter);
  };
  if (mask == 0) to_block(dst, bar);
  for (uint32_t block = 0; block < 16; ++block)
    if (mask >> block & 1) to_block(map_cluster(dst, block), map_cluster(bar, block));
}

void tma_store(const CUtensorMap* map_of, uint32_t src, const int* at, int rank, bool add) {
  interleave();
  const TensorMap& map = read_map(map_of, rank);
  grouped_store(runs_of(map, at, resolve(src, map.bytes(), 128), false),
                add ? map.element->add : nullptr);
}

void leave(const Fiber& fiber) {
  for (const auto& group : fiber.copies[true])
    if (group->used && group->waited == 0)
      fail("the thread ends, but nothing waited until its bulk stores had read shared memory");
  if (!warp_of(fiber).accumulators.empty()) fail("the thread ends with a wgmma in flight");
  for (const auto& [place, barrier] : fiber.block->mbarriers)
    if (fiber.block->alive == 1 && barrier.bytes != 0)
      fail("the block ends while its mbarrier ", hex(addr_of(place)), " still lacks ",
           barrier.bytes, " bytes");
}

}  // namespace emu

/// The limits are those that the driver's documentation names. A swizzled box narrower than its
/// pattern is refused, too: how it lies in shared memory is not documented.
extern "C" CUresult CUDAAPI cuTensorMapEncodeTiled(
    CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base,
    const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
    const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
    CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  static_assert(CU_TENSOR_MAP_SWIZZLE_32B == 1 && CU_TENSOR_MAP_SWIZZLE_128B == 3);
  const auto* const element =
      std::find_if(emu::kElements, std::end(emu::kElements),
                   [=](const emu::Element& known) { return known.type == type; });
  const size_t row = element == std::end(emu::kElements) ? 1 : box[0] * element->bytes;
  bool good = rank >= 1 && rank <= 5 && row % 16 == 0 && swizzle <= CU_TENSOR_MAP_SWIZZLE_128B &&
              (swizzle == CU_TENSOR_MAP_SWIZZLE_NONE || row == 16u << swizzle) &&
              interleave == CU_TENSOR_MAP_INTERLEAVE_NONE &&
              fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE && reinterpret_cast<size_t>(base) % 16 == 0;
  auto& own = *new (map) emu::TensorMap{element, static_cast<unsigned char*>(base)};
  own.rank = rank;
  own.swizzle = swizzle;
  for (cuuint32_t dim = 0; good && dim < rank; ++dim) {
    good = sizes[dim] > 0 && sizes[dim] <= 1ull << 32 && box[dim] > 0 && box[dim] <= 256 &&
           steps[dim] > 0 && steps[dim] <= 8;
    if (!good) break;
    own.sizes[dim] = sizes[dim];
    own.steps[dim] = dim == 0 ? 1 : steps[dim];
    own.count[dim] = (box[dim] + own.steps[dim] - 1) / own.steps[dim];
    if (dim == 0) continue;
    own.strides[dim - 1] = strides[dim - 1];
    good = strides[dim - 1] % 16 == 0 && strides[dim - 1] < 1ull << 40;
  }
  return good ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
