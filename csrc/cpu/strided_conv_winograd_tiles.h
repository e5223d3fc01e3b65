// Winograd's minimal filtering for 2x2 kernels with channels in the lanes, and how images are cut
// into tiles. Only for *.isa.cpp files.
//
// A 4x4 convolution of stride 2 is the sum of four 2x2 convolutions of stride 1, one for each
// phase (row mod 2, column mod 2) of the padded input. One dimension of such a convolution is the
// product of two polynomials, taken at some points and at infinity (Lavin and Gray, 2016; Winograd,
// 1980). With kFinite points besides infinity a tile has kFinite outputs; without infinity it has
// one less and needs one product less, so that two sizes of tiles share one set of transformed
// weights and fit any image.
#pragma once

#include "simd_lanes.h"

namespace pyops::cpu::PYOPS_ISA {
namespace {

PYOPS_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
PYOPS_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
PYOPS_INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int kTaps = 16;       // of a 4x4 kernel
constexpr int kOutVectors = 2;  // vectors of output channels worked on at once
constexpr int kOutBlock = kOutVectors * kLanes;

// One dimension of a tile of m outputs, m = kFinite or kFinite - 1, with m + 1 positions:
//   input        m + 1 pixels -> positions
//   weight       2 taps -> all kFinite + 1 positions
//   output       positions -> m pixels
//   gradient     m pixels of the output's gradient -> positions (the transpose of output)
//   taps         all positions -> the gradient of 2 taps (the transpose of weight)
template <int kFinitePoints>
struct Filter;

template <>
struct Filter<3> {  // 0, 1, -1
  static constexpr int kFinite = 3;

  template <int m>
  PYOPS_INLINE static void input(const Vec (&d)[m + 1], Vec (&v)[m + 1]) {
    v[0] = d[0] - d[2];
    v[1] = d[1] + d[2];
    v[2] = d[2] - d[1];
    if constexpr (m == 3) v[3] = d[3] - d[1];
  }
  PYOPS_INLINE static void weight(const Vec (&g)[2], Vec (&u)[4]) {
    const Vec a = 0.5f * g[0], b = 0.5f * g[1];
    u[0] = g[0];
    u[1] = a + b;
    u[2] = a - b;
    u[3] = g[1];
  }
  template <int m>
  PYOPS_INLINE static void output(const Vec (&p)[m + 1], Vec (&y)[m]) {
    const Vec even = p[1] + p[2];
    y[0] = p[0] + even;
    y[1] = p[1] - p[2];
    if constexpr (m == 3) y[2] = p[3] + even;
  }
  template <int m>
  PYOPS_INLINE static void gradient(const Vec (&y)[m], Vec (&p)[m + 1]) {
    p[0] = y[0];
    Vec even = y[0];
    if constexpr (m == 3) {
      even += y[2];
      p[3] = y[2];
    }
    p[1] = even + y[1];
    p[2] = even - y[1];
  }
  PYOPS_INLINE static void taps(const Vec (&s)[4], Vec (&g)[2]) {
    g[0] = fma(splat(0.5f), s[1] + s[2], s[0]);
    g[1] = fma(splat(0.5f), s[1] - s[2], s[3]);
  }
};

template <>
struct Filter<4> {  // +-a, +-b, which lose less accuracy than 0, +-1 and 2
  static constexpr int kFinite = 4;
  static constexpr float a = 0.5f, b = 1.25f, aa = a * a, bb = b * b;
  static constexpr float na = 1 / (2 * a * (aa - bb)), nb = 1 / (2 * b * (bb - aa));

  template <int m>
  PYOPS_INLINE static void input(const Vec (&d)[m + 1], Vec (&v)[m + 1]) {
    const Vec even_a = fma(d[0], splat(-bb), d[2]), odd_a = fma(d[1], splat(-bb), d[3]);
    const Vec even_b = fma(d[0], splat(-aa), d[2]), odd_b = fma(d[1], splat(-aa), d[3]);
    v[0] = fma(even_a, splat(a), odd_a);
    v[1] = fma(even_a, splat(a), -odd_a);
    v[2] = fma(even_b, splat(b), odd_b);
    v[3] = fma(even_b, splat(b), -odd_b);
    if constexpr (m == 4) v[4] = fma(d[0], splat(aa * bb), fma(d[2], splat(-aa - bb), d[4]));
  }
  PYOPS_INLINE static void weight(const Vec (&g)[2], Vec (&u)[5]) {
    u[0] = fma(g[1], splat(a), g[0]) * na;
    u[1] = fma(g[1], splat(-a), g[0]) * na;
    u[2] = fma(g[1], splat(b), g[0]) * nb;
    u[3] = fma(g[1], splat(-b), g[0]) * nb;
    u[4] = g[1];
  }
  template <int m>
  PYOPS_INLINE static void output(const Vec (&p)[m + 1], Vec (&y)[m]) {
    const Vec even_a = p[0] + p[1], odd_a = p[0] - p[1];
    const Vec even_b = p[2] + p[3], odd_b = p[2] - p[3];
    y[0] = even_a + even_b;
    y[1] = fma(odd_a, splat(a), odd_b * b);
    y[2] = fma(even_a, splat(aa), even_b * bb);
    if constexpr (m == 4) y[3] = fma(odd_a, splat(a * aa), fma(odd_b, splat(b * bb), p[4]));
  }
  template <int m>
  PYOPS_INLINE static void gradient(const Vec (&y)[m], Vec (&p)[m + 1]) {
    const Vec even_a = fma(y[2], splat(aa), y[0]), even_b = fma(y[2], splat(bb), y[0]);
    Vec odd_a = y[1] * a, odd_b = y[1] * b;
    if constexpr (m == 4) {
      odd_a = fma(y[3], splat(a * aa), odd_a);
      odd_b = fma(y[3], splat(b * bb), odd_b);
      p[4] = y[3];
    }
    p[0] = even_a + odd_a;
    p[1] = even_a - odd_a;
    p[2] = even_b + odd_b;
    p[3] = even_b - odd_b;
  }
  PYOPS_INLINE static void taps(const Vec (&s)[5], Vec (&g)[2]) {
    g[0] = fma(s[0] + s[1], splat(na), (s[2] + s[3]) * nb);
    g[1] = fma(s[0] - s[1], splat(a * na), fma(s[2] - s[3], splat(b * nb), s[4]));
  }
};

// A number known when compiling, for lambdas.
template <int kNumber>
struct Int {
  static constexpr int value = kNumber;
};

// One dimension of an image as tiles: first `big` of `finite` pixels, then `small` of one less.
struct Tiling {
  int64_t big = 0, small = 0, finite;

  Tiling(int64_t extent, int64_t points) : finite(points) {
    int64_t best = -1;
    for (int64_t count = 0; count <= divide_up(extent, points); ++count) {
      const int64_t rest = most(0, divide_up(extent - count * points, points - 1));
      const int64_t products = count * (points + 1) + rest * points;
      if (best >= 0 && products >= best) continue;
      best = products;
      big = count;
      small = rest;
    }
  }
  int64_t count() const { return big + small; }
  int64_t cover() const { return big * finite + small * (finite - 1); }
  int64_t positions() const { return big * (finite + 1) + small * finite; }
  int64_t start(int64_t tile) const {
    return tile < big ? tile * finite : big * finite + (tile - big) * (finite - 1);
  }
};

// The tiles of `images` images. A position with infinity belongs to big tiles only: in the order
// (small, big), (big, big), (big, small), (small, small) the tiles of each position are a range.
template <class F>
struct Grid {
  static constexpr int kFinite = F::kFinite, kAlpha = kFinite + 1, kPositions = kAlpha * kAlpha;
  Tiling down, across;
  int64_t images;

  Grid(int64_t height, int64_t width, int64_t image_count)
      : down(height, kFinite), across(width, kFinite), images(image_count) {}

  int64_t tiles_of_image() const { return down.count() * across.count(); }
  int64_t tiles() const { return images * tiles_of_image(); }
  bool used(int position) const {
    return (down.big > 0 || position / kAlpha < kFinite) &&
           (across.big > 0 || position % kAlpha < kFinite);
  }
  void range(int position, int64_t* begin, int64_t* end) const {
    const bool tall = position / kAlpha == kFinite, wide = position % kAlpha == kFinite;
    *begin = tall ? images * down.small * across.big : 0;
    *end = wide ? images * down.count() * across.big
                : images * (down.count() * across.big + down.big * across.small);
    if (!tall && !wide) *end = tiles();
  }

  // Calls f(y, x, tile, Int<height>, Int<width>) for every tile of one image.
  template <class Function>
  PYOPS_INLINE void each_tile(int64_t image, const Function& f) const {
    const int64_t corner = down.small * across.big, core = down.big * across.big;
    const int64_t side = down.big * across.small, rest = down.small * across.small;
    int64_t tile = image * corner;
    part(down.big, down.small, 0, across.big, tile, f, Int<kFinite - 1>{}, Int<kFinite>{});
    tile = images * corner + image * core;
    part(0, down.big, 0, across.big, tile, f, Int<kFinite>{}, Int<kFinite>{});
    tile = images * (corner + core) + image * side;
    part(0, down.big, across.big, across.small, tile, f, Int<kFinite>{}, Int<kFinite - 1>{});
    tile = images * (corner + core + side) + image * rest;
    part(down.big, down.small, across.big, across.small, tile, f, Int<kFinite - 1>{},
         Int<kFinite - 1>{});
  }

 private:
  template <class Function, class Height, class Width>
  PYOPS_INLINE void part(int64_t first_row, int64_t rows, int64_t first_column, int64_t columns,
                         int64_t tile, const Function& f, Height height, Width width) const {
    for (int64_t y = first_row; y < first_row + rows; ++y) {
      for (int64_t x = first_column; x < first_column + columns; ++x) {
        f(down.start(y), across.start(x), tile++, height, width);
      }
    }
  }
};

// d: the first pixel of a tile, its rows and columns `row` and `column` floats apart; v: its
// positions, `stride` floats apart.
template <class F, int kHeight, int kWidth>
PYOPS_INLINE void transform_input(const float* d, int64_t row, int64_t column, float* v,
                                  int64_t stride) {
  Vec half[kWidth + 1][kHeight + 1];
#pragma GCC unroll 5
  for (int i = 0; i <= kHeight; ++i) {
    Vec pixels[kWidth + 1], out[kWidth + 1];
#pragma GCC unroll 5
    for (int j = 0; j <= kWidth; ++j) pixels[j] = load(d + i * row + j * column);
    F::template input<kWidth>(pixels, out);
#pragma GCC unroll 5
    for (int j = 0; j <= kWidth; ++j) half[j][i] = out[j];
  }
#pragma GCC unroll 5
  for (int j = 0; j <= kWidth; ++j) {
    Vec out[kHeight + 1];
    F::template input<kHeight>(half[j], out);
#pragma GCC unroll 5
    for (int i = 0; i <= kHeight; ++i) store(v + (i * (F::kFinite + 1) + j) * stride, out[i]);
  }
}

// The same for the gradient of a tile of outputs.
template <class F, int kHeight, int kWidth>
PYOPS_INLINE void transform_gradient(const float* y, int64_t row, int64_t column, float* p,
                                     int64_t stride) {
  Vec half[kWidth + 1][kHeight];
#pragma GCC unroll 5
  for (int i = 0; i < kHeight; ++i) {
    Vec pixels[kWidth], out[kWidth + 1];
#pragma GCC unroll 5
    for (int j = 0; j < kWidth; ++j) pixels[j] = load(y + i * row + j * column);
    F::template gradient<kWidth>(pixels, out);
#pragma GCC unroll 5
    for (int j = 0; j <= kWidth; ++j) half[j][i] = out[j];
  }
#pragma GCC unroll 5
  for (int j = 0; j <= kWidth; ++j) {
    Vec out[kHeight + 1];
    F::template gradient<kHeight>(half[j], out);
#pragma GCC unroll 5
    for (int i = 0; i <= kHeight; ++i) store(p + (i * (F::kFinite + 1) + j) * stride, out[i]);
  }
}

// m: the positions of a tile, `stride` floats apart.
template <class F, int kHeight, int kWidth>
PYOPS_INLINE void transform_output(const float* m, int64_t stride, Vec (&y)[kHeight][kWidth]) {
  Vec half[kHeight][kWidth + 1];
#pragma GCC unroll 5
  for (int j = 0; j <= kWidth; ++j) {
    Vec positions[kHeight + 1], out[kHeight];
#pragma GCC unroll 5
    for (int i = 0; i <= kHeight; ++i) {
      positions[i] = load(m + (i * (F::kFinite + 1) + j) * stride);
    }
    F::template output<kHeight>(positions, out);
#pragma GCC unroll 5
    for (int i = 0; i < kHeight; ++i) half[i][j] = out[i];
  }
#pragma GCC unroll 5
  for (int i = 0; i < kHeight; ++i) F::template output<kWidth>(half[i], y[i]);
}

// Bit i * (kWidth + 1) + j is set where pixel (i, j) of that tile is not zero in some lane.
template <int kHeight, int kWidth>
PYOPS_INLINE uint32_t seen_pixels(const float* d, int64_t row, int64_t column) {
  uint32_t seen = 0;
  for (int i = 0; i <= kHeight; ++i) {
    for (int j = 0; j <= kWidth; ++j) {
      const VecInt bits = reinterpret_cast<VecInt>(load(d + i * row + j * column));
      if (any((bits & 0x7fffffff) != 0)) seen |= 1u << (i * (kWidth + 1) + j);
    }
  }
  return seen;
}

// The 16 taps of kLanes kernels that lie `stride` floats apart: lane i of taps[t] is tap t of the
// i-th.
PYOPS_INLINE void load_taps(const float* weight, int64_t stride, Vec (&taps)[kTaps]) {
#pragma GCC unroll 4
  for (int t = 0; t < kTaps; t += kLanes) {
    Vec block[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) block[i] = load(weight + i * stride + t);
    transpose(block);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) taps[t + i] = block[i];
  }
}
PYOPS_INLINE void store_taps(const Vec (&taps)[kTaps], float* weight, int64_t stride) {
#pragma GCC unroll 4
  for (int t = 0; t < kTaps; t += kLanes) {
    Vec block[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) block[i] = taps[t + i];
    transpose(block);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) store(weight + i * stride + t, block[i]);
  }
}

// An image as (channels, height, width) or, `channels_last`, (height, width, channels).
struct Image {
  const float* data;
  int64_t channels, height, width;
  bool channels_last;
};

// kLanes channels from c0 on as (rows, columns, lane), zeros around the image, which starts at
// pixel (border, border).
PYOPS_INLINE void pack(const Image& image, int64_t c0, int64_t border, int64_t rows,
                       int64_t columns, float* out) {
  const int64_t area = image.height * image.width;
  for (int64_t y = 0; y < rows; ++y) {
    float* const row = out + y * columns * kLanes;
    const bool inside = y >= border && y < border + image.height;
    for (int64_t x = 0; x < (inside ? border : columns); ++x) store(row + x * kLanes, Vec{});
    if (!inside) continue;
    for (int64_t x = border + image.width; x < columns; ++x) store(row + x * kLanes, Vec{});
  }
  float* to = out + (border * columns + border) * kLanes;
  if (image.channels_last) {
    const float* from = image.data + c0;
    for (int64_t y = 0; y < image.height; ++y, to += columns * kLanes) {
      for (int64_t x = 0; x < image.width; ++x, from += image.channels) {
        store(to + x * kLanes, load(from));
      }
    }
    return;
  }
  int64_t x = 0;
  for (int64_t i = 0; i < area; i += kLanes) {
    const int here = static_cast<int>(least(kLanes, area - i));
    Vec block[kLanes];
#pragma GCC unroll 16
    for (int j = 0; j < kLanes; ++j) block[j] = load_first(image.data + (c0 + j) * area + i, here);
    transpose(block);
#pragma GCC unroll 16
    for (int j = 0; j < kLanes; ++j) {
      if (j >= here) break;
      store(to, block[j]);
      to += kLanes;
      if (++x == image.width) {
        x = 0;
        to += (columns - image.width) * kLanes;
      }
    }
  }
}

}  // namespace
}  // namespace pyops::cpu::PYOPS_ISA
