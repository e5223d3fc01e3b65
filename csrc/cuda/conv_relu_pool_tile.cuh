// What the generic convolution kernels share: how the output is cut into tiles, where the rows of a
// tile lie, and what becomes of a finished one (bias, activation, pool, codes, store).
//
// A tile is kRows pixels of the convolution by some output channels. Its rows are one of
//   fold    the four places of 2x2 windows, 16 windows to 64 rows, so that a thread of mma.sync
//           holds all four places of a window: row = window / 16 * 64 + place * 16 + window % 16
//   linear  single pixels in the order of memory, across images (no pool)
//   box     all pixels that box_n x box_h x box_w windows touch: any other pool
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <climits>

#include "conv_relu_pool.h"
#include "ptx.cuh"

namespace pyops::cuda::conv {

#ifdef PYOPS_EMULATE
#define PYOPS_DEVICE inline
#else
#define PYOPS_DEVICE __device__ __forceinline__
#endif

constexpr int kRows = 128;  // pixels of a tile
constexpr int kOutside = INT_MIN / 2;

enum class Rows : int { kFold, kLinear, kBox };

struct Tiling {
  Rows rows;
  int outputs;              // pooled outputs of a full tile
  int box_n, box_h, box_w;  // kBox: pooled outputs along each axis
  int rows_h, rows_w;       // kBox: pixels along each axis
  int boxes_h, boxes_w;     // kBox: tiles that an image is cut into
  int64_t tiles;            // of the whole output
  int channel_blocks;       // per group
};

Tiling make_tiling(const ConvPoolForward& p, int block_channels, bool can_fold);
bool sizes_fit(const ConvPoolForward& p);

// Where a row's receptive field begins.
struct RowEntry {
  int64_t base;  // of (n, y, x), in elements from the input's first; may lie before it
  int y, x;      // y is kOutside for a row that is no pixel
};

// Walks k = (r, s, c) in steps.
struct Tap {
  int r = 0, s = 0, c = 0;

  PYOPS_DEVICE void advance(int step, int channels, int kernel_w) {
    c += step;
    while (c >= channels) {
      c -= channels;
      if (++s == kernel_w) s = 0, ++r;
    }
  }
};

// A pooled output of the tile.
struct OutputEntry {
  int64_t offset;  // from the output's first element, or -1
  int y, x;        // the window's corner in the convolution's output
  int row;         // kBox, kLinear: the tile's row of that corner
};

struct TileTables {
  RowEntry rows[kRows];
  OutputEntry outputs[kRows];
};

PYOPS_DEVICE bool inside(const ConvPoolForward& p, const RowEntry& entry, int dy, int dx) {
  return static_cast<unsigned>(entry.y + dy) < static_cast<unsigned>(p.in_h) &&
         static_cast<unsigned>(entry.x + dx) < static_cast<unsigned>(p.in_w);
}

// a = quotient * b + remainder; the 32-bit division costs a fourth of the 64-bit one.
PYOPS_DEVICE int divide(int64_t& a, int64_t b) {
  int64_t quotient;
  if (a < INT_MAX) {
    quotient = static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  } else {
    quotient = a / b;
  }
  const int remainder = static_cast<int>(a - quotient * b);
  a = quotient;
  return remainder;
}

// (n, oy, ox) of output `o` of a tile; false if there is none.
PYOPS_DEVICE bool locate(const ConvPoolForward& p, const Tiling& t, int64_t tile, int o, int& n,
                         int& oy, int& ox) {
  if (t.rows == Rows::kBox) {
    const int box_x = divide(tile, t.boxes_w);
    const int box_y = divide(tile, t.boxes_h);
    const int wx = o % t.box_w, rest = o / t.box_w;
    n = static_cast<int>(tile) * t.box_n + rest / t.box_h;
    oy = box_y * t.box_h + rest % t.box_h;
    ox = box_x * t.box_w + wx;
    return o < t.outputs && n < p.batch && oy < p.out_h && ox < p.out_w;
  }
  int64_t index = tile * t.outputs + o;
  if (index >= p.batch * p.out_h * p.out_w) return false;
  ox = divide(index, p.out_w);
  oy = divide(index, p.out_h);
  n = static_cast<int>(index);
  return true;
}

// Called by all threads; a barrier must follow.
PYOPS_DEVICE void fill_tables(const ConvPoolForward& p, const Tiling& t, int64_t tile, int threads,
                              TileTables& tables) {
  for (int row = threadIdx.x; row < kRows; row += threads) {
    int n = 0, oy = 0, ox = 0, y, x;
    bool inside;
    if (t.rows == Rows::kBox) {
      const int rx = row % t.rows_w, rest = row / t.rows_w, ry = rest % t.rows_h;
      int64_t of_tile = tile;
      const int box_x = divide(of_tile, t.boxes_w);
      const int box_y = divide(of_tile, t.boxes_h);
      n = static_cast<int>(of_tile) * t.box_n + rest / t.rows_h;
      y = static_cast<int>(box_y * t.box_h * p.pool_stride_h - p.pool_pad_h) + ry;
      x = static_cast<int>(box_x * t.box_w * p.pool_stride_w - p.pool_pad_w) + rx;
      inside = rest / t.rows_h < t.box_n && n < p.batch;
    } else {
      const bool fold = t.rows == Rows::kFold;
      const int o = fold ? row / 64 * 16 + row % 16 : row;
      const int place = fold ? row % 64 / 16 : 0;
      inside = locate(p, t, tile, o, n, oy, ox);
      y = static_cast<int>(oy * p.pool_stride_h - p.pool_pad_h) + place / 2;
      x = static_cast<int>(ox * p.pool_stride_w - p.pool_pad_w) + place % 2;
    }
    inside = inside && y >= 0 && y < p.conv_h && x >= 0 && x < p.conv_w;
    RowEntry entry{0, kOutside, 0};
    if (inside) {
      entry.y = static_cast<int>(y * p.stride_h - p.pad_h);
      entry.x = static_cast<int>(x * p.stride_w - p.pad_w);
      entry.base = n * p.in.n + entry.y * p.in.h + entry.x * p.in.w;
    }
    tables.rows[row] = entry;
  }
  for (int o = threadIdx.x; o < kRows; o += threads) {
    int n = 0, oy = 0, ox = 0;
    OutputEntry entry{-1, 0, 0, 0};
    if (o < t.outputs && locate(p, t, tile, o, n, oy, ox)) {
      entry.offset = n * p.out.n + oy * p.out.h + ox * p.out.w;
      entry.y = static_cast<int>(oy * p.pool_stride_h - p.pool_pad_h);
      entry.x = static_cast<int>(ox * p.pool_stride_w - p.pool_pad_w);
      entry.row = o;
      if (t.rows == Rows::kBox) {
        const int wx = o % t.box_w, rest = o / t.box_w;
        const int top =
            rest / t.box_h * t.rows_h + rest % t.box_h * static_cast<int>(p.pool_stride_h);
        entry.row = top * t.rows_w + wx * static_cast<int>(p.pool_stride_w);
      }
    }
    tables.outputs[o] = entry;
  }
}

// One pooled output as it comes about: elements are added in the order of the window.
struct Window {
  float value = 0.0f;
  int code = 0;
  bool empty = true;

  // `sum` is the convolution without its bias.
  PYOPS_DEVICE void add(const ConvPoolForward& p, float sum, float bias, int place) {
    const float before = sum + bias;
    bool whole = true;
    float after = before;
    if (p.activation == Activation::kRelu) {
      whole = !(before <= 0.0f);
      after = whole ? before : 0.0f;
    } else if (p.activation == Activation::kLeakyRelu) {
      whole = before > 0.0f;
      after = whole ? before : before * static_cast<float>(p.negative_slope);
    }
    if (p.pool == Pool::kAvg) {
      value += after;
      if (whole) code |= 1 << (place & 7);
    } else if (empty || after > value || after != after) {  // the first of equals, the last NaN
      value = after;
      code = p.pool == Pool::kNone ? whole : (place & 127) | (whole ? 128 : 0);
    }
    empty = false;
  }
};

// What torch divides an average by: padding counts, what ceil_mode adds beyond it does not.
PYOPS_DEVICE float average_size(const ConvPoolGeometry& p, int y, int x) {
  const int64_t bottom = p.conv_h + p.pool_pad_h, right = p.conv_w + p.pool_pad_w;
  const int64_t rows = y + p.pool_h < bottom ? p.pool_h : bottom - y;
  const int64_t columns = x + p.pool_w < right ? p.pool_w : right - x;
  return static_cast<float>(rows * columns);
}

PYOPS_DEVICE void store_as(float* at, float value) { *at = value; }
PYOPS_DEVICE void store_as(__nv_bfloat16* at, float value) { *at = __float2bfloat16_rn(value); }
PYOPS_DEVICE void store_as(__half* at, float value) { *at = __float2half_rn(value); }
PYOPS_DEVICE float as_float(float value) { return value; }
PYOPS_DEVICE float as_float(__nv_bfloat16 value) { return __bfloat162float(value); }
PYOPS_DEVICE float as_float(__half value) { return __half2float(value); }

template <class T>
struct alignas(4 * sizeof(T)) Four {
  T at[4];
};

// Pools (unless `folded`) and stores the tile. `sums`: (kRows, pitch) of the convolution without
// bias, or with `folded`: (outputs, pitch) finished but for an average's division, their codes in
// `codes`: (outputs, channels). The tile's first channel is `channel_start`; `limit` of them exist.
template <class T>
PYOPS_DEVICE void finish_tile(const ConvPoolForward& p, const Tiling& t, const TileTables& tables,
                              const float* sums, int pitch, const uint8_t* codes, bool folded,
                              int64_t channel_start, int channels, int limit, int threads) {
  const int quads = channels / 4, items = t.outputs * quads;
  T* output = static_cast<T*>(p.output);
  const T* bias = static_cast<const T*>(p.bias);
  // Four channels at once where they lie side by side and aligned.
  const bool side_by_side = p.out.c == 1;
  const bool wide = side_by_side && p.out_channels % 4 == 0 && channel_start % 4 == 0 &&
                    reinterpret_cast<uintptr_t>(output) % sizeof(Four<T>) == 0 &&
                    reinterpret_cast<uintptr_t>(p.codes) % 4 == 0;
  for (int item = threadIdx.x; item < items; item += threads) {
    // Neighbouring threads take neighbouring addresses.
    const int o = side_by_side ? item / quads : item % t.outputs;
    const int quad = side_by_side ? item % quads : item / t.outputs;
    const OutputEntry entry = tables.outputs[o];
    const int left = limit - quad * 4;
    if (entry.offset < 0 || left <= 0) continue;
    const int64_t channel = channel_start + quad * 4;
    Window window[4];
    if (folded) {
      for (int i = 0; i < 4; ++i) {
        window[i].value = sums[o * pitch + quad * 4 + i];
        if (p.codes) window[i].code = codes[o * channels + quad * 4 + i];
      }
    } else {
      float biases[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      if (bias) {
        for (int i = 0; i < 4; ++i) {
          if (i < left) biases[i] = as_float(bias[channel + i]);
        }
      }
      for (int y = 0; y < p.pool_h; ++y) {
        if (entry.y + y < 0 || entry.y + y >= p.conv_h) continue;
        for (int x = 0; x < p.pool_w; ++x) {
          if (entry.x + x < 0 || entry.x + x >= p.conv_w) continue;
          const float* row = sums + (entry.row + y * t.rows_w + x) * pitch + quad * 4;
          const Four<float> four = *reinterpret_cast<const Four<float>*>(row);
          for (int i = 0; i < 4; ++i) {
            window[i].add(p, four.at[i], biases[i], y * static_cast<int>(p.pool_w) + x);
          }
        }
      }
    }
    if (p.pool == Pool::kAvg) {
      const float size = average_size(p, entry.y, entry.x);
      for (int i = 0; i < 4; ++i) window[i].value /= size;
    }
    const int64_t at = entry.offset + channel * p.out.c;
    if (wide && left >= 4) {
      Four<T> values;
      Four<uint8_t> bytes;
      for (int i = 0; i < 4; ++i) {
        store_as(&values.at[i], window[i].value);
        bytes.at[i] = static_cast<uint8_t>(window[i].code);
      }
      *reinterpret_cast<Four<T>*>(output + at) = values;
      if (p.codes) *reinterpret_cast<Four<uint8_t>*>(p.codes + at) = bytes;
    } else {
      for (int i = 0; i < 4; ++i) {
        if (i >= left) break;
        store_as(output + at + i * p.out.c, window[i].value);
        if (p.codes) p.codes[at + i * p.out.c] = static_cast<uint8_t>(window[i].code);
      }
    }
  }
}

}  // namespace pyops::cuda::conv
