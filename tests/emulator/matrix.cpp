/// The tensor cores: ldmatrix, mma.sync, and wgmma with its queue.
#include "state.h"

namespace emu {

constexpr int size_of(Type type) { return type == TF32 ? 4 : 2; }
constexpr int depth_of(Type type) { return 32 / size_of(type); }

static float element(const void* at, Type type) {
  uint32_t bits = 0;
  std::memcpy(&bits, at, static_cast<size_t>(size_of(type)));
  if (type == F16) return __half2float(__half(__half_raw{static_cast<unsigned short>(bits)}));
  return __uint_as_float(type == TF32 ? bits & ~0x1FFFu : bits << 16);
}

// ---- ldmatrix, stmatrix ----

struct Matrices {
  uint32_t registers[4], addr;
  Fiber* fiber;
};

/// Matrix i's row r lies at the address of lane 8i + r; lane l holds elements 2(l%4), 2(l%4) + 1
/// of row l/4 of each matrix, or of its transpose.
static void move_matrices(Matrices& own, int count, bool transpose, bool store) {
  collective(store ? "stmatrix" : "ldmatrix", ~0u, own, [=](auto of) {
    for (int row = 0; row < 8 * count; ++row) {
      unsigned char* const place = resolve(of(row)->addr, 16, 16);
      const Actor actor = as_thread(*of(row)->fiber);
      machine.acting = &actor;
      track(place, 16, store ? kWrite : kRead);
      machine.acting = nullptr;
      for (int column = 0; column < 8; ++column) {
        const int r = row % 8, major = transpose ? column : r, minor = transpose ? r : column;
        uint32_t* const word = &of(4 * major + minor / 2)->registers[row / 8];
        auto* const half = reinterpret_cast<unsigned char*>(word) + 2 * (minor % 2);
        if (store)
          std::memcpy(place + 2 * column, half, 2);
        else
          std::memcpy(half, place + 2 * column, 2);
      }
    }
  });
}

void ldmatrix(uint32_t* d, int count, bool transpose, uint32_t addr) {
  Matrices own{{}, addr, &self()};
  move_matrices(own, count, transpose, false);
  std::copy(own.registers, own.registers + count, d);
}

void stmatrix(const uint32_t* s, int count, bool transpose, uint32_t addr) {
  Matrices own{{}, addr, &self()};
  std::copy(s, s + count, own.registers);
  move_matrices(own, count, transpose, true);
}

// ---- mma.sync ----

struct Mma {
  float* d;
  const uint32_t *a, *b;
};

/// Element k of row m of A (or of column m of B) in the registers of a warp: with n numbers a
/// register, lane 4(m%8) + k/n%4 has it in register m/8 + rows/8 (k/4n).
template <class Registers>
static float fragment(Registers registers, int rows, int m, int k, Type type) {
  const int n = 4 / size_of(type);
  const uint32_t* const lane = registers(4 * (m % 8) + k / n % 4);
  const auto* word =
      reinterpret_cast<const unsigned char*>(&lane[m / 8 + rows / 8 * (k / (4 * n))]);
  return element(word + k % n * size_of(type), type);
}

void mma_sync(float* d, const uint32_t* a, const uint32_t* b, Type type) {
  Mma own{d, a, b};
  collective("mma", ~0u, own, [type](auto of) {
    const int depth = depth_of(type);
    float rows[16][16], columns[8][16];
    for (int k = 0; k < depth; ++k) {
      for (int m = 0; m < 16; ++m)
        rows[m][k] = fragment([&](int lane) { return of(lane)->a; }, 16, m, k, type);
      for (int n = 0; n < 8; ++n)
        columns[n][k] = fragment([&](int lane) { return of(lane)->b; }, 8, n, k, type);
    }
    for (int m = 0; m < 16; ++m)
      for (int n = 0; n < 8; ++n) {
        float& sum = of(4 * (m % 8) + n / 2)->d[2 * (m / 8) + n % 2];
        for (int k = 0; k < depth; ++k) sum += rows[m][k] * columns[n][k];
      }
  });
}

// ---- wgmma ----

/// An operand in shared memory as its descriptor tells: chunks of 16 bytes, `wide` of them a row.
struct Descriptor {
  uint32_t start, leading, stride, base_offset, wide;

  explicit Descriptor(uint64_t bits) {
    const auto field = [=](int from) { return static_cast<uint32_t>(bits >> from & 0x3FFF) << 4; };
    const uint32_t wides[4]{1, 8, 4, 2};
    start = field(0);
    leading = field(16);
    stride = field(32);
    base_offset = bits >> 49 & 7;
    wide = wides[bits >> 62];
  }

  /// Address of the chunk number `along` of the contiguous axis (K if is_k), at `minor` of the
  /// other one.
  uint32_t chunk(uint32_t along, uint32_t minor, bool is_k) const {
    const uint32_t addr = start + minor % 8 * 16 * wide;
    // 8 rows of 16 bytes are contiguous; leading steps along K, stride along M or N.
    if (wide == 1)
      return is_k ? addr + along * leading + minor / 8 * stride
                  : addr + along * stride + minor / 8 * leading;
    const uint32_t in =
        addr + minor / 8 * stride + along % wide * 16 + (is_k ? 0 : along / wide * leading);
    return in ^ (((in >> 7) - base_offset) & (wide - 1)) << 4;
  }
};

using Operand = std::vector<float>;  // rows of A or columns of B, K numbers each

/// From `first` on, `rows` of M or N of an operand in shared memory.
static Operand fetch(uint64_t descriptor, int first, int rows, bool is_k, Type type,
                     const Block& block) {
  const Descriptor operand(descriptor);
  const int depth = depth_of(type), per = 16 / size_of(type);
  Operand to(static_cast<size_t>(rows * depth));
  for (int row = 0; row < rows; row += is_k ? 1 : per)
    for (int k = 0; k < depth; k += is_k ? per : 1) {
      const auto m = static_cast<uint32_t>(first + row),
                 along = is_k ? static_cast<uint32_t>(k) : m;
      const uint32_t addr = operand.chunk(along / static_cast<uint32_t>(per),
                                          is_k ? m : static_cast<uint32_t>(k), is_k);
      if (addr < kSmemBase || addr + 16 > kSmemBase + machine.config.smem)
        fail("wgmma: its descriptor leads to shared memory %#x, outside the block's", addr);
      const unsigned char* const chunk = block.smem + (addr - kSmemBase);
      track(chunk, 16, kRead);
      for (int i = 0; i < per; ++i)
        to[static_cast<size_t>(is_k ? row * depth + k + i : (row + i) * depth + k)] =
            element(chunk + i * size_of(type), type);
    }
  return to;
}

/// A warp's 16 rows.
static void execute(const Operand& a, const Operand& b, int n_columns, bool accumulate,
                    Accumulator& into) {
  const size_t depth = a.size() / 16;
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < n_columns; ++n) {
      float sum = 0;
      const float* const row = &a[static_cast<size_t>(m) * depth];
      const float* const column = &b[static_cast<size_t>(n) * depth];
      for (size_t k = 0; k < depth; ++k) sum += row[k] * column[k];
      const int lane = 4 * (m % 8) + n % 8 / 2, i = 4 * (n / 8) + 2 * (m / 8) + n % 2;
      float& d = into.values[static_cast<size_t>(lane * into.count + i)];
      d = accumulate ? d + sum : sum;
    }
}

constexpr uint32_t kInFlight = 0x7FC0ACC5;  // a NaN: the registers of accumulators in flight

struct Issue {
  Fiber* fiber;
  float* d;
  const uint32_t* a_registers;
  Warp::Call call;
  bool accumulate;
};

/// The accumulators of an operation that a warp issues, new or in flight already.
template <class Lanes>
static Accumulator& accumulator_of(Warp& warp, int count, Lanes of) {
  float* const first = of(0)->d;
  for (const auto& other : warp.accumulators) {
    if (other->d[0] == first && other->count == count) return *other;
    if (first < other->d[0] + other->count && other->d[0] < first + count)
      fail("wgmma: the accumulators overlap others in flight");
  }
  Accumulator& made = *warp.accumulators.emplace_back(std::make_unique<Accumulator>());
  made.count = count;
  for (int lane = 0; lane < 32; ++lane) {
    if (!of(lane)->fiber->registers_fenced)
      fail("wgmma: its registers were free for other use since the last wgmma_fence");
    float* const d = made.d[lane] = of(lane)->d;
    made.values.insert(made.values.end(), d, d + count);
    std::fill(d, d + count, __uint_as_float(kInFlight));
  }
  return made;
}

void wgmma(float* d, int n, Type type, const uint32_t* a_registers, uint64_t a, uint64_t b,
           int a_major, int b_major, bool accumulate) {
  Fiber& fiber = self();
  Block& block = *fiber.block;
  const auto first = static_cast<size_t>(fiber.warp & ~3);
  if (block.fibers.size() < 32 * (first + 4)) fail("wgmma by less than a whole warpgroup");
  Issue own{&fiber, d, a_registers, {n, a, b}, accumulate};
  collective("wgmma", ~0u, own, [&, type, n, a, b, a_major, b_major, accumulate](auto of) {
    Warp& warp = warp_of(fiber);
    for (int lane = 1; lane < 32; ++lane)
      if (of(lane)->call != own.call || of(lane)->accumulate != accumulate)
        fail("wgmma: the lanes of the warp differ in descriptors or `accumulate`");
    ++warp.issued;
    warp.calls.push_back(own.call);
    for (size_t i = first; i < first + 4; ++i)
      if (block.warps[i].issued >= warp.issued && block.warps[i].calls[warp.issued - 1] != own.call)
        fail("wgmma: warps %d and %zu of the warpgroup issue different operations", fiber.warp, i);
    Accumulator& accumulator = accumulator_of(warp, n / 2, of);
    accumulator.last = warp.issued;
    Actor actor = as_wgmma(fiber, warp.issued);
    const auto clocks = std::make_shared<Clocks>();
    Operand rows;
    for (int lane = 0; lane < 32; ++lane) {
      release(*clocks, *of(lane)->fiber);
      if (a_registers == nullptr) continue;
      const uint32_t* const from = of(lane)->a_registers;
      warp.operands.push_back({from, {from[0], from[1], from[2], from[3]}, warp.issued});
    }
    actor.clocks = clocks;
    if (a_registers != nullptr)
      for (int m = 0; m < 16; ++m)
        for (int k = 0; k < depth_of(type); ++k)
          rows.push_back(fragment([&](int lane) { return of(lane)->a_registers; }, 16, m, k, type));
    defer(&warp, actor, [=, &block, &warp, &accumulator, row = 16 * (fiber.warp % 4)] {
      const Operand left = rows.empty() ? fetch(a, row, 16, a_major == 0, type, block) : rows;
      execute(left, fetch(b, 0, n, b_major == 0, type, block), n, accumulate, accumulator);
      ++warp.executed;
      wake(warp.waiting);
    });
  });
}

void wgmma_fence() {
  interleave();
  collective("wgmma_fence", ~0u, self(), [](auto) {});
  self().registers_fenced = true;
}

void wgmma_commit() {
  collective("wgmma_commit", ~0u, warp_of(self()),
             [](auto of) { of(0)->groups.push_back(of(0)->issued); });
}

/// Gives the accumulators of the finished operations back to their registers.
static void deliver(const Fiber& fiber, uint64_t done) {
  Warp& warp = warp_of(fiber);
  for (const auto& [registers, values, last] : warp.operands)
    if (last <= done && !std::equal(values, values + 4, registers))
      fail("the A registers of a wgmma were overwritten while it was in flight");
  for (const auto& accumulator : warp.accumulators) {
    if (accumulator->last > done) continue;
    const float* value = accumulator->values.data();
    for (float* d : accumulator->d)
      for (int i = 0; i < accumulator->count; ++i) {
        if (__float_as_uint(d[i]) != kInFlight)
          fail("an accumulator of a wgmma was overwritten while it was in flight");
        d[i] = *value++;
      }
    for (const auto& lane : fiber.block->fibers)
      if (lane->warp == fiber.warp) lane->registers_fenced = false;
  }
  std::erase_if(warp.accumulators, [=](const auto& each) { return each->last <= done; });
  std::erase_if(warp.operands, [=](const auto& each) { return each.last <= done; });
}

void wgmma_wait(int pending) {
  Fiber& fiber = self();
  Warp& warp = warp_of(fiber);
  const size_t keep = static_cast<size_t>(pending), groups = warp.groups.size();
  const uint64_t done = groups > keep ? warp.groups[groups - 1 - keep] : 0;
  await(
      warp.waiting, [&] { return warp.executed >= done; }, "its wgmmas, all but %u groups",
      static_cast<unsigned>(pending));
  collective("wgmma_wait", ~0u, fiber, [done](auto of) {
    deliver(*of(0), done);
    for (int lane = 0; lane < 32; ++lane) observe(of(lane)->clocks, as_wgmma(*of(lane), done));
  });
}

}  // namespace emu
