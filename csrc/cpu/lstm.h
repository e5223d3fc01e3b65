// Interface between the op lstm and its CPU kernels. Free of torch.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "isa.h"

namespace pyops::cpu {

// A sequence of vectors, (steps, batch, features) with any step and row stride and unit feature
// stride. Packed sequences are rows one after another: the rows of step t begin at row_begin[t].
struct LstmSequence {
  void* data;
  int64_t step_stride, row_stride;  // in elements; step_stride is not used if packed
};

// Gates lie in torch's order: input, forget, cell, output. `index` of a state or weight is
// layer * directions + direction.
struct LstmParams {
  int64_t steps, batch, rows;  // rows: of all steps, steps * batch unless packed
  int64_t input_size, hidden_size, layers, directions;
  DType dtype;
  bool has_biases;
  const int64_t* batch_sizes;  // (steps,), never increasing, at most batch; null if not packed
  const int64_t* row_begin;    // (steps,)

  LstmSequence input;          // features: input_size
  const void* h0;              // (layers * directions, batch, hidden_size)
  const void* c0;              // like h0
  const void* const* weights;  // per index: w_ih (4 * hidden_size, in), w_hh (4 * hidden_size,
                               // hidden_size)[, b_ih, b_hh (4 * hidden_size,)]
  LstmSequence output;         // features: directions * hidden_size
  void* h_n;                   // like h0
  void* c_n;
  // Per index (rows, 5, hidden_size): the gates and the cell after each step; then per layer but
  // the last (rows, directions * hidden_size): its output. Null if no gradient is needed.
  void* saved;

  int64_t active(int64_t step) const { return batch_sizes ? batch_sizes[step] : batch; }
  int64_t first_row(int64_t step) const { return batch_sizes ? row_begin[step] : step * batch; }
  // Where row 0 of a step lies, in elements from the sequence's data.
  int64_t offset(const LstmSequence& s, int64_t step) const {
    return batch_sizes ? row_begin[step] * s.row_stride : step * s.step_stride;
  }
  int64_t in_features(int64_t layer) const { return layer ? directions * hidden_size : input_size; }
  int64_t tensors_per_index() const { return has_biases ? 4 : 2; }
  int64_t saved_gates(int64_t index) const { return index * rows * 5 * hidden_size; }
  int64_t saved_output(int64_t layer) const {
    return (layers * 5 + layer) * directions * rows * hidden_size;
  }
  int64_t saved_size() const { return saved_output(layers - 1); }
};

struct LstmGradParams {
  LstmParams p;              // h_n and c_n are not read
  LstmSequence grad_output;  // data null: zero
  const void* grad_h_n;      // like h0, or null: zero
  const void* grad_c_n;
  // Null: not asked for.
  LstmSequence grad_input;
  void* grad_h0;
  void* grad_c0;
  void* const* grad_weights;  // like weights, contiguous
};

void lstm_forward(const LstmParams&);
void lstm_backward(const LstmGradParams&);

}  // namespace pyops::cpu
