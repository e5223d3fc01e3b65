// conv_relu_pool2d's gradient of the input on the tensor cores of sm_80 and later, straight from
// grad_output and codes: the convolution of conv_relu_pool_grad_input_part, whose input, the
// gradient before activation and pool, exists in shared memory only.
//
// A block computes 128 pixels (a box of the images) x 64 or 128 channels. For each 64 bytes of
// out_channels, every window that meets the box's halo is read once and its gradient put at its
// places; all taps read that halo, shifted. Two halos take turns: while one is multiplied, a tap at
// a time against weights that come by cp.async, windows of the next pass through registers.
#include <algorithm>
#include <climits>

#include "conv_relu_pool_backward.cuh"
#include "conv_relu_pool_fragments.cuh"
#include "conv_relu_pool_windows.cuh"
#include "kernel_plan.h"
#include "launch.cuh"

namespace pyops::cuda::conv {
namespace {

constexpr int kStages = 3;      // of weights
constexpr int kHaloRows = 240;  // pixels: 8 x 16 and what kernels of up to 5 x 5 see beyond

struct HaloTiling : Tiling {
  int halo_h, halo_w;        // pixels of the halo, for each of box_n images
  int windows_h, windows_w;  // the most windows that meet it
  bool wide_windows;
};

// A window that meets the halo.
struct WindowEntry {
  int window;     // its index in memory, or -1
  int row;        // of the halo, where its place (0, 0) lies or would lie
  int places;     // bit dy * 2 + dx: that place lies in the image and in the halo
  float inverse;  // of an average's size
};

struct HaloTables {
  TileTables tile;
  WindowEntry windows[kHaloRows];
  int corners[kRows];  // of the halo: where the first tap of a row of the tile lies
};

template <int BlockChannels>
struct GradInputShape {
  static constexpr int kThreads = 2 * BlockChannels;  // warps of 64 rows x 32 channels
  static constexpr int kResident = 512 / kThreads;    // blocks that registers must suffice for
  static constexpr int kWeightBytes = BlockChannels * kRowBytes;
  static constexpr int kHaloBytes = kHaloRows * kRowBytes;
  static constexpr int kPitch = BlockChannels + 8;  // floats; 8 keeps rows in different banks
  static constexpr size_t kSmem =
      sizeof(HaloTables) +
      std::max<size_t>(2 * kHaloBytes + kStages * kWeightBytes, kRows * kPitch * sizeof(float));
};

// Called by all threads; a barrier must follow. `tile` is the box's index.
PYOPS_DEVICE void fill_windows(const ConvPoolBackward& p, const ConvPoolForward& f,
                               const HaloTiling& t, int64_t tile, int threads,
                               WindowEntry* windows) {
  const int step_h = static_cast<int>(p.pool_stride_h), step_w = static_cast<int>(p.pool_stride_w);
  const int pool_h = static_cast<int>(p.pool_h), pool_w = static_cast<int>(p.pool_w);
  const int box_x = divide(tile, t.boxes_w);
  const int box_y = divide(tile, t.boxes_h);
  const int top = static_cast<int>(box_y * t.box_h - f.pad_h);  // of the halo, in the image
  const int left = static_cast<int>(box_x * t.box_w - f.pad_w);
  // The first window whose last line lies in the halo, or beyond its start.
  const auto first = [](int from, int step) { return from > 0 ? (from + step - 1) / step : 0; };
  const int first_y = first(top + static_cast<int>(p.pool_pad_h) - pool_h + 1, step_h);
  const int first_x = first(left + static_cast<int>(p.pool_pad_w) - pool_w + 1, step_w);
  const int count = t.box_n * t.windows_h * t.windows_w;
  for (int i = threadIdx.x; i < count; i += threads) {
    const int ox = first_x + i % t.windows_w, rest = i / t.windows_w;
    const int oy = first_y + rest % t.windows_h, image = rest / t.windows_h;
    const int n = static_cast<int>(tile) * t.box_n + image;
    const int y = oy * step_h - static_cast<int>(p.pool_pad_h);
    const int x = ox * step_w - static_cast<int>(p.pool_pad_w);
    WindowEntry entry{-1, (image * t.halo_h + y - top) * t.halo_w + x - left, 0, 1.0f};
    if (n < p.batch && oy < p.out_h && ox < p.out_w) {
      for (int slot = 0; slot < 4; ++slot) {
        const int dy = slot / 2, dx = slot % 2;
        const bool exists = dy < pool_h && dx < pool_w && y + dy >= 0 && y + dy < p.conv_h &&
                            x + dx >= 0 && x + dx < p.conv_w && y + dy >= top &&
                            y + dy < top + t.halo_h && x + dx >= left && x + dx < left + t.halo_w;
        if (exists) entry.places |= 1 << slot;
      }
      if (entry.places) {
        entry.window = static_cast<int>((n * p.out_h + oy) * p.out_w + ox);
        if (p.pool == Pool::kAvg) entry.inverse = average_inverse(p, y, x);
      }
    }
    windows[i] = entry;
  }
}

// Brings gradients of some out_channels to the halo: an item is a chunk of one window.
template <class T>
struct HaloLoader {
  static constexpr int kElements = 16 / sizeof(T);

  const ConvPoolBackward& p;
  const HaloTiling& t;
  const WindowEntry* windows;
  int64_t channel;  // the group's first
  int channels;     // of the group
  int items;

  struct Item {
    PooledChunk<T> chunk;
    int number;  // of the item, or -1
  };

  // `begin`: the first of the halo's channels.
  PYOPS_DEVICE void fetch(int number, int begin, Item& item) const {
    item.number = -1;
    if (number >= items) return;
    const int window = windows[number / 4].window, at = begin + number % 4 * kElements;
    if (window < 0) return;
    item.number = number;
    item.chunk.load(p.grad_output, p.codes, window * p.out_channels + channel + at, channels - at,
                    t.wide_windows);
  }

  PYOPS_DEVICE void put(const Item& item, unsigned char* halo) const {
    if (item.number < 0) return;
    const WindowEntry entry = windows[item.number / 4];
    const WindowGradient<T> gradient(p, item.chunk, entry.inverse);
#pragma unroll
    for (int slot = 0; slot < 4; ++slot) {
      if (!(entry.places >> slot & 1)) continue;
      const int row = entry.row + slot / 2 * t.halo_w + slot % 2;
      *reinterpret_cast<Words*>(halo + chunk_offset(row, item.number % 4)) =
          gradient.at(slot / 2 * static_cast<int>(p.pool_w) + slot % 2);
    }
  }
};

// Brings the weights of one tap and 64 bytes of out_channels.
template <class T, int BlockChannels, bool Wide>
PYOPS_DEVICE void load_weights(const T* weight, int limit, int channels, int taps, int tap,
                               int begin, unsigned char* stage) {
  constexpr int kElements = 16 / sizeof(T);
  const int chunk = threadIdx.x % 4, at = begin + chunk * kElements;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = threadIdx.x / 4 + i * BlockChannels / 2;
    const T* from = weight + (static_cast<int64_t>(row) * taps + tap) * channels + at;
    unsigned char* to = stage + chunk_offset(row, chunk);
    if constexpr (Wide) {
      const bool valid = row < limit && at < channels;
      ptx::cp_async<16>(ptx::smem_addr(to), valid ? from : weight, valid ? 16 : 0);
    } else {
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        const bool valid = row < limit && at + e < channels;
        reinterpret_cast<T*>(to)[e] = valid ? from[e] : T(0.0f);
      }
    }
  }
}

template <class T, int BlockChannels, bool Wide>
__global__ void __launch_bounds__(GradInputShape<BlockChannels>::kThreads,
                                  GradInputShape<BlockChannels>::kResident)
    conv_relu_pool_grad_input_kernel(const __grid_constant__ ConvPoolBackward p,
                                     const __grid_constant__ ConvPoolForward f,
                                     const __grid_constant__ HaloTiling t) {
  using Shape = GradInputShape<BlockChannels>;
  constexpr int kDepth = kRowBytes / sizeof(T);
  DYN_SMEM(smem);
  HaloTables& tables = *reinterpret_cast<HaloTables*>(smem);
  unsigned char* halos = smem + sizeof(HaloTables);
  unsigned char* weights = halos + 2 * Shape::kHaloBytes;

  // Channel blocks vary fastest: the blocks that read the same windows run together.
  int64_t tile = blockIdx.x;
  const int block = divide(tile, t.channel_blocks);
  const int group = divide(tile, f.groups);
  const int group_channels = static_cast<int>(f.out_channels / f.groups);
  const int limit = group_channels - block * BlockChannels;
  const int64_t channel = static_cast<int64_t>(group) * group_channels + block * BlockChannels;
  const int channels = static_cast<int>(f.in_channels / f.groups);
  const int kernel_w = static_cast<int>(f.kernel_w);
  const int taps = static_cast<int>(f.kernel_h) * kernel_w;
  const T* weight = static_cast<const T*>(f.weight) + channel * taps * channels;

  fill_tables(f, t, tile, Shape::kThreads, tables.tile);
  fill_windows(p, f, t, tile, Shape::kThreads, tables.windows);
  for (int row = threadIdx.x; row < kRows; row += Shape::kThreads) {
    const int rest = row / t.box_w, image = rest / t.box_h;
    tables.corners[row] =
        image < t.box_n ? (image * t.halo_h + rest % t.box_h) * t.halo_w + row % t.box_w : 0;
  }
  // What no window covers stays zero.
  for (int i = threadIdx.x; i < 2 * Shape::kHaloBytes / 16; i += Shape::kThreads) {
    reinterpret_cast<Words*>(halos)[i] = Words{};
  }
  ptx::sync_threads();

  const int blocks = taps ? (channels + kDepth - 1) / kDepth : 0, steps = blocks * taps;
  int next_tap = 0, next_begin = 0;  // of the weights to be loaded
  const auto load_next = [&](int step) {
    if (step < steps) {
      load_weights<T, BlockChannels, Wide>(weight, limit, channels, taps, next_tap, next_begin,
                                           weights + step % kStages * Shape::kWeightBytes);
      if (++next_tap == taps) next_tap = 0, next_begin += kDepth;
    }
    ptx::cp_async_commit();
  };
  for (int step = 0; step < kStages - 1; ++step) load_next(step);

  const HaloLoader<T> loader{p,
                             t,
                             tables.windows,
                             static_cast<int64_t>(group) * channels,
                             channels,
                             4 * t.box_n * t.windows_h * t.windows_w};
  const auto bring = [&](int first, int begin, unsigned char* halo) {
    for (int item = first + threadIdx.x; item < loader.items; item += Shape::kThreads) {
      typename HaloLoader<T>::Item loaded;
      loader.fetch(item, begin, loaded);
      loader.put(loaded, halo);
    }
  };
  if (blocks > 0) bring(0, 0, halos);

  const int warp = ptx::warp_id(), lane = ptx::lane_id();
  const int warp_row = warp % 2 * 64, warp_channel = warp / 2 * 32;
  float sums[4][4][4] = {};
  int step = 0;
  for (int b = 0; b < blocks; ++b) {
    const unsigned char* halo = halos + b % 2 * Shape::kHaloBytes;
    unsigned char* next_halo = halos + (b + 1) % 2 * Shape::kHaloBytes;
    const int next_channels = (b + 1) * kDepth;
    Tap tap;
    for (int i = 0; i < taps; ++i, ++step) {
      ptx::cp_async_wait<kStages - 2>();
      ptx::sync_threads();  // this stage and halo are complete, and those before read by all
      load_next(step + kStages - 1);
      typename HaloLoader<T>::Item item;
      loader.fetch(b + 1 < blocks ? i * Shape::kThreads + static_cast<int>(threadIdx.x) : INT_MAX,
                   next_channels, item);
      const int shift = tap.r * static_cast<int>(f.dilation_h) * t.halo_w +
                        tap.s * static_cast<int>(f.dilation_w);
      multiply_stage<T>(
          sums, ptx::smem_addr(halo),
          [&](int m) { return tables.corners[warp_row + m * 16 + lane % 16] + shift; },
          ptx::smem_addr(weights + step % kStages * Shape::kWeightBytes), warp_channel);
      loader.put(item, next_halo);
      if (++tap.s == kernel_w) tap.s = 0, ++tap.r;
    }
    if (b + 1 < blocks) bring(taps * Shape::kThreads, next_channels, next_halo);
  }
  ptx::cp_async_wait<0>();
  ptx::sync_threads();

  float* finished = reinterpret_cast<float*>(halos);
#pragma unroll
  for (int m = 0; m < 4; ++m) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = warp_row + m * 16 + lane / 4 + i / 2 * 8;
        const int column = warp_channel + n * 8 + lane % 4 * 2 + i % 2;
        finished[row * Shape::kPitch + column] = sums[m][n][i];
      }
    }
  }
  ptx::sync_threads();
  // Without a pool a tile's outputs are its rows.
  finish_tile<T>(f, t, tables.tile, finished, Shape::kPitch, nullptr, true, channel, BlockChannels,
                 limit, Shape::kThreads);
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The box with the fewest tiles, then the smallest halo; tiles is 0 if none fits.
HaloTiling make_halo_tiling(const ConvPoolBackward& p, const ConvPoolForward& f,
                            int block_channels) {
  HaloTiling t{};
  t.rows = Rows::kBox;
  t.channel_blocks = static_cast<int>(ceil_div(f.out_channels / f.groups, block_channels));
  t.wide_windows = takes_wide_windows(p);
  const int64_t beyond_h = std::max<int64_t>(f.kernel_h - 1, 0) * f.dilation_h;
  const int64_t beyond_w = std::max<int64_t>(f.kernel_w - 1, 0) * f.dilation_w;
  for (int64_t h = 1; h <= std::min<int64_t>(f.out_h, kRows); ++h) {
    const int64_t halo_h = h + beyond_h;
    const int64_t most = std::min(kRows / h, kHaloRows / halo_h - beyond_w);
    if (most < 1) break;
    // Boxes of equal width, as few as shared memory allows.
    const int64_t boxes_w = ceil_div(f.out_w, std::min(most, f.out_w));
    const int64_t w = ceil_div(f.out_w, boxes_w), halo_w = w + beyond_w;
    const int64_t n = std::min({f.batch, kRows / (h * w), kHaloRows / (halo_h * halo_w)});
    const int64_t boxes_h = ceil_div(f.out_h, h);
    const int64_t tiles = ceil_div(f.batch, n) * boxes_h * boxes_w;
    const int64_t rows = n * halo_h * halo_w;
    if (t.tiles &&
        (tiles > t.tiles || (tiles == t.tiles && rows >= int64_t{t.box_n} * t.halo_h * t.halo_w))) {
      continue;
    }
    t.tiles = tiles, t.outputs = static_cast<int>(n * h * w);
    t.box_n = static_cast<int>(n), t.box_h = static_cast<int>(h), t.box_w = static_cast<int>(w);
    t.rows_h = t.box_h, t.rows_w = t.box_w;
    t.boxes_h = static_cast<int>(boxes_h), t.boxes_w = static_cast<int>(boxes_w);
    t.halo_h = static_cast<int>(halo_h), t.halo_w = static_cast<int>(halo_w);
    t.windows_h = static_cast<int>((halo_h + p.pool_h - 2) / p.pool_stride_h + 1);
    t.windows_w = static_cast<int>((halo_w + p.pool_w - 2) / p.pool_stride_w + 1);
  }
  return t;
}

template <class T, int BlockChannels, bool Wide>
void run(const ConvPoolBackward& p, const ConvPoolForward& f, const HaloTiling& t,
         cudaStream_t stream) {
  using Shape = GradInputShape<BlockChannels>;
  const unsigned blocks = static_cast<unsigned>(t.tiles * t.channel_blocks * f.groups);
  launch({"conv_relu_pool_grad_input", blocks, Shape::kThreads, 1, Shape::kSmem, stream},
         planned<conv_relu_pool_grad_input_kernel<T, BlockChannels, Wide>, Shape::kThreads,
                 Shape::kSmem>(),
         p, f, t);
}

template <class T>
void dispatch(const ConvPoolBackward& p, const ConvPoolForward& f, cudaStream_t stream) {
  const HaloTiling t = make_halo_tiling(p, f, 64);
  const int64_t channels = f.out_channels / f.groups;
  if (f.in_channels / f.groups % (16 / sizeof(T)) != 0) return run<T, 64, false>(p, f, t, stream);
  // Twice the channels a block form the halo half as often, if enough blocks remain.
  const int64_t broad = t.tiles * ceil_div(channels, 128) * f.groups;
  if (channels <= 64 || broad < 2 * p.device.multiprocessors) {
    return run<T, 64, true>(p, f, t, stream);
  }
  run<T, 128, true>(p, f, make_halo_tiling(p, f, 128), stream);
}

}  // namespace
}  // namespace pyops::cuda::conv

namespace pyops::cuda {

using namespace conv;

bool conv_relu_pool_grad_input_mma_supports(const ConvPoolBackward& p, const ConvPoolForward& f) {
  if (!fuses(p) || (p.dtype == DType::kFloat && !p.allow_tf32) || p.device.capability < 80 ||
      !sizes_fit(f) || p.batch * p.out_h * p.out_w > INT_MAX) {
    return false;
  }
  const HaloTiling t = make_halo_tiling(p, f, 64);
  return t.tiles > 0 && t.tiles * t.channel_blocks * f.groups <= INT_MAX;
}

void conv_relu_pool_grad_input_mma(const ConvPoolBackward& p, const ConvPoolForward& f,
                                   cudaStream_t stream) {
  if (p.dtype == DType::kBFloat16) return dispatch<__nv_bfloat16>(p, f, stream);
  if (p.dtype == DType::kHalf) return dispatch<__half>(p, f, stream);
  dispatch<float>(p, f, stream);
}

}  // namespace pyops::cuda
