// Host side of conv_relu_pool_tile.cuh: cutting the output into tiles.
#include <algorithm>

#include "conv_relu_pool_tile.cuh"

namespace pyops::cuda::conv {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The box of windows that wastes the fewest rows: the fewest tiles for the whole output.
void choose_box(const ConvPoolForward& p, Tiling& t) {
  t.tiles = 0;
  for (int64_t h = 1; h <= p.out_h; ++h) {
    const int64_t rows_h = (h - 1) * p.pool_stride_h + p.pool_h;
    if (rows_h * p.pool_w > kRows) break;
    const int64_t most = (kRows / rows_h - p.pool_w) / p.pool_stride_w + 1;
    // Boxes of equal width, as few as the rows allow.
    const int64_t boxes_w = ceil_div(p.out_w, std::min(most, p.out_w));
    const int64_t w = ceil_div(p.out_w, boxes_w);
    const int64_t rows_w = (w - 1) * p.pool_stride_w + p.pool_w;
    const int64_t n = std::min(p.batch, kRows / (rows_h * rows_w));
    const int64_t boxes_h = ceil_div(p.out_h, h);
    const int64_t tiles = ceil_div(p.batch, n) * boxes_h * boxes_w;
    if (t.tiles == 0 || tiles < t.tiles) {
      t.tiles = tiles;
      t.outputs = static_cast<int>(n * h * w);
      t.box_n = static_cast<int>(n), t.box_h = static_cast<int>(h), t.box_w = static_cast<int>(w);
      t.rows_h = static_cast<int>(rows_h), t.rows_w = static_cast<int>(rows_w);
      t.boxes_h = static_cast<int>(boxes_h), t.boxes_w = static_cast<int>(boxes_w);
    }
  }
}

}  // namespace

Tiling make_tiling(const ConvPoolForward& p, int block_channels, bool can_fold) {
  Tiling t{};
  const int64_t outputs = p.batch * p.out_h * p.out_w;
  if (p.pool == Pool::kNone) {
    t.rows = Rows::kLinear;
    t.outputs = kRows;
    t.tiles = ceil_div(outputs, t.outputs);
  } else if (can_fold && p.pool_h == 2 && p.pool_w == 2) {
    t.rows = Rows::kFold;
    t.outputs = kRows / 4;
    t.tiles = ceil_div(outputs, t.outputs);
  } else {
    t.rows = Rows::kBox;
    choose_box(p, t);
  }
  t.channel_blocks = static_cast<int>(ceil_div(p.out_channels / p.groups, block_channels));
  return t;
}

// Coordinates and counts that the kernels keep in 32 bits, and windows that fit a tile.
bool sizes_fit(const ConvPoolForward& p) {
  constexpr int64_t most = 1 << 30;
  const bool coordinates = p.in_h + 2 * p.pad_h < most && p.in_w + 2 * p.pad_w < most &&
                           p.conv_h + p.pool_pad_h + p.pool_h < most &&
                           p.conv_w + p.pool_pad_w + p.pool_w < most && p.batch < most;
  const int64_t reduction = p.kernel_h * p.kernel_w * (p.in_channels / p.groups);
  if (!coordinates || reduction >= most || p.out_channels >= most) return false;
  if (p.pool_h * p.pool_w > kRows) return false;
  const Tiling t = make_tiling(p, 64, false);
  return t.tiles * t.channel_blocks * p.groups < most;
}

}  // namespace pyops::cuda::conv
