// Halos of the Hopper convolution formed from a pooled gradient and its codes (2 x 2 windows with
// step 2), where TMA would bring them from an expanded gradient.
#pragma once

#include "conv_relu_pool_windows.cuh"
#include "ptx.cuh"

namespace pyops::cuda {

// A thread of kFormers forms 16 bytes of channels of every other line of windows of a halo. The
// windows' grid covers the plane without gaps, so that every byte of the halo is written; windows
// and pixels that do not exist are zero.
template <class T, class Tile>
struct HaloFormer {
  static constexpr int kFormers = 96, kChunks = 8;
  static constexpr int kWindowsW = (kTileWidth + 2) / 2 + 1, kWindowsH = Tile::kLines / 2 + 1;
  static constexpr int kOwn = (kWindowsH + 1) / 2;
  static_assert(kFormers == 2 * kWindowsW * kChunks);

  const ConvPoolBackward& p;
  int thread;
  int top, left;    // of the halo, in the expanded gradient
  int first_y, ox;  // this thread's first window
  conv::PooledChunk<T> own[kOwn];

  // Begins to read the halo of an image, whose channels start with `channel`.
  PTX_FN void fetch(int image, int y, int x, int channel) {
    top = y, left = x;
    first_y = (y + static_cast<int>(p.pool_pad_h) >> 1) + thread / (kWindowsW * kChunks);
    ox = (x + static_cast<int>(p.pool_pad_w) >> 1) + thread / kChunks % kWindowsW;
    const int out_h = static_cast<int>(p.out_h), out_w = static_cast<int>(p.out_w);
    const int own_channel = channel + thread % kChunks * 8;
    const bool column = image < p.batch && static_cast<unsigned>(ox) < static_cast<unsigned>(out_w);
    const int existing = column ? static_cast<int>(p.out_channels) - own_channel : 0;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int oy = first_y + 2 * i;
      const bool line = static_cast<unsigned>(oy) < static_cast<unsigned>(out_h);
      const int64_t window = (static_cast<int64_t>(image) * out_h + oy) * out_w + ox;
      own[i].load(p.grad_output, p.codes, window * p.out_channels + own_channel,
                  line ? existing : 0, true);
    }
  }

  // Puts it where TMA would have put it.
  PTX_FN void store(uint32_t halo) const {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int y = 2 * (first_y + 2 * i) - static_cast<int>(p.pool_pad_h);
      const int x = 2 * ox - static_cast<int>(p.pool_pad_w);
      const float inverse = p.pool == Pool::kAvg ? conv::average_inverse(p, y, x) : 1.0f;
      const conv::WindowGradient<T> gradient(p, own[i], inverse);
#pragma unroll
      for (int place = 0; place < 4; ++place) {
        const int at_y = y + place / 2, at_x = x + place % 2;
        const int line = at_y - top, column = at_x - left;
        if (static_cast<unsigned>(line) >= static_cast<unsigned>(Tile::kLines)) continue;
        const bool exists = static_cast<unsigned>(at_y) < static_cast<unsigned>(p.conv_h) &&
                            static_cast<unsigned>(at_x) < static_cast<unsigned>(p.conv_w);
        conv::Words words{};
        if (exists) words = gradient.at(place);
#pragma unroll
        for (int box = 0; box < Tile::kBoxes; ++box) {
          if (static_cast<unsigned>(column - box) >= static_cast<unsigned>(Tile::kColumns))
            continue;
          ptx::st_shared(
              halo + box * Tile::kBoxBytes + Tile::chunk(thread % kChunks, line, column - box),
              words);
        }
      }
    }
  }
};

}  // namespace pyops::cuda
