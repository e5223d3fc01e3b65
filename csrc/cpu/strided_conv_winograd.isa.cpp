// 4x4 convolutions of stride 2 and padding 1, and transposed ones, by Winograd's method.
//
// A block of whole images goes through
//   pack    pixels of kLanes channels, zeros around them -> (row, column, lane)
//   input   V (problem, position, channel group, tile, lane)
//   gemm    M (position, tile, output channel) = V x U, one small product a position
//   finish  inverse transform, affine map, activation -> output
// for kOutBlock output channels at a time. A convolution sums over channels and input phases: one
// problem. A transposed one is a convolution for each phase of its output: four problems of a
// quarter of the size, on windows of the same input that start a pixel apart.
#include "strided_conv_winograd.h"

#include "conv_transpose_act_epilogue.h"
#include "runtime.h"
#include "strided_conv_winograd_tiles.h"

namespace pyops::cpu::PYOPS_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kGemmRows = 14;
#else
constexpr int kGemmRows = 6;
#endif
constexpr int64_t kFlush = 64;              // channels summed in registers
constexpr int64_t kBlockBytes = 768 << 10;  // of V
constexpr int64_t kSkew = 16;  // floats that keep positions out of each other's cache sets

// m (kRows, kOutBlock) = v (group, kRows of v_group / kLanes tiles, lane) x u (channel, kOutBlock).
template <int kRows>
void gemm_rows(const float* v, int64_t v_group, const float* u, float* m, int64_t groups) {
  for (int64_t first = 0; first < groups; first += kFlush / kLanes) {
    const int64_t end = least(groups, first + kFlush / kLanes);
    Vec sum[kRows][kOutVectors] = {};
    for (int64_t g = first; g < end; ++g, v += v_group) {
#pragma GCC unroll 2
      for (int lane = 0; lane < kLanes; ++lane, u += kOutBlock) {
        const Vec u0 = load(u), u1 = load(u + kLanes);
#pragma GCC unroll 14
        for (int r = 0; r < kRows; ++r) {
          const Vec x = splat(v[r * kLanes + lane]);
          sum[r][0] = fma(x, u0, sum[r][0]);
          sum[r][1] = fma(x, u1, sum[r][1]);
        }
      }
    }
#pragma GCC unroll 14
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int i = 0; i < kOutVectors; ++i) {
        float* const to = m + r * kOutBlock + i * kLanes;
        store(to, first == 0 ? sum[r][i] : load(to) + sum[r][i]);
      }
    }
  }
}

using GemmRows = void (*)(const float*, int64_t, const float*, float*, int64_t);
constexpr GemmRows kGemm[] = {
    gemm_rows<1>,  gemm_rows<2>, gemm_rows<3>, gemm_rows<4>,  gemm_rows<5>,  gemm_rows<6>,
#if defined(__AVX512F__)
    gemm_rows<7>,  gemm_rows<8>, gemm_rows<9>, gemm_rows<10>, gemm_rows<11>, gemm_rows<12>,
    gemm_rows<13>, gemm_rows<14>
#endif
};
static_assert(kGemmRows == sizeof(kGemm) / sizeof(kGemm[0]));

// What both directions need: "in" and "out" are the op's.
struct Problem {
  int64_t batch, in_channels, in_h, in_w, out_channels, out_h, out_w;
  bool channels_last;
  const float* input;
  const float* weight;
  const float *bias, *scale, *shift;
  float* output;
  Epilogue epilogue;
};

template <class F, bool kTransposed>
class Convolution {
  using Tiles = Grid<F>;
  static constexpr int kAlpha = Tiles::kAlpha, kPositions = Tiles::kPositions;
  static constexpr int kProblems = kTransposed ? 4 : 1, kWindows = 4;

  const Problem& p;
  const Tiles grid;                            // of a block's images
  const int64_t channels, groups, out_blocks;  // a problem's input channels
  bool marks_blank;
  mutable int spoilt = 0;  // set by any thread

 public:
  Convolution(const Problem& problem, int64_t images)
      : p(problem),
        grid(extent(problem.out_h), extent(problem.out_w), images),
        channels(p.in_channels * (kTransposed ? 1 : 4)),
        groups(channels / kLanes),
        out_blocks(p.out_channels / kOutBlock) {
    // The activation's gradient is told by the sign of the output. Where it sees zeros only and the
    // affine map adds nothing, the transforms' rounding must not decide that.
    const OutputActivation activation = p.epilogue.function.activation;
    marks_blank = false;
    if (activation == OutputActivation::kRelu || activation == OutputActivation::kLeakyRelu) {
      for (int64_t k = 0; k < p.out_channels; ++k) {
        marks_blank |= p.bias[k] * p.scale[k] + p.shift[k] == 0;
      }
    }
  }

  // Outputs of one problem.
  static int64_t extent(int64_t out) { return kTransposed ? (out + 1) / 2 : out; }

  // Images whose V fits the second-level cache, and blocks for every thread.
  static int64_t images_of_block(const Problem& p) {
    const Tiles one(extent(p.out_h), extent(p.out_w), 1);
    const int64_t bytes = one.down.positions() * one.across.positions() * p.in_channels * 4 * 4;
    int64_t blocks = divide_up(p.batch, most(1, kBlockBytes / bytes));
    blocks = divide_up(blocks, num_threads()) * num_threads();
    return divide_up(p.batch, least(blocks, p.batch));
  }

  bool run() const {
    float* const u = static_cast<float*>(scratch(0, out_blocks * u_block() * sizeof(float)));
    const int64_t channels_a_task = 32;
    const int64_t tasks = divide_up(p.in_channels, channels_a_task);
    parallel_for(out_blocks * tasks, [&](int64_t index) {
      const int64_t first = index % tasks * channels_a_task;
      transform_weights(index / tasks, first, least(p.in_channels, first + channels_a_task), u);
    });
    // With fewer blocks than threads several transform the same images, for their own outputs.
    const int64_t blocks = divide_up(p.batch, grid.images);
    const int64_t splits = least(out_blocks, divide_up(num_threads(), blocks));
    parallel_for(blocks * splits, [&](int64_t index) {
      const int64_t first = index / splits * grid.images, part = index % splits;
      run_block(first, least(p.batch - first, grid.images), u, out_blocks * part / splits,
                out_blocks * (part + 1) / splits);
    });
    return __atomic_load_n(&spoilt, __ATOMIC_RELAXED) == 0;
  }

 private:
  int64_t u_position() const { return channels * kOutBlock + kSkew; }
  int64_t u_block() const { return kProblems * kPositions * u_position(); }
  int64_t v_position(const Tiles& tiles) const { return groups * tiles.tiles() * kLanes + kSkew; }
  // The packed image: what the windows of all tiles cover.
  int64_t rows() const { return kTransposed ? grid.down.cover() + 2 : 2 * grid.down.cover() + 2; }
  int64_t columns() const {
    return kTransposed ? grid.across.cover() + 2 : 2 * grid.across.cover() + 2;
  }

  // u (output block, problem, position, channel, kOutBlock): input channels [first, last).
  void transform_weights(int64_t block, int64_t first, int64_t last, float* u) const {
    const int64_t out = block * kOutBlock;
    u += block * u_block();
    for (int64_t c = first; c < last; ++c) {
      for (int vec = 0; vec < kOutVectors; ++vec) {
        Vec taps[kTaps];
        const int64_t k = out + vec * kLanes;
        if (kTransposed) {
          load_taps(p.weight + (c * p.out_channels + k) * kTaps, kTaps, taps);
        } else {
          load_taps(p.weight + (k * p.in_channels + c) * kTaps, p.in_channels * kTaps, taps);
        }
#pragma GCC unroll 4
        for (int phase = 0; phase < kWindows; ++phase) {
          const int64_t at = kTransposed ? phase * kPositions * u_position() + c * kOutBlock
                                         : (phase * p.in_channels + c) * kOutBlock;
          transform_phase(taps, phase / 2, phase % 2, u + at + vec * kLanes);
        }
      }
    }
  }

  PYOPS_INLINE void transform_phase(const Vec (&taps)[kTaps], int y, int x, float* u) const {
    Vec half[kAlpha][2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      // A transposed convolution meets its taps in falling order.
      const int row = 4 * (2 * (kTransposed ? 1 - i : i) + y) + x;
      const Vec pair[2] = {taps[row + (kTransposed ? 2 : 0)], taps[row + (kTransposed ? 0 : 2)]};
      Vec out[kAlpha];
      F::weight(pair, out);
#pragma GCC unroll 5
      for (int j = 0; j < kAlpha; ++j) half[j][i] = out[j];
    }
#pragma GCC unroll 5
    for (int j = 0; j < kAlpha; ++j) {
      Vec out[kAlpha];
      F::weight(half[j], out);
#pragma GCC unroll 5
      for (int i = 0; i < kAlpha; ++i) {
        if (grid.used(i * kAlpha + j)) store(u + (i * kAlpha + j) * u_position(), out[i]);
      }
    }
  }

  // For output blocks [begin, end).
  void run_block(int64_t first, int64_t images, const float* u, int64_t begin, int64_t end) const {
    Tiles tiles = grid;
    tiles.images = images;
    const int64_t v_size = kPositions * v_position(tiles), count = tiles.tiles();
    float* const v = static_cast<float*>(scratch(4, kProblems * v_size * sizeof(float)));
    float* const m =
        static_cast<float*>(scratch(5, kPositions * count * kOutBlock * sizeof(float)));
    uint32_t* seen = nullptr;
    if (marks_blank) {
      seen = static_cast<uint32_t*>(scratch(7, kProblems * count * sizeof(uint32_t)));
      std::memset(seen, 0, kProblems * count * sizeof(uint32_t));
    }
    transform_images(tiles, first, v, seen);
    const int64_t area = p.out_h * p.out_w;
    float* pixels = nullptr;  // (image, pixel, kOutBlock), to be transposed
    if (!p.channels_last) {
      pixels =
          static_cast<float*>(scratch(6, (images * area + kLanes) * kOutBlock * sizeof(float)));
    }
    for (int64_t block = begin; block < end; ++block) {
      for (int f = 0; f < kProblems; ++f) {
        multiply(tiles, v + f * v_size, u + block * u_block() + f * kPositions * u_position(), m);
        const uint32_t* const mask = seen ? seen + f * count : nullptr;
        if (p.channels_last) {
          float* const to = p.output + first * area * p.out_channels + block * kOutBlock;
          finish(tiles, f, block, m, mask, to, p.out_channels);
        } else {
          finish(tiles, f, block, m, mask, pixels, kOutBlock);
        }
      }
      if (pixels != nullptr) write_planes(pixels, first, images, block);
    }
  }

  void transform_images(const Tiles& tiles, int64_t first, float* v, uint32_t* seen) const {
    const int64_t stride = v_position(tiles), count = tiles.tiles(), width = columns();
    float* const packed = static_cast<float*>(scratch(6, rows() * width * kLanes * sizeof(float)));
    const int64_t step = kTransposed ? 1 : 2;  // pixels from one of a window to the next
    const int64_t row = step * width * kLanes, column = step * kLanes;
    for (int64_t image = 0; image < tiles.images; ++image) {
      const Image from{p.input + (first + image) * p.in_channels * p.in_h * p.in_w, p.in_channels,
                       p.in_h, p.in_w, p.channels_last};
      for (int64_t c = 0; c < p.in_channels; c += kLanes) {
        pack(from, c, 1, rows(), width, packed);
        for (int window = 0; window < kWindows; ++window) {
          const int64_t y0 = kTransposed ? 1 - window / 2 : window / 2;
          const int64_t x0 = kTransposed ? 1 - window % 2 : window % 2;
          const int64_t group = c / kLanes;
          float* const to = kTransposed
                                ? v + window * kPositions * stride + group * count * kLanes
                                : v + (window * p.in_channels / kLanes + group) * count * kLanes;
          const float* const at = packed + (y0 * width + x0) * kLanes;
          tiles.each_tile(image, [&](int64_t y, int64_t x, int64_t tile, auto height, auto across) {
            constexpr int h = decltype(height)::value, w = decltype(across)::value;
            const float* const d = at + y * row + x * column;
            transform_input<F, h, w>(d, row, column, to + tile * kLanes, stride);
            if (seen == nullptr) return;
            seen[(kTransposed ? window * count : 0) + tile] |= seen_pixels<h, w>(d, row, column);
          });
        }
      }
    }
  }

  void multiply(const Tiles& tiles, const float* v, const float* u, float* m) const {
    const int64_t count = tiles.tiles();
    for (int position = 0; position < kPositions; ++position) {
      int64_t tile, end;
      tiles.range(position, &tile, &end);
      for (int64_t chunks = divide_up(end - tile, kGemmRows); chunks > 0; --chunks) {
        const int64_t rows = divide_up(end - tile, chunks);
        kGemm[rows - 1](v + position * v_position(tiles) + tile * kLanes, count * kLanes,
                        u + position * u_position(), m + (position * count + tile) * kOutBlock,
                        groups);
        tile += rows;
      }
    }
  }

  // to (image, pixel, channel of the block), pixels `pitch` floats apart.
  void finish(const Tiles& tiles, int problem, int64_t block, const float* m, const uint32_t* seen,
              float* to, int64_t pitch) const {
    const int64_t count = tiles.tiles(), step = kTransposed ? 2 : 1;
    const int64_t y_first = kTransposed ? 1 - problem / 2 : 0;
    const int64_t x_first = kTransposed ? 1 - problem % 2 : 0;
    VecInt bad{};
    for (int vec = 0; vec < kOutVectors; ++vec) {
      const int64_t k = block * kOutBlock + vec * kLanes;
      const Affine affine{load(p.bias + k), load(p.scale + k), load(p.shift + k)};
      for (int64_t image = 0; image < tiles.images; ++image) {
        float* const base = to + image * p.out_h * p.out_w * pitch + vec * kLanes;
        tiles.each_tile(image, [&](int64_t y0, int64_t x0, int64_t tile, auto height, auto across) {
          constexpr int h = decltype(height)::value, w = decltype(across)::value;
          Vec out[h][w];
          transform_output<F, h, w>(m + tile * kOutBlock + vec * kLanes, count * kOutBlock, out);
          Vec sum{};
#pragma GCC unroll 4
          for (int i = 0; i < h; ++i) {
            const int64_t y = (y0 + i) * step + y_first;
            if (y >= p.out_h) break;
#pragma GCC unroll 4
            for (int j = 0; j < w; ++j) {
              const int64_t x = (x0 + j) * step + x_first;
              if (x >= p.out_w) break;
              Vec value = out[i][j];
              sum += value;
              constexpr uint32_t kWindow = 3 | 3 << (w + 1);
              if (seen && !(seen[tile] >> (i * (w + 1) + j) & kWindow)) value = Vec{};
              store(base + (y * p.out_w + x) * pitch, p.epilogue(value, affine));
            }
          }
          bad |= sum - sum != Vec{};
        });
      }
    }
    if (any(bad)) __atomic_store_n(&spoilt, 1, __ATOMIC_RELAXED);
  }

  void write_planes(const float* pixels, int64_t first, int64_t images, int64_t block) const {
    const int64_t area = p.out_h * p.out_w;
    for (int64_t image = 0; image < images; ++image) {
      for (int vec = 0; vec < kOutVectors; ++vec) {
        const int64_t k = block * kOutBlock + vec * kLanes;
        float* const to = p.output + ((first + image) * p.out_channels + k) * area;
        for (int64_t i = 0; i < area; i += kLanes) {
          const int here = static_cast<int>(least(kLanes, area - i));
          const float* const from = pixels + (image * area + i) * kOutBlock + vec * kLanes;
          Vec tile[kLanes];
#pragma GCC unroll 16
          for (int j = 0; j < kLanes; ++j) tile[j] = load(from + j * kOutBlock);
          transpose(tile);
#pragma GCC unroll 16
          for (int j = 0; j < kLanes; ++j) store_first(to + j * area + i, tile[j], here);
        }
      }
    }
  }
};

template <class F, bool kTransposed>
bool run(const Problem& p) {
  using Kernel = Convolution<F, kTransposed>;
  return Kernel(p, Kernel::images_of_block(p)).run();
}

}  // namespace

bool strided_conv_winograd(const StridedConvParams& c) {
  ConvTransposeParams e{};
  e.activation = c.activation, e.negative_slope = c.negative_slope;
  const Problem p{c.batch, c.in_channels, c.in_h,          c.in_w,   c.out_channels,
                  c.out_h, c.out_w,       c.channels_last, c.input,  c.weight,
                  c.bias,  c.scale,       c.shift,         c.output, Epilogue(e)};
  return run<Filter<3>, false>(p);
}

bool conv_transpose_winograd(const ConvTransposeParams& c) {
  if (!suits_strided_winograd(c, c.in_channels, c.out_channels)) return false;
  const Problem p{c.batch,
                  c.in_channels,
                  c.in_h,
                  c.in_w,
                  c.out_channels,
                  c.out_h,
                  c.out_w,
                  c.channels_last,
                  static_cast<const float*>(c.input),
                  static_cast<const float*>(c.weight),
                  c.bias,
                  c.scale,
                  c.shift,
                  static_cast<float*>(c.output),
                  Epilogue(c)};
  return run<Filter<3>, true>(p);
}

}  // namespace pyops::cpu::PYOPS_ISA
