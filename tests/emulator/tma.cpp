/// Tensor maps and the boxes that TMA moves.
#include "state.h"

namespace emu {

/// What the emulator keeps in a CUtensorMap.
struct TensorMap {
  uint32_t magic;
  uint8_t rank, element, swizzle, type;
  uint8_t steps[6];
  uint16_t box[5];
  unsigned char* base;
  uint64_t sizes[5], strides[4];

  /// Elements taken along a dimension.
  int count(int dim) const { return (box[dim] + steps[dim] - 1) / steps[dim]; }
  size_t row_bytes() const { return static_cast<size_t>(count(0)) * element; }
  size_t bytes() const {
    size_t all = element;
    for (int dim = 0; dim < rank; ++dim) all *= static_cast<size_t>(count(dim));
    return all;
  }
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));
constexpr uint32_t kMagic = 0x7E4502A9;

/// Chunks of 16 bytes change places within 32, 64 or 128 bytes by the address's bits from 7 on.
static uint32_t swizzled(uint32_t addr, int swizzle) {
  const uint32_t rows = swizzle == CU_TENSOR_MAP_SWIZZLE_32B    ? 1
                        : swizzle == CU_TENSOR_MAP_SWIZZLE_64B  ? 3
                        : swizzle == CU_TENSOR_MAP_SWIZZLE_128B ? 7
                                                                : 0;
  return addr ^ (addr >> 7 & rows) << 4;
}

static TensorMap read_map(const CUtensorMap* map, int rank, Site site) {
  TensorMap own;
  std::memcpy(&own, map, sizeof own);
  if (own.magic != kMagic) fail("this is no tensor map", site);
  if (own.rank != rank) fail(text("%d coordinates for a map of rank %d", rank, own.rank), site);
  if (reinterpret_cast<uintptr_t>(map) % 64 != 0) fail("the tensor map is not aligned to 64", site);
  return own;
}

/// Calls each(offset in the box, global address, first valid byte, end of the valid bytes) for
/// every 16 bytes of the box.
template <class Each>
static void walk(const TensorMap& map, const int* at, Each each) {
  const size_t row_bytes = map.row_bytes(), rows = map.bytes() / row_bytes;
  for (size_t row = 0; row < rows; ++row) {
    unsigned char* base = map.base;
    bool inside = true;
    size_t rest = row;
    for (int dim = 1; dim < map.rank; ++dim) {
      const auto count = static_cast<size_t>(map.count(dim));
      const int64_t index = at[dim] + static_cast<int64_t>(rest % count) * map.steps[dim];
      rest /= count;
      inside &= index >= 0 && index < static_cast<int64_t>(map.sizes[dim]);
      base += index * static_cast<int64_t>(map.strides[dim - 1]);
    }
    for (size_t byte = 0; byte < row_bytes; byte += 16) {
      const int64_t from = static_cast<int64_t>(at[0]) * map.element + static_cast<int64_t>(byte);
      const int64_t end = static_cast<int64_t>(map.sizes[0]) * map.element;
      const auto clamp = [](int64_t x) {
        return static_cast<int>(std::min<int64_t>(std::max<int64_t>(x, 0), 16));
      };
      const int first = clamp(-from), last = inside ? clamp(end - from) : 0;
      each(row * row_bytes + byte, base + from, first, std::max(first, last));
    }
  }
}

void tma_load(uint32_t dst, const CUtensorMap* map_of, uint32_t bar, const int* coordinates,
              int rank, uint16_t mask, Site site) {
  interleave(site);
  const TensorMap map = read_map(map_of, rank, site);
  Block* block = nullptr;
  const unsigned char* to = resolve(dst, map.bytes(), 128, true, site, &block);
  check_counter(bar, block, site);
  const auto offset = static_cast<uint32_t>(to - block->smem);
  const std::vector<int> at(coordinates, coordinates + rank);
  std::vector<Piece> pieces;
  if (mask == 0) pieces.push_back({block, offset, map.bytes()});
  const auto& blocks = block->cluster->blocks;
  for (uint32_t rank_of = 0; rank_of < 16; ++rank_of) {
    if (!(mask >> rank_of & 1)) continue;
    if (rank_of >= blocks.size())
      fail(text("multicast to block %u of a cluster of %zu", rank_of, blocks.size()), site);
    const uint32_t there = (bar & 0xFFFFFF) | (rank_of + 1) << 24;
    check_counter(there, blocks[rank_of], site);
    pieces.push_back({blocks[rank_of], offset, map.bytes()});
  }
  deferred_load(
      pieces, bar,
      [=](const Actor& actor, const Piece& piece) {
        walk(map, at.data(), [&](size_t place, unsigned char* from, int first, int last) {
          const uint32_t addr =
              swizzled(piece.offset + kSmemBase + static_cast<uint32_t>(place), map.swizzle);
          unsigned char* chunk = piece.block->smem + (addr - kSmemBase);
          std::memset(chunk, 0, 16);
          if (first == last) return;
          const auto bytes = static_cast<size_t>(last - first);
          check_global(from + first, bytes, site);
          track(actor, from + first, bytes, kRead | kAsync, site);
          std::memcpy(chunk + first, from + first, bytes);
        });
      },
      site);
}

void tma_store(const CUtensorMap* map_of, uint32_t src, const int* coordinates, int rank, bool add,
               Site site) {
  interleave(site);
  const TensorMap map = read_map(map_of, rank, site);
  const unsigned char* from = resolve(src, map.bytes(), 128, false, site);
  const unsigned char* smem = self().block->smem;
  const std::vector<int> at(coordinates, coordinates + rank);
  char element = 0;
  if (add) {
    element = map.type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32    ? 'f'
              : map.type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16  ? 'h'
              : map.type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 ? 'b'
                                                             : 'x';
    if (element == 'x') fail("tma_reduce_add of a type that the emulator does not know", site);
  }
  deferred_store(
      [=](const Actor& actor) {
        std::vector<Run> runs;
        track(actor, from, map.bytes(), kRead | kAsync, site);
        walk(map, at.data(), [&](size_t place, unsigned char* to, int first, int last) {
          const auto offset = static_cast<uint32_t>(from - smem) + static_cast<uint32_t>(place);
          const unsigned char* chunk =
              smem + (swizzled(offset + kSmemBase, map.swizzle) - kSmemBase);
          if (first == last) return;
          check_global(to + first, static_cast<size_t>(last - first), site);
          runs.push_back({to + first, {chunk + first, chunk + last}});
        });
        return runs;
      },
      element, site);
}

static int element_bytes(CUtensorMapDataType type) {
  switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8:
      return 1;
    case CU_TENSOR_MAP_DATA_TYPE_UINT16:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16:
      return 2;
    case CU_TENSOR_MAP_DATA_TYPE_UINT64:
    case CU_TENSOR_MAP_DATA_TYPE_INT64:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT64:
      return 8;
    default:
      return 4;
  }
}

}  // namespace emu

/// The limits are those that the driver's documentation names. A swizzled box narrower than its
/// pattern is refused, too: how it lies in shared memory is not documented.
extern "C" CUresult CUDAAPI cuTensorMapEncodeTiled(
    CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base,
    const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
    const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
    CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  emu::TensorMap own{};
  const auto bytes = static_cast<cuuint32_t>(emu::element_bytes(type));
  if (rank < 1 || rank > 5 || interleave != CU_TENSOR_MAP_INTERLEAVE_NONE ||
      fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE || reinterpret_cast<uintptr_t>(base) % 16 != 0)
    return CUDA_ERROR_INVALID_VALUE;
  own.magic = emu::kMagic;
  own.rank = static_cast<uint8_t>(rank);
  own.element = static_cast<uint8_t>(bytes);
  own.swizzle = static_cast<uint8_t>(swizzle);
  own.type = static_cast<uint8_t>(type);
  own.base = static_cast<unsigned char*>(base);
  for (cuuint32_t dim = 0; dim < rank; ++dim) {
    if (sizes[dim] == 0 || sizes[dim] > 1ull << 32) return CUDA_ERROR_INVALID_VALUE;
    if (box[dim] == 0 || box[dim] > 256 || steps[dim] == 0 || steps[dim] > 8)
      return CUDA_ERROR_INVALID_VALUE;
    own.sizes[dim] = sizes[dim];
    own.box[dim] = static_cast<uint16_t>(box[dim]);
    own.steps[dim] = static_cast<uint8_t>(dim == 0 ? 1 : steps[dim]);
    if (dim == 0) continue;
    if (strides[dim - 1] % 16 != 0 || strides[dim - 1] >= 1ull << 40)
      return CUDA_ERROR_INVALID_VALUE;
    own.strides[dim - 1] = strides[dim - 1];
  }
  const cuuint32_t span = swizzle == CU_TENSOR_MAP_SWIZZLE_32B    ? 32
                          : swizzle == CU_TENSOR_MAP_SWIZZLE_64B  ? 64
                          : swizzle == CU_TENSOR_MAP_SWIZZLE_128B ? 128
                                                                  : 0;
  if (box[0] * bytes % 16 != 0 || (span != 0 && box[0] * bytes != span))
    return CUDA_ERROR_INVALID_VALUE;
  std::memset(map, 0, sizeof *map);
  std::memcpy(static_cast<void*>(map), &own, sizeof own);
  return CUDA_SUCCESS;
}
