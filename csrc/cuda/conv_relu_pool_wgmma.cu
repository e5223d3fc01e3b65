// 3x3 convolution, bias, activation and 2x2 max pooling (or none) on Hopper: bf16 and fp16 NHWC.
//
// sum[channel, pixel] = weight[channel, c] x pixels[pixel, c]^T, over taps and blocks of 64 input
// channels. A tile is 8 pixels wide; its halo comes to shared memory once per block of channels, by
// TMA, whose zeros outside the image are the padding, and is read by all nine taps. One warp brings
// halos, one weights; two warpgroups multiply and finish a tile each. For the gradient of the
// input, three warps form halos from the pooled gradient instead. Design and figures:
// docs/kernels/conv_relu_pool_hopper.md.
#include <stdexcept>
#include <string>

#include "conv_relu_pool_wgmma.cuh"
#include "conv_relu_pool_wgmma_windows.cuh"
#include "kernel_plan.h"
#include "launch.cuh"

namespace pyops::cuda {
namespace {

using namespace ptx;

constexpr int kChannels = kBlockChannels;  // in and out: 128 bytes, a row of the swizzle
constexpr int kThreads = 128 * (1 + kGroups);
constexpr uint32_t kWeightBytes = kChannels * kChannels * 2;  // of one tap
constexpr uint32_t kSharedBytes = 227 * 1024;

constexpr uint32_t align_1024(uint32_t bytes) { return (bytes + 1023) / 1024 * 1024; }

template <int kRows, Addressing kAddressing>
struct Halo {
  static constexpr bool kSwizzled = kAddressing != Addressing::kPlanes;
  static constexpr int kLines = kRows + 2;
  static constexpr int kPitch = kAddressing == Addressing::kCopies    ? kTileWidth
                                : kAddressing == Addressing::kPitch16 ? 16
                                                                      : kTileWidth + 2;
  static constexpr int kBoxes = kAddressing == Addressing::kCopies ? 3 : 1;
  static constexpr int kColumns = kTileWidth + 3 - kBoxes;  // of a box that are read
  static constexpr uint32_t kBoxBytes = kLines * kPitch * kChannels * 2;
  static constexpr uint32_t kPlaneBytes = kLines * kPitch * 16;  // kPlanes: of 8 channels
  static constexpr uint32_t kBytes = kBoxes * kBoxBytes;
  static constexpr uint32_t kSlotBytes = align_1024(kBytes);
  static constexpr int kMostSlots = (kSharedBytes - kTaps * kWeightBytes - 1024) / kSlotBytes;
  static constexpr int kSlots = kMostSlots < 6 ? kMostSlots : 6;
  static_assert(kSlots >= kGroups);
  static constexpr uint32_t kBarriers = kTaps * kWeightBytes + kSlots * kSlotBytes;
  static constexpr uint32_t kShared = kBarriers + 8 * (2 * kSlots + 2 * kTaps);
  // Between the operands of neighbouring 16 channels, in units of a descriptor's address.
  static constexpr uint64_t kStep = kSwizzled ? 2 : 2 * kPlaneBytes / 16;

  // Byte of a chunk of 8 channels of a pixel of a swizzled box.
  static PTX_FN uint32_t chunk(int chunk, int line, int column) {
    const int row = line * kPitch + column;
    return row * 128 + ((chunk ^ (row & 7)) << 4);
  }

  // The operand of the first 16 channels: 8 pixels of a line, kRows lines.
  static PTX_FN uint64_t operand(uint32_t halo, int r, int s) {
    if constexpr (kAddressing == Addressing::kCopies)
      return smem_descriptor<Swizzle::B128>(halo + s * kBoxBytes + r * kPitch * 128, 1,
                                            kPitch * 128);
    else if constexpr (kAddressing == Addressing::kShifted)
      return smem_descriptor<Swizzle::B128>(halo + (r * kPitch + s) * 128, 1, kPitch * 128);
    else if constexpr (kAddressing == Addressing::kPitch16)
      return smem_descriptor<Swizzle::B128>(halo + (r * kPitch + s) * 128, 1, kPitch * 128, s);
    else
      return smem_descriptor<Swizzle::None>(halo + (r * kPitch + s) * 16, kPlaneBytes, kPitch * 16);
  }
};

struct Params {
  const void* bias;  // (out_channels,) or null
  void* output;      // (batch, out_h, out_w, out_channels)
  uint8_t* codes;    // the same, or null
  int batch, out_channels, out_h, out_w, pad_h, pad_w;
  int tiles_h, tiles_w, output_blocks, channel_blocks;
  int last_steps;  // of 16 channels, in the last block of channels
  int64_t works;
  bool resident, pooled;
  Finish finish;
};

struct TileAt {
  int image, y, x;  // of its first pixel; image == batch: there is no such tile
};

PTX_FN TileAt tile_at(const Params& p, int64_t work, int group) {
  const int64_t tile = work / p.output_blocks * kGroups + group;
  const int in_image = p.tiles_h * p.tiles_w;
  const int64_t image = tile / in_image;
  if (image >= p.batch) return {p.batch, 0, 0};
  const int rest = static_cast<int>(tile - image * in_image);
  return {static_cast<int>(image), rest / p.tiles_w, rest % p.tiles_w};
}

// Slots of the ring of halos, walked by `by`.
template <int kSlots>
struct Walk {
  int slot;
  uint32_t phase = 0;
  PTX_FN void next(int by) {
    slot += by;
    if (slot >= kSlots) {
      slot -= kSlots;
      phase ^= 1;
    }
  }
};

// By one thread; or kFused, from `source` and by HaloFormer's threads.
template <class T, int kRows, Addressing kAddressing, bool kFused>
PTX_FN void bring_halos(const CUtensorMap* map, const ConvPoolBackward& source, int thread,
                        const Params& p, uint32_t halos, uint32_t full, uint32_t empty) {
  using Tile = Halo<kRows, kAddressing>;
  Walk<Tile::kSlots> at{0};
  HaloFormer<T, Tile> former{source, thread};
  for (int64_t work = blockIdx.x; work < p.works; work += gridDim.x) {
    for (int block = 0; block < p.channel_blocks; ++block) {
      for (int group = 0; group < kGroups; ++group) {
        const TileAt tile = tile_at(p, work, group);
        const uint32_t halo = halos + at.slot * Tile::kSlotBytes;
        const uint32_t bar = full + 8 * at.slot;
        const int x = tile.x * kTileWidth - p.pad_w, y = tile.y * kRows - p.pad_h;
        if constexpr (kFused) former.fetch(tile.image, y, x, block * kChannels);
        mbar_wait(empty + 8 * at.slot, at.phase ^ 1);
        if constexpr (kFused) {
          former.store(halo);
          fence_proxy_async_shared();
          sync_warp();
          if (lane_id() == 0) mbar_arrive(bar);
          at.next(1);
          continue;
        }
        mbar_arrive_expect_tx(bar, Tile::kBytes);
        for (int box = 0; box < Tile::kBoxes; ++box) {
          if constexpr (Tile::kSwizzled)
            tma_load<4>(halo + box * Tile::kBoxBytes, map, bar,
                        {block * kChannels, x + box, y, tile.image});
          else
            tma_load<5>(halo, map, bar, {0, x, y, block * (kChannels / 8), tile.image});
        }
        at.next(1);
      }
    }
  }
}

// A box is 64 x 64 channels of one tap; of a warp's 16 rows the first eight are its even channels,
// the others the odd ones (weight_map).
PTX_FN void bring_weights(const CUtensorMap* map, const Params& p, uint32_t weights, uint32_t full,
                          uint32_t empty) {
  uint32_t phase = 0;
  for (int64_t work = blockIdx.x; work < p.works; work += gridDim.x) {
    const int output_block = static_cast<int>(work % p.output_blocks);
    for (int block = 0; block < p.channel_blocks; ++block) {
      for (int tap = 0; tap < kTaps; ++tap) {
        mbar_wait(empty + 8 * tap, phase ^ 1);
        mbar_arrive_expect_tx(full + 8 * tap, kWeightBytes);
        tma_load<5>(weights + tap * kWeightBytes, map, full + 8 * tap,
                    {block * kChannels, 0, 0, output_block * (kChannels / 16), tap});
      }
      phase ^= 1;
    }
    if (p.resident) break;
  }
}

// A thread holds channels 2g and 2g + 1 (g = lane / 4) of its warp's 16, since the rows of
// weights alternate so, and columns 2t and 2t + 1 (t = lane % 4) of every line: whole windows.
// Eight lanes store 32 bytes in a row.
template <class T, int kRows, bool kCodes>
PTX_FN void store_pooled(const float (&sum)[kRows * 4], const Params& p, const TileAt& tile,
                         int channel, float bias0, float bias1) {
  const int x = tile.x * (kTileWidth / 2) + lane_id() % 4;
  if (x >= p.out_w || channel >= p.out_channels) return;
  int64_t at = ((static_cast<int64_t>(tile.image) * p.out_h + tile.y * (kRows / 2)) * p.out_w + x) *
                   p.out_channels +
               channel;
  const int64_t line = static_cast<int64_t>(p.out_w) * p.out_channels;
#pragma unroll
  for (int i = 0; i < kRows / 2; ++i) {
    if (tile.y * (kRows / 2) + i >= p.out_h) break;
    const float* w =
        &sum[8 * i];  // columns 2t, 2t + 1 of channel 2g, the same of 2g + 1; next line
    const float largest0 = max_of(w[0], w[1], w[4], w[5]);
    const float largest1 = max_of(w[2], w[3], w[6], w[7]);
    const float shifted0 = largest0 + bias0, shifted1 = largest1 + bias1;
    *reinterpret_cast<uint32_t*>(static_cast<T*>(p.output) + at) =
        pack_pair<T>(p.finish.activate(shifted0), p.finish.activate(shifted1));
    if constexpr (kCodes) {
      const uint32_t low = max_code(w[0], w[1], w[4], w[5], largest0, shifted0, p.finish);
      const uint32_t high = max_code(w[2], w[3], w[6], w[7], largest1, shifted1, p.finish);
      *reinterpret_cast<uint16_t*>(p.codes + at) = static_cast<uint16_t>(low | high << 8);
    }
    at += line;
  }
}

template <class T, int kRows>
PTX_FN void store_pixels(const float (&sum)[kRows * 4], const Params& p, const TileAt& tile,
                         int channel, float bias0, float bias1) {
  const int x = tile.x * kTileWidth + lane_id() % 4 * 2;
  if (x >= p.out_w || channel >= p.out_channels) return;
  T* at = static_cast<T*>(p.output) +
          ((static_cast<int64_t>(tile.image) * p.out_h + tile.y * kRows) * p.out_w + x) *
              p.out_channels +
          channel;
  const int64_t line = static_cast<int64_t>(p.out_w) * p.out_channels;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    if (tile.y * kRows + i >= p.out_h) break;
#pragma unroll
    for (int dx = 0; dx < 2; ++dx) {
      if (x + dx < p.out_w)
        *reinterpret_cast<uint32_t*>(at + dx * p.out_channels) =
            pack_pair<T>(p.finish.activate(sum[4 * i + dx] + bias0),
                         p.finish.activate(sum[4 * i + 2 + dx] + bias1));
    }
    at += line;
  }
}

template <class T, int kRows, Addressing kAddressing>
PTX_FN void multiply(const Params& p, int group, uint32_t weights, uint32_t halos,
                     uint32_t weight_full, uint32_t weight_empty, uint32_t full, uint32_t empty) {
  using Tile = Halo<kRows, kAddressing>;
  constexpr int kPixels = kRows * kTileWidth;
  const int lane = lane_id();
  const int own_channel = warp_id() % 4 * 16 + lane / 4 * 2;
  float sum[kPixels / 2];
  Walk<Tile::kSlots> at{group};
  uint32_t weight_phase = 0;
  // With resident weights the groups take turns at the tensor cores, one finishing its tile while
  // the other multiplies. Else both wait for the same weights.
  if (p.resident && group == 1) named_barrier_arrive<1, 128 * kGroups>();
  for (int64_t work = blockIdx.x; work < p.works; work += gridDim.x) {
    const TileAt tile = tile_at(p, work, group);
    const int channel = static_cast<int>(work % p.output_blocks) * kChannels + own_channel;
    float bias0 = 0.0f, bias1 = 0.0f;
    if (p.bias && channel < p.out_channels) {
      bias0 = to_float(static_cast<const T*>(p.bias)[channel]);
      bias1 = to_float(static_cast<const T*>(p.bias)[channel + 1]);
    }
    if (p.resident) {
      if (group == 0)
        named_barrier_sync<1, 128 * kGroups>();
      else
        named_barrier_sync<2, 128 * kGroups>();
    }
    int block = 0, slot_before = at.slot;
    bool accumulate = false;
    do {
      mbar_wait(full + 8 * at.slot, at.phase);
      const uint32_t halo = halos + at.slot * Tile::kSlotBytes;
      const int steps = block + 1 < p.channel_blocks ? kChannels / 16 : p.last_steps;
#pragma unroll 1
      for (int r = 0; r < 3; ++r) {
#pragma unroll 1
        for (int s = 0; s < 3; ++s) {
          const int tap = r * 3 + s;
          mbar_wait(weight_full + 8 * tap, weight_phase);
          const uint64_t a = smem_descriptor<Swizzle::B128>(weights + tap * kWeightBytes, 1, 1024);
          const uint64_t b = Tile::operand(halo, r, s);
          if (steps == kChannels / 16) {
            wgmma_fence();
#pragma unroll
            for (int step = 0; step < kChannels / 16; ++step)
              wgmma<T, kPixels>(sum, a + 2 * step, b + Tile::kStep * step, accumulate || step > 0);
            wgmma_commit();
          } else {  // a last block of 16, 32 or 48 channels
#pragma unroll 1
            for (int step = 0; step < steps; ++step) {
              wgmma_fence();
              wgmma<T, kPixels>(sum, a + 2 * step, b + Tile::kStep * step, accumulate || step > 0);
              wgmma_commit();
            }
          }
          accumulate = true;
          wgmma_wait<1>();  // for the tap before
          if (lane == 0) {
            if (!p.resident && (tap > 0 || block > 0))
              mbar_arrive(weight_empty + 8 * (tap > 0 ? tap - 1 : kTaps - 1));
            if (tap == 0 && block > 0) mbar_arrive(empty + 8 * slot_before);
          }
        }
      }
      slot_before = at.slot;
      at.next(kGroups);
      if (!p.resident) weight_phase ^= 1;
    } while (++block < p.channel_blocks);
    if (p.resident) {
      if (group == 0)
        named_barrier_arrive<2, 128 * kGroups>();
      else if (work + gridDim.x < p.works)
        named_barrier_arrive<1, 128 * kGroups>();
    }
    wgmma_wait<0>();
    if (lane == 0) {
      mbar_arrive(empty + 8 * slot_before);
      if (!p.resident) mbar_arrive(weight_empty + 8 * (kTaps - 1));
    }
    if (tile.image == p.batch) continue;
    if (!p.pooled)
      store_pixels<T, kRows>(sum, p, tile, channel, bias0, bias1);
    else if (p.codes)
      store_pooled<T, kRows, true>(sum, p, tile, channel, bias0, bias1);
    else
      store_pooled<T, kRows, false>(sum, p, tile, channel, bias0, bias1);
  }
}

template <class T, int kRows, Addressing kAddressing, bool kFused>
__global__ void __launch_bounds__(kThreads, 1)
    conv_relu_pool_wgmma_kernel(const __grid_constant__ CUtensorMap input_map,
                                const __grid_constant__ CUtensorMap weight_map, const Params p,
                                const __grid_constant__ ConvPoolBackward source) {
  using Tile = Halo<kRows, kAddressing>;
  DYN_SMEM(shared);
  const uint32_t weights = smem_addr(shared);
  const uint32_t halos = weights + kTaps * kWeightBytes;
  const uint32_t full = weights + Tile::kBarriers, empty = full + 8 * Tile::kSlots;
  const uint32_t weight_full = empty + 8 * Tile::kSlots, weight_empty = weight_full + 8 * kTaps;
  const int warp = warp_id();
  if (threadIdx.x == 0) {
    if constexpr (!kFused) prefetch_tensor_map(&input_map);
    prefetch_tensor_map(&weight_map);
    for (int i = 0; i < Tile::kSlots; ++i) {
      mbar_init(full + 8 * i, kFused ? HaloFormer<T, Tile>::kFormers / 32 : 1);
      mbar_init(empty + 8 * i, 4);  // the warps of one group
    }
    for (int i = 0; i < kTaps; ++i) {
      mbar_init(weight_full + 8 * i, 1);
      mbar_init(weight_empty + 8 * i, 4 * kGroups);
    }
    fence_mbarrier_init();
  }
  sync_threads();
  if (warp < 4) {
    if (warp == 1) {
      if (elect_one()) bring_weights(&weight_map, p, weights, weight_full, weight_empty);
    } else if (kFused || (warp == 0 && elect_one())) {
      const int thread = (warp == 0 ? 0 : warp - 1) * 32 + lane_id();
      bring_halos<T, kRows, kAddressing, kFused>(&input_map, source, thread, p, halos, full, empty);
    }
  } else {
    multiply<T, kRows, kAddressing>(p, warp / 4 - 1, weights, halos, weight_full, weight_empty,
                                    full, empty);
  }
}

// ---- host ----

// (out_channels, 3, 3, in_channels) with the output channels taken apart, 16 w + 2 r + odd, so that
// a box has them in the order w, odd, r.
template <class T>
CUtensorMap weight_map(const ConvPoolForward& f) {
  const uint64_t in = static_cast<uint64_t>(f.in_channels);
  const uint64_t out = static_cast<uint64_t>(f.out_channels);
  const uint64_t tap = 2 * in, channel = kTaps * tap;
  TensorMapConfig map{};
  map = {tensor_map_type<T>(),
         5,
         f.weight,
         {in, 8, 2, out / 16, kTaps},
         {2 * channel, channel, 16 * channel, tap},
         {kChannels, 8, 2, kChannels / 16, 1},
         {1, 1, 1, 1, 1},
         CU_TENSOR_MAP_SWIZZLE_128B};
  return make_tensor_map(map);
}

// Of (batch, in_h, in_w, in_channels): a block of channels of a tile's halo.
template <class T, class Tile>
CUtensorMap input_map(const ConvPoolForward& f) {
  const auto size = [](int64_t value) { return static_cast<uint64_t>(value); };
  const uint64_t channels = size(f.in_channels), w = size(f.in_w), h = size(f.in_h);
  const uint64_t pixel = channels * 2, line = pixel * w;
  TensorMapConfig map{};
  if constexpr (Tile::kSwizzled)
    map = {tensor_map_type<T>(),
           4,
           f.input,
           {channels, w, h, size(f.batch)},
           {pixel, line, line * h},
           {kChannels, Tile::kPitch, Tile::kLines, 1},
           {1, 1, 1, 1, 1},
           CU_TENSOR_MAP_SWIZZLE_128B};
  else
    map = {tensor_map_type<T>(),
           5,
           f.input,
           {8, w, h, channels / 8, size(f.batch)},
           {pixel, line, 16, line * h},
           {8, Tile::kPitch, Tile::kLines, 8, 1}};
  return make_tensor_map(map);
}

template <class T, int kRows, Addressing kAddressing>
void run(const ConvPoolForward& f, const WgmmaPlan& plan, const Params& p,
         const ConvPoolBackward* source, cudaStream_t stream) {
  using Tile = Halo<kRows, kAddressing>;
  LaunchConfig config{"conv_relu_pool_wgmma", dim3(plan.grid), dim3(kThreads)};
  config.smem = Tile::kShared;
  config.stream = stream;
  if constexpr (forms_halos(kAddressing)) {
    if (source)
      return launch(config,
                    planned<conv_relu_pool_wgmma_kernel<T, kRows, kAddressing, true>, kThreads,
                            Tile::kShared>(),
                    CUtensorMap{}, weight_map<T>(f), p, *source);
  }
  launch(
      config,
      planned<conv_relu_pool_wgmma_kernel<T, kRows, kAddressing, false>, kThreads, Tile::kShared>(),
      input_map<T, Tile>(f), weight_map<T>(f), p, ConvPoolBackward{});
}

template <class T, Addressing kAddressing>
void run_rows(const ConvPoolForward& f, const WgmmaPlan& plan, const Params& p,
              const ConvPoolBackward* source, cudaStream_t stream) {
  if constexpr (kAddressing == Addressing::kShifted) {
    if (plan.rows == 32) return run<T, 32, kAddressing>(f, plan, p, source, stream);
    if (plan.rows == 28) return run<T, 28, kAddressing>(f, plan, p, source, stream);
  }
  if (plan.rows == 16) return run<T, 16, kAddressing>(f, plan, p, source, stream);
  run<T, 14, kAddressing>(f, plan, p, source, stream);
}

template <class T>
void run_addressing(const ConvPoolForward& f, Addressing addressing, const WgmmaPlan& plan,
                    const Params& p, const ConvPoolBackward* source, cudaStream_t stream) {
  switch (addressing) {
    case Addressing::kCopies:
      return run_rows<T, Addressing::kCopies>(f, plan, p, source, stream);
    case Addressing::kShifted:
      return run_rows<T, Addressing::kShifted>(f, plan, p, source, stream);
    case Addressing::kPitch16:
      return run_rows<T, Addressing::kPitch16>(f, plan, p, source, stream);
    case Addressing::kPlanes:
      return run_rows<T, Addressing::kPlanes>(f, plan, p, source, stream);
  }
}

}  // namespace

void conv_relu_pool_forward_wgmma(const ConvPoolForward& f, Addressing addressing,
                                  cudaStream_t stream, const ConvPoolBackward* source) {
  if (!conv_relu_pool_forward_wgmma_supports(f)) {
    throw std::runtime_error(
        "conv_relu_pool_wgmma: does not take " + std::to_string(f.in_channels) + " to " +
        std::to_string(f.out_channels) + " channels with these sizes, strides and alignment");
  }
  const WgmmaPlan plan = conv_relu_pool_wgmma_plan(f, addressing);
  Params p{};
  p.bias = f.bias;
  p.output = f.output;
  p.codes = f.codes;
  p.batch = static_cast<int>(f.batch);
  p.out_channels = static_cast<int>(f.out_channels);
  p.out_h = static_cast<int>(f.out_h);
  p.out_w = static_cast<int>(f.out_w);
  p.pad_h = static_cast<int>(f.pad_h);
  p.pad_w = static_cast<int>(f.pad_w);
  p.tiles_h = plan.tiles_h;
  p.tiles_w = plan.tiles_w;
  p.output_blocks = plan.output_blocks;
  p.channel_blocks = plan.channel_blocks;
  p.last_steps =
      static_cast<int>((f.in_channels - (plan.channel_blocks - 1) * kChannels + 15) / 16);
  p.works = plan.works;
  p.resident = plan.resident;
  p.pooled = f.pool == Pool::kMax;
  p.finish = make_finish(f);
  if (f.dtype == DType::kBFloat16)
    run_addressing<__nv_bfloat16>(f, addressing, plan, p, source, stream);
  else
    run_addressing<__half>(f, addressing, plan, p, source, stream);
}

}  // namespace pyops::cuda
