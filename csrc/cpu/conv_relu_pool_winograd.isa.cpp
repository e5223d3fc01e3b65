// 3x3 convolution by Winograd's method with activation and pooling fused: a Winograd tile is a
// set of whole pooling windows, so that the convolution's own output never reaches memory.
//
// A block of tiles (kMaxTiles of them) goes through
//   pack    pixels of kLanes channels around the block -> (row, column, lane), borders zero
//   input   V (position, channel group, tile, lane)
//   gemm    M (position, tile, output channel) = V x U, one small product a position
//   finish  inverse transform, bias, activation, pooling -> output
// for kBlockChannels output channels at a time, so that V and M stay in L2 and one position of
// U (output block, position, input channel, kBlockChannels) in L1. Weights are transformed anew
// in each call: it costs a few percent, and no cache can go stale.
#include "conv_relu_pool_winograd.h"

#include "conv_relu_pool_epilogue.h"
#include "runtime.h"

namespace pyops::cpu::PYOPS_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kGemmRows = 7;  // tiles a register block: two levels of 7 x 2 sums
#else
constexpr int kGemmRows = 6;
#endif
constexpr int kMaxTiles = 28;
constexpr int kFlush = 16;
// Few tiles: transform the input first, then every block of output channels transforms its own
// weights, this many channels at a time, and uses them at once.
constexpr int64_t kFewTiles = 128;
constexpr int kWeightChannels = 128;

PYOPS_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
PYOPS_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
PYOPS_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

template <class F>
PYOPS_INLINE void with_type(DType dtype, const F& f) {
  if (dtype == DType::kFloat) return f(float{});
  if (dtype == DType::kBFloat16) return f(BFloat16{});
  return f(Half{});
}

// (rows, columns, kLanes) pixels of one channel group, from input row y0 and column x0 on. Writes
// up to kLanes - 1 pixels beyond the end.
template <class T>
void pack(const ConvReluPoolParams& p, int64_t n, int64_t y0, int64_t x0, int rows, int columns,
          int64_t group, float* out) {
  const T* const input = static_cast<const T*>(p.input);
  const int64_t c0 = group * kLanes;
  const int live = static_cast<int>(smaller(kLanes, p.in_channels - c0));
  const int first = static_cast<int>(smaller(columns, larger(0, -x0)));
  const int last = static_cast<int>(larger(first, smaller(columns, p.in_w - x0)));
  for (int r = 0; r < rows; ++r, out += columns * kLanes) {
    const int64_t y = y0 + r;
    if (y < 0 || y >= p.in_h) {
      for (int x = 0; x < columns; ++x) store(out + x * kLanes, Vec{});
      continue;
    }
    for (int x = 0; x < first; ++x) store(out + x * kLanes, Vec{});
    if (p.channels_last) {
      const int64_t at = ((n * p.in_h + y) * p.in_w + x0) * p.in_channels + c0;
      for (int x = first; x < last; ++x) {
        store(out + x * kLanes, load_first(input + (at + x * p.in_channels), live));
      }
    } else {
      const int64_t plane = p.in_h * p.in_w;
      const int64_t at = ((n * p.in_channels + c0) * p.in_h + y) * p.in_w + x0;
      for (int x = first; x < last; x += kLanes) {
        const int count = last - x;
        Vec block[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          block[i] = i < live ? load_first(input + (at + i * plane + x), count) : Vec{};
        }
        transpose(block);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(out + (x + i) * kLanes, block[i]);
      }
    }
    for (int x = last; x < columns; ++x) store(out + x * kLanes, Vec{});
  }
}

// The weights of one channel group and kBlockChannels output channels, (tap of 9 channels, lane).
template <class T>
PYOPS_INLINE void load_weights(const ConvReluPoolParams& p, int64_t k0, int64_t group, int live,
                               float* taps) {
  const T* const weight = static_cast<const T*>(p.weight);
  for (int j = 0; j < 9; ++j) {
    Vec block[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      const int64_t at = ((k0 + i) * p.in_channels + group * kLanes) * 9 + j * kLanes;
      const int count = live * 9 - j * kLanes;
      __builtin_prefetch(weight + at + 9 * kLanes);  // the next group's: rows are far apart
      block[i] = k0 + i < p.out_channels && count > 0 ? load_first(weight + at, count) : Vec{};
    }
    transpose(block);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) store(taps + (j * kLanes + i) * kLanes, block[i]);
  }
}

// m (kRows, kBlockChannels) = or += v (group, kRows of v_group / kLanes tiles, lane) x
// u (channels, kBlockChannels). Sums of kFlush channels are added up apart.
template <int kRows>
void gemm_rows(const float* v, int64_t v_group, const float* u, float* m, int64_t channels,
               bool accumulate) {
  Vec total[kRows][kBlockVecs] = {};
  for (int64_t begin = 0; begin < channels; begin += kFlush) {
    Vec sum[kRows][kBlockVecs] = {};
    const int64_t end = smaller(channels, begin + kFlush);
    for (int64_t c = begin; c < end; c += kLanes, v += v_group) {
      const int64_t lanes = smaller(kLanes, end - c);
#pragma GCC unroll 2
      for (int64_t lane = 0; lane < lanes; ++lane, u += kBlockChannels) {
        const Vec u0 = load(u), u1 = load(u + kLanes);
#pragma GCC unroll 7
        for (int r = 0; r < kRows; ++r) {
          const Vec x = splat(v[r * kLanes + lane]);
          sum[r][0] = fma(x, u0, sum[r][0]);
          sum[r][1] = fma(x, u1, sum[r][1]);
        }
      }
    }
#pragma GCC unroll 7
    for (int r = 0; r < kRows; ++r) {
      total[r][0] += sum[r][0];
      total[r][1] += sum[r][1];
    }
  }
#pragma GCC unroll 7
  for (int r = 0; r < kRows; ++r, m += kBlockChannels) {
    store(m, accumulate ? load(m) + total[r][0] : total[r][0]);
    store(m + kLanes, accumulate ? load(m + kLanes) + total[r][1] : total[r][1]);
  }
}

using GemmRows = void (*)(const float*, int64_t, const float*, float*, int64_t, bool);
constexpr GemmRows kGemm[] = {gemm_rows<1>, gemm_rows<2>, gemm_rows<3>, gemm_rows<4>,
                              gemm_rows<5>, gemm_rows<6>, gemm_rows<7>};
static_assert(kGemmRows <= sizeof(kGemm) / sizeof(kGemm[0]));

// One convolution output as defined, for tiles that an infinity or NaN has spread through.
template <class T>
float direct_value(const ConvReluPoolParams& p, int64_t n, int64_t k, int64_t y, int64_t x) {
  const T* const input = static_cast<const T*>(p.input);
  const T* const weight = static_cast<const T*>(p.weight) + k * p.in_channels * 9;
  const int64_t plane = p.in_h * p.in_w, step = p.channels_last ? 1 : plane;
  const int64_t pixel = p.channels_last ? p.in_channels : 1;
  float sum = 0;
  for (int64_t c = 0; c < p.in_channels; ++c) {
    const T* const from = input + n * p.in_channels * plane + c * step;
    float part = 0;
    for (int64_t i = 0; i < 9; ++i) {
      const int64_t iy = y - p.pad_h + i / 3, ix = x - p.pad_w + i % 3;
      if (iy < 0 || iy >= p.in_h || ix < 0 || ix >= p.in_w) continue;
      part += to_float(weight[c * 9 + i]) * to_float(from[(iy * p.in_w + ix) * pixel]);
    }
    sum += part;
  }
  return sum;
}

template <int kHeight, int kWidth>
class Forward {
  using Tile = Winograd<kHeight, kWidth>;
  static constexpr int kPositions = Tile::kPositions;
  static constexpr int kMaxRows = kMaxTiles * kHeight * kWidth;  // of a tile of outputs
  // Codes tell whether an output is above zero. Where it sees zeros only and the bias is zero, the
  // transforms' rounding must not decide that.
  static constexpr bool kMarksBlank = kHeight * kWidth <= 8;
  // Keeps the positions of one tile out of one another's cache sets.
  static constexpr int64_t kSkew = kLanes;

  // Tiles of one image that form a rectangle.
  struct Segment {
    int64_t image, y, x;  // of the first tile, in tiles
    int rows, columns;
  };
  struct Block {
    int num_segments, tiles;
    Segment segments[kMaxTiles];
  };

 public:
  explicit Forward(const ConvReluPoolParams& params) : p(params), epilogue(params) {
    window = p.pool == Pool::kNone ? 1 : 2;
    groups = ceil_div(p.in_channels, kLanes);
    output_blocks = ceil_div(p.out_channels, kBlockChannels);
    tiles_h = ceil_div(p.out_h * window, kHeight);
    tiles_w = ceil_div(p.out_w * window, kWidth);
    choose_block();
  }

  // Multiply-adds of the small products, the bulk of the work.
  int64_t cost() const {
    return p.batch * tiles_h * tiles_w * kPositions * p.in_channels * output_blocks *
           kBlockChannels;
  }

  void run() const {
    if (p.batch * tiles_h * tiles_w <= kFewTiles && output_blocks >= 4) {
      run_few_tiles();
    } else {
      run_many_tiles();
    }
  }

 private:
  const ConvReluPoolParams& p;
  const Epilogue epilogue;
  int window;
  int64_t groups, output_blocks, tiles_h, tiles_w;
  int64_t block_rows, block_columns;  // in tiles; rows count through all images
  int64_t blocks_down, blocks_across;

  // Square blocks pack fewer halo pixels, but long rows come from memory several times faster.
  void choose_block() {
    const int64_t total_rows = p.batch * tiles_h;
    double best = 0;
    for (int64_t across = ceil_div(tiles_w, kMaxTiles); across <= tiles_w; ++across) {
      const int64_t columns = ceil_div(tiles_w, across);
      int64_t rows = smaller(kMaxTiles / columns, across > 1 ? tiles_h : total_rows);
      rows = ceil_div(total_rows, ceil_div(total_rows, rows));
      const int64_t tiles = rows * columns;
      // In cycles for kLanes channels, roughly: products, then packing; a new row costs as much as
      // three vectors more of one.
      const double products = static_cast<double>(tiles + 2 * ceil_div(tiles, kGemmRows)) *
                              kPositions * output_blocks * kBlockChannels;
      const int64_t images = ceil_div(rows, tiles_h);
      const double packing = static_cast<double>(rows * kHeight + 2 * images) *
                             (ceil_div(columns * kWidth + 2, kLanes) + 3) * 10 * kLanes;
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

  int64_t num_blocks() const { return blocks_down * blocks_across; }
  int64_t v_stride(int tiles) const { return groups * tiles * kLanes + kSkew; }
  int64_t v_size() const { return kPositions * v_stride(static_cast<int>(max_tiles())); }
  int64_t m_size() const { return kPositions * max_tiles() * kBlockChannels; }
  int64_t max_tiles() const { return block_rows * block_columns; }

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

  // v: this block's V; blank: (group, kMaxTiles) of Tile::blank_outputs.
  void transform_input(const Block& block, int64_t first_group, int64_t last_group, float* v,
                       uint8_t* blank) const {
    const int64_t pixels = (block_rows * kHeight + 2) * (block_columns * kWidth + 2) + kLanes;
    float* const packed = static_cast<float*>(scratch(6, pixels * kLanes * sizeof(float)));
    const int64_t stride = v_stride(block.tiles);
    for (int64_t group = first_group; group < last_group; ++group) {
      float* to = v + group * block.tiles * kLanes;
      uint8_t* blank_to = blank + group * kMaxTiles;
      for (int s = 0; s < block.num_segments; ++s) {
        const Segment& g = block.segments[s];
        const int columns = g.columns * kWidth + 2;
        with_type(p.dtype, [&](auto t) {
          pack<decltype(t)>(p, g.image, g.y * kHeight - p.pad_h, g.x * kWidth - p.pad_w,
                            g.rows * kHeight + 2, columns, group, packed);
        });
        for (int y = 0; y < g.rows; ++y) {
          for (int x = 0; x < g.columns; ++x, to += kLanes) {
            const float* const from = packed + (y * kHeight * columns + x * kWidth) * kLanes;
            Tile::input(from, columns * kLanes, to, stride);
            if (kMarksBlank && epilogue.with_codes) {
              *blank_to++ = static_cast<uint8_t>(Tile::blank_outputs(from, columns * kLanes));
            }
          }
        }
      }
    }
  }

  // u: (position, channels, kBlockChannels), positions `stride` floats apart, from channel
  // first_group * kLanes on.
  void transform_weights(int64_t output_block, int64_t first_group, int64_t last_group, float* u,
                         int64_t stride) const {
    alignas(64) float taps[9 * kLanes * kLanes];
    for (int64_t group = first_group; group < last_group; ++group) {
      const int live = static_cast<int>(smaller(kLanes, p.in_channels - group * kLanes));
      for (int vec = 0; vec < kBlockVecs; ++vec) {
        const int64_t k0 = output_block * kBlockChannels + vec * kLanes;
        with_type(p.dtype, [&](auto t) { load_weights<decltype(t)>(p, k0, group, live, taps); });
        float* const to = u + (group - first_group) * kLanes * kBlockChannels + vec * kLanes;
        for (int c = 0; c < live; ++c) {
          Tile::weight(taps + c * 9 * kLanes, to + c * kBlockChannels, stride);
        }
      }
    }
  }

  // v starts at the first of `channels`.
  void multiply(int tiles, const float* v, const float* u, int64_t u_stride, int64_t channels,
                bool accumulate, float* m) const {
    const int chunks = static_cast<int>(ceil_div(tiles, kGemmRows));
    const int64_t stride = v_stride(tiles);
    for (int position = 0; position < kPositions; ++position) {
      for (int chunk = 0, tile = 0; chunk < chunks; ++chunk) {
        const int rows = (tiles - tile + chunks - chunk - 1) / (chunks - chunk);
        kGemm[rows - 1](v + position * stride + tile * kLanes, tiles * kLanes,
                        u + position * u_stride, m + (position * tiles + tile) * kBlockChannels,
                        channels, accumulate);
        tile += rows;
      }
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
              direct_value<T>(p, g->image, k0 + lane, y0 + i / kWidth, x0 + i % kWidth);
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

  void finish(const Block& block, int64_t output_block, const float* m,
              const uint8_t* blank) const {
    constexpr int64_t kTileFloats = (kMaxRows + kLanes) * kBlockChannels;
    float* const values = static_cast<float*>(scratch(7, 2 * kTileFloats * sizeof(float)));
    int32_t* const codes =
        epilogue.with_codes ? reinterpret_cast<int32_t*>(values + kTileFloats) : nullptr;
    const int64_t k0 = output_block * kBlockChannels;
    uint8_t is_blank[kMaxTiles] = {};
    if (kMarksBlank && epilogue.with_codes) {
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
    with_type(p.dtype,
              [&](auto t) { store_runs<decltype(t)>(p, runs, num_runs, values, codes, k0); });
  }

  void run_many_tiles() const {
    const int64_t u_stride = p.in_channels * kBlockChannels + kSkew;
    const int64_t u_block = kPositions * u_stride;
    float* const u = static_cast<float*>(scratch(0, output_blocks * u_block * sizeof(float)));
    parallel_for(output_blocks * groups, [&](int64_t index) {
      const int64_t block = index / groups, group = index % groups;
      transform_weights(block, group, group + 1,
                        u + block * u_block + group * kLanes * kBlockChannels, u_stride);
    });
    const int64_t tasks = smaller(num_blocks(), 8 * num_threads());
    parallel_for(tasks, [&](int64_t task) {
      float* const v = static_cast<float*>(scratch(4, v_size() * sizeof(float)));
      float* const m =
          static_cast<float*>(scratch(5, m_size() * sizeof(float) + groups * kMaxTiles));
      uint8_t* const blank = reinterpret_cast<uint8_t*>(m + m_size());
      for (int64_t i = num_blocks() * task / tasks; i < num_blocks() * (task + 1) / tasks; ++i) {
        Block block;
        make_block(i, &block);
        transform_input(block, 0, groups, v, blank);
        for (int64_t k = 0; k < output_blocks; ++k) {
          multiply(block.tiles, v, u + k * u_block, u_stride, p.in_channels, false, m);
          finish(block, k, m, blank);
        }
      }
    });
  }

  void run_few_tiles() const {
    float* const v = static_cast<float*>(scratch(0, num_blocks() * v_size() * sizeof(float)));
    const int64_t blank_size = groups * kMaxTiles;
    uint8_t* const blank = static_cast<uint8_t*>(scratch(1, num_blocks() * blank_size));
    parallel_for(num_blocks() * groups, [&](int64_t index) {
      Block block;
      make_block(index / groups, &block);
      const int64_t group = index % groups;
      transform_input(block, group, group + 1, v + index / groups * v_size(),
                      blank + index / groups * blank_size);
    });
    parallel_for(output_blocks, [&](int64_t output_block) {
      constexpr int64_t u_stride = kWeightChannels * kBlockChannels + kSkew;
      constexpr int64_t step = kWeightChannels / kLanes;
      float* const u = static_cast<float*>(scratch(4, kPositions * u_stride * sizeof(float)));
      float* const m = static_cast<float*>(scratch(5, num_blocks() * m_size() * sizeof(float)));
      Block block;
      for (int64_t group = 0; group < groups; group += step) {
        transform_weights(output_block, group, smaller(groups, group + step), u, u_stride);
        const int64_t c0 = group * kLanes;
        for (int64_t i = 0; i < num_blocks(); ++i) {
          make_block(i, &block);
          multiply(block.tiles, v + i * v_size() + group * block.tiles * kLanes, u, u_stride,
                   smaller(kWeightChannels, p.in_channels - c0), group > 0, m + i * m_size());
        }
      }
      for (int64_t i = 0; i < num_blocks(); ++i) {
        make_block(i, &block);
        finish(block, output_block, m + i * m_size(), blank + i * blank_size);
      }
    });
  }
};

}  // namespace

bool conv_relu_pool_winograd(const ConvReluPoolParams& p) {
  if (p.dtype == DType::kDouble || p.groups != 1 || p.kernel_h != 3 || p.kernel_w != 3 ||
      p.stride_h != 1 || p.stride_w != 1 || p.dilation_h != 1 || p.dilation_w != 1) {
    return false;
  }
  if (p.pool != Pool::kNone && (p.pool_h != 2 || p.pool_w != 2 || p.pool_stride_h != 2 ||
                                p.pool_stride_w != 2 || p.pool_pad_h != 0 || p.pool_pad_w != 0 ||
                                p.out_h * 2 > p.conv_h || p.out_w * 2 > p.conv_w)) {
    return false;
  }
  const int64_t window = p.pool == Pool::kNone ? 1 : 4;
  const int64_t direct = p.batch * p.out_h * p.out_w * window * 9 * p.in_channels * p.out_channels;
  const Forward<2, 2> small(p);
  const Forward<2, 4> medium(p);
  if (p.in_channels < 8 || smaller(small.cost(), medium.cost()) * 5 > direct * 4) return false;
  // With codes, only the smallest tile: it is exact on small integers and gives equal outputs for
  // equal pixels, so that ties and zeros fall as they do in a direct convolution. It also has half
  // the rounding error, worth a fifth of the time.
  if (p.codes != nullptr || (p.dtype == DType::kFloat && small.cost() * 4 < medium.cost() * 5)) {
    small.run();
    return true;
  }
  // What fp32 loses inside the largest tile is far below what 16-bit outputs are rounded to.
  if (p.dtype != DType::kFloat) {
    const Forward<4, 4> large(p);
    if (large.cost() < medium.cost()) {
      large.run();
      return true;
    }
  }
  medium.run();
  return true;
}

}  // namespace pyops::cpu::PYOPS_ISA
