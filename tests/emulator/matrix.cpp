/// The tensor cores: ldmatrix, mma.sync, and wgmma with its queue.
#include "state.h"

namespace emu {

static float element(uint32_t word, int half, Type type) {
  uint32_t bits = type == TF32 ? word & ~0x1FFFu : (word >> 16 * half & 0xFFFF) << 16;
  if (type == F16) {
    return __half2float(__half(__half_raw{static_cast<unsigned short>(bits >> 16)}));
  }
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// ---- ldmatrix, stmatrix ----

struct Matrices {
  uint32_t* registers;
  int count;
  bool transpose, store;
  uint32_t addr;
  Site site;
  Fiber* fiber;
};

/// Matrix i's row r lies at the address of lane 8i + r; lane l holds elements 2(l%4), 2(l%4) + 1
/// of row l/4 of each matrix, or of its transpose.
static void move_matrices(Lanes lanes) {
  const auto of = [&](int lane) -> Matrices& { return *static_cast<Matrices*>(lanes[lane]); };
  for (int row = 0; row < 8 * of(0).count; ++row) {
    Matrices& addressed = of(row);
    unsigned char* place = resolve(addressed.addr, 16, 16, false, addressed.site);
    track(as_thread(*addressed.fiber), place, 16, addressed.store ? kWrite : kRead, addressed.site);
    for (int column = 0; column < 8; ++column) {
      const int r = row % 8, major = addressed.transpose ? column : r,
                minor = addressed.transpose ? r : column;
      uint32_t* word = &of(4 * major + minor / 2).registers[row / 8];
      auto* halves = reinterpret_cast<unsigned char*>(word) + 2 * (minor % 2);
      if (addressed.store)
        std::memcpy(place + 2 * column, halves, 2);
      else
        std::memcpy(halves, place + 2 * column, 2);
    }
  }
}

void ldmatrix(uint32_t* d, int count, bool transpose, uint32_t addr, Site site) {
  Matrices own{d, count, transpose, false, addr, site, &self()};
  collective("ldmatrix", ~0u, &own, move_matrices, site);
}

void stmatrix(const uint32_t* s, int count, bool transpose, uint32_t addr, Site site) {
  uint32_t copy[4];
  std::copy(s, s + count, copy);
  Matrices own{copy, count, transpose, true, addr, site, &self()};
  collective("stmatrix", ~0u, &own, move_matrices, site);
}

// ---- mma.sync ----

/// a[16][k] of a warp from its registers: element (r, c) of 16-bit types in lane 4(r%8) + c%8/2,
/// register r/8 + 2(c/8), of tf32 in lane 4(r%8) + c%4, register r/8 + 2(c/4).
static void unpack_a(float (&a)[16][16], const uint32_t* const (&registers)[32], Type type) {
  for (int r = 0; r < 16; ++r)
    for (int c = 0; c < (type == TF32 ? 8 : 16); ++c)
      a[r][c] = type == TF32
                    ? element(registers[4 * (r % 8) + c % 4][r / 8 + 2 * (c / 4)], 0, type)
                    : element(registers[4 * (r % 8) + c % 8 / 2][r / 8 + 2 * (c / 8)], c % 2, type);
}

struct Mma {
  float* d;
  const uint32_t *a, *b;
  Type type;
};

static void multiply(Lanes lanes) {
  const auto of = [&](int lane) -> Mma& { return *static_cast<Mma*>(lanes[lane]); };
  const Type type = of(0).type;
  const int depth = type == TF32 ? 8 : 16;
  float a[16][16], b[16][8];
  const uint32_t* registers[32];
  for (int lane = 0; lane < 32; ++lane) registers[lane] = of(lane).a;
  unpack_a(a, registers, type);
  for (int k = 0; k < depth; ++k)
    for (int n = 0; n < 8; ++n)
      b[k][n] = type == TF32 ? element(of(4 * n + k % 4).b[k / 4], 0, type)
                             : element(of(4 * n + k % 8 / 2).b[k / 8], k % 2, type);
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 8; ++n) {
      float& d = of(4 * (m % 8) + n / 2).d[2 * (m / 8) + n % 2];
      for (int k = 0; k < depth; ++k) d += a[m][k] * b[k][n];
    }
}

void mma_sync(float* d, const uint32_t* a, const uint32_t* b, Type type, Site site) {
  Mma own{d, a, b, type};
  collective("mma", ~0u, &own, multiply, site);
}

// ---- wgmma ----

/// An operand in shared memory as its descriptor tells: chunks of 16 bytes, `wide` of them a row.
struct Descriptor {
  uint32_t start, leading, stride, base_offset;
  uint32_t wide;

  explicit Descriptor(uint64_t bits)
      : start(static_cast<uint32_t>(bits & 0x3FFF) << 4),
        leading(static_cast<uint32_t>(bits >> 16 & 0x3FFF) << 4),
        stride(static_cast<uint32_t>(bits >> 32 & 0x3FFF) << 4),
        base_offset(static_cast<uint32_t>(bits >> 49 & 7)) {
    const uint32_t wides[4]{1, 8, 4, 2};
    wide = wides[bits >> 62];
  }

  /// Address of the chunk with the elements from `major` on (along the contiguous axis) at `minor`.
  /// is_k: the contiguous axis is K.
  uint32_t chunk(uint32_t major_chunk, uint32_t minor, bool is_k) const {
    uint32_t addr = start + minor % 8 * 16 * wide;
    if (wide == 1) {
      // 8 rows of 16 bytes are contiguous; leading steps along K, stride along M or N.
      addr += is_k ? major_chunk * leading + minor / 8 * stride
                   : major_chunk * stride + minor / 8 * leading;
      return addr;
    }
    addr += minor / 8 * stride + major_chunk % wide * 16;
    if (!is_k) addr += major_chunk / wide * leading;
    return addr ^ (((addr >> 7) - base_offset) & (wide - 1)) << 4;
  }
};

struct Wgmma {
  int n;
  Type type;
  uint64_t a, b;
  int a_major, b_major;
  bool accumulate, a_in_registers;
  uint32_t a_registers[32][4];
  Site site;
};

/// to[minor][k] of an operand, rows first... of M or N.
static void fetch(std::vector<float>& to, uint64_t descriptor, int first, int rows, int major,
                  Type type, const Actor& actor, Block& block, Site site) {
  const Descriptor operand(descriptor);
  const int size = type == TF32 ? 4 : 2, depth = type == TF32 ? 8 : 16, per = 16 / size;
  const bool is_k = major == 0;
  const auto read = [&](uint32_t addr) {
    if (addr < kSmemBase || addr + 16 > kSmemBase + machine.config.smem)
      fail(text("wgmma: its descriptor leads to shared memory %#x, outside the block's", addr),
           site);
    const unsigned char* place = block.smem + (addr - kSmemBase);
    track(actor, place, 16, kRead | kAsync, site);
    return place;
  };
  const auto value = [&](const unsigned char* chunk, int i) {
    uint32_t word = 0;
    std::memcpy(&word, chunk + i * size, static_cast<size_t>(size));
    return element(word, 0, type);
  };
  to.resize(static_cast<size_t>(rows * depth));
  for (int outer = 0; outer < (is_k ? rows : depth); ++outer)
    for (int inner = 0; inner < (is_k ? depth : rows); inner += per) {
      const int row = first + (is_k ? outer : inner), k = is_k ? inner : outer;
      const unsigned char* chunk = is_k ? read(operand.chunk(static_cast<uint32_t>(k / per),
                                                             static_cast<uint32_t>(row), true))
                                        : read(operand.chunk(static_cast<uint32_t>(row / per),
                                                             static_cast<uint32_t>(k), false));
      for (int i = 0; i < per; ++i) {
        const int r = row - first + (is_k ? 0 : i), c = k + (is_k ? i : 0);
        to[static_cast<size_t>(r * depth + c)] = value(chunk, i);
      }
    }
}

/// A warp's 16 rows.
static void execute(const Wgmma& op, Block& block, int warp, Accumulator& into,
                    const Actor& actor) {
  const int depth = op.type == TF32 ? 8 : 16;
  std::vector<float> a, b;
  if (op.a_in_registers) {
    float rows[16][16];
    const uint32_t* registers[32];
    for (int lane = 0; lane < 32; ++lane) registers[lane] = op.a_registers[lane];
    unpack_a(rows, registers, op.type);
    a.resize(static_cast<size_t>(16 * depth));
    for (int r = 0; r < 16; ++r)
      std::copy(rows[r], rows[r] + depth, &a[static_cast<size_t>(r * depth)]);
  } else {
    fetch(a, op.a, 16 * (warp % 4), 16, op.a_major, op.type, actor, block, op.site);
  }
  fetch(b, op.b, 0, op.n, op.b_major, op.type, actor, block, op.site);
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < op.n; ++n) {
      float sum = 0;
      for (int k = 0; k < depth; ++k)
        sum += a[static_cast<size_t>(m * depth + k)] * b[static_cast<size_t>(n * depth + k)];
      const int lane = 4 * (m % 8) + n % 8 / 2, i = 4 * (n / 8) + 2 * (m / 8) + n % 2;
      float& d = into.values[static_cast<size_t>(lane * into.count + i)];
      d = op.accumulate ? d + sum : sum;
    }
}

struct WgmmaIssue {
  Wgmma* op;
  float* d;
  const uint32_t* a;
  Fiber* fiber;
};

constexpr uint32_t kInFlight = 0x7FC0ACC5;  // a NaN: the registers of accumulators in flight

static void issue(Lanes lanes) {
  const auto of = [&](int lane) -> WgmmaIssue& { return *static_cast<WgmmaIssue*>(lanes[lane]); };
  Fiber& fiber = *of(0).fiber;
  Block& block = *fiber.block;
  Warp& warp = block.warps[static_cast<size_t>(fiber.warp)];
  auto op = std::make_shared<Wgmma>(*of(0).op);
  const int count = op->n / 2;
  for (int lane = 1; lane < 32; ++lane)
    if (const Wgmma& other = *of(lane).op;
        other.a != op->a || other.b != op->b || other.accumulate != op->accumulate)
      fail("wgmma: the lanes of the warp differ in descriptors or `accumulate`", op->site);
  ++warp.issued;
  warp.calls.push_back({op->n, op->a, op->b, op->a_in_registers});
  for (size_t i = static_cast<size_t>(fiber.warp & ~3); i < block.warps.size(); ++i) {
    if (static_cast<int>(i) > (fiber.warp | 3)) break;
    const Warp& other = block.warps[i];
    if (other.issued < warp.issued) continue;
    const WgmmaCall &mine = warp.calls.back(), &theirs = other.calls[warp.issued - 1];
    if (mine.n != theirs.n || mine.a != theirs.a || mine.b != theirs.b)
      fail(text("wgmma: warps %d and %zu of the warpgroup issue different operations", fiber.warp,
                i),
           op->site);
  }
  Accumulator* accumulator = nullptr;
  for (const auto& candidate : warp.accumulators) {
    if (candidate->d[0] == of(0).d && candidate->count == count)
      accumulator = candidate.get();
    else if (of(0).d < candidate->d[0] + candidate->count && candidate->d[0] < of(0).d + count)
      fail("wgmma: the accumulators overlap others in flight", op->site);
  }
  if (accumulator == nullptr) {
    warp.accumulators.push_back(std::make_unique<Accumulator>());
    accumulator = warp.accumulators.back().get();
    accumulator->count = count;
    accumulator->values.resize(static_cast<size_t>(32 * count));
    for (int lane = 0; lane < 32; ++lane) {
      if (!of(lane).fiber->registers_fenced)
        fail("wgmma: its registers were free for other use since the last wgmma_fence", op->site);
      accumulator->d[lane] = of(lane).d;
      std::copy(of(lane).d, of(lane).d + count,
                &accumulator->values[static_cast<size_t>(lane * count)]);
      for (int i = 0; i < count; ++i) std::memcpy(&of(lane).d[i], &kInFlight, 4);
    }
  }
  accumulator->last = warp.issued;
  if (op->a_in_registers)
    for (int lane = 0; lane < 32; ++lane) {
      std::copy(of(lane).a, of(lane).a + 4, op->a_registers[lane]);
      Warp::Operand operand{of(lane).a, {}, lane, warp.issued};
      std::copy(of(lane).a, of(lane).a + 4, operand.values);
      warp.operands.push_back(operand);
    }
  const Actor actor = as_wgmma(block, fiber.warp);
  const int index = fiber.warp;
  defer(1, &warp, [=, &block, &warp] {
    execute(*op, block, index, *accumulator, actor);
    ++warp.executed;
    wake(warp.waiting);
  });
}

void wgmma(float* d, int n, Type type, const uint32_t* a_registers, uint64_t a, uint64_t b,
           int a_major, int b_major, bool accumulate, Site site) {
  Fiber& fiber = self();
  if (fiber.block->fibers.size() < static_cast<size_t>(fiber.warp | 3) * 32 + 32)
    fail("wgmma by less than a whole warpgroup", site);
  Wgmma op{n, type, a, b, a_major, b_major, accumulate, a_registers != nullptr, {}, site};
  WgmmaIssue own{&op, d, a_registers, &fiber};
  collective("wgmma", ~0u, &own, issue, site);
}

void wgmma_fence(Site site) {
  interleave(site);
  collective("wgmma_fence", ~0u, nullptr, [](Lanes) {}, site);
  self().registers_fenced = true;
}

void wgmma_commit(Site site) {
  collective(
      "wgmma_commit", ~0u, &my_warp(),
      [](Lanes lanes) {
        Warp& warp = *static_cast<Warp*>(lanes[0]);
        warp.groups.push_back(warp.issued);
      },
      site);
}

/// Gives the accumulators of finished operations back to their registers.
static void deliver(Warp& warp, Fiber& fiber, uint64_t done, Site site) {
  const Block& block = *fiber.block;
  const auto first = static_cast<size_t>(fiber.warp) * 32;
  for (const Warp::Operand& operand : warp.operands)
    if (operand.last <= done && !std::equal(operand.values, operand.values + 4, operand.registers))
      fail("the A registers of a wgmma were overwritten while it was in flight", site);
  for (auto& accumulator : warp.accumulators) {
    if (accumulator->last > done) continue;
    for (size_t lane = 0; lane < 32; ++lane) {
      float* d = accumulator->d[lane];
      const auto count = static_cast<size_t>(accumulator->count);
      for (size_t i = 0; i < count; ++i) {
        if (bits(d[i]) != kInFlight)
          fail("an accumulator of a wgmma was overwritten while it was in flight", site);
        d[i] = accumulator->values[lane * count + i];
      }
      block.fibers[first + lane]->registers_fenced = false;
    }
    accumulator = nullptr;
  }
  const auto drop = [](auto& list, auto dropped) {
    list.erase(std::remove_if(list.begin(), list.end(), dropped), list.end());
  };
  drop(warp.accumulators, [](const auto& accumulator) { return accumulator == nullptr; });
  drop(warp.operands, [=](const Warp::Operand& operand) { return operand.last <= done; });
}

void wgmma_wait(int pending, Site site) {
  Warp& warp = my_warp();
  Fiber& fiber = self();
  const size_t keep = static_cast<size_t>(pending);
  const uint64_t done = warp.groups.size() > keep ? warp.groups[warp.groups.size() - 1 - keep] : 0;
  while (warp.executed < done) {
    warp.waiting.push_back(&fiber);
    block("its wgmmas, all but %u groups", static_cast<unsigned>(pending), 0, site);
  }
  struct Wait {
    uint64_t done;
    Fiber* fiber;
    Site site;
  } own{done, &fiber, site};
  collective(
      "wgmma_wait", ~0u, &own,
      [](Lanes lanes) {
        const Wait& wait = *static_cast<Wait*>(lanes[0]);
        Block& block = *wait.fiber->block;
        Warp& warp = block.warps[static_cast<size_t>(wait.fiber->warp)];
        deliver(warp, *wait.fiber, wait.done, wait.site);
        if (!racing) return;
        for (void* lane : lanes)
          observe(static_cast<Wait*>(lane)->fiber->clocks,
                  {wgmma_lane(block, wait.fiber->warp), static_cast<uint32_t>(wait.done), nullptr});
      },
      site);
}

}  // namespace emu
