// First layers on Hopper: convolution of 1 or 3 channels (up to 32 products an output), bias,
// activation and 2x2 max pooling (or none); bf16 and fp16, NHWC output.
//
// sum[pixel, channel] = patch[pixel, tap] x weight[channel, tap]^T. The patches are gathered from a
// tile of the input in shared memory straight into the registers of operand A: nothing is unfolded
// in memory. Bound by writing the output: docs/kernels/conv_relu_pool_hopper.md.
#include <algorithm>

#include "conv_relu_pool_wgmma.cuh"
#include "kernel_plan.h"
#include "launch.cuh"

namespace pyops::cuda {
namespace {

using namespace ptx;

constexpr int kThreads = 128;
constexpr int kBlocks = 4;  // a multiprocessor
constexpr int kTile = 16;   // windows of 2x2 pixels, each way
constexpr int kMostKernel = kMostStemKernel;
constexpr int kLines = 2 * kTile + kMostKernel - 1;
constexpr int kWarpLines = kLines / 4;
static_assert(kLines % 4 == 0);

struct Params {
  const uint16_t* input;  // (batch, kC, in_h, in_w), any strides
  int64_t image_stride;
  int stride_c, stride_h, stride_w;
  const uint16_t* weight;  // (out_channels, kernel_h, kernel_w, kC)
  const void* bias;        // (out_channels,) or null
  void* output;            // (batch, out_h, out_w, out_channels)
  uint8_t* codes;          // the same, or null
  int in_h, in_w, out_channels, kernel_h, kernel_w, out_h, out_w, pad_h, pad_w;
  int tiles_h, tiles_w;
  int64_t tiles;
  bool pooled;
  Finish finish;
};

template <class T, int kC, int kSteps, int kN>
struct Stem {
  static constexpr int kPitch = (2 * kTile + kMostKernel - 1) * kC;  // of a line, elements
  static constexpr int kLoads = (kPitch + 31) / 32;                  // of a lane, a line
  // Operand B: planes of 8 taps, a row of 16 bytes a channel.
  static constexpr uint32_t kWeightBytes = kSteps * 16 * kN * 2;
  static constexpr uint32_t kShared = kWeightBytes + kN * 4 + kLines * kPitch * 2;
};

// Where a thread finds its part of operand A, and which product each index of the contraction
// means. Of 16 products a step, thread t of four holds 2t, 2t + 1, 2t + 8, 2t + 9, of four pixels.
template <int kC, int kSteps>
struct Gather {  // any kernel: product i is tap i in the weight's order
  int offset[kSteps][4];
  uint32_t mask[2]{0, 0};  // of the last step's pairs: a zero weight would not silence an infinity

  static PTX_FN int product(int index, int products) { return index < products ? index : -1; }

  PTX_FN Gather(const Params& p, int pitch, int t) {
    const int products = p.kernel_h * p.kernel_w * kC, line = p.kernel_w * kC;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int i = step * 16 + 2 * t + e % 2 + e / 2 * 8;
        offset[step][e] = i < products ? i / line * pitch + i % line : 0;
        if (step == kSteps - 1 && i < products) mask[e / 2] |= 0xFFFFu << (e % 2 * 16);
      }
    }
  }

  // a[dy]: of the pixels (dy, dx) of the window whose first input pixel is `pixel`.
  PTX_FN void operands(const uint16_t* pixel, int pitch, uint32_t (&a)[2][kSteps][4]) const {
#pragma unroll
    for (int i = 0; i < 2 * kSteps * 4; ++i) {
      const int dy = i / (kSteps * 4), step = i / 4 % kSteps, dx = i % 2, half = i / 2 % 2;
      const uint16_t* from = pixel + dy * pitch + dx * kC;
      const uint32_t low = from[offset[step][2 * half]], high = from[offset[step][2 * half + 1]];
      a[dy][step][i % 4] = low | high << 16;
      if (step == kSteps - 1) a[dy][step][i % 4] &= mask[half];
    }
  }
};

// 3x3 of three channels: threads 0 to 2 hold eight taps of a channel each, so that the four pixels
// of a window share a patch of 4x4; thread 3 the ninth tap of every channel.
template <>
struct Gather<3, 2> {
  int first, rows, columns;  // offsets of the patch, of its lower and of its right half
  uint32_t select[4];        // of __byte_perm: pairs of products, zeros where there are none

  static PTX_FN int tap(int slot) {  // row and column of a thread's slot: 3 * row + column
    constexpr int kOrder = 0x75431620;
    return kOrder >> (4 * slot) & 15;
  }
  static PTX_FN int product(int index, int) {
    const int t = index % 8 / 2, slot = index / 16 * 4 + index / 8 % 2 * 2 + index % 2;
    if (t < 3) return tap(slot) * 3 + t;
    return slot < 3 ? 8 * 3 + slot : -1;
  }

  PTX_FN Gather(const Params&, int pitch, int t) {
    // Thread 3 sees a channel in each 2x2 part of its patch: taps 0, 2 and 6 of the others.
    first = t < 3 ? t : 2 * pitch + 6;
    rows = t < 3 ? 2 * pitch : 2;
    columns = t < 3 ? 6 : 1;
#pragma unroll
    for (int pair = 0; pair < 4; ++pair)
      select[pair] = t < 3 || pair == 0 ? 0x5410 : pair == 1 ? 0x3210 : 0x3232;
  }

  PTX_FN void operands(const uint16_t* pixel, int pitch, uint32_t (&a)[2][2][4]) const {
    uint32_t patch[4][4];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int y = i / 4, x = i % 4;
      const uint16_t* part = pixel + first + y / 2 * rows + x / 2 * columns;
      patch[y][x] = y + x < 6 ? part[y % 2 * pitch + x % 2 * 3] : 0;
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int dy = i / 8, dx = i % 2, pair = i / 2 % 4;
      const int low = tap(2 * pair), high = tap(2 * pair + 1);
      a[dy][pair / 2][i % 4] = __byte_perm(patch[low / 3 + dy][low % 3 + dx],
                                           patch[high / 3 + dy][high % 3 + dx], select[pair]);
    }
  }
};

// A thread (g = lane / 4, t = lane % 4) gets columns 8j + 2t + b of the product; as channels these
// are runs of 8, of which four lanes store 64 bytes in a row.
PTX_FN int channel_of_column(int column) {
  return column / 32 * 32 + column % 8 / 2 * 8 + column / 8 % 4 * 2 + column % 2;
}

template <class T, int kC, int kSteps, int kN>
PTX_FN void load_weights(const Params& p, uint16_t* weights, float* bias) {
  const int products = p.kernel_h * p.kernel_w * kC, first = blockIdx.y * kN;
  for (int i = threadIdx.x; i < kN * kSteps * 16; i += kThreads) {
    const int index = i % (kSteps * 16), column = i / (kSteps * 16);
    const int product = Gather<kC, kSteps>::product(index, products);
    const int channel = first + channel_of_column(column);
    weights[index / 8 * (kN * 8) + column * 8 + index % 8] =
        product >= 0 && channel < p.out_channels
            ? p.weight[static_cast<int64_t>(channel) * products + product]
            : uint16_t{0};
  }
  for (int i = threadIdx.x; i < kN; i += kThreads)
    bias[i] = p.bias && first + i < p.out_channels
                  ? to_float(static_cast<const T*>(p.bias)[first + i])
                  : 0.0f;
}

struct TileAt {
  int64_t image;
  int y, x;  // of its first window
};

// The pixels under a tile, zeros outside the image. A warp takes every fourth line; all loads
// are under way before the first is stored.
template <class T, int kC, int kSteps, int kN>
PTX_FN void load_pixels(const Params& p, const TileAt& tile, uint16_t* pixels) {
  using S = Stem<T, kC, kSteps, kN>;
  const int warp = warp_id(), lane = lane_id();
  const int y0 = 2 * tile.y - p.pad_h, x0 = 2 * tile.x - p.pad_w;
  const uint16_t* image = p.input + tile.image * p.image_stride;
  // What lies outside is read at the edge and masked: a load takes two additions, no branches.
  uint32_t column[S::kLoads], inside[S::kLoads];  // bytes; bits
#pragma unroll
  for (int j = 0; j < S::kLoads; ++j) {
    const int at = lane + 32 * j, x = x0 + at / kC;
    column[j] = 2 * (min(max(x, 0), p.in_w - 1) * p.stride_w + at % kC * p.stride_c);
    inside[j] = x >= 0 && x < p.in_w ? ~0u : 0u;
  }
  uint16_t values[kWarpLines][S::kLoads];
#pragma unroll
  for (int i = 0; i < kWarpLines; ++i) {
    const int y = y0 + warp + 4 * i;
    const char* line =
        reinterpret_cast<const char*>(image + min(max(y, 0), p.in_h - 1) * p.stride_h);
    const uint32_t some = y >= 0 && y < p.in_h ? ~0u : 0u;
#pragma unroll
    for (int j = 0; j < S::kLoads; ++j) {
      const uint32_t value = *reinterpret_cast<const uint16_t*>(line + column[j]);
      values[i][j] = static_cast<uint16_t>(value & some & inside[j]);
    }
  }
  uint16_t* to = pixels + warp * S::kPitch + lane;
#pragma unroll
  for (int j = 0; j < S::kLoads; ++j) {
#pragma unroll
    for (int i = 0; i < kWarpLines; ++i)
      if (lane + 32 * j < S::kPitch) to[4 * i * S::kPitch + 32 * j] = values[i][j];
  }
}

// Finish::activate in one instruction for the usual case.
template <bool kRelu>
PTX_FN float activate(const Params& p, float value) {
  if constexpr (kRelu) return max_nan(value, 0.0f);
  return p.finish.activate(value);
}

// Windows of one thread: sum[dy][4j + 2dx + b].
template <class T, int kN, bool kPooled, bool kCodes, bool kRelu>
PTX_FN void store_as(const float (&sum)[2][kN / 2], const Params& p, const float* bias,
                     int64_t image, int window_y, int window_x) {
  const int lane = lane_id() % 4;
#pragma unroll
  for (int run = 0; run < kN / 32; ++run) {
    const int first = run * 32 + lane * 8, channel = blockIdx.y * kN + first;
    if (channel >= p.out_channels) continue;
    if constexpr (kPooled) {
      if (window_y >= p.out_h || window_x >= p.out_w) continue;
      const int64_t at =
          ((image * p.out_h + window_y) * p.out_w + window_x) * p.out_channels + channel;
      uint32_t packed[4], codes[2]{0, 0};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float value[2];
#pragma unroll
        for (int b = 0; b < 2; ++b) {
          const int i = 4 * (4 * run + j) + b;
          const float w[4]{sum[0][i], sum[0][i + 2], sum[1][i], sum[1][i + 2]};
          const float largest = max_of(w[0], w[1], w[2], w[3]);
          const float shifted = largest + bias[first + 2 * j + b];
          value[b] = activate<kRelu>(p, shifted);
          if constexpr (kCodes)
            codes[j / 2] |= max_code(w[0], w[1], w[2], w[3], largest, shifted, p.finish)
                            << (j % 2 * 16 + b * 8);
        }
        packed[j] = pack_pair<T>(value[0], value[1]);
      }
      *reinterpret_cast<uint4*>(static_cast<T*>(p.output) + at) =
          uint4{packed[0], packed[1], packed[2], packed[3]};
      if constexpr (kCodes) *reinterpret_cast<uint2*>(p.codes + at) = uint2{codes[0], codes[1]};
    } else {
#pragma unroll
      for (int place = 0; place < 4; ++place) {
        const int dy = place / 2, dx = place % 2;
        const int y = 2 * window_y + dy, x = 2 * window_x + dx;
        if (y >= p.out_h || x >= p.out_w) continue;
        uint32_t packed[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int i = 4 * (4 * run + j) + 2 * dx;
          packed[j] = pack_pair<T>(activate<kRelu>(p, sum[dy][i] + bias[first + 2 * j]),
                                   activate<kRelu>(p, sum[dy][i + 1] + bias[first + 2 * j + 1]));
        }
        *reinterpret_cast<uint4*>(static_cast<T*>(p.output) +
                                  ((image * p.out_h + y) * p.out_w + x) * p.out_channels +
                                  channel) = uint4{packed[0], packed[1], packed[2], packed[3]};
      }
    }
  }
}

template <class T, int kN, bool kRelu>
PTX_FN void store(const float (&sum)[2][kN / 2], const Params& p, const float* bias, int64_t image,
                  int y, int x) {
  if (!p.pooled)
    store_as<T, kN, false, false, kRelu>(sum, p, bias, image, y, x);
  else if (p.codes)
    store_as<T, kN, true, true, kRelu>(sum, p, bias, image, y, x);
  else
    store_as<T, kN, true, false, kRelu>(sum, p, bias, image, y, x);
}

template <class T, int kC, int kSteps, int kN>
__global__ void __launch_bounds__(kThreads, kBlocks)
    conv_relu_pool_wgmma_stem_kernel(const Params p) {
  using S = Stem<T, kC, kSteps, kN>;
  DYN_SMEM(shared);
  uint16_t* const weights = reinterpret_cast<uint16_t*>(shared);
  float* const bias = reinterpret_cast<float*>(shared + S::kWeightBytes);
  uint16_t* const pixels = reinterpret_cast<uint16_t*>(shared + S::kWeightBytes + kN * 4);
  const int warp = warp_id(), g = lane_id() / 4, t = lane_id() % 4;

  const Gather<kC, kSteps> gather(p, S::kPitch, t);
  load_weights<T, kC, kSteps, kN>(p, weights, bias);
  fence_proxy_async_shared();
  for (int64_t tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
    const int in_image = p.tiles_h * p.tiles_w;
    const int64_t image = tile / in_image;
    const int rest = static_cast<int>(tile - image * in_image);
    const TileAt at{image, rest / p.tiles_w * kTile, rest % p.tiles_w * kTile};
    load_pixels<T, kC, kSteps, kN>(p, at, pixels);
    sync_threads();
    const int x = warp % 2 * 8 + g;
#pragma unroll 1
    for (int y = warp / 2; y < kTile; y += 2) {
      if (at.y + (y & ~1) >= (p.pooled ? p.out_h : (p.out_h + 1) / 2)) break;  // for all four warps
      uint32_t a[2][kSteps][4];
      gather.operands(pixels + 2 * y * S::kPitch + 2 * x * kC, S::kPitch, a);
      float sum[2][kN / 2];
      wgmma_fence();
#pragma unroll
      for (int dy = 0; dy < 2; ++dy) {
#pragma unroll
        for (int step = 0; step < kSteps; ++step)
          wgmma<T, kN>(sum[dy], a[dy][step],
                       smem_descriptor<Swizzle::None>(smem_addr(shared) + step * (2 * kN * 16),
                                                      kN * 16, 128),
                       step > 0);
      }
      wgmma_commit();
      wgmma_wait<0>();
      if (p.finish.relu)
        store<T, kN, true>(sum, p, bias, at.image, at.y + y, at.x + x);
      else
        store<T, kN, false>(sum, p, bias, at.image, at.y + y, at.x + x);
    }
    sync_threads();  // before the next tile's pixels
  }
}

// ---- host ----

template <class T, int kC, int kSteps, int kN>
void run(const ConvPoolForward& f, const Params& p, cudaStream_t stream) {
  const int64_t most = std::max(f.device.multiprocessors, 1) * kBlocks;
  LaunchConfig config{"conv_relu_pool_wgmma_stem",
                      dim3(std::min(p.tiles, most), (f.out_channels + kN - 1) / kN),
                      dim3(kThreads)};
  config.smem = Stem<T, kC, kSteps, kN>::kShared;
  config.stream = stream;
  launch(config,
         planned<conv_relu_pool_wgmma_stem_kernel<T, kC, kSteps, kN>, kThreads,
                 Stem<T, kC, kSteps, kN>::kShared>(),
         p);
}

template <class T, int kC, int kSteps>
void run_channels(const ConvPoolForward& f, const Params& p, cudaStream_t stream) {
  if (f.out_channels <= 32)
    run<T, kC, kSteps, 32>(f, p, stream);
  else
    run<T, kC, kSteps, 64>(f, p, stream);
}

template <class T>
void run_taps(const ConvPoolForward& f, const Params& p, cudaStream_t stream) {
  const int64_t taps = f.kernel_h * f.kernel_w * f.in_channels;
  if (f.in_channels == 3)
    run_channels<T, 3, 2>(f, p, stream);
  else if (taps > 16)
    run_channels<T, 1, 2>(f, p, stream);
  else
    run_channels<T, 1, 1>(f, p, stream);
}

}  // namespace

void conv_relu_pool_forward_wgmma_stem(const ConvPoolForward& f, cudaStream_t stream) {
  Params p{};
  p.input = static_cast<const uint16_t*>(f.input);
  p.image_stride = f.in.n;
  p.stride_c = static_cast<int>(f.in.c);
  p.stride_h = static_cast<int>(f.in.h);
  p.stride_w = static_cast<int>(f.in.w);
  p.weight = static_cast<const uint16_t*>(f.weight);
  p.bias = f.bias;
  p.output = f.output;
  p.codes = f.codes;
  p.in_h = static_cast<int>(f.in_h);
  p.in_w = static_cast<int>(f.in_w);
  p.out_channels = static_cast<int>(f.out_channels);
  p.kernel_h = static_cast<int>(f.kernel_h);
  p.kernel_w = static_cast<int>(f.kernel_w);
  p.out_h = static_cast<int>(f.out_h);
  p.out_w = static_cast<int>(f.out_w);
  p.pad_h = static_cast<int>(f.pad_h);
  p.pad_w = static_cast<int>(f.pad_w);
  p.pooled = f.pool == Pool::kMax;
  const int64_t pixels = p.pooled ? kTile : 2 * kTile;
  p.tiles_h = static_cast<int>((f.out_h + pixels - 1) / pixels);
  p.tiles_w = static_cast<int>((f.out_w + pixels - 1) / pixels);
  p.tiles = f.batch * p.tiles_h * p.tiles_w;
  p.finish = make_finish(f);
  if (f.dtype == DType::kBFloat16)
    run_taps<__nv_bfloat16>(f, p, stream);
  else
    run_taps<__half>(f, p, stream);
}

}  // namespace pyops::cuda
