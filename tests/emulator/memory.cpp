/// Shared memory and stacks, the buffers of a test, and plain accesses to them.
#include <sys/mman.h>

#include "state.h"

// AddressSanitizer's, where it is loaded.
extern "C" {
__attribute__((weak)) void __asan_poison_memory_region(const volatile void*, size_t);
__attribute__((weak)) void __asan_unpoison_memory_region(const volatile void*, size_t);
}

namespace emu {

constexpr size_t kSlot = 256 * 1024, kSlots = 64, kStacks = 4096;

static char* reserve(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("the emulator finds no memory");
  return static_cast<char*>(memory);
}
static char* const slots = reserve(kSlots * kSlot);
static char* const stacks = reserve(kStacks * kStack);

static void mark(const void* memory, size_t bytes, bool usable) {
  if (__asan_poison_memory_region == nullptr) return;
  (usable ? __asan_unpoison_memory_region : __asan_poison_memory_region)(memory, bytes);
}

char* take_stack(size_t index) {
  if (index >= kStacks) throw std::runtime_error("too many threads for the emulator");
  mark(stacks + index * kStack, kStack, true);  // a launch that failed left its marks
  return stacks + index * kStack;
}

static size_t offset_from(const void* start, const void* address) {
  return reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(start);
}
bool on_stack(const void* address) { return offset_from(stacks, address) < kStacks * kStack; }
bool in_smem(const void* address) { return offset_from(slots, address) < kSlots * kSlot; }

// ---- shared memory ----

/// NaN in every floating-point type.
void poison(void* memory, size_t bytes) { std::memset(memory, 0xFF, bytes); }

unsigned char* smem_slot(size_t slot) {
  if (slot >= kSlots) throw std::runtime_error("too many blocks for the emulator");
  char* const memory = slots + slot * kSlot;
  mark(memory, kSlot, true);
  poison(memory, machine.config.smem);
  mark(memory + machine.config.smem, kSlot - machine.config.smem, false);
  return reinterpret_cast<unsigned char*>(memory);
}

Block& block_of(const unsigned char* smem) {
  return *machine.blocks[offset_from(slots, smem) / kSlot];
}
uint32_t addr_of(const unsigned char* smem) {
  return static_cast<uint32_t>(offset_from(slots, smem) % kSlot) + kSmemBase;
}
unsigned char* dynamic_smem() { return self().block->smem; }

uint32_t smem_addr(const void* pointer) {
  const size_t offset = offset_from(dynamic_smem(), pointer);
  if (offset > machine.config.smem)
    fail("smem_addr of a pointer outside the block's shared memory");
  return static_cast<uint32_t>(offset) + kSmemBase;
}

// A shared::cluster address is that of the block with its rank + 1 above bit 24.
uint32_t map_cluster(uint32_t addr, uint32_t rank) {
  if (rank >= cluster_size()) fail("map_cluster: the cluster has no block %u", rank);
  return (addr & 0xFFFFFF) | (rank + 1) << 24;
}

unsigned char* resolve(uint32_t addr, size_t bytes, size_t alignment, bool cluster) {
  const Block* block = self().block;
  const uint32_t rank = addr >> 24, offset = (addr & 0xFFFFFF) - kSmemBase;
  if (rank != 0) {
    if (!cluster) fail("a shared::cluster address where a shared::cta one is needed");
    block = block->cluster->blocks[rank - 1];
    if (block->alive == 0) fail("shared memory of a block of the cluster that has ended");
  }
  if (offset > machine.config.smem || bytes > machine.config.smem - offset)
    fail("shared memory %#x + %zu is outside the block's %zu bytes", addr, bytes,
         machine.config.smem);
  if (offset % alignment != 0)
    fail("shared memory address %#x is not aligned to %zu", addr, alignment);
  return block->smem + offset;
}

void ld_shared(void* to, int bytes, uint32_t addr, bool cluster) {
  const auto size = static_cast<size_t>(bytes);
  const unsigned char* from = resolve(addr, size, size, cluster);
  track(from, size, kRead);
  std::memcpy(to, from, size);
}

void st_shared(uint32_t addr, const void* from, int bytes, bool cluster) {
  const auto size = static_cast<size_t>(bytes);
  unsigned char* to = resolve(addr, size, size, cluster);
  track(to, size, kWrite);
  std::memcpy(to, from, size);
}

// ---- the test's buffers in global memory ----

struct Buffer {
  size_t bytes;
  std::string name;
};
static std::map<uintptr_t, Buffer> buffers;

static void check_global(const void* address, size_t bytes) {
  if (buffers.empty()) return;
  const auto at = reinterpret_cast<uintptr_t>(address);
  const auto after = buffers.upper_bound(at);
  if (after != buffers.begin()) {
    const auto& [start, buffer] = *std::prev(after);
    if (at + bytes <= start + buffer.bytes) return;
    if (at < start + buffer.bytes + 65536)
      fail("global access of %zu bytes at byte %zu of %s, which has %zu", bytes, at - start,
           buffer.name.c_str(), buffer.bytes);
  }
  if (after != buffers.end() && after->first - at < 65536)
    fail("global access of %zu bytes, %zu bytes before %s", bytes, after->first - at,
         after->second.name.c_str());
  fail("global access of %zu bytes at %p, outside every buffer", bytes, address);
}

void touch(const void* address, size_t bytes, int access) {
  if (!in_smem(address)) check_global(address, bytes);
  track(address, bytes, access);
}

}  // namespace emu

extern "C" void emu_buffer(const void* start, size_t bytes, const char* name) {
  emu::buffers[reinterpret_cast<uintptr_t>(start)] = {bytes, name};
}
extern "C" void emu_forget_buffers() { emu::buffers.clear(); }
