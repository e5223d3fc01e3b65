// 3x3 and 5x5 convolution by Winograd's method with activation and pooling fused: a Winograd tile
// is a set of whole pooling windows, so that the convolution's own output never reaches memory.
//
// A block of tiles (kBlockTiles of them) goes through
//   pack    pixels of kLanes channels around the block -> (row, column, lane), borders zero
//   input   V (position, channel group, tile, lane)
//   gemm    M (position, tile, output channel) = V x U, one small product a position
//   finish  inverse transform, bias, activation, pooling -> output
// for kBlockChannels output channels at a time, so that V and M stay in L2 and one position of
// U (output block, position, input channel, kBlockChannels) in L1. Weights are transformed anew
// in each call: it costs a few percent, and no cache can go stale.
#include "conv_relu_pool_winograd_blocks.h"

namespace pyops::cpu::PYOPS_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kGemmRows = 7;  // tiles a register block: two levels of 7 x 2 sums
#else
constexpr int kGemmRows = 6;
#endif
constexpr int kBlockTiles = 28;
constexpr int kFlush = 16;
// Few tiles: transform the input first, then every block of output channels transforms its own
// weights, this many channels at a time, and uses them at once.
constexpr int64_t kFewTiles = 128;
constexpr int kWeightChannels = 128;

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

template <class Down, class Across>
class Forward : public WinogradBlocks<Down, Across> {
  using Base = WinogradBlocks<Down, Across>;
  using Base::block_columns, Base::block_rows, Base::tiles_h, Base::tiles_w;
  using Base::finish, Base::m_size, Base::make_block, Base::max_tiles, Base::num_blocks;
  using Base::kHeight, Base::kWidth, Base::kTaps, Base::kPositions, Base::p, Base::epilogue,
      Base::groups, Base::output_blocks;
  using typename Base::Block, typename Base::Segment, typename Base::Tile;
  // Codes tell whether an output is above zero. Where it sees zeros only and the bias is zero, the
  // transforms' rounding must not decide that.
  static constexpr bool kMarksBlank = kHeight * kWidth <= 8;
  // Keeps the positions of one tile out of one another's cache sets.
  static constexpr int64_t kSkew = kLanes;

 public:
  explicit Forward(const ConvReluPoolParams& params) : Base(params, kBlockTiles, kGemmRows) {}

  void run() const {
    if (p.batch * tiles_h * tiles_w <= kFewTiles && output_blocks >= 4) {
      run_few_tiles();
    } else {
      run_many_tiles();
    }
  }

 private:
  bool marks_blank() const { return kMarksBlank && epilogue.with_codes; }
  int64_t v_stride(int tiles) const { return groups * tiles * kLanes + kSkew; }
  int64_t v_size() const { return kPositions * v_stride(static_cast<int>(max_tiles())); }

  // v: this block's V; blank: (group, kMaxTiles) of Tile::blank_outputs.
  void transform_input(const Block& block, int64_t first_group, int64_t last_group, float* v,
                       uint8_t* blank) const {
    const int64_t pixels =
        (block_rows * kHeight + kTaps - 1) * (block_columns * kWidth + kTaps - 1) + kLanes;
    float* const packed = static_cast<float*>(scratch(6, pixels * kLanes * sizeof(float)));
    const int64_t stride = v_stride(block.tiles);
    for (int64_t group = first_group; group < last_group; ++group) {
      float* to = v + group * block.tiles * kLanes;
      uint8_t* blank_to = blank + group * kMaxTiles;
      for (int s = 0; s < block.num_segments; ++s) {
        const Segment& g = block.segments[s];
        const int columns = g.columns * kWidth + kTaps - 1;
        with_type(p.dtype, [&](auto t) {
          pack<decltype(t)>(p, g.image, g.y * kHeight - p.pad_h, g.x * kWidth - p.pad_w,
                            g.rows * kHeight + kTaps - 1, columns, group, packed);
        });
        for (int y = 0; y < g.rows; ++y) {
          for (int x = 0; x < g.columns; ++x, to += kLanes) {
            const float* const from = packed + (y * kHeight * columns + x * kWidth) * kLanes;
            Tile::input(from, columns * kLanes, to, stride);
            if (marks_blank()) {
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
    alignas(64) float taps[kTaps * kTaps * kLanes * kLanes];
    for (int64_t group = first_group; group < last_group; ++group) {
      const int live = static_cast<int>(smaller(kLanes, p.in_channels - group * kLanes));
      for (int vec = 0; vec < kBlockVecs; ++vec) {
        const int64_t k0 = output_block * kBlockChannels + vec * kLanes;
        with_type(p.dtype,
                  [&](auto t) { load_weights<kTaps, decltype(t)>(p, k0, group, live, taps); });
        float* const to = u + (group - first_group) * kLanes * kBlockChannels + vec * kLanes;
        for (int c = 0; c < live; ++c) {
          Tile::weight(taps + c * kTaps * kTaps * kLanes, to + c * kBlockChannels, stride);
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
          finish(block, k, m, marks_blank() ? blank : nullptr);
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
        finish(block, output_block, m + i * m_size(),
               marks_blank() ? blank + i * blank_size : nullptr);
      }
    });
  }
};

// Multiply-adds of a direct convolution.
int64_t direct_cost(const ConvReluPoolParams& p) {
  const int64_t window = p.pool == Pool::kNone ? 1 : 4;
  return p.batch * p.out_h * p.out_w * window * p.kernel_h * p.kernel_w * p.in_channels *
         p.out_channels;
}

// Runs the tile that is given, if it saves a fifth of a direct convolution's products.
template <class Tiles>
bool run_if_cheap(const ConvReluPoolParams& p, const Tiles& tiles) {
  if (tiles.cost() * 5 > direct_cost(p) * 4) return false;
  tiles.run();
  return true;
}

}  // namespace

bool conv_relu_pool_winograd(const ConvReluPoolParams& p) {
  if (p.dtype == DType::kDouble || p.in_channels < 8) return false;
  // With codes, only tiles that are exact on small integers and give equal outputs for equal
  // pixels, so that ties and zeros fall as they do in a direct convolution.
  if (suits_winograd(p, 5)) {
    if (p.dtype == DType::kBFloat16) return false;  // direct, by bfloat16 dot products, is faster
    if (p.codes != nullptr) return run_if_cheap(p, Forward<F25Exact, F25Exact>(p));
    return run_if_cheap(p, Forward<F25Exact, F25>(p));  // F25 both ways exceeds the error budget
  }
  if (!suits_winograd(p, 3)) return false;
  const Forward<F23, F23> small(p);
  const Forward<F23, F43> medium(p);
  // The smallest tile has half the rounding error, worth a fifth of the time.
  if (p.codes != nullptr || (p.dtype == DType::kFloat && small.cost() * 4 < medium.cost() * 5)) {
    return run_if_cheap(p, small);
  }
  // What fp32 loses inside the largest tile is far below what 16-bit outputs are rounded to.
  if (p.dtype != DType::kFloat) {
    const Forward<F43, F43> large(p);
    if (large.cost() < medium.cost()) return run_if_cheap(p, large);
  }
  return run_if_cheap(p, medium);
}

}  // namespace pyops::cpu::PYOPS_ISA
