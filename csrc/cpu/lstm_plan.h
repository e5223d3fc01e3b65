// How the LSTM's forward pass is cut into tasks, and where its scratch lies. Free of torch.
//
// A chain is one layer, direction, group of batch rows and group of hidden units, run through time
// in order. Chains of other rows are independent. Those of other units of the same layer wait for
// each other after every step; those of a higher layer follow the lower one, so that layers form a
// wavefront. What is computed does not depend on the cut: every sum has one fixed order.
#pragma once

#include <cstdint>
#include <vector>

#include "lstm.h"

namespace pyops::cpu {

struct LstmChain {
  int64_t index;                   // layer * directions + direction
  int64_t row_begin, row_end;      // of the batch
  int64_t block_begin, block_end;  // of hidden units
  float* projected;    // [own block][row of the chunk][block_floats], if input products are apart
  char* projected_in;  // [row of the chunk][input words]
};

// Scratch of a layer and direction.
struct LstmLayerScratch {
  float* packed;      // [block][hidden words, then input words][block_floats]
  float* bias;        // [block][block_floats]
  char* activations;  // [step parity][batch][hidden words, then, if not apart, input words]
  float* cell;        // [batch][blocks * units]
};

// Hidden units are cut into blocks, a vector or half a vector of them; the gates of a block's
// units lie side by side, [gate][unit].
struct LstmBlocks {
  int64_t lanes;    // floats a vector
  bool pairs;       // a word is two bfloat16, else one float
  int64_t vectors;  // of a block: 4, one a gate, or 2, each two gates of half as many units
  int64_t units;    // of a block
  int64_t blocks;

  int64_t block_floats() const { return vectors * lanes; }
  int64_t padded_hidden() const { return blocks * units; }
  int64_t words(int64_t features) const { return pairs ? (features + 1) / 2 : features; }
};
LstmBlocks lstm_blocks(const LstmParams&);

// Whether a core's second-level cache keeps the weights of a layer.
bool lstm_weights_cached(const LstmParams&, const LstmBlocks&);
// How many groups rows, units and layers are cut into to occupy the threads.
struct LstmGroups {
  int64_t rows, units, layers;
};
LstmGroups lstm_groups(const LstmParams&, const LstmBlocks&, int64_t units_at_once);
// The row groups' bounds, groups.rows + 1 of them, with about equally many elements in each.
std::vector<int64_t> lstm_row_bounds(const LstmParams&, int64_t groups);

struct LstmPlan : LstmBlocks {
  LstmParams p;
  bool apart;                      // input products are made for a chunk of steps at once
  int64_t chunk;                   // steps
  const LstmLayerScratch* layers;  // by index
  const LstmSequence* hidden;      // by layer: its output

  int64_t hidden_words() const { return words(p.hidden_size); }
  int64_t input_words(int64_t index) const { return words(p.in_features(index / p.directions)); }
  int64_t block_words(int64_t index) const { return hidden_words() + input_words(index); }
  int64_t activation_bytes(int64_t index) const {
    return 4 * (apart ? hidden_words() : block_words(index));
  }
  int64_t projected_rows(const LstmChain& chain) const {
    return chunk * (chain.row_end - chain.row_begin);
  }
  int64_t time_of(int64_t index, int64_t step) const {
    return index % p.directions ? p.steps - 1 - step : step;
  }
};

// Packs one block's weights and sets its units' initial states.
PYOPS_ISA_KERNEL(void, lstm_prepare, (const LstmPlan&, int64_t index, int64_t block))
// Runs steps [begin, end) of a chain, which lie in one chunk.
PYOPS_ISA_KERNEL(void, lstm_run, (const LstmPlan&, const LstmChain&, int64_t begin, int64_t end))

}  // namespace pyops::cpu
