/// Tensor maps and the boxes that TMA moves.
#include "state.h"

namespace emu {

/// The element types of pyops::tensor_map_type.
struct Element {
  CUtensorMapDataType type;
  size_t bytes;
  Add add;
};
constexpr Element kElements[] = {
    {CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, nullptr},
    {CU_TENSOR_MAP_DATA_TYPE_UINT32, 4, nullptr},
    {CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, add_elements<__half>},
    {CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, add_elements<__nv_bfloat16>},
    {CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 4, add_elements<float>},
};

/// What the emulator keeps in a CUtensorMap.
struct TensorMap {
  uint32_t magic;
  int rank;
  const Element* element;
  uint32_t swizzle;  // rows of 128 bytes in the pattern, less one: 0, 1, 3, 7
  uint8_t steps[5];
  uint16_t count[5];  // elements taken along a dimension
  unsigned char* base;
  int64_t sizes[5], strides[4];

  size_t bytes() const {
    size_t all = element->bytes;
    for (int dim = 0; dim < rank; ++dim) all *= count[dim];
    return all;
  }
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));
constexpr uint32_t kMagic = 0x7E4502A9;

static TensorMap read_map(const CUtensorMap* map, int rank) {
  TensorMap own;
  std::memcpy(static_cast<void*>(&own), map, sizeof own);
  if (own.magic != kMagic) fail("this is no tensor map");
  if (own.rank != rank) fail("%d coordinates for a map of rank %d", rank, own.rank);
  if (reinterpret_cast<uintptr_t>(map) % 64 != 0) fail("the tensor map is not aligned to 64");
  return own;
}

/// The parts of the box at coordinates `at` that lie inside the tensor, as runs of up to 16 bytes;
/// the box in shared memory starts at `box`.
static std::vector<Run> runs_of(const TensorMap& map, const int* at, unsigned char* box) {
  std::vector<Run> runs;
  const auto element = static_cast<int64_t>(map.element->bytes);
  const int64_t row_bytes = map.count[0] * element, end = map.sizes[0] * element;
  for (size_t row = 0; row < map.bytes() / static_cast<size_t>(row_bytes); ++row) {
    unsigned char* base = map.base;
    bool inside = true;
    size_t rest = row;
    for (int dim = 1; dim < map.rank; ++dim) {
      const int64_t index = at[dim] + static_cast<int64_t>(rest % map.count[dim]) * map.steps[dim];
      rest /= map.count[dim];
      inside &= index >= 0 && index < map.sizes[dim];
      base += index * map.strides[dim - 1];
    }
    for (int64_t byte = 0; inside && byte < row_bytes; byte += 16) {
      const int64_t from = at[0] * element + byte;
      const int64_t first = std::max<int64_t>(-from, 0), last = std::min<int64_t>(end - from, 16);
      if (first >= last) continue;
      // 16 bytes change places within 32, 64 or 128 by the address's bits from 7 on (which the
      // host's address shares).
      auto place = reinterpret_cast<uintptr_t>(box) + row * static_cast<size_t>(row_bytes) +
                   static_cast<size_t>(byte);
      place ^= (place >> 7 & map.swizzle) << 4;
      runs.push_back({reinterpret_cast<unsigned char*>(place) + first, base + from + first,
                      static_cast<size_t>(last - first)});
    }
  }
  return runs;
}

void tma_load(uint32_t dst, const CUtensorMap* map_of, uint32_t bar, const int* at, int rank,
              uint16_t mask) {
  interleave();
  const TensorMap map = read_map(map_of, rank);
  const auto load = [&](uint32_t to, uint32_t counter) {
    unsigned char* const box = resolve(to, map.bytes(), 128, true);
    counted_load(box, std::vector<unsigned char>(map.bytes()), runs_of(map, at, box), counter);
  };
  if (mask == 0) return load(dst, bar);
  for (uint32_t block = 0; block < 16; ++block)
    if (mask >> block & 1) load(map_cluster(dst, block), map_cluster(bar, block));
}

void tma_store(const CUtensorMap* map_of, uint32_t src, const int* at, int rank, bool add) {
  interleave();
  const TensorMap map = read_map(map_of, rank);
  if (add && map.element->add == nullptr) fail("tma_reduce_add of integers");
  grouped_store(runs_of(map, at, resolve(src, map.bytes(), 128)), add ? map.element->add : nullptr);
}

}  // namespace emu

/// The limits are those that the driver's documentation names. A swizzled box narrower than its
/// pattern is refused, too: how it lies in shared memory is not documented.
extern "C" CUresult CUDAAPI cuTensorMapEncodeTiled(
    CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base,
    const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
    const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
    CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  const auto* const element =
      std::find_if(std::begin(emu::kElements), std::end(emu::kElements),
                   [=](const emu::Element& known) { return known.type == type; });
  static_assert(CU_TENSOR_MAP_SWIZZLE_32B == 1 && CU_TENSOR_MAP_SWIZZLE_128B == 3);
  if (element == std::end(emu::kElements)) return CUDA_ERROR_INVALID_VALUE;
  const size_t row = box[0] * element->bytes;
  if (rank < 1 || rank > 5 || interleave != CU_TENSOR_MAP_INTERLEAVE_NONE ||
      fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE || reinterpret_cast<uintptr_t>(base) % 16 != 0 ||
      row % 16 != 0 || swizzle > CU_TENSOR_MAP_SWIZZLE_128B ||
      (swizzle != CU_TENSOR_MAP_SWIZZLE_NONE && row != 16u << swizzle))
    return CUDA_ERROR_INVALID_VALUE;
  emu::TensorMap own{emu::kMagic,
                     static_cast<int>(rank),
                     element,
                     (1u << swizzle) - 1,
                     {},
                     {},
                     static_cast<unsigned char*>(base),
                     {},
                     {}};
  for (cuuint32_t dim = 0; dim < rank; ++dim) {
    if (sizes[dim] == 0 || sizes[dim] > 1ull << 32 || box[dim] == 0 || box[dim] > 256 ||
        steps[dim] == 0 || steps[dim] > 8)
      return CUDA_ERROR_INVALID_VALUE;
    own.sizes[dim] = static_cast<int64_t>(sizes[dim]);
    own.steps[dim] = static_cast<uint8_t>(dim == 0 ? 1 : steps[dim]);
    own.count[dim] = static_cast<uint16_t>((box[dim] + own.steps[dim] - 1) / own.steps[dim]);
    if (dim == 0) continue;
    if (strides[dim - 1] % 16 != 0 || strides[dim - 1] >= 1ull << 40)
      return CUDA_ERROR_INVALID_VALUE;
    own.strides[dim - 1] = static_cast<int64_t>(strides[dim - 1]);
  }
  std::memset(map, 0, sizeof *map);
  std::memcpy(static_cast<void*>(map), &own, sizeof own);
  return CUDA_SUCCESS;
}
