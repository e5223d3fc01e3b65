// Gradient of a strided convolution's weight: one product of matrices a tap, summed over pixels.
//
// A task owns a block of high channels (lanes) and some blocks of low channels (rows of the
// register tile) of the result, and walks over the images in chunks whose packed planes stay in the
// second-level cache: [pixel][channel of the block], so that each tap is a walk with constant
// steps over the pixels that it has in both images.
#include "runtime.h"
#include "simd_lanes.h"
#include "strided_conv.h"

namespace pyops::cpu::PYOPS_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kRows = 14;  // kRows x kVectors accumulators fill the register file
#elif defined(__AVX2__)
constexpr int kRows = 6;
#else
constexpr int kRows = 4;
#endif
constexpr int kVectors = 2;
constexpr int64_t kBlock = kVectors * kLanes;
constexpr int64_t kRowPitch = 16;          // floats of a packed low pixel
constexpr int64_t kHighBytes = 512 << 10;  // of a chunk's packed high block
constexpr int64_t kPixelsPerSum = 256;     // bounds the rounding error of long sums
constexpr int64_t kMostPixels = 64;        // of a low image
constexpr int64_t kAhead = 6;              // pixels whose channels are prefetched
static_assert(kRows <= kRowPitch);

PYOPS_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
PYOPS_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
PYOPS_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Plan {
  StridedWgradParams p;
  int64_t low_channels, high_channels;  // of one group
  int64_t low_blocks, high_blocks;
  int64_t splits, split_blocks;  // of the low blocks among tasks
  int64_t chunk;                 // images
};

// The low positions whose tap lies in the high image: [begin, end).
struct Span {
  int64_t begin, end;

  Span(int64_t low, int64_t high, int64_t stride, int64_t offset) {
    begin = offset >= 0 ? 0 : ceil_div(-offset, stride);
    end = offset >= high ? 0 : min(low, (high - 1 - offset) / stride + 1);
    end = max(begin, end);
  }
};

// Some pixels of several images, in both packed planes.
struct Walk {
  const float* low;
  const float* high;
  int64_t images, rows, columns;
  int64_t low_image, low_row, high_image, high_row, high_step;
  float* sums;  // [row][kBlock]
};

using Tile = void (*)(const Walk&);

template <int P>
void tile(const Walk& walk) {
  Vec acc[P][kVectors] = {};
  for (int64_t n = 0; n < walk.images; ++n) {
    for (int64_t y = 0; y < walk.rows; ++y) {
      const float* low = walk.low + n * walk.low_image + y * walk.low_row;
      const float* high = walk.high + n * walk.high_image + y * walk.high_row;
      for (int64_t x = 0; x < walk.columns; ++x, low += kRowPitch, high += walk.high_step) {
        Vec h[kVectors];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
          h[v] = load(high + v * kLanes);
          __builtin_prefetch(high + kAhead * walk.high_step + v * kLanes);
        }
        __builtin_prefetch(low + kAhead * kRowPitch);
#pragma GCC unroll 16
        for (int i = 0; i < P; ++i) {
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v) acc[i][v] = fma(splat(low[i]), h[v], acc[i][v]);
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < P; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      float* sum = walk.sums + i * kBlock + v * kLanes;
      store(sum, load(sum) + acc[i][v]);
    }
  }
}

template <int... kInts>
struct Ints {};
template <int kCount, int... kInts>
struct Range : Range<kCount - 1, kCount, kInts...> {};
template <int... kInts>
struct Range<0, kInts...> {
  using type = Ints<kInts...>;
};

template <int... kCounts>
Tile select_tile(int64_t rows, Ints<kCounts...>) {
  static constexpr Tile kTiles[kRows] = {&tile<kCounts>...};
  return kTiles[rows - 1];
}

// Channels [first, first + count) of `images` images, as [image][pixel][pitch]; zeros beyond count.
template <class T>
void pack(const T* src, bool channels_last, int64_t channels, int64_t plane, int64_t images,
          int64_t first, int64_t count, int64_t pitch, float* dst) {
  for (int64_t n = 0; n < images; ++n, src += channels * plane) {
    for (int64_t k = 0; k < pitch; k += kLanes) {
      const int live = static_cast<int>(max(0, min(kLanes, count - k)));
      float* to = dst + n * plane * pitch + k;
      if (channels_last) {
        const T* from = src + first + k;
        for (int64_t i = 0; i < plane; ++i, from += channels, to += pitch) {
          store(to, load_first(from, live));
        }
        continue;
      }
      const T* from = src + (first + k) * plane;
      for (int64_t i = 0; i < plane; i += kLanes) {
        const int here = static_cast<int>(min(kLanes, plane - i));
        Vec m[kLanes] = {};
        for (int j = 0; j < live; ++j) m[j] = load_first(from + j * plane + i, here);
        transpose(m);
        for (int j = 0; j < here; ++j, to += pitch) store(to, m[j]);
      }
    }
  }
}

// Adds what `images` images give to the sums of one block: [tap][row][kBlock].
void correlate(const Plan& plan, Tile tile, const float* low, const float* high, int64_t images,
               float* sums) {
  const StridedWgradParams& p = plan.p;
  Walk walk{};
  walk.low_row = p.low_w * kRowPitch;
  walk.low_image = p.low_h * walk.low_row;
  walk.high_row = p.stride_h * p.high_w * kBlock;
  walk.high_image = p.high_h * p.high_w * kBlock;
  walk.high_step = p.stride_w * kBlock;
  walk.sums = sums;
  for (int64_t r = 0; r < p.kernel_h; ++r) {
    const int64_t down = r * p.dilation_h - p.pad_h;
    const Span rows(p.low_h, p.high_h, p.stride_h, down);
    for (int64_t s = 0; s < p.kernel_w; ++s, walk.sums += kRows * kBlock) {
      const int64_t right = s * p.dilation_w - p.pad_w;
      const Span columns(p.low_w, p.high_w, p.stride_w, right);
      walk.columns = columns.end - columns.begin;
      if (walk.columns == 0 || rows.begin == rows.end) continue;
      const int64_t most_rows = max(1, kPixelsPerSum / walk.columns);
      const int64_t all_rows = rows.end - rows.begin;
      const int64_t most_images = max(1, most_rows / all_rows);
      for (int64_t n = 0; n < images; n += most_images) {
        walk.images = min(most_images, images - n);
        for (int64_t y = rows.begin; y < rows.end; y += most_rows) {
          walk.rows = min(most_rows, rows.end - y);
          walk.low = low + n * walk.low_image + y * walk.low_row + columns.begin * kRowPitch;
          walk.high =
              high + n * walk.high_image +
              ((y * p.stride_h + down) * p.high_w + columns.begin * p.stride_w + right) * kBlock;
          tile(walk);
        }
      }
    }
  }
}

// From [tap][row][kBlock] to (rows, high_channels, taps).
template <class T>
void write(const Plan& plan, const float* sums, int64_t rows, int64_t first_low, int64_t first_high,
           T* grad_weight) {
  const int64_t taps = plan.p.kernel_h * plan.p.kernel_w;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t k = 0; k < min(kBlock, plan.high_channels - first_high); k += kLanes) {
      const int live = static_cast<int>(min(kLanes, plan.high_channels - first_high - k));
      T* to = grad_weight + ((first_low + i) * plan.high_channels + first_high + k) * taps;
      for (int64_t t = 0; t < taps; t += kLanes) {
        const int here = static_cast<int>(min(kLanes, taps - t));
        Vec m[kLanes] = {};
        for (int j = 0; j < here; ++j) m[j] = load(sums + ((t + j) * kRows + i) * kBlock + k);
        transpose(m);
        for (int j = 0; j < live; ++j) store_first(to + j * taps + t, m[j], here);
      }
    }
  }
}

template <class T>
void run_task(const Plan& plan, int64_t index) {
  const StridedWgradParams& p = plan.p;
  const int64_t split = index % plan.splits, block = index / plan.splits % plan.high_blocks;
  const int64_t group = index / plan.splits / plan.high_blocks;
  const int64_t begin = split * plan.split_blocks;
  const int64_t end = min(plan.low_blocks, begin + plan.split_blocks);
  const int64_t low_area = p.low_h * p.low_w, high_area = p.high_h * p.high_w;
  const int64_t taps = p.kernel_h * p.kernel_w, block_sums = taps * kRows * kBlock;
  float* high = static_cast<float*>(scratch(4, plan.chunk * high_area * kBlock * 4));
  float* low = static_cast<float*>(scratch(5, plan.chunk * low_area * kRowPitch * 4));
  float* sums = static_cast<float*>(scratch(6, (end - begin) * block_sums * 4));
  std::memset(sums, 0, (end - begin) * block_sums * 4);
  const int64_t first_high = block * kBlock;
  for (int64_t n = 0; n < p.batch; n += plan.chunk) {
    const int64_t images = min(plan.chunk, p.batch - n);
    pack(static_cast<const T*>(p.high) + n * p.high_channels * high_area, p.channels_last,
         p.high_channels, high_area, images, group * plan.high_channels + first_high,
         min(kBlock, plan.high_channels - first_high), kBlock, high);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t rows = min(kRows, plan.low_channels - b * kRows);
      pack(static_cast<const T*>(p.low) + n * p.low_channels * low_area, p.channels_last,
           p.low_channels, low_area, images, group * plan.low_channels + b * kRows, rows, kRowPitch,
           low);
      correlate(plan, select_tile(rows, typename Range<kRows>::type()), low, high, images,
                sums + (b - begin) * block_sums);
    }
  }
  T* grad_weight =
      static_cast<T*>(p.grad_weight) + group * plan.low_channels * plan.high_channels * taps;
  for (int64_t b = begin; b < end; ++b) {
    write(plan, sums + (b - begin) * block_sums, min(kRows, plan.low_channels - b * kRows),
          b * kRows, first_high, grad_weight);
  }
}

}  // namespace

bool strided_conv_wgrad(const StridedWgradParams& p) {
  Plan plan{};
  plan.p = p;
  plan.low_channels = p.low_channels / p.groups;
  plan.high_channels = p.high_channels / p.groups;
  if (p.dtype == DType::kDouble) return false;
  // Large images the library sums as fast; few channels would leave tiles mostly empty.
  const bool pays = p.low_h * p.low_w <= kMostPixels && plan.high_channels >= kLanes &&
                    plan.low_channels >= kRows;
  if (!pays && !p.accurate) return false;
  plan.low_blocks = ceil_div(plan.low_channels, kRows);
  plan.high_blocks = ceil_div(plan.high_channels, kBlock);
  const int64_t owners = p.groups * plan.high_blocks;
  const int64_t wanted = num_threads() == 1 ? 1 : 2 * num_threads();
  plan.splits = min(plan.low_blocks, ceil_div(wanted, owners));
  plan.split_blocks = ceil_div(plan.low_blocks, plan.splits);
  plan.splits = ceil_div(plan.low_blocks, plan.split_blocks);
  plan.chunk = max(1, min(p.batch, kHighBytes / (p.high_h * p.high_w * kBlock * 4)));
  const int64_t tasks = owners * plan.splits;
  if (p.dtype == DType::kFloat) {
    parallel_for(tasks, [&](int64_t index) { run_task<float>(plan, index); });
  } else if (p.dtype == DType::kBFloat16) {
    parallel_for(tasks, [&](int64_t index) { run_task<BFloat16>(plan, index); });
  } else {
    parallel_for(tasks, [&](int64_t index) { run_task<Half>(plan, index); });
  }
  return true;
}

}  // namespace pyops::cpu::PYOPS_ISA
