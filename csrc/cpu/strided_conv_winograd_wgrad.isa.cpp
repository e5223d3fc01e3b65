// Gradient of the weight of a 4x4 convolution of stride 2 and padding 1 by Winograd's method.
//
// The same identity as for the convolution, read in another direction: with V the transformed
// input and P the transformed gradient, the sum of V x P over tiles, one product of matrices a
// position, is the gradient of the transformed weight. A few images at a time:
//   transform   V (position, phase and channel group, tile, lane)
//               P (position, block, tile, kOutBlock)
//   gemm        S (block, position, phase and channel, kOutBlock) += V x P
// and at the end S is transformed back. Sums are in a fixed order whatever the threads do.
#include "runtime.h"
#include "strided_conv_winograd.h"
#include "strided_conv_winograd_tiles.h"

namespace pyops::cpu::PYOPS_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kRows = 8;  // channels of a register block: kRows x kOutVectors sums
#else
constexpr int kRows = 4;
#endif
constexpr int64_t kLeastPixels = 256;
constexpr int64_t kChunkBytes = 6 << 20;  // of V and P, at least
constexpr int64_t kSkew = 16;  // floats that keep positions out of each other's cache sets
static_assert(kLanes % kRows == 0);

// sums (kRows, kOutBlock) = or += v (tile, kLanes)^T x g (tile, kOutBlock).
PYOPS_INLINE void gemm(const float* v, const float* g, int64_t tiles, float* sums, bool add) {
  Vec sum[kRows][kOutVectors] = {};
#pragma GCC unroll 2
  for (int64_t t = 0; t < tiles; ++t, v += kLanes, g += kOutBlock) {
    const Vec g0 = load(g), g1 = load(g + kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec x = splat(v[r]);
      sum[r][0] = fma(x, g0, sum[r][0]);
      sum[r][1] = fma(x, g1, sum[r][1]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r, sums += kOutBlock) {
    store(sums, add ? load(sums) + sum[r][0] : sum[r][0]);
    store(sums + kLanes, add ? load(sums + kLanes) + sum[r][1] : sum[r][1]);
  }
}

template <class F>
class WeightGradient {
  using Tiles = Grid<F>;
  static constexpr int kAlpha = Tiles::kAlpha, kPositions = Tiles::kPositions, kPhases = 4;

  const StridedWgradParams& p;
  const int64_t high, low;  // channels; high ones once for each phase
  const int64_t high_groups, low_blocks;

 public:
  explicit WeightGradient(const StridedWgradParams& params)
      : p(params),
        high(kPhases * p.high_channels),
        low(p.low_channels),
        high_groups(high / kLanes),
        low_blocks(low / kOutBlock) {}

  bool run() const {
    const Tiles one(p.low_h, p.low_w, 1);
    const int64_t positions = one.down.positions() * one.across.positions();
    const int64_t block_floats = kPositions * s_position();
    // Every chunk goes through all sums once more.
    const int64_t chunk_bytes = most(kChunkBytes, low_blocks * block_floats);
    const int64_t chunks = divide_up(p.batch * positions * (high + low) * 4, chunk_bytes);
    const int64_t chunk = divide_up(p.batch, least(p.batch, chunks));
    Tiles tiles(p.low_h, p.low_w, chunk);
    float* const v = static_cast<float*>(scratch(0, kPositions * v_position(tiles) * 4));
    float* const g = static_cast<float*>(scratch(1, kPositions * g_position(tiles) * 4));
    // Sums that need not outlive their task stay in its cache.
    const bool at_once = chunk >= p.batch && low_blocks >= num_threads();
    float* const all_sums =
        at_once ? nullptr : static_cast<float*>(scratch(2, low_blocks * block_floats * 4));
    const int64_t parts = p.high_channels / kLanes + low_blocks;
    int spoilt = 0;
    for (int64_t first = 0; first < p.batch; first += chunk) {
      tiles.images = least(chunk, p.batch - first);
      parallel_for(tiles.images * parts, [&](int64_t index) {
        const int64_t image = index / parts, part = index % parts;
        if (part < low_blocks) {
          transform_low(tiles, first, image, part, g);
        } else {
          transform_high(tiles, first, image, part - low_blocks, v);
        }
      });
      const bool last = first + chunk >= p.batch;
      const auto finish = [&](int64_t block, const float* sums) {
        if (!write(tiles, block, sums)) __atomic_store_n(&spoilt, 1, __ATOMIC_RELAXED);
      };
      if (at_once) {
        parallel_for(low_blocks, [&](int64_t block) {
          float* const sums = static_cast<float*>(scratch(5, block_floats * 4));
          for (int position = 0; position < kPositions; ++position) {
            multiply(tiles, position, block, v, g, false, sums);
          }
          finish(block, sums);
        });
        continue;
      }
      parallel_for(low_blocks * kPositions, [&](int64_t index) {
        const int64_t block = index / kPositions;
        multiply(tiles, static_cast<int>(index % kPositions), block, v, g, first > 0,
                 all_sums + block * block_floats);
      });
      if (!last) continue;
      parallel_for(low_blocks,
                   [&](int64_t block) { finish(block, all_sums + block * block_floats); });
    }
    return spoilt == 0;
  }

 private:
  int64_t v_position(const Tiles& tiles) const { return high * tiles.tiles() + kSkew; }
  int64_t g_position(const Tiles& tiles) const { return low * tiles.tiles() + kSkew; }
  int64_t s_position() const { return high * kOutBlock + kSkew; }

  void transform_high(const Tiles& tiles, int64_t first, int64_t image, int64_t group,
                      float* v) const {
    const int64_t rows = 2 * tiles.down.cover() + 2, width = 2 * tiles.across.cover() + 2;
    float* const packed = static_cast<float*>(scratch(4, rows * width * kLanes * 4));
    const Image from{
        static_cast<const float*>(p.high) + (first + image) * p.high_channels * p.high_h * p.high_w,
        p.high_channels, p.high_h, p.high_w, p.channels_last};
    pack(from, group * kLanes, 1, rows, width, packed);
    const int64_t row = 2 * width * kLanes, column = 2 * kLanes;
    for (int phase = 0; phase < kPhases; ++phase) {
      const float* const at = packed + (phase / 2 * width + phase % 2) * kLanes;
      const int64_t to = (phase * p.high_channels / kLanes + group) * tiles.tiles();
      tiles.each_tile(image, [&](int64_t y, int64_t x, int64_t tile, auto height, auto across) {
        constexpr int h = decltype(height)::value, w = decltype(across)::value;
        transform_input<F, h, w>(at + y * row + x * column, row, column, v + (to + tile) * kLanes,
                                 v_position(tiles));
      });
    }
  }

  void transform_low(const Tiles& tiles, int64_t first, int64_t image, int64_t block,
                     float* g) const {
    const int64_t rows = tiles.down.cover(), width = tiles.across.cover();
    float* const packed = static_cast<float*>(scratch(4, rows * width * kLanes * 4));
    const Image from{static_cast<const float*>(p.low) + (first + image) * low * p.low_h * p.low_w,
                     low, p.low_h, p.low_w, p.channels_last};
    for (int vec = 0; vec < kOutVectors; ++vec) {
      pack(from, block * kOutBlock + vec * kLanes, 0, rows, width, packed);
      float* const to = g + block * tiles.tiles() * kOutBlock + vec * kLanes;
      tiles.each_tile(image, [&](int64_t y, int64_t x, int64_t tile, auto height, auto across) {
        constexpr int h = decltype(height)::value, w = decltype(across)::value;
        transform_gradient<F, h, w>(packed + (y * width + x) * kLanes, width * kLanes, kLanes,
                                    to + tile * kOutBlock, g_position(tiles));
      });
    }
  }

  void multiply(const Tiles& tiles, int position, int64_t block, const float* v, const float* g,
                bool add, float* sums) const {
    if (!tiles.used(position)) return;
    int64_t begin, end;
    tiles.range(position, &begin, &end);
    const float* const right =
        g + position * g_position(tiles) + (block * tiles.tiles() + begin) * kOutBlock;
    for (int64_t group = 0; group < high_groups; ++group) {
      const float* const left =
          v + position * v_position(tiles) + (group * tiles.tiles() + begin) * kLanes;
      for (int64_t c = 0; c < kLanes; c += kRows) {
        float* const to = sums + position * s_position() + (group * kLanes + c) * kOutBlock;
        gemm(left + c, right, end - begin, to, add);
      }
    }
  }

  // The weights of one block of low channels and all high ones. False if one is not finite.
  bool write(const Tiles& tiles, int64_t block, const float* sums) const {
    VecInt bad{};
    for (int64_t index = 0; index < kOutVectors * p.high_channels; ++index) {
      const int64_t vec = index / p.high_channels, c = index % p.high_channels;
      Vec taps[kTaps];
#pragma GCC unroll 4
      for (int phase = 0; phase < kPhases; ++phase) {
        const float* const from = sums + (phase * p.high_channels + c) * kOutBlock + vec * kLanes;
        Vec half[2][kAlpha];
#pragma GCC unroll 5
        for (int j = 0; j < kAlpha; ++j) {
          Vec s[kAlpha], out[2];
#pragma GCC unroll 5
          for (int i = 0; i < kAlpha; ++i) {
            const int position = i * kAlpha + j;
            s[i] = tiles.used(position) ? load(from + position * s_position()) : Vec{};
          }
          F::taps(s, out);
          half[0][j] = out[0];
          half[1][j] = out[1];
        }
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          Vec out[2];
          F::taps(half[i], out);
          const int at = 4 * (2 * i + phase / 2) + phase % 2;
          taps[at] = out[0];
          taps[at + 2] = out[1];
          bad |= (out[0] - out[0] != Vec{}) | (out[1] - out[1] != Vec{});
        }
      }
      const int64_t k = block * kOutBlock + vec * kLanes;
      float* const to = static_cast<float*>(p.grad_weight) + (k * p.high_channels + c) * kTaps;
      store_taps(taps, to, p.high_channels * kTaps);
    }
    return !any(bad);
  }
};

}  // namespace

bool strided_wgrad_winograd(const StridedWgradParams& p) {
  if (!suits_strided_winograd(p, p.low_channels, p.high_channels)) return false;
  // Sums over few pixels do not pay for the transforms, nor hide their rounding.
  if (p.batch * p.low_h * p.low_w < kLeastPixels) return false;
  return WeightGradient<Filter<4>>(p).run();
}

}  // namespace pyops::cpu::PYOPS_ISA
