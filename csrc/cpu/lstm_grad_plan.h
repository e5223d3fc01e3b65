// How the LSTM's backward pass through one layer is cut into tasks, and where its scratch lies.
// Free of torch.
//
// First back through time (chains, as in the forward pass), which leaves the gradients of the
// gates before their activations; then from these the gradient of the input and of the weights,
// each one large product.
#pragma once

#include <cstdint>

#include "lstm_plan.h"

namespace pyops::cpu {

// Columns of a product, in blocks of `vectors` vectors.
struct LstmColumns {
  int64_t count, vectors, blocks;
};

// Of one direction.
struct LstmGradScratch {
  float* recurrent;  // w_hh as [column block][gate word][columns]: for the hidden gradients
  float* input;      // w_ih likewise, or null
  char* gates;       // [row of the sequence][gate words]: the gates' gradients
  float* hidden;     // [batch][padded columns]: gradient of the hidden state
  float* cell;       // [batch][padded_hidden]: gradient of the cell state
  float* totals;     // [block][in + hidden + 1][block_floats]: of the weights and the bias
};

struct LstmGradChain {
  int64_t direction;
  int64_t row_begin, row_end;        // of the batch
  int64_t block_begin, block_end;    // of hidden units
  int64_t column_begin, column_end;  // blocks of the same units as columns
};

struct LstmGradPlan : LstmBlocks {
  LstmGradParams g;
  int64_t layer;
  LstmSequence in, out;   // of this layer
  LstmSequence grad_out;  // data null: zero
  LstmSequence grad_in;   // data null: not asked for
  LstmColumns hidden_columns, in_columns;
  const LstmGradScratch* directions;

  int64_t gate_words() const { return blocks * block_floats() / (pairs ? 2 : 1); }
  int64_t column_floats(const LstmColumns& c) const { return c.vectors * lanes; }
  int64_t in_features() const { return g.p.in_features(layer); }
  int64_t weight_columns() const { return in_features() + g.p.hidden_size + 1; }
  int64_t time_of(int64_t direction, int64_t step) const {
    return direction ? g.p.steps - 1 - step : step;
  }
};

// Rows of the sequence summed at once for the weights' gradients: one running sum over all of them
// would have several times the rounding error.
constexpr int64_t kLstmRowsPerSum = 256;
constexpr int64_t kLstmRowsPerInputTask = 48;

// A part of the weights' gradients of one direction.
struct LstmWeightTask {
  int64_t direction;
  int64_t block_begin, block_end;    // of hidden units
  int64_t column_begin, column_end;  // of [input features, hidden features, bias]
  float* gathered;                   // [word of kLstmRowsPerSum rows][columns]
};

PYOPS_ISA_KERNEL(void, lstm_grad_prepare,
                 (const LstmGradPlan&, int64_t direction, int64_t column_block))
// Task 0 takes the last step, task `steps` makes the gradients of the initial states.
PYOPS_ISA_KERNEL(void, lstm_grad_run, (const LstmGradPlan&, const LstmGradChain&, int64_t task))
// Rows [begin, end) of the input's gradient, both directions.
PYOPS_ISA_KERNEL(void, lstm_grad_input, (const LstmGradPlan&, int64_t begin, int64_t end))
PYOPS_ISA_KERNEL(void, lstm_grad_weights, (const LstmGradPlan&, const LstmWeightTask&))

}  // namespace pyops::cpu
