/// Shared memory, stacks, and the buffers of a test.
#include <sys/mman.h>

#include "state.h"

// AddressSanitizer's, where it is loaded.
extern "C" {
__attribute__((weak)) void __asan_poison_memory_region(const volatile void*, size_t);
__attribute__((weak)) void __asan_unpoison_memory_region(const volatile void*, size_t);
}

namespace emu {

constexpr size_t kSlot = 256 * 1024, kSlots = 64, kStacks = 4096;

static unsigned char* reserve(size_t bytes) {
  constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, kFlags, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("the emulator finds no memory");
  return static_cast<unsigned char*>(memory);
}
static unsigned char* const slots = reserve(kSlots * kSlot);
static unsigned char* const stacks = reserve(kStacks * kStack);

static size_t offset_from(const void* start, const void* address) {
  return reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(start);
}
bool on_stack(const void* address) { return offset_from(stacks, address) < kStacks * kStack; }
bool in_smem(const void* address) { return offset_from(slots, address) < kSlots * kSlot; }
Block& block_of(const unsigned char* smem) {
  return *machine.blocks[offset_from(slots, smem) / kSlot];
}
uint32_t addr_of(const unsigned char* smem) { return offset_from(slots, smem) % kSlot + kSmemBase; }

static void set_usable(const void* memory, size_t bytes, bool usable) {
  if (__asan_poison_memory_region == nullptr) return;
  (usable ? __asan_unpoison_memory_region : __asan_poison_memory_region)(memory, bytes);
}

unsigned char* take_stack(size_t index) {
  if (index >= kStacks) throw std::runtime_error("too many threads for the emulator");
  set_usable(stacks + index * kStack, kStack, true);  // a launch that failed left its marks
  return stacks + index * kStack;
}

/// NaN in every floating-point type.
void poison(void* memory, size_t bytes) { std::memset(memory, 0xFF, bytes); }

unsigned char* take_smem(size_t slot) {
  if (slot >= kSlots) throw std::runtime_error("too many blocks for the emulator");
  unsigned char* const memory = slots + slot * kSlot;
  set_usable(memory, kSlot, true);
  poison(memory, machine.config.smem);
  set_usable(memory + machine.config.smem, kSlot - machine.config.smem, false);
  return memory;
}

unsigned char* dynamic_smem() { return self().block->smem; }

uint32_t smem_addr(const void* pointer) {
  const size_t offset = offset_from(dynamic_smem(), pointer);
  if (offset > machine.config.smem)
    fail("smem_addr of a pointer outside the block's shared memory");
  return offset + kSmemBase;
}

// A shared::cluster address is that of the block with its rank + 1 above bit 24.
uint32_t map_cluster(uint32_t addr, uint32_t rank) {
  if (rank >= cluster_size()) fail("the cluster has no block ", rank);
  return (addr & 0xFFFFFF) | (rank + 1) << 24;
}

unsigned char* resolve(uint32_t addr, size_t bytes, size_t alignment, bool cluster) {
  const Block* block = self().block;
  const uint32_t rank = addr >> 24, offset = (addr & 0xFFFFFF) - kSmemBase;
  const size_t size = machine.config.smem;
  if (rank != 0) {
    if (!cluster) fail("a shared::cluster address where a shared::cta one is needed");
    block = block->cluster->blocks[rank - 1];
    if (block->alive == 0) fail("shared memory of a block of the cluster that has ended");
  }
  if (offset > size || bytes > size - offset)
    fail("shared memory ", hex(addr), " + ", bytes, " is outside the block's ", size, " bytes");
  if (offset % alignment != 0)
    fail("shared memory address ", hex(addr), " is not aligned to ", alignment);
  return block->smem + offset;
}

void move_shared(void* registers, size_t bytes, uint32_t addr, bool store, bool cluster) {
  unsigned char* const place = resolve(addr, bytes, bytes, cluster);
  track(place, bytes, store ? kWrite : kRead);
  std::memcpy(store ? place : registers, store ? registers : place, bytes);
}

struct Buffer {
  size_t bytes;
  std::string name;
};
static std::map<uintptr_t, Buffer> buffers;  // of the test, in global memory

static void check_global(const void* address, size_t bytes) {
  if (buffers.empty()) return;
  const auto at = reinterpret_cast<uintptr_t>(address);
  auto buffer = buffers.upper_bound(at);
  if (buffer != buffers.begin()) --buffer;
  const auto& [start, named] = *buffer;
  if (at < start || at + bytes > start + named.bytes)
    fail("global access of ", bytes, " bytes, of which the first is number ",
         static_cast<int64_t>(at - start), " from ", named.name, "'s, which has ", named.bytes);
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
