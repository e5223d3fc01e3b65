/// The tensor cores: ldmatrix, mma.sync, and wgmma with its queue.
#include "state.h"

namespace emu {

constexpr int size_of(Type type) { return type == TF32 ? 4 : 2; }
constexpr int depth_of(Type type) { return 32 / size_of(type); }

static float element(const void* at, Type type) {
  uint32_t bits = 0;
  std::memcpy(&bits, at, size_of(type));
  if (type == F16) return __half2float(__half(__half_raw{static_cast<unsigned short>(bits)}));
  return __uint_as_float(type == TF32 ? bits & ~0x1FFFu : bits << 16);
}

/// Matrix i's row r lies at the address of lane 8i + r; lane l holds elements 2(l%4), 2(l%4) + 1
/// of row l/4 of each matrix, or of its transpose.
void move_matrices(uint32_t* registers, int count, bool transpose, uint32_t addr, bool store) {
  struct Own {
    uint32_t* registers;
    unsigned char* row;
  } own{registers, nullptr};
  if (lane_id() < 8 * count) {
    own.row = resolve(addr, 16, 16);
    track(own.row, 16, store ? kWrite : kRead);
  }
  collective(store ? "stmatrix" : "ldmatrix", own, [=](auto of) {
    for (int i = 0; i < 64 * count; ++i) {
      const int row = i / 8 % 8, column = i % 8;
      const int major = transpose ? column : row, minor = transpose ? row : column;
      uint32_t* const word = &of(4 * major + minor / 2)->registers[i / 64];
      unsigned char* const half = reinterpret_cast<unsigned char*>(word) + 2 * (minor % 2);
      unsigned char* const place = of(i / 8)->row + 2 * column;
      std::memcpy(store ? place : half, store ? half : place, 2);
    }
  });
}

using Operand = std::vector<float>;  // rows of A or columns of B, all of K each

/// 8 or 16 rows of A or columns of B in the registers of a warp: with n numbers a register, element
/// k of row m is in lane 4(m%8) + k/n%4, register m/8 + rows/8 (k/4n).
template <class Registers>
static Operand unpack(int rows, Type type, Registers registers) {
  const int n = 4 / size_of(type), depth = depth_of(type);
  Operand to;
  for (int m = 0; m < rows; ++m)
    for (int k = 0; k < depth; ++k) {
      const uint32_t* const word =
          registers(4 * (m % 8) + k / n % 4) + m / 8 + rows / 8 * (k / (4 * n));
      to.push_back(element(reinterpret_cast<const char*>(word) + k % n * size_of(type), type));
    }
  return to;
}

/// Calls add(lane, register, sum) for all of a 16-row product, as its accumulators lie.
template <class Add>
static void multiply(const Operand& a, const Operand& b, Add add) {
  const size_t depth = a.size() / 16, columns = b.size() / depth;
  for (size_t m = 0; m < 16; ++m)
    for (size_t n = 0; n < columns; ++n) {
      float sum = 0;
      for (size_t k = 0; k < depth; ++k) sum += a[m * depth + k] * b[n * depth + k];
      add(4 * (m % 8) + n % 8 / 2, 4 * (n / 8) + 2 * (m / 8) + n % 2, sum);
    }
}

void mma_sync(float* d, const uint32_t* a, const uint32_t* b, Type type) {
  struct Own {
    float* d;
    const uint32_t *a, *b;
  } own{d, a, b};
  collective("mma", own, [type](auto of) {
    multiply(unpack(16, type, [of](int lane) { return of(lane)->a; }),
             unpack(8, type, [of](int lane) { return of(lane)->b; }),
             [of](int lane, int i, float sum) { of(lane)->d[i] += sum; });
  });
}

/// An operand in shared memory as its descriptor tells: chunks of 16 bytes, `wide` of them a row.
struct Descriptor {
  uint64_t bits;

  uint32_t field(int from) const { return (bits >> from & 0x3FFF) << 4; }
  /// Address of the chunk number `along` of the contiguous axis (K if is_k), at `minor` of the
  /// other one.
  uint32_t chunk(uint32_t along, uint32_t minor, bool is_k) const {
    const uint32_t leading = field(16), stride = field(32), base_offset = bits >> 49 & 7;
    const uint32_t wide = bits >> 62 == 0 ? 1 : 16 >> (bits >> 62);
    const uint32_t addr = field(0) + minor % 8 * 16 * wide;
    // 8 rows of 16 bytes are contiguous; leading steps along K, stride along M or N.
    if (wide == 1)
      return addr + (is_k ? along : minor / 8) * leading + (is_k ? minor / 8 : along) * stride;
    const uint32_t to =
        addr + minor / 8 * stride + along % wide * 16 + (is_k ? 0 : along / wide * leading);
    return to ^ (((to >> 7) - base_offset) & (wide - 1)) << 4;
  }
};

/// From `first` on, `rows` of M or N of an operand in shared memory.
static Operand fetch(Descriptor operand, int first, int rows, bool is_k, Type type,
                     const Block& block) {
  const int depth = depth_of(type), size = size_of(type), per = 16 / size;
  Operand to(rows * depth);
  for (int row = 0; row < rows; row += is_k ? 1 : per)
    for (int k = 0; k < depth; k += is_k ? per : 1) {
      const int m = first + row;
      const uint32_t addr = operand.chunk((is_k ? k : m) / per, is_k ? m : k, is_k);
      if (addr < kSmemBase || addr + 16 > kSmemBase + machine.config.smem)
        fail("wgmma: its descriptor leads to ", hex(addr), ", outside the block's shared memory");
      const unsigned char* const chunk = block.smem + (addr - kSmemBase);
      track(chunk, 16, kRead);
      for (int i = 0; i < per; ++i)
        to[is_k ? row * depth + k + i : (row + i) * depth + k] = element(chunk + i * size, type);
    }
  return to;
}

constexpr uint32_t kInFlight = 0x7FC0ACC5;  // a NaN: the registers of accumulators in flight

/// The accumulators of an operation that a warp issues, new or in flight already.
template <class Lanes>
static Accumulator& accumulator_of(Warp& warp, int count, Lanes of) {
  float* const first = of(0)->d;
  for (Accumulator& other : warp.accumulators) {
    if (other.d[0] == first && other.count == count) return other;
    if (first < other.d[0] + other.count && other.d[0] < first + count)
      fail("wgmma: the accumulators overlap others in flight");
  }
  Accumulator& made = warp.accumulators.emplace_back();
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
  struct Own {
    Fiber* fiber;
    float* d;
    const uint32_t* a;
    Warp::Call call;
  } own{&self(), d, a_registers, {n, a, b, accumulate}};
  const Block& block = *self().block;
  const int first = self().warp & ~3;
  if (block.warps.size() < first + 4u) fail("wgmma by less than a whole warpgroup");
  collective("wgmma", own, [=, &block](auto of) {
    const Fiber& fiber = *of(0)->fiber;
    const Warp::Call call = of(0)->call;
    Warp& warp = warp_of(fiber);
    const uint64_t number = ++warp.issued;
    warp.calls.push_back(call);
    for (int i = first; i < first + 4; ++i)
      if (block.warps[i].issued >= number && block.warps[i].calls[number - 1] != call)
        fail("wgmma: warps ", fiber.warp, " and ", i,
             " of the warpgroup issue different operations");
    Accumulator& accumulator = accumulator_of(warp, n / 2, of);
    accumulator.last = number;
    const Actor actor = as_wgmma(*of(0)->fiber, number);
    for (int lane = 0; lane < 32; ++lane) {
      if (of(lane)->call != call)
        fail("wgmma: the lanes of the warp differ in descriptors or `accumulate`");
      if (actor.clocks != nullptr) release(*actor.clocks, *of(lane)->fiber);
      if (const uint32_t* const r = of(lane)->a)
        warp.operands.push_back({r, {r[0], r[1], r[2], r[3]}, number});
    }
    Operand rows;
    if (a_registers != nullptr) rows = unpack(16, type, [of](int lane) { return of(lane)->a; });
    defer(warp.chain, actor, [=, &block, &warp, &accumulator, row = 16 * (fiber.warp % 4)] {
      multiply(rows.empty() ? fetch({a}, row, 16, a_major == 0, type, block) : rows,
               fetch({b}, 0, n, b_major == 0, type, block), [&](int lane, int i, float sum) {
                 float& value = accumulator.values[lane * accumulator.count + i];
                 value = accumulate ? value + sum : sum;
               });
      ++warp.executed;
      wake(warp.waiting);
    });
  });
}

void wgmma_fence() {
  interleave();
  gather("wgmma_fence", nullptr);
  self().registers_fenced = true;
}

void wgmma_commit() {
  collective("wgmma_commit", warp_of(self()),
             [](auto of) { of(0)->groups.push_back(of(0)->issued); });
}

/// Gives the accumulators of the operations up to number `done` back to their registers.
static void deliver(Warp& warp, uint64_t done) {
  for (const auto& [registers, values, last] : warp.operands)
    if (last <= done && !std::equal(values, values + 4, registers))
      fail("the A registers of a wgmma were overwritten while it was in flight");
  for (const Accumulator& accumulator : warp.accumulators) {
    const float* value = accumulator.values.data();
    for (int i = 0; accumulator.last <= done && i < 32 * accumulator.count; ++i) {
      float& d = accumulator.d[i / accumulator.count][i % accumulator.count];
      if (std::memcmp(&d, &kInFlight, 4) != 0)
        fail("an accumulator of a wgmma was overwritten while it was in flight");
      d = *value++;
    }
  }
}

void wgmma_wait(size_t pending) {
  Warp& warp = warp_of(self());
  const size_t groups = warp.groups.size();
  const uint64_t done = groups > pending ? warp.groups[groups - 1 - pending] : 0;
  await(warp.waiting, {"its wgmmas, all but %u groups", static_cast<unsigned>(pending)},
        [&] { return warp.executed >= done; });
  collective("wgmma_wait", self(), [done, &warp](auto of) {
    deliver(warp, done);
    const Actor finishing = as_wgmma(*of(0), done);
    const auto finished = [=](const auto& each) { return each.last <= done; };
    const bool returned = std::erase_if(warp.accumulators, finished) > 0;
    std::erase_if(warp.operands, finished);
    for (int lane = 0; lane < 32; ++lane) {
      observe(of(lane)->clocks, finishing);
      if (returned) of(lane)->registers_fenced = false;
    }
  });
}

}  // namespace emu
