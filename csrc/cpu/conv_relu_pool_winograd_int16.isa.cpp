// Winograd's method F(4x4, 3x3) for bfloat16 with products of 16-bit integers, which run at twice
// the speed of float32 and are exact: only rounding the transformed operands loses accuracy, and 15
// bits lose far less than bfloat16's own 8 in the output.
//
// Each sum of products is over kSumChannels input channels. Its operands are scaled so that the
// Euclidean norm of V's is below 2^15 and that of U's below 2^16; by Cauchy and Schwarz no sum
// leaves 32 bits. V has a scale for each tile and position, U one for each output channel. Both
// scales go to float32 with the sum. Input channels are first balanced by powers of two, taken
// from V and given to U: a loud channel with small weights would else drown the others.
//
// Organisation as in conv_relu_pool_winograd.isa.cpp, words of two channels in place of floats.
#include "conv_relu_pool_winograd_blocks.h"

namespace pyops::cpu::PYOPS_ISA {

#if defined(__AVX512VNNI__) && defined(__AVX512BF16__)
namespace {

constexpr int kGemmRows = 14;  // tiles a register block: 14 x 2 sums
constexpr int64_t kBlockTiles = 28;
constexpr int64_t kFewTiles = 128;  // up to here each block of output channels follows its weights
constexpr int kSumChannels = 128;
constexpr int kSumGroups = kSumChannels / kLanes;
constexpr int kWordLanes = kLanes / 2;  // words of two channels in a channel group
constexpr int kPositions = 36;
constexpr int kScales = 48;        // kPositions in whole vectors
constexpr int64_t kSkew = kLanes;  // words between positions, so that they differ in cache sets

// Norms of the rounded operands, which are up to half of the square root of kSumChannels longer.
constexpr float kInputNorm = 32700, kWeightNorm = 65400, kMostWeight = 32700;
// Adding it rounds to an integer, which is then in the low bits.
constexpr float kRound = 12582912;  // 1.5 * 2^23

// Each position of U is divided by its transform's norm in both directions, so that no channel's
// transformed weights are longer than the weights. V's scale makes up for it.
struct PositionNorms {
  alignas(64) float norm[kScales], inverse[kScales];
};
constexpr double constant_root(double x) {
  double root = x < 1 ? 1 : x;
  for (int i = 0; i < 60; ++i) root = 0.5 * (root + x / root);
  return root;
}
constexpr PositionNorms make_position_norms() {
  using T = F43;
  constexpr double aa = T::aa, bb = T::bb;
  constexpr double na = 1 / (2 * aa * (bb - aa)), nb = 1 / (2 * bb * (bb - aa));
  const double a = na * constant_root(1 + aa + aa * aa), b = nb * constant_root(1 + bb + bb * bb);
  const double row[6] = {1 / (aa * bb), a, a, b, b, 1};
  PositionNorms norms{};
  for (int i = 0; i < kPositions; ++i) {
    norms.norm[i] = static_cast<float>(row[i / 6] * row[i % 6]);
    norms.inverse[i] = static_cast<float>(1 / (row[i / 6] * row[i % 6]));
  }
  return norms;
}
constexpr PositionNorms kPositionNorms = make_position_norms();

alignas(64) constexpr int16_t kLowHalves[32] = {0,  2,  4,  6,  8,  10, 12, 14, 16, 18, 20,
                                                22, 24, 26, 28, 30, 32, 34, 36, 38, 40, 42,
                                                44, 46, 48, 50, 52, 54, 56, 58, 60, 62};

PYOPS_INLINE __m512i bits_of(Vec x) { return reinterpret_cast<__m512i>(x); }

PYOPS_INLINE Vec to_floats(__m512i x) {
  return __builtin_convertvector(reinterpret_cast<VecInt>(x), Vec);
}
PYOPS_INLINE Vec square_root(Vec x) { return _mm512_maskz_sqrt_ps(0xffff, x); }

// Whether a sum of squares is finite and its terms have not vanished.
PYOPS_INLINE VecInt is_usual(Vec squares) {
  return (squares > splat(1e-36f)) & (squares < splat(1e38f));
}

// For sums of squares that are not usual: zero in lanes that are zero in all of `count` vectors;
// elsewhere NaN, for which the outputs will be recomputed.
__attribute__((noinline, cold)) Vec nan_unless_zero(const float* x, int64_t count) {
  VecInt zero = VecInt{} - 1;
  for (int64_t i = 0; i < count; ++i) zero &= load(x + i * kLanes) == Vec{};
  return zero ? Vec{} : splat(__builtin_nanf(""));
}

// Sums of the lanes of 16 vectors, one a lane.
PYOPS_INLINE Vec sum_lanes(Vec (&rows)[kLanes]) {
#pragma GCC unroll 4
  for (int level = 3; level >= 0; --level) {
    const __m512i low = _mm512_load_si512(kTransposeLanes.low[level]);
    const __m512i high = _mm512_load_si512(kTransposeLanes.high[level]);
#pragma GCC unroll 1
    for (int i = 0; i < 1 << level; ++i) {
      const Vec a = rows[i], b = rows[i + (1 << level)];
      rows[i] = Vec(_mm512_permutex2var_ps(a, low, b)) + Vec(_mm512_permutex2var_ps(a, high, b));
    }
  }
  return rows[0];
}

// Pixels as words of two columns, (channel group, row, column pair, lane): rows x 2 * pairs pixels
// of `groups` channel groups from first_group, input row y0 and column x0 on. Channel groups lie
// `group_size` floats apart. Writes up to kLanes - 1 words beyond the end of each.
void pack(const ConvReluPoolParams& p, int64_t n, int64_t y0, int64_t x0, int rows, int pairs,
          int64_t first_group, int groups, float* out, int64_t group_size) {
  const uint16_t* const input = static_cast<const uint16_t*>(p.input);
  const int64_t c0 = first_group * kLanes, plane = p.in_h * p.in_w;
  const int64_t first = larger(0, -x0), last = smaller(2 * pairs, p.in_w - x0);
  for (int r = 0; r < rows; ++r, out += pairs * kLanes) {
    const int64_t y = y0 + r;
    if (y < 0 || y >= p.in_h) {
      for (int g = 0; g < groups; ++g) {
        for (int x = 0; x < pairs; ++x) store(out + g * group_size + x * kLanes, Vec{});
      }
      continue;
    }
    if (p.channels_last) {
      const uint16_t* from = input + (((n * p.in_h + y) * p.in_w + x0) * p.in_channels + c0);
      const __mmask16 tail = first_lanes(
          static_cast<int>(p.in_channels - c0 - (groups - 1) * static_cast<int64_t>(kLanes)));
      for (int x = 0; x < pairs; ++x, from += 2 * p.in_channels) {
        const bool even_lies = 2 * x >= first && 2 * x < last;
        const bool odd_lies = 2 * x + 1 >= first && 2 * x + 1 < last;
        for (int g = 0; g < groups; ++g) {
          const __mmask16 mask = g == groups - 1 ? tail : __mmask16(0xffff);
          const uint16_t* const at = from + g * kLanes;
          const __m256i even = _mm256_maskz_loadu_epi16(even_lies ? mask : __mmask16(0), at);
          const __m256i odd =
              _mm256_maskz_loadu_epi16(odd_lies ? mask : __mmask16(0), at + p.in_channels);
          const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16);
          _mm512_store_si512(out + g * group_size + x * kLanes,
                             _mm512_or_si512(_mm512_cvtepu16_epi32(even), high));
        }
      }
      continue;
    }
    for (int g = 0; g < groups; ++g) {
      const int64_t c = c0 + g * kLanes;
      const int live = static_cast<int>(smaller(kLanes, p.in_channels - c));
      const uint16_t* const row = input + (((n * p.in_channels + c) * p.in_h + y) * p.in_w + x0);
      for (int x = 0; x < pairs; x += kLanes) {
        const int64_t from = 2 * x, begin = larger(0, first - from), end = last - from;
        const uint32_t below_end = end >= 32 ? ~0u : end <= 0 ? 0u : (1u << end) - 1;
        const __mmask32 mask = begin >= 32 ? 0u : below_end >> begin << begin;
        Vec block[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          block[i] =
              i < live
                  ? reinterpret_cast<Vec>(_mm512_maskz_loadu_epi16(mask, row + (i * plane + from)))
                  : Vec{};
        }
        transpose(block);
        float* const to = out + g * group_size + x * kLanes;
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(to + i * kLanes, block[i]);
      }
    }
  }
}

// One tile of one channel group. words: its first pixel, rows `pitch` floats apart; v: positions
// kSumGroups vectors apart.
PYOPS_INLINE void transform_tile(const float* words, int64_t pitch, Vec balance, float* v) {
  Vec half[6][6];
#pragma GCC unroll 6
  for (int i = 0; i < 6; ++i) {
    Vec row[6], out[6];
#pragma GCC unroll 3
    for (int j = 0; j < 3; ++j) {
      const __m512i word = _mm512_load_si512(words + i * pitch + j * kLanes);
      const __m512i odd = _mm512_and_si512(word, _mm512_set1_epi32(0xffff0000));
      row[2 * j] = reinterpret_cast<Vec>(_mm512_slli_epi32(word, 16)) * balance;
      row[2 * j + 1] = reinterpret_cast<Vec>(odd) * balance;
    }
    F43::input(row, out);
#pragma GCC unroll 6
    for (int j = 0; j < 6; ++j) half[j][i] = out[j];
  }
#pragma GCC unroll 6
  for (int j = 0; j < 6; ++j) {
    Vec out[6];
    F43::input(half[j], out);
#pragma GCC unroll 6
    for (int i = 0; i < 6; ++i) store(v + (i * 6 + j) * kSumChannels, out[i]);
  }
}

// Factors from V to integers and back, for each position. v: (position, kSumGroups, lane).
PYOPS_INLINE void choose_scales(const float* v, int groups, float* forth, float* back) {
  for (int first = 0; first < kPositions; first += kLanes) {
    Vec rows[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      rows[i] = Vec{};
      if (first + i >= kPositions) continue;
      const float* const from = v + (first + i) * kSumChannels;
      for (int g = 0; g < groups; ++g) {
        const Vec x = load(from + g * kLanes);
        rows[i] = fma(x, x, rows[i]);
      }
    }
    const Vec squares = sum_lanes(rows), norm = square_root(squares);
    store(forth + first, kInputNorm / norm);
    store(back + first, norm * (1 / kInputNorm) * load(kPositionNorms.norm + first));
    const VecInt usual = is_usual(squares);
    if (!any(~usual)) continue;
    for (int i = first; i < smaller(kPositions, first + kLanes); ++i) {
      if (usual[i - first]) continue;
      const Vec values = nan_unless_zero(v + i * kSumChannels, groups);
      forth[i] = 0;
      back[i] = any(values != Vec{}) ? __builtin_nanf("") : 0;
    }
  }
}

// values (group, lane) times scale to words (group, word), groups `step` words apart.
PYOPS_INLINE void round_position(const float* values, Vec scale, int groups, int32_t* to,
                                 int64_t step) {
  const auto rounded = [&](int g) {
    return bits_of(fma(load(values + g * kLanes), scale, splat(kRound)));
  };
  int g = 0;
  for (; g + 2 <= groups; g += 2, to += 2 * step) {
    const __m512i low_halves = _mm512_load_si512(kLowHalves);
    const __m512i both = _mm512_permutex2var_epi16(rounded(g), low_halves, rounded(g + 1));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(both));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + step), _mm512_extracti64x4_epi64(both, 1));
  }
  if (g < groups) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(rounded(g)));
  }
}

// m (kRows, kBlockChannels) = or += the sums over `groups` channel groups, scaled. v: (group,
// kRows of v_group / kWordLanes tiles, word), u: (word, kBlockChannels).
template <int kRows>
void gemm_rows(const int32_t* v, int64_t v_group, const int32_t* u, int64_t groups,
               const float* tile_scale, const float* channel_scale, bool accumulate, float* m) {
  __m512i sum[kRows][kBlockVecs] = {};
  for (int64_t group = 0; group < groups; ++group, v += v_group) {
#pragma GCC unroll 1
    for (int word = 0; word < kWordLanes; ++word, u += kBlockChannels) {
      const __m512i u0 = _mm512_load_si512(u), u1 = _mm512_load_si512(u + kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const __m512i x = _mm512_set1_epi32(v[r * kWordLanes + word]);
        asm("vpdpwssd %2, %1, %0" : "+v"(sum[r][0]) : "v"(x), "v"(u0));
        asm("vpdpwssd %2, %1, %0" : "+v"(sum[r][1]) : "v"(x), "v"(u1));
      }
    }
  }
  const __mmask16 before = accumulate ? 0xffff : 0;
  const Vec scale0 = load(channel_scale), scale1 = load(channel_scale + kLanes);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r, m += kBlockChannels) {
    const Vec tile = splat(tile_scale[r]);
    store(m, fma(to_floats(sum[r][0]), tile * scale0, masked_load(m, before)));
    store(m + kLanes, fma(to_floats(sum[r][1]), tile * scale1, masked_load(m + kLanes, before)));
  }
}

using GemmRows = void (*)(const int32_t*, int64_t, const int32_t*, int64_t, const float*,
                          const float*, bool, float*);
constexpr GemmRows kGemm[kGemmRows] = {gemm_rows<1>,  gemm_rows<2>,  gemm_rows<3>,  gemm_rows<4>,
                                       gemm_rows<5>,  gemm_rows<6>,  gemm_rows<7>,  gemm_rows<8>,
                                       gemm_rows<9>,  gemm_rows<10>, gemm_rows<11>, gemm_rows<12>,
                                       gemm_rows<13>, gemm_rows<14>};

class Forward : public WinogradBlocks<F43, F43> {
 public:
  explicit Forward(const ConvReluPoolParams& params)
      : WinogradBlocks(params, kBlockTiles, kGemmRows) {
    sums = ceil_div(groups, kSumGroups);
  }

  void run() const {
    float* const balance = static_cast<float*>(scratch(0, 2 * groups * kLanes * sizeof(float)));
    balance_channels(balance, balance + groups * kLanes);
    if (p.batch * tiles_h * tiles_w <= kFewTiles && output_blocks >= 4) {
      run_few_tiles(balance);
    } else {
      run_many_tiles(balance);
    }
  }

 private:
  int64_t sums;  // of up to kSumChannels channels each

  // V of a block (position, group, tile, word), then its scales (sum, position, tile).
  int64_t v_stride(int64_t tiles) const { return groups * tiles * kWordLanes + kSkew; }
  int64_t v_words() const { return kPositions * v_stride(max_tiles()); }
  int64_t v_size() const { return v_words() + sums * kPositions * max_tiles(); }
  // U of an output block (sum, position, word, kBlockChannels), then its scales (sum,
  // kBlockChannels). The last sum may have fewer words.
  int64_t u_stride(int64_t sum) const {
    return groups_of(sum) * kWordLanes * kBlockChannels + kSkew;
  }
  int64_t u_sum() const { return kPositions * u_stride(0); }
  int64_t u_size() const { return sums * (u_sum() + kBlockChannels); }
  int groups_of(int64_t sum) const {
    return static_cast<int>(smaller(kSumGroups, groups - sum * kSumGroups));
  }

  // Powers of two near each input channel's largest weight, and their inverses.
  void balance_channels(float* balance, float* inverse) const {
    constexpr int64_t kRows = 64;  // output channels in a task
    const int64_t columns = p.in_channels * 9, padded = ceil_div(columns, 32) * 32;
    const int64_t tasks = ceil_div(p.out_channels, kRows);
    // The largest of each column of weights, as bits without the sign.
    uint16_t* const most = static_cast<uint16_t*>(scratch(1, tasks * padded * sizeof(uint16_t)));
    parallel_for(tasks, [&](int64_t task) {
      uint16_t* const to = most + task * padded;
      std::memset(to, 0, padded * sizeof(uint16_t));
      const int64_t end = smaller(p.out_channels, (task + 1) * kRows);
      for (int64_t k = task * kRows; k < end; ++k) {
        const uint16_t* const from = static_cast<const uint16_t*>(p.weight) + k * columns;
        for (int64_t i = 0; i < columns; i += 32) {
          const __mmask32 mask = columns - i >= 32 ? ~0u : (1u << (columns - i)) - 1;
          const __m512i bits = _mm512_slli_epi16(_mm512_maskz_loadu_epi16(mask, from + i), 1);
          _mm512_storeu_si512(to + i, _mm512_max_epu16(bits, _mm512_loadu_si512(to + i)));
        }
      }
    });
    for (int64_t c = 0; c < groups * kLanes; ++c) {
      int largest = 0;
      for (int64_t i = 0; i < 9 * tasks && c < p.in_channels; ++i) {
        const int64_t tap = i % 9;
        const int64_t at = p.weight_channels_last ? tap * p.in_channels + c : c * 9 + tap;
        const int bits = most[i / 9 * padded + at];
        largest = bits > largest ? bits : largest;
      }
      int exponent = largest >> 8;
      exponent = exponent < 1 ? 1 : exponent > 253 ? 253 : exponent;
      balance[c] = to_float(BFloat16{static_cast<uint16_t>(exponent << 7)});
      inverse[c] = to_float(BFloat16{static_cast<uint16_t>((254 - exponent) << 7)});
    }
  }

  void transform_input(const Block& block, int64_t sum, const float* balance, int32_t* v) const {
    const int first_group = static_cast<int>(sum * kSumGroups), live = groups_of(sum);
    const int64_t pixels = (block_rows * 4 + 2) * (block_columns * 2 + 1) + kLanes;
    float* const packed = static_cast<float*>(
        scratch(6, (live * pixels + kPositions * kSumGroups) * kLanes * sizeof(float)));
    float* const values = packed + live * pixels * kLanes;
    const int64_t stride = v_stride(block.tiles);
    float* const scales = reinterpret_cast<float*>(v + v_words()) + sum * kPositions * max_tiles();
    int tile = 0;
    for (int s = 0; s < block.num_segments; ++s) {
      const Segment& segment = block.segments[s];
      const int pairs = segment.columns * 2 + 1;
      pack(p, segment.image, segment.y * 4 - p.pad_h, segment.x * 4 - p.pad_w, segment.rows * 4 + 2,
           pairs, first_group, live, packed, pixels * kLanes);
      for (int i = 0; i < segment.rows * segment.columns; ++i, ++tile) {
        const int y = i / segment.columns, x = i % segment.columns;
        const float* const from = packed + (y * 4 * pairs + x * 2) * kLanes;
        for (int g = 0; g < live; ++g) {
          transform_tile(from + g * pixels * kLanes, pairs * kLanes,
                         load(balance + (first_group + g) * kLanes), values + g * kLanes);
        }
        alignas(64) float forth[kScales], back[kScales];
        choose_scales(values, live, forth, back);
        int32_t* const to = v + (first_group * block.tiles + tile) * kWordLanes;
        for (int position = 0; position < kPositions; ++position) {
          round_position(values + position * kSumChannels, splat(forth[position]), live,
                         to + position * stride, block.tiles * kWordLanes);
          scales[position * block.tiles + tile] = back[position];
        }
      }
    }
  }

  // u: (position, word, kBlockChannels), positions u_stride(sum) apart; scales: (kBlockChannels).
  void transform_weights(int64_t output_block, int64_t sum, const float* inverse, int32_t* u,
                         float* scales) const {
    const int live_groups = groups_of(sum);
    const int64_t stride = u_stride(sum);
    float* const taps = static_cast<float*>(scratch(6, kSumChannels * 9 * kLanes * sizeof(float)));
    for (int vec = 0; vec < kBlockVecs; ++vec) {
      const int64_t k0 = output_block * kBlockChannels + vec * kLanes;
      Vec squares{}, most{};
      for (int g = 0; g < live_groups; ++g) {
        const int64_t group = sum * kSumGroups + g;
        const int live = static_cast<int>(smaller(kLanes, p.in_channels - group * kLanes));
        float* to = taps + g * 9 * kLanes * kLanes;
        load_weights<3, BFloat16>(p, k0, group, live, to);
        for (int c = 0; c < kLanes; ++c, to += 9 * kLanes) {
          const Vec factor = splat(c < live ? inverse[group * kLanes + c] : 0.0f);
          Vec channel{};
#pragma GCC unroll 9
          for (int tap = 0; tap < 9; ++tap) {
            const Vec w = c < live ? load(to + tap * kLanes) * factor : Vec{};
            store(to + tap * kLanes, w);
            channel = fma(w, w, channel);
          }
          squares += channel;
          most = max_finite(channel, most);
        }
      }
      // The norm last: if it is NaN, that is the larger.
      Vec scale = max_finite(square_root(most) * (1 / kMostWeight),
                             square_root(squares) * (1 / kWeightNorm));
      const VecInt usual = is_usual(squares);
      const Vec factor = usual ? 1 / scale : Vec{};
      if (any(~usual)) {
        scale = usual ? scale : nan_unless_zero(taps, live_groups * kLanes * 9);
      }
      store(scales + vec * kLanes, scale);
      for (int word = 0; word < live_groups * kWordLanes; ++word) {
        alignas(64) float values[2][kPositions * kLanes];
        for (int half = 0; half < 2; ++half) {
          const float* const from = taps + (2 * word + half) * 9 * kLanes;
          alignas(64) float scaled[9 * kLanes];
#pragma GCC unroll 9
          for (int tap = 0; tap < 9; ++tap) {
            store(scaled + tap * kLanes, load(from + tap * kLanes) * factor);
          }
          Tile::weight(scaled, values[half], kLanes);
        }
        int32_t* const to = u + word * kBlockChannels + vec * kLanes;
#pragma GCC unroll 4
        for (int position = 0; position < kPositions; ++position) {
          const Vec norm = splat(kPositionNorms.inverse[position]);
          const Vec even = fma(load(values[0] + position * kLanes), norm, splat(kRound));
          const Vec odd = fma(load(values[1] + position * kLanes), norm, splat(kRound));
          const __m512i low = _mm512_and_si512(bits_of(even), _mm512_set1_epi32(0xffff));
          _mm512_storeu_si512(to + position * stride,
                              _mm512_or_si512(low, _mm512_slli_epi32(bits_of(odd), 16)));
        }
      }
    }
  }

  void multiply(int64_t tiles, const int32_t* v, int64_t sum, const int32_t* u,
                const float* channel_scales, float* m) const {
    const int chunks = static_cast<int>(ceil_div(tiles, kGemmRows));
    const float* const tile_scales =
        reinterpret_cast<const float*>(v + v_words()) + sum * kPositions * max_tiles();
    for (int position = 0; position < kPositions; ++position) {
      const int32_t* const from =
          v + position * v_stride(tiles) + sum * kSumGroups * tiles * kWordLanes;
      for (int chunk = 0, tile = 0; chunk < chunks; ++chunk) {
        const int rows = static_cast<int>((tiles - tile + chunks - chunk - 1) / (chunks - chunk));
        kGemm[rows - 1](from + tile * kWordLanes, tiles * kWordLanes, u + position * u_stride(sum),
                        groups_of(sum), tile_scales + position * tiles + tile, channel_scales,
                        sum > 0, m + (position * tiles + tile) * kBlockChannels);
        tile += rows;
      }
    }
  }

  void run_many_tiles(const float* balance) const {
    int32_t* const u =
        static_cast<int32_t*>(scratch(2, output_blocks * u_size() * sizeof(int32_t)));
    const auto scales_of = [&](int64_t block, int64_t sum) {
      return reinterpret_cast<float*>(u + block * u_size() + sums * u_sum()) + sum * kBlockChannels;
    };
    parallel_for(output_blocks * sums, [&](int64_t index) {
      const int64_t block = index / sums, sum = index % sums;
      transform_weights(block, sum, balance + groups * kLanes, u + block * u_size() + sum * u_sum(),
                        scales_of(block, sum));
    });
    const int64_t tasks = smaller(num_blocks(), 8 * num_threads());
    parallel_for(tasks, [&](int64_t task) {
      int32_t* const v = static_cast<int32_t*>(scratch(4, v_size() * sizeof(int32_t)));
      float* const m = static_cast<float*>(scratch(5, m_size() * sizeof(float)));
      for (int64_t i = num_blocks() * task / tasks; i < num_blocks() * (task + 1) / tasks; ++i) {
        Block block;
        make_block(i, &block);
        for (int64_t sum = 0; sum < sums; ++sum) transform_input(block, sum, balance, v);
        for (int64_t k = 0; k < output_blocks; ++k) {
          for (int64_t sum = 0; sum < sums; ++sum) {
            multiply(block.tiles, v, sum, u + k * u_size() + sum * u_sum(), scales_of(k, sum), m);
          }
          finish(block, k, m, nullptr);
        }
      }
    });
  }

  void run_few_tiles(const float* balance) const {
    int32_t* const v = static_cast<int32_t*>(scratch(2, num_blocks() * v_size() * sizeof(int32_t)));
    parallel_for(num_blocks() * sums, [&](int64_t index) {
      Block block;
      make_block(index / sums, &block);
      transform_input(block, index % sums, balance, v + index / sums * v_size());
    });
    parallel_for(output_blocks, [&](int64_t output_block) {
      int32_t* const u = static_cast<int32_t*>(scratch(4, u_sum() * sizeof(int32_t)));
      float* const m = static_cast<float*>(scratch(5, num_blocks() * m_size() * sizeof(float)));
      alignas(64) float scales[kBlockChannels];
      Block block;
      for (int64_t sum = 0; sum < sums; ++sum) {
        transform_weights(output_block, sum, balance + groups * kLanes, u, scales);
        for (int64_t i = 0; i < num_blocks(); ++i) {
          make_block(i, &block);
          multiply(block.tiles, v + i * v_size(), sum, u, scales, m + i * m_size());
        }
      }
      for (int64_t i = 0; i < num_blocks(); ++i) {
        make_block(i, &block);
        finish(block, output_block, m + i * m_size(), nullptr);
      }
    });
  }
};

}  // namespace

bool conv_relu_pool_winograd_int16(const ConvReluPoolParams& p) {
  if (p.dtype != DType::kBFloat16 || p.codes != nullptr || p.in_channels < 8 ||
      !suits_winograd(p, 3)) {
    return false;
  }
  const int64_t window = p.pool == Pool::kNone ? 1 : 4;
  const int64_t direct = p.batch * p.out_h * p.out_w * window * 9 * p.in_channels * p.out_channels;
  const Forward forward(p);
  if (forward.cost() * 5 > direct * 4) return false;
  forward.run();
  return true;
}
#else
bool conv_relu_pool_winograd_int16(const ConvReluPoolParams&) { return false; }
#endif

}  // namespace pyops::cpu::PYOPS_ISA
