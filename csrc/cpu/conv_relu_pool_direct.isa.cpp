// Direct convolution of any geometry: lanes are output channels, pixels are broadcast.
//
// Weights are packed once a call as [block of output channels][tap][channels of the block], a tap
// being one (input channel, kernel row, kernel column). A task is a band of output rows of one
// image and group: its input rows are copied to scratch, padded and converted, so that each tap
// is a constant offset from a pixel and padding costs no checks. Convolution rows go to a second
// scratch buffer, [row][pixel][channel], from which they are activated, pooled and written.
//
// A "word" is what one 32-bit lane multiplies: a float, or two bfloat16 channels.
#include "conv_relu_pool.h"
#include "conv_relu_pool_finish.h"
#include "conv_relu_pool_tile.h"
#include "runtime.h"
#include "simd.h"

namespace pyops::cpu::PYOPS_ISA {
namespace {

constexpr int64_t kPlanesAhead = 2;         // input planes whose rows are prefetched
constexpr int64_t kInputBytes = 448 << 10;  // of a task, to stay in the second-level cache

struct Plan {
  ConvReluPoolParams p;
  bool pairs;                      // words are two bfloat16
  bool in_place;                   // the input is read where it lies
  int64_t channels, out_channels;  // of one group
  int64_t words;                   // of one pixel
  int64_t taps, packed_taps;       // of one output channel; rounded up to whole vectors
  int64_t blocks, tail_vectors;    // blocks of output channels, and vectors in the last
  // Scratch copy of the input: its strides in words, and what part of the input it takes.
  int64_t word_stride, column_stride, row_stride, columns;
  int64_t pixel_step, conv_row_step;  // from one convolution pixel or row to the next
  int64_t column_take, row_take;      // every how many-th input column and row is copied
  int64_t bands, band_rows;           // split of the output rows
  int64_t splits, split_blocks;       // split of the blocks
  const int32_t* offsets;             // of each tap in the scratch copy

  int64_t vectors(int64_t block) const { return block + 1 < blocks ? kVectors : tail_vectors; }
  int64_t group_floats() const {
    return packed_taps * kLanes * ((blocks - 1) * kVectors + tail_vectors);
  }
  int64_t input_rows(int64_t conv_rows) const {
    if (p.kernel_h == 1) return conv_rows;
    return (conv_rows - 1) * p.stride_h + (p.kernel_h - 1) * p.dilation_h + 1;
  }
};

// ---- packing

PYOPS_INLINE int32_t make_pair(BFloat16 low, BFloat16 high) {
  return static_cast<int32_t>(low.bits | static_cast<uint32_t>(high.bits) << 16);
}

// Words of which `low` and `high` (null: zero) hold the halves.
PYOPS_INLINE void copy_pairs(const BFloat16* low, const BFloat16* high, int64_t step, int64_t count,
                             float* dst) {
  WordInt* words = reinterpret_cast<WordInt*>(dst);
  if (high && step == 1) {
    for (int64_t i = 0; i < count; ++i) words[i] = make_pair(low[i], high[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) {
      words[i] = make_pair(low[i * step], high ? high[i * step] : BFloat16{0});
    }
  }
}

// The words of one pixel, whose `channels` lie side by side.
template <class T>
PYOPS_INLINE void copy_pixel(const T* src, int64_t channels, bool, float* dst) {
  copy_words(src, 1, channels, dst);
}
PYOPS_INLINE void copy_pixel(const BFloat16* src, int64_t channels, bool pairs, float* dst) {
  if (!pairs) return copy_words(src, 1, channels, dst);
  std::memcpy(dst, src, channels * 2);
  if (channels % 2) reinterpret_cast<WordInt*>(dst)[channels / 2] = src[channels - 1].bits;
}

// The words of a row of pixels of the channels from src on, `plane` elements apart.
template <class T>
PYOPS_INLINE void copy_row(const T* src, int64_t, int64_t, bool, int64_t step, int64_t count,
                           float* dst) {
  copy_words(src, step, count, dst);
}
PYOPS_INLINE void copy_row(const BFloat16* src, int64_t plane, int64_t channels_left, bool pairs,
                           int64_t step, int64_t count, float* dst) {
  if (!pairs) return copy_words(src, step, count, dst);
  copy_pairs(src, channels_left > 1 ? src + plane : nullptr, step, count, dst);
}

// Copies the input rows under convolution rows from conv_row on, of one image and group.
template <class T>
void pack_input(const Plan& plan, int64_t n, int64_t group, int64_t conv_row, int64_t rows,
                float* dst) {
  const ConvReluPoolParams& p = plan.p;
  const int64_t plane = p.in_h * p.in_w, step = plan.column_take;
  const int64_t first_row = conv_row * p.stride_h - p.pad_h;
  // The scratch columns [begin, end) that lie in the image; begin's input column is `column`.
  const int64_t begin = min(plan.columns, ceil_div(p.pad_w, step));
  const int64_t end = max(begin, min(plan.columns, (p.in_w - 1 + p.pad_w) / step + 1));
  const int64_t column = begin * step - p.pad_w;
  const int64_t per_word = plan.pairs ? 2 : 1;
  const T* image = static_cast<const T*>(p.input) + n * p.in_channels * plane;

  if (p.channels_last) {
    const bool whole = step == 1 && plan.channels == p.in_channels &&
                       plan.column_stride * per_word == plan.channels;
    for (int64_t j = 0; j < rows; ++j) {
      float* row = dst + j * plan.row_stride;
      const int64_t y = first_row + j * plan.row_take;
      if (y < 0 || y >= p.in_h) {
        std::memset(row, 0, plan.row_stride * 4);
        continue;
      }
      const T* src = image + (y * p.in_w + column) * p.in_channels + group * plan.channels;
      std::memset(row, 0, begin * plan.column_stride * 4);
      if (whole) {
        copy_pixel(src, (end - begin) * plan.channels, plan.pairs,
                   row + begin * plan.column_stride);
      } else {
        for (int64_t i = begin; i < end; ++i, src += step * p.in_channels) {
          copy_pixel(src, plan.channels, plan.pairs, row + i * plan.column_stride);
        }
      }
      std::memset(row + end * plan.column_stride, 0, (plan.columns - end) * plan.column_stride * 4);
    }
    return;
  }
  for (int64_t word = 0; word < plan.words; ++word) {
    const int64_t channel = word * per_word;
    const T* src = image + (group * plan.channels + channel) * plane + column;
    for (int64_t j = 0; j < rows; ++j) {
      float* row = dst + j * plan.row_stride + word * plan.word_stride;
      const int64_t y = first_row + j * plan.row_take;
      if (y < 0 || y >= p.in_h) {
        std::memset(row, 0, plan.columns * 4);
        continue;
      }
      // Planes are too far apart for the hardware to run ahead.
      const char* later = reinterpret_cast<const char*>(src + kPlanesAhead * plane + y * p.in_w);
      for (int64_t i = 0; i < (end - begin) * step * static_cast<int64_t>(sizeof(T)); i += 64) {
        __builtin_prefetch(later + i);
      }
      for (int64_t i = 0; i < begin; ++i) row[i] = 0;
      copy_row(src + y * p.in_w, plane, plan.channels - channel, plan.pairs, step, end - begin,
               row + begin);
      for (int64_t i = end; i < plan.columns; ++i) row[i] = 0;
    }
  }
}

// Words [tap, tap + count) of one output channel's weights.
template <class T>
PYOPS_INLINE void weight_words(const Plan&, const T* src, int64_t tap, int64_t count, float* dst) {
  copy_words(src + tap, 1, count, dst);
}
PYOPS_INLINE void weight_words(const Plan& plan, const BFloat16* src, int64_t tap, int64_t count,
                               float* dst) {
  if (!plan.pairs) return copy_words(src + tap, 1, count, dst);
  const int64_t area = plan.p.kernel_h * plan.p.kernel_w;
  if (plan.channels % 2 == 0 && (area == 1 || plan.p.weight_channels_last)) {
    std::memcpy(dst, src + 2 * tap, count * 4);
    return;
  }
  int64_t word = tap / area, place = tap % area;
  for (const int64_t end = tap + count; tap < end; ++word, place = 0) {
    const BFloat16* low = src + 2 * word * area + place;
    const int64_t length = min(area - place, end - tap);
#if defined(__AVX512BF16__)
    if (length == area && area <= kLanes && 2 * word + 1 < plan.channels) {
      // Both channels in one load, their halves interleaved by one permutation.
      const __mmask32 both = static_cast<__mmask32>((uint64_t{1} << 2 * area) - 1);
      const __m512i order = _mm512_add_epi16(
          _mm512_set1_epi32(static_cast<int32_t>(area << 16)),
          _mm512_set_epi32(0xf000f, 0xe000e, 0xd000d, 0xc000c, 0xb000b, 0xa000a, 0x90009, 0x80008,
                           0x70007, 0x60006, 0x50005, 0x40004, 0x30003, 0x20002, 0x10001, 0));
      const __m512i halves = _mm512_maskz_loadu_epi16(both, low);
      _mm512_mask_storeu_epi32(dst, static_cast<__mmask16>((1u << area) - 1),
                               _mm512_permutexvar_epi16(order, halves));
      tap += length;
      dst += length;
      continue;
    }
#endif
    copy_pairs(low, 2 * word + 1 < plan.channels ? low + area : nullptr, 1, length, dst);
    tap += length;
    dst += length;
  }
}

// Packs one block of output channels as [tap][channel], zeros beyond the last channel. Rows go
// through a buffer: reading all channels' weights side by side would collide in the caches.
template <class T>
void pack_weight(const Plan& plan, int64_t group, int64_t block, float* dst) {
  constexpr int64_t kStep = 256;
  alignas(64) float rows[kBlock][kStep + 16];
  const int64_t vectors = plan.vectors(block), k = block * kBlock;
  const int64_t valid = min(vectors * kLanes, plan.out_channels - k);
  const int64_t per_channel = plan.channels * plan.p.kernel_h * plan.p.kernel_w;
  const T* src =
      static_cast<const T*>(plan.p.weight) + (group * plan.out_channels + k) * per_channel;
  std::memset(rows, 0, sizeof(rows));
  for (int64_t t = 0; t < plan.taps; t += kStep) {
    const int64_t count = min(kStep, plan.taps - t);
    for (int64_t i = 0; i < valid; ++i) {
      weight_words(plan, src + i * per_channel, t, count, rows[i]);
    }
    for (int64_t u = 0; u < count; u += kLanes) {
      for (int64_t v = 0; v < vectors; ++v, dst += kLanes) {
        Vec m[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) m[i] = load(rows[v * kLanes + i] + u);
        transpose(m);
        // What the last vector writes beyond the last tap is overwritten or lies in the padding.
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(dst + i * vectors * kLanes, m[i]);
      }
      dst += (kLanes - 1) * vectors * kLanes;
    }
  }
}

// ---- a task

template <class T>
void run_task(const Plan& plan, const float* weight, int64_t index) {
  const ConvReluPoolParams& p = plan.p;
  const int64_t split = index % plan.splits, band = index / plan.splits % plan.bands;
  const int64_t image = index / plan.splits / plan.bands, n = image / p.groups,
                g = image % p.groups;
  const int64_t row_begin = band * plan.band_rows,
                row_end = min(p.out_h, row_begin + plan.band_rows);
  const int64_t block_begin = split * plan.split_blocks;
  const int64_t block_end = min(plan.blocks, block_begin + plan.split_blocks);
  if (row_begin >= row_end || block_begin >= block_end) return;

  const int64_t conv_begin = pool_begin(p, row_begin);
  const int64_t rows = plan.input_rows(pool_end(p, row_end - 1) - conv_begin);
  const float* input;
  if (plan.in_place) {
    const T* first = static_cast<const T*>(p.input) + g * plan.channels +
                     (n * p.in_h + conv_begin * p.stride_h) * p.in_w * p.in_channels;
    input = static_cast<const float*>(static_cast<const void*>(first));
  } else {
    float* copy = static_cast<float*>(scratch(4, rows * plan.row_stride * 4));
    pack_input<T>(plan, n, g, conv_begin, rows, copy);
    input = copy;
  }

  ConvolveRows convolve{
      nullptr, plan.offsets, plan.taps,       taps_per_sum(p.kernel_h * p.kernel_w),
      0,       p.conv_w,     plan.pixel_step, plan.conv_row_step};
  for (int64_t block = block_begin; block < block_end; ++block) {
    const int64_t k = block * kBlock;
    convolve.weight = weight + g * plan.group_floats() + k * plan.packed_taps;
    convolve.vectors = plan.vectors(block);
    const Channels channels{n, g * plan.out_channels + k, min(kBlock, plan.out_channels - k),
                            convolve.vectors};
    finish_band<T>(p, channels, row_begin, row_end, [&](int64_t begin, int64_t end, float* sums) {
      const float* rows = input + (begin - conv_begin) * plan.conv_row_step;
      if (plan.pairs) convolve_rows<Operand::kPair>(convolve, rows, end - begin, sums);
      if (!plan.pairs) convolve_rows<Operand::kFloat>(convolve, rows, end - begin, sums);
    });
  }
}

// ---- planning

// Splits the work into bands of rows and runs of blocks: the least estimated time, in cycles.
void split_work(Plan* plan) {
  const ConvReluPoolParams& p = plan->p;
  const int64_t vectors = (plan->blocks - 1) * kVectors + plan->tail_vectors;
  double least = 0;
  for (int64_t rows = p.out_h; rows >= 1; --rows) {
    const int64_t bands = ceil_div(p.out_h, rows);
    if (rows > 1 && ceil_div(p.out_h, rows - 1) == bands) continue;  // fewer rows, as many bands
    const int64_t conv_rows = min(p.conv_h, (rows - 1) * p.pool_stride_h + p.pool_h);
    const double words = static_cast<double>(plan->input_rows(conv_rows) * plan->row_stride);
    if (words * 4 > kInputBytes && rows > 1) continue;
    for (int64_t splits = 1; splits <= min(plan->blocks, 2 * num_threads()); ++splits) {
      const int64_t blocks = ceil_div(plan->blocks, splits);
      if (ceil_div(plan->blocks, blocks) != splits) continue;
      const int64_t mine = min(vectors, blocks * kVectors);
      const double weight_cycles = static_cast<double>(plan->taps * mine) * kLanes * 4 / 16;
      const double task = 2000 + words / 2 + weight_cycles +
                          static_cast<double>(conv_rows * p.conv_w * plan->taps * mine);
      const int64_t tasks = p.batch * p.groups * bands * splits;
      const double time = task * static_cast<double>(ceil_div(tasks, num_threads()));
      if (least == 0 || time < least) {
        least = time;
        plan->bands = bands;
        plan->band_rows = rows;
        plan->splits = splits;
        plan->split_blocks = blocks;
      }
    }
  }
}

// Tap offsets are 32-bit.
bool fits_offsets(const Plan& plan) {
  const double rows = static_cast<double>((plan.p.kernel_h - 1) * plan.p.dilation_h + 1);
  return rows * static_cast<double>(plan.row_stride) < 2e9;
}

bool make_plan(const ConvReluPoolParams& params, Plan* plan) {
  plan->p = params;
  ConvReluPoolParams& p = plan->p;
  // Columns that no window reads are left out.
  p.conv_w = min(p.conv_w, (p.out_w - 1) * p.pool_stride_w + p.pool_w - p.pool_pad_w);
  plan->pairs = false;
#if defined(__AVX512BF16__)
  plan->pairs = p.dtype == DType::kBFloat16;
#endif
  plan->channels = p.in_channels / p.groups;
  plan->out_channels = p.out_channels / p.groups;
  plan->words = plan->pairs ? ceil_div(plan->channels, 2) : plan->channels;
  plan->taps = plan->words * p.kernel_h * p.kernel_w;
  plan->packed_taps = ceil_div(plan->taps, kLanes) * kLanes;
  plan->blocks = ceil_div(plan->out_channels, kBlock);
  plan->tail_vectors = ceil_div(plan->out_channels - (plan->blocks - 1) * kBlock, kLanes);

  // A kernel of one row or column skips what the stride skips when copying already.
  const int64_t span = (p.conv_w - 1) * p.stride_w + (p.kernel_w - 1) * p.dilation_w + 1;
  plan->columns = p.kernel_w == 1 ? p.conv_w : span;
  plan->column_take = p.kernel_w == 1 ? p.stride_w : 1;
  plan->row_take = p.kernel_h == 1 ? p.stride_h : 1;
  // Odd numbers of cache lines keep pixels or channels that are read together in different sets.
  if (p.channels_last) {
    plan->word_stride = 1;
    plan->column_stride = plan->words < 128 ? plan->words : (plan->words + 15) / 16 * 16 | 16;
    plan->row_stride = plan->columns * plan->column_stride;
  } else {
    plan->column_stride = 1;
    plan->word_stride = plan->columns < 64 ? plan->columns : (plan->columns + 15) / 16 * 16 | 16;
    plan->row_stride = plan->words * plan->word_stride;
  }
  // Pixels that lie in the input as they would in the copy are read there. (Pitches of many cache
  // lines are not: pixels would share few cache sets.)
  const int64_t per_word = plan->pairs ? 2 : 1, pitch = p.in_channels / per_word;
  const int64_t same_set = p.kernel_h * p.kernel_w == 1 ? 512 : 128;
  plan->in_place = p.channels_last && (p.dtype == DType::kFloat || plan->pairs) && p.pad_h == 0 &&
                   p.pad_w == 0 && plan->channels % per_word == 0 &&
                   p.in_channels % per_word == 0 && pitch * p.stride_w % same_set != 0;
  if (plan->in_place) {
    plan->column_stride = pitch;
    plan->row_stride = p.in_w * pitch;
    plan->pixel_step = p.stride_w * pitch;
    plan->conv_row_step = p.stride_h * plan->row_stride;
    return fits_offsets(*plan);
  }
  plan->pixel_step = (p.kernel_w == 1 ? 1 : p.stride_w) * plan->column_stride;
  plan->conv_row_step = (p.kernel_h == 1 ? 1 : p.stride_h) * plan->row_stride;
  return fits_offsets(*plan);
}

template <class T>
void run(Plan& plan) {
  const ConvReluPoolParams& p = plan.p;
  float* weight = static_cast<float*>(scratch(0, p.groups * plan.group_floats() * 4));
  parallel_for(p.groups * plan.blocks, [&](int64_t index) {
    const int64_t g = index / plan.blocks, block = index % plan.blocks;
    pack_weight<T>(plan, g, block,
                   weight + g * plan.group_floats() + block * kBlock * plan.packed_taps);
  });
  int32_t* offsets = static_cast<int32_t*>(scratch(1, plan.taps * 4));
  // Taps in the order in which the weights lie.
  const int64_t area = p.kernel_h * p.kernel_w;
  for (int64_t t = 0; t < plan.taps; ++t) {
    const int64_t word = p.weight_channels_last ? t % plan.words : t / area;
    const int64_t place = p.weight_channels_last ? t / plan.words : t % area;
    offsets[t] = static_cast<int32_t>(word * plan.word_stride +
                                      place / p.kernel_w * p.dilation_h * plan.row_stride +
                                      place % p.kernel_w * p.dilation_w * plan.column_stride);
  }
  plan.offsets = offsets;
  parallel_for(p.batch * p.groups * plan.bands * plan.splits,
               [&](int64_t index) { run_task<T>(plan, weight, index); });
}

}  // namespace

bool conv_relu_pool_direct(const ConvReluPoolParams& p) {
  Plan plan;
  if (p.dtype == DType::kDouble || !make_plan(p, &plan)) return false;
  if (p.batch == 0 || p.out_channels == 0 || p.out_h == 0 || p.out_w == 0) return true;
  split_work(&plan);
  with_type(p.dtype, [&](auto t) { run<decltype(t)>(plan); });
  return true;
}

}  // namespace pyops::cpu::PYOPS_ISA
