/// Shared memory, stacks, the buffers of a test, and plain accesses to them.
#include <sys/mman.h>

#include "state.h"

// AddressSanitizer's, where it is loaded.
extern "C" {
__attribute__((weak)) void __asan_poison_memory_region(const volatile void*, size_t);
__attribute__((weak)) void __asan_unpoison_memory_region(const volatile void*, size_t);
}

namespace emu {

constexpr size_t kSlot = 256 * 1024;
constexpr int kSlots = 64, kStacks = 4096;

static char* reserve(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("the emulator finds no memory");
  return static_cast<char*>(memory);
}

static char* arena() {
  static char* const memory = reserve(kSlots * kSlot);
  return memory;
}

static char* stacks() {
  static char* const memory = reserve(kStacks * kStack);
  return memory;
}

static void mark(const void* memory, size_t bytes, bool usable) {
  if (__asan_poison_memory_region == nullptr) return;
  (usable ? __asan_unpoison_memory_region : __asan_poison_memory_region)(memory, bytes);
}

char* take_stack(int index) {
  if (index >= kStacks) throw std::runtime_error("too many threads for the emulator");
  char* const stack = stacks() + static_cast<size_t>(index) * kStack;
  mark(stack, kStack, true);  // a launch that failed left its marks
  return stack;
}

bool on_stack(const void* address) {
  const char* p = static_cast<const char*>(address);
  return p >= stacks() && p < stacks() + kStacks * kStack;
}

bool in_arena(const void* address) {
  const char* p = static_cast<const char*>(address);
  return p >= arena() && p < arena() + kSlots * kSlot;
}

/// NaN in every floating-point type.
void poison(void* memory, size_t bytes) { std::memset(memory, 0xFF, bytes); }

unsigned char* smem_slot(int slot) {
  if (slot >= kSlots) throw std::runtime_error("too many blocks for the emulator");
  char* const memory = arena() + static_cast<size_t>(slot) * kSlot;
  mark(memory, kSlot, true);
  poison(memory, machine.config.smem);
  mark(memory + machine.config.smem, kSlot - machine.config.smem, false);
  return reinterpret_cast<unsigned char*>(memory);
}

unsigned char* dynamic_smem() { return self().block->smem; }

uint32_t smem_addr(const void* pointer) {
  const auto* p = static_cast<const unsigned char*>(pointer);
  const unsigned char* smem = self().block->smem;
  if (p < smem || p > smem + machine.config.smem)
    fail("smem_addr of a pointer outside the block's shared memory", self().site);
  return static_cast<uint32_t>(p - smem) + kSmemBase;
}

// A shared::cluster address is that of the block with its rank + 1 above bit 24.
uint32_t map_cluster(uint32_t addr, uint32_t rank, Site site) {
  if (rank >= cluster_size()) fail(text("map_cluster: the cluster has no block %u", rank), site);
  return (addr & 0xFFFFFF) | (rank + 1) << 24;
}

unsigned char* resolve(uint32_t addr, size_t bytes, int alignment, bool cluster, Site site,
                       Block** owner) {
  Block* block = self().block;
  const uint32_t rank = addr >> 24, offset = (addr & 0xFFFFFF) - kSmemBase;
  if (rank != 0) {
    if (!cluster) fail("a shared::cluster address where a shared::cta one is needed", site);
    block = block->cluster->blocks[rank - 1];
    if (block->alive == 0) fail("shared memory of a block of the cluster that has ended", site);
  }
  if (offset > machine.config.smem || bytes > machine.config.smem - offset)
    fail(text("shared memory %#x + %zu is outside the block's %zu bytes", addr, bytes,
              machine.config.smem),
         site);
  if (offset % static_cast<uint32_t>(alignment) != 0)
    fail(text("shared memory address %#x is not aligned to %d", addr, alignment), site);
  if (owner != nullptr) *owner = block;
  return block->smem + offset;
}

// ---- the test's buffers in global memory ----

struct Buffer {
  size_t bytes;
  std::string name;
};
static std::map<uintptr_t, Buffer> buffers;

void check_global(const void* address, size_t bytes, Site site) {
  if (buffers.empty()) return;
  const auto at = reinterpret_cast<uintptr_t>(address);
  auto after = buffers.upper_bound(at);
  if (after != buffers.begin()) {
    const auto& [start, buffer] = *std::prev(after);
    if (at + bytes <= start + buffer.bytes) return;
    if (at < start + buffer.bytes + 65536)
      fail(text("global access of %zu bytes at byte %zu of %s, which has %zu", bytes, at - start,
                buffer.name.c_str(), buffer.bytes),
           site);
  }
  if (after != buffers.end() && after->first - at < 65536)
    fail(text("global access of %zu bytes, %zu bytes before %s", bytes, after->first - at,
              after->second.name.c_str()),
         site);
  fail(text("global access of %zu bytes at %p, outside every buffer", bytes, address), site);
}

// ---- plain accesses by address ----

static void plain(const void* address, size_t bytes, bool write, Site site) {
  track(as_thread(self()), address, bytes, write ? kWrite : kRead, site);
}

void ld_cluster(void* to, int bytes, uint32_t addr, Site site) {
  const size_t size = static_cast<size_t>(bytes);
  const unsigned char* from = resolve(addr, size, bytes, true, site);
  plain(from, size, false, site);
  std::memcpy(to, from, size);
}

void st_cluster(uint32_t addr, const void* from, int bytes, Site site) {
  const size_t size = static_cast<size_t>(bytes);
  unsigned char* to = resolve(addr, size, bytes, true, site);
  plain(to, size, true, site);
  std::memcpy(to, from, size);
}

void ld_shared(void* to, int bytes, uint32_t addr, Site site) {
  resolve(addr, 0, bytes, false, site);
  ld_cluster(to, bytes, addr, site);
}

void st_shared(uint32_t addr, const void* from, int bytes, Site site) {
  resolve(addr, 0, bytes, false, site);
  st_cluster(addr, from, bytes, site);
}

}  // namespace emu

extern "C" void emu_buffer(const void* start, size_t bytes, const char* name) {
  emu::buffers[reinterpret_cast<uintptr_t>(start)] = {bytes, name};
}
extern "C" void emu_forget_buffers() { emu::buffers.clear(); }
