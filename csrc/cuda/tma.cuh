/// Tensor memory access, bulk copies, clusters and their shared memory (sm_90).
/// Part of ptx.cuh: include that.
#pragma once

namespace pyops::ptx {

// ---- TMA -----------------------------------------------------------------------------------

// One asm per rank; operands: %0 shared address, %1 tensor map, %2 mbarrier, %3 cache policy,
// %4 block mask, %5... coordinates.
#define PTX_TMA_RANK(R, NAME, MIDDLE, COORDS, TAIL, ...)                                   \
  PTX90(, NAME "." #R "d" MIDDLE COORDS TAIL ::"r"(smem), "l"(map), "r"(bar), "l"(policy), \
        "h"(mask), __VA_ARGS__ : "memory")
#define PTX_TMA(NAME, MIDDLE, TAIL)                                                             \
  if constexpr (Rank == 1)                                                                      \
    PTX_TMA_RANK(1, NAME, MIDDLE, "{%5}", TAIL, "r"(at[0]));                                    \
  else if constexpr (Rank == 2)                                                                 \
    PTX_TMA_RANK(2, NAME, MIDDLE, "{%5, %6}", TAIL, "r"(at[0]), "r"(at[1]));                    \
  else if constexpr (Rank == 3)                                                                 \
    PTX_TMA_RANK(3, NAME, MIDDLE, "{%5, %6, %7}", TAIL, "r"(at[0]), "r"(at[1]), "r"(at[2]));    \
  else if constexpr (Rank == 4)                                                                 \
    PTX_TMA_RANK(4, NAME, MIDDLE, "{%5, %6, %7, %8}", TAIL, "r"(at[0]), "r"(at[1]), "r"(at[2]), \
                 "r"(at[3]));                                                                   \
  else                                                                                          \
    PTX_TMA_RANK(5, NAME, MIDDLE, "{%5, %6, %7, %8, %9}", TAIL, "r"(at[0]), "r"(at[1]),         \
                 "r"(at[2]), "r"(at[3]), "r"(at[4]))

// What L2 does with the lines of a TMA load (the encoded policies of createpolicy).
constexpr uint64_t kEvictFirst = 0x12F0000000000000;
constexpr uint64_t kEvictLast = 0x14F0000000000000;

/// Loads the map's box at coordinates `at` (innermost first, may lie outside: zeros) into shared
/// memory (aligned to 128 bytes; 1024 with the 128-byte swizzle) and counts its bytes at `bar`.
template <int Rank>
PTX_FN void tma_load(uint32_t smem, const CUtensorMap* map, uint32_t bar,
                     const int (&at)[Rank] PTX_AT) {
#ifdef PYOPS_EMULATE
  PTX_HERE;
  emu::tma_load(smem, map, bar, at, Rank, 0);
#else
  [[maybe_unused]] constexpr uint64_t policy = 0;
  [[maybe_unused]] constexpr uint16_t mask = 0;
  PTX_TMA("cp.async.bulk.tensor",
          ".shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, ", "], [%2];");
#endif
}

/// tma_load with an L2 policy, kEvictFirst or kEvictLast.
template <int Rank>
PTX_FN void tma_load_hint(uint32_t smem, const CUtensorMap* map, uint32_t bar,
                          const int (&at)[Rank], uint64_t policy PTX_AT) {
#ifdef PYOPS_EMULATE
  (void)policy;
  PTX_HERE;
  emu::tma_load(smem, map, bar, at, Rank, 0);
#else
  [[maybe_unused]] constexpr uint16_t mask = 0;
  PTX_TMA("cp.async.bulk.tensor",
          ".shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, ",
          "], [%2], %3;");
#endif
}

/// tma_load into the same place of every block of the cluster whose bit is in `mask`; each block's
/// barrier at the place of `bar` counts the bytes.
template <int Rank>
PTX_FN void tma_load_multicast(uint32_t smem, const CUtensorMap* map, uint32_t bar,
                               const int (&at)[Rank], uint16_t mask PTX_AT) {
#ifdef PYOPS_EMULATE
  PTX_HERE;
  emu::tma_load(smem, map, bar, at, Rank, mask);
#else
  [[maybe_unused]] constexpr uint64_t policy = 0;
  PTX_TMA("cp.async.bulk.tensor",
          ".shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, ",
          "], [%2], %4;");
#endif
}

/// Stores a box from shared memory; parts outside the tensor are dropped. In this thread's bulk
/// group: bulk_commit, then bulk_wait_read before the shared memory is written again.
template <int Rank>
PTX_FN void tma_store(const CUtensorMap* map, uint32_t smem, const int (&at)[Rank] PTX_AT) {
#ifdef PYOPS_EMULATE
  PTX_HERE;
  emu::tma_store(map, smem, at, Rank, false);
#else
  [[maybe_unused]] constexpr uint64_t policy = 0;
  [[maybe_unused]] constexpr uint16_t mask = 0;
  [[maybe_unused]] constexpr uint32_t bar = 0;
  PTX_TMA("cp.async.bulk.tensor", ".global.shared::cta.bulk_group [%1, ", "], [%0];");
#endif
}

/// tma_store that adds to what is there (atomically an element; the order is not fixed).
template <int Rank>
PTX_FN void tma_reduce_add(const CUtensorMap* map, uint32_t smem, const int (&at)[Rank] PTX_AT) {
#ifdef PYOPS_EMULATE
  PTX_HERE;
  emu::tma_store(map, smem, at, Rank, true);
#else
  [[maybe_unused]] constexpr uint64_t policy = 0;
  [[maybe_unused]] constexpr uint16_t mask = 0;
  [[maybe_unused]] constexpr uint32_t bar = 0;
  PTX_TMA("cp.reduce.async.bulk.tensor", ".global.shared::cta.add.tile.bulk_group [%1, ",
          "], [%0];");
#endif
}
#undef PTX_TMA
#undef PTX_TMA_RANK

PTX_FN void prefetch_tensor_map(const CUtensorMap* map PTX_AT) {
  PTX90((void)map, "prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

/// Copies `bytes` (a multiple of 16, both addresses too) global to shared, counted at `bar`.
PTX_FN void bulk_load(uint32_t smem, const void* src, uint32_t bytes, uint32_t bar PTX_AT) {
  PTX90(emu::bulk_load(smem, src, bytes, bar),
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
        "[%3];" ::"r"(smem),
        "l"(__cvta_generic_to_global(src)), "r"(bytes), "r"(bar) : "memory");
}

/// Copies shared memory to a block of the cluster; `dst` and `bar` there, from map_cluster.
PTX_FN void bulk_copy_cluster(uint32_t dst, uint32_t src, uint32_t bytes, uint32_t bar PTX_AT) {
  PTX90(emu::bulk_load(dst, emu::resolve(src, bytes, 16), bytes, bar),
        "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, "
        "[%3];" ::"r"(dst),
        "r"(src), "r"(bytes), "r"(bar) : "memory");
}

PTX_FN void bulk_store(void* dst, uint32_t smem, uint32_t bytes PTX_AT) {
  PTX90(emu::bulk_store(dst, smem, bytes, false),
        "cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(
            __cvta_generic_to_global(dst)),
        "r"(smem), "r"(bytes) : "memory");
}

/// dst[i] += smem[i], float32.
PTX_FN void bulk_reduce_add(float* dst, uint32_t smem, uint32_t bytes PTX_AT) {
  PTX90(emu::bulk_store(dst, smem, bytes, true),
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(
            __cvta_generic_to_global(dst)),
        "r"(smem), "r"(bytes) : "memory");
}

PTX_FN void bulk_commit(PTX_ONLY_AT) {
  PTX90(emu::copies_commit(true), "cp.async.bulk.commit_group;" :: : "memory");
}

/// Waits until at most Pending of this thread's newest bulk groups are unfinished.
template <int Pending>
PTX_FN void bulk_wait(PTX_ONLY_AT) {
  PTX90(emu::copies_wait(true, Pending, false),
        "cp.async.bulk.wait_group %0;" ::"n"(Pending) : "memory");
}

/// ... have not yet read their shared memory.
template <int Pending>
PTX_FN void bulk_wait_read(PTX_ONLY_AT) {
  PTX90(emu::copies_wait(true, Pending, true),
        "cp.async.bulk.wait_group.read %0;" ::"n"(Pending) : "memory");
}

// ---- clusters -------------------------------------------------------------------------------

PTX_FN uint32_t cluster_rank(PTX_ONLY_AT) {
  uint32_t rank = 0;
  PTX90(rank = emu::cluster_rank(), "mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

PTX_FN uint32_t cluster_size(PTX_ONLY_AT) {
  uint32_t size = 1;
  PTX90(size = emu::cluster_size(), "mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

/// The two halves of the barrier of all threads of the cluster (release, acquire).
PTX_FN void cluster_arrive(PTX_ONLY_AT) {
  PTX90(emu::cluster_arrive(), "barrier.cluster.arrive.release.aligned;" :: : "memory");
}
PTX_FN void cluster_wait(PTX_ONLY_AT) {
  PTX90(emu::cluster_wait(), "barrier.cluster.wait.acquire.aligned;" :: : "memory");
}
PTX_FN void cluster_sync(PTX_ONLY_AT) {
  cluster_arrive(PTX_ONLY_PASS);
  cluster_wait(PTX_ONLY_PASS);
}

/// The address that `addr` of this block has in block `rank` of the cluster.
PTX_FN uint32_t map_cluster(uint32_t addr, uint32_t rank PTX_AT) {
  uint32_t mapped = 0;
  PTX90(mapped = emu::map_cluster(addr, rank),
        "mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(addr), "r"(rank));
  return mapped;
}

/// 4 bytes of another block's shared memory; `addr` from map_cluster.
template <class T>
PTX_FN T ld_cluster(uint32_t addr PTX_AT) {
  static_assert(sizeof(T) == 4);
  union {
    uint32_t word;
    T value;
  };
  PTX90(emu::move_shared(&word, 4, addr, false, true),
        "ld.shared::cluster.b32 %0, [%1];" : "=r"(word) : "r"(addr) : "memory");
  return value;
}

template <class T>
PTX_FN void st_cluster(uint32_t addr, T stored PTX_AT) {
  static_assert(sizeof(T) == 4);
  union {
    T value;
    uint32_t word;
  };
  value = stored;
  PTX90(emu::move_shared(&word, 4, addr, true, true),
        "st.shared::cluster.b32 [%0], %1;" ::"r"(addr), "r"(word) : "memory");
}

/// st_cluster in the background, its 4 bytes counted at `bar` (of the same block as addr).
template <class T>
PTX_FN void st_async(uint32_t addr, T stored, uint32_t bar PTX_AT) {
  static_assert(sizeof(T) == 4);
  union {
    T value;
    uint32_t word;
  };
  value = stored;
  PTX90(
      emu::st_async(addr, word, bar),
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(addr),
      "r"(word), "r"(bar) : "memory");
}

}  // namespace pyops::ptx
