// What the kernels by Winograd's method share: how tiles form blocks, and the way from a block's
// products to outputs. Only for *.isa.cpp files.
#pragma once

#include "conv_relu_pool_epilogue.h"
#include "conv_relu_pool_winograd.h"
#include "runtime.h"

namespace pyops::cpu::PYOPS_ISA {
namespace {

constexpr int kMaxTiles = 56;  // of a block

PYOPS_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
PYOPS_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
PYOPS_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// The weights of one channel group and kLanes output channels from k0 on, (channel, tap, lane),
// zeros where there are none.
template <int kTaps, class T>
PYOPS_INLINE void load_weights(const ConvReluPoolParams& p, int64_t k0, int64_t group, int live,
                               float* taps) {
  constexpr int kArea = kTaps * kTaps;
  const T* const weight = static_cast<const T*>(p.weight) + k0 * p.in_channels * kArea;
  const bool last = p.weight_channels_last;
  for (int j = 0; j < kArea; ++j) {
    // A row of kLanes numbers: as many channels of one tap, or 1 / kArea of all taps of these
    // channels.
    const int64_t at =
        last ? j * p.in_channels + group * kLanes : group * kLanes * kArea + j * kLanes;
    const int count = last ? live : live * kArea - j * kLanes;
    Vec block[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      const T* const from = weight + (i * p.in_channels * kArea + at);
      __builtin_prefetch(from +
                         (last ? kLanes : kArea * kLanes));  // the next group's: rows are far apart
      block[i] = k0 + i < p.out_channels && count > 0 ? load_first(from, count) : Vec{};
    }
    transpose(block);
    float* const to = taps + j * kLanes * (last ? 1 : kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) store(to + i * kLanes * (last ? kArea : 1), block[i]);
  }
}

// One convolution output as defined, for tiles that an infinity or NaN has spread through.
template <int kTaps, class T>
float direct_value(const ConvReluPoolParams& p, int64_t n, int64_t k, int64_t y, int64_t x) {
  const T* const input = static_cast<const T*>(p.input);
  constexpr int kArea = kTaps * kTaps;
  const T* const weight = static_cast<const T*>(p.weight) + k * p.in_channels * kArea;
  const int64_t tap = p.weight_channels_last ? p.in_channels : 1;
  const int64_t channel = p.weight_channels_last ? 1 : kArea;
  const int64_t plane = p.in_h * p.in_w, step = p.channels_last ? 1 : plane;
  const int64_t pixel = p.channels_last ? p.in_channels : 1;
  double sum = 0;  // in which no part overflows
  for (int64_t c = 0; c < p.in_channels; ++c) {
    const T* const from = input + n * p.in_channels * plane + c * step;
    for (int64_t i = 0; i < kArea; ++i) {
      const int64_t iy = y - p.pad_h + i / kTaps, ix = x - p.pad_w + i % kTaps;
      if (iy < 0 || iy >= p.in_h || ix < 0 || ix >= p.in_w) continue;
      sum += static_cast<double>(to_float(weight[c * channel + i * tap])) *
             to_float(from[(iy * p.in_w + ix) * pixel]);
    }
  }
  return static_cast<float>(sum);
}

// A convolution cut into tiles of kHeight x kWidth outputs, whole pooling windows each.
template <class Down, class Across>
class WinogradBlocks {
 protected:
  using Tile = Winograd<Down, Across>;
  static constexpr int kHeight = Tile::kHeight, kWidth = Tile::kWidth, kTaps = Tile::kTaps;
  static constexpr int kPositions = Tile::kPositions;
  static constexpr int kMaxRows = kMaxTiles * kHeight * kWidth;  // of a tile of outputs

  // Tiles of one image that form a rectangle.
  struct Segment {
    int64_t image, y, x;  // of the first tile, in tiles
    int rows, columns;
  };
  struct Block {
    int num_segments, tiles;
    Segment segments[kMaxTiles];
  };

  const ConvReluPoolParams& p;
  const Epilogue epilogue;
  int window;
  int64_t groups, output_blocks, tiles_h, tiles_w;
  int64_t block_rows, block_columns;  // in tiles; rows count through all images
  int64_t blocks_down, blocks_across;

  // gemm_rows: tiles that a product takes at once.
  WinogradBlocks(const ConvReluPoolParams& params, int64_t most_tiles, int64_t gemm_rows)
      : p(params), epilogue(params) {
    window = p.pool == Pool::kNone ? 1 : 2;
    groups = ceil_div(p.in_channels, kLanes);
    output_blocks = ceil_div(p.out_channels, kBlockChannels);
    tiles_h = ceil_div(p.out_h * window, kHeight);
    tiles_w = ceil_div(p.out_w * window, kWidth);
    choose_block(most_tiles, gemm_rows);
  }

 public:
  // Multiply-adds of the small products, the bulk of the work.
  int64_t cost() const {
    return p.batch * tiles_h * tiles_w * kPositions * p.in_channels * output_blocks *
           kBlockChannels;
  }

 protected:
  int64_t num_blocks() const { return blocks_down * blocks_across; }
  int64_t max_tiles() const { return block_rows * block_columns; }
  int64_t m_size() const { return kPositions * max_tiles() * kBlockChannels; }

  void make_block(int64_t index, Block* block) const {
    // Downwards first: a block finds its halo in cache.
    const int64_t x = index / blocks_down * block_columns;
    int64_t row = index % blocks_down * block_rows;
    const int64_t end = smaller(p.batch * tiles_h, row + block_rows);
    const int columns = static_cast<int>(smaller(block_columns, tiles_w - x));
    block->num_segments = block->tiles = 0;
    while (row < end) {
      const int64_t image = row / tiles_h, y = row % tiles_h;
      const int rows = static_cast<int>(smaller(end - row, tiles_h - y));
      block->segments[block->num_segments++] = {image, y, x, rows, columns};
      block->tiles += rows * columns;
      row += rows;
    }
  }

  int make_runs(const Block& block, Run* runs) const {
    const int down = kHeight / window, across = kWidth / window;
    int count = 0, tile = 0;
    for (int s = 0; s < block.num_segments; ++s) {
      const Segment& g = block.segments[s];
      for (int row = 0; row < g.rows; ++row, tile += g.columns) {
        for (int i = 0; i < down && (g.y + row) * down + i < p.out_h; ++i) {
          const int64_t x = g.x * across;
          const int length = static_cast<int>(smaller(g.columns * across, p.out_w - x));
          const Run run = {g.image, ((g.y + row) * down + i) * p.out_w + x,
                           (i * block.tiles + tile) * across, length};
          Run* const before = runs + count - 1;
          if (count > 0 && before->image == run.image && before->at + before->length == run.at &&
              before->pixel + before->length == run.pixel) {
            before->length += length;
          } else {
            runs[count++] = run;
          }
        }
      }
    }
    return count;
  }

  // Outputs of tile `tile` straight from the definition.
  __attribute__((noinline, cold)) void recompute(const Block& block, int tile, int64_t k0,
                                                 Vec (&y)[kHeight][kWidth]) const {
    const Segment* g = block.segments;
    for (; tile >= g->rows * g->columns; ++g) tile -= g->rows * g->columns;
    const int64_t y0 = (g->y + tile / g->columns) * kHeight;
    const int64_t x0 = (g->x + tile % g->columns) * kWidth;
    with_type(p.dtype, [&](auto t) {
      using T = decltype(t);
      for (int lane = 0; lane < kLanes && k0 + lane < p.out_channels; ++lane) {
        const T* const bias = static_cast<const T*>(p.bias);
        for (int i = 0; i < kHeight * kWidth; ++i) {
          const float value =
              direct_value<kTaps, T>(p, g->image, k0 + lane, y0 + i / kWidth, x0 + i % kWidth);
          y[i / kWidth][i % kWidth][lane] = value + (bias ? to_float(bias[k0 + lane]) : 0.0f);
        }
      }
    });
  }

  template <bool kFinite>
  PYOPS_INLINE void pool_tile(const Vec (&y)[kHeight][kWidth], int tile, int tiles, float* values,
                              int32_t* codes) const {
    if (window == 1) {
#pragma GCC unroll 4
      for (int i = 0; i < kHeight; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < kWidth; ++j) {
          const int at = ((i * tiles + tile) * kWidth + j) * kBlockChannels;
          store(values + at, epilogue.activate(y[i][j]));
          if (codes) store_codes(codes + at, epilogue.passes(y[i][j]) & 1);
        }
      }
      return;
    }
#pragma GCC unroll 2
    for (int i = 0; i < kHeight / 2; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < kWidth / 2; ++j) {
        const int at = ((i * tiles + tile) * (kWidth / 2) + j) * kBlockChannels;
        const Vec x[4] = {y[2 * i][2 * j], y[2 * i][2 * j + 1], y[2 * i + 1][2 * j],
                          y[2 * i + 1][2 * j + 1]};
        VecInt code{};
        store(values + at, pool_window<kFinite>(epilogue, x, &code));
        if (codes) store_codes(codes + at, code);
      }
    }
  }

  PYOPS_INLINE static void store_codes(int32_t* to, VecInt codes) {
    store(reinterpret_cast<float*>(to), reinterpret_cast<Vec>(codes));
  }

  // m (position, tile, kBlockChannels) -> outputs. blank (group, kMaxTiles): outputs that see zeros
  // only, as Winograd::blank_outputs has them, or null if that does not matter.
  void finish(const Block& block, int64_t output_block, const float* m,
              const uint8_t* blank) const {
    constexpr int64_t kTileFloats = (kMaxRows + kLanes) * kBlockChannels;
    float* const values = static_cast<float*>(scratch(7, 2 * kTileFloats * sizeof(float)));
    int32_t* const codes =
        epilogue.with_codes ? reinterpret_cast<int32_t*>(values + kTileFloats) : nullptr;
    const int64_t k0 = output_block * kBlockChannels;
    uint8_t is_blank[kMaxTiles] = {};
    if (blank != nullptr) {
      for (int tile = 0; tile < block.tiles; ++tile) {
        is_blank[tile] = blank[tile];
        for (int64_t g = 1; g < groups; ++g) is_blank[tile] &= blank[g * kMaxTiles + tile];
      }
    }
    for (int vec = 0; vec < kBlockVecs; ++vec) {
      const int64_t k = k0 + vec * kLanes;
      if (k >= p.out_channels) break;
      Vec bias{};
      if (p.bias != nullptr) {
        with_type(p.dtype, [&](auto t) {
          bias = load_first(static_cast<const decltype(t)*>(p.bias) + k,
                            static_cast<int>(smaller(kLanes, p.out_channels - k)));
        });
      }
      for (int tile = 0; tile < block.tiles; ++tile) {
        Vec y[kHeight][kWidth];
        Tile::output(m + tile * kBlockChannels + vec * kLanes, block.tiles * kBlockChannels, y);
        Vec sum{};
#pragma GCC unroll 4
        for (int i = 0; i < kHeight; ++i) {
#pragma GCC unroll 4
          for (int j = 0; j < kWidth; ++j) {
            if (is_blank[tile] >> (i * kWidth + j) & 1) y[i][j] = Vec{};
            y[i][j] += bias;
            sum += y[i][j];
          }
        }
        float* const to = values + vec * kLanes;
        int32_t* const codes_to = codes ? codes + vec * kLanes : nullptr;
        // False exactly if an infinity or NaN is among them (or the sum overflows).
        if (__builtin_expect(!any(sum - sum != Vec{}), 1)) {
          pool_tile<true>(y, tile, block.tiles, to, codes_to);
        } else {
          Vec exact[kHeight][kWidth] = {};
          recompute(block, tile, k, exact);
          pool_tile<false>(exact, tile, block.tiles, to, codes_to);
        }
      }
    }
    Run runs[kMaxTiles * kHeight];
    const int num_runs = make_runs(block, runs);
    if (p.sums != nullptr) return store_sums(runs, num_runs, values, k0);
    with_type(p.dtype,
              [&](auto t) { store_runs<decltype(t)>(p, runs, num_runs, values, codes, k0); });
  }

 private:
  void store_sums(const Run* runs, int num_runs, const float* values, int64_t k0) const {
    const int64_t channels = ceil_div(p.out_channels, kLanes) * kLanes;
    const int64_t width = smaller(kBlockChannels, channels - k0);
    for (const Run* run = runs; run < runs + num_runs; ++run) {
      const float* from = values + run->at * static_cast<int64_t>(kBlockChannels);
      float* to = p.sums + (run->image * p.out_h * p.out_w + run->pixel) * channels + k0;
      for (int i = 0; i < run->length; ++i, from += kBlockChannels, to += channels) {
        for (int64_t k = 0; k < width; k += kLanes) store(to + k, load(from + k));
      }
    }
  }

  // Square blocks pack fewer halo pixels, but long rows come from memory several times faster.
  void choose_block(int64_t most_tiles, int64_t gemm_rows) {
    const int64_t total_rows = p.batch * tiles_h;
    double best = 0;
    for (int64_t across = ceil_div(tiles_w, most_tiles); across <= tiles_w; ++across) {
      const int64_t columns = ceil_div(tiles_w, across);
      int64_t rows = smaller(most_tiles / columns, across > 1 ? tiles_h : total_rows);
      rows = ceil_div(total_rows, ceil_div(total_rows, rows));
      const int64_t tiles = rows * columns;
      // In cycles for kLanes channels, roughly: products, then packing; a new row costs as much as
      // three vectors more of one.
      const double products = static_cast<double>(tiles + 2 * ceil_div(tiles, gemm_rows)) *
                              kPositions * output_blocks * kBlockChannels;
      const int64_t images = ceil_div(rows, tiles_h);
      const double packing = static_cast<double>(rows * kHeight + (kTaps - 1) * images) *
                             (ceil_div(columns * kWidth + kTaps - 1, kLanes) + 3) * 10 * kLanes;
      const double cycles = (products + packing) * ceil_div(total_rows, rows) * across;
      if (best == 0 || cycles < best) {
        best = cycles;
        block_rows = rows;
        block_columns = columns;
      }
      if (columns == 1) break;
    }
    blocks_down = ceil_div(total_rows, block_rows);
    blocks_across = ceil_div(tiles_w, block_columns);
  }
};

// Whether the geometry is one that these kernels take.
PYOPS_INLINE bool suits_winograd(const ConvReluPoolParams& p, int taps) {
  if (p.groups != 1 || p.kernel_h != taps || p.kernel_w != taps || p.stride_h != 1 ||
      p.stride_w != 1 || p.dilation_h != 1 || p.dilation_w != 1) {
    return false;
  }
  return p.pool == Pool::kNone || (p.pool_h == 2 && p.pool_w == 2 && p.pool_stride_h == 2 &&
                                   p.pool_stride_w == 2 && p.pool_pad_h == 0 && p.pool_pad_w == 0 &&
                                   p.out_h * 2 <= p.conv_h && p.out_w * 2 <= p.conv_w);
}

}  // namespace
}  // namespace pyops::cpu::PYOPS_ISA
