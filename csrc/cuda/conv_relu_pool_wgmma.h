// The Hopper convolutions' choices, made on the host. Free of torch and of device code.
#pragma once

#include "conv_relu_pool.h"

namespace pyops::cuda {

// How the tensor cores reach the pixels of a tap, which lie a pixel or two beside those of the
// aligned tile. docs/kernels/conv_relu_pool_hopper.md tells what each rests on.
enum class Addressing : int {
  kCopies,   // three tiles, one per column of taps: every operand starts on a swizzle pattern
  kShifted,  // one tile; an operand starts within a pattern, which counts from the tile's start
  kPitch16,  // one tile with rows of 16 pixels; the shift is in the descriptor's base offset
  kPlanes,   // one tile without swizzle, in planes of 8 channels
};

// Whether halos can be formed from a pooled gradient: of the first and the fastest, so that the
// other two do not double what is compiled.
constexpr bool forms_halos(Addressing addressing) {
  return addressing == Addressing::kCopies || addressing == Addressing::kShifted;
}

// Default until a GPU has shown that a faster one is right.
constexpr Addressing kDefaultAddressing = Addressing::kCopies;

constexpr int kBlockChannels = 64;  // of a block, in and out
constexpr int kTileWidth = 8;       // pixels: a group of rows of the operand
constexpr int kGroups = 2;          // warpgroups that multiply, each a tile
constexpr int kTaps = 9;

// How the deep kernel divides its work.
struct WgmmaPlan {
  int rows;  // of a tile, which is kTileWidth wide
  int tiles_h, tiles_w;
  int output_blocks, channel_blocks;  // of kBlockChannels
  int64_t works;                      // pairs of tiles times output_blocks
  bool resident;                      // the weights of an output block stay in shared memory
  int grid;
};

WgmmaPlan conv_relu_pool_wgmma_plan(const ConvPoolForward&, Addressing);

// 3x3, input channels a multiple of 8, 16 or more, output channels of 16. `source`: what the input
// is to be formed from, for a part of its gradient of the input.
void conv_relu_pool_forward_wgmma(const ConvPoolForward&, Addressing, cudaStream_t,
                                  const ConvPoolBackward* source = nullptr);
bool conv_relu_pool_forward_wgmma_supports(const ConvPoolForward&);

// 3x3 of 3 input channels, or 1 channel and up to 32 taps.
constexpr int kMostStemKernel = 5;
void conv_relu_pool_forward_wgmma_stem(const ConvPoolForward&, cudaStream_t);
bool conv_relu_pool_forward_wgmma_stem_supports(const ConvPoolForward&);

}  // namespace pyops::cuda
