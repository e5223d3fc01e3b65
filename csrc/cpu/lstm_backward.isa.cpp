// The LSTM's backward pass through one layer.
#include <type_traits>

#include "lstm_cell.h"
#include "lstm_grad_plan.h"
#include "lstm_tile.h"

namespace pyops::cpu::PYOPS_ISA {
namespace {

constexpr int64_t kMostFloats = 4 * kLanes;  // of a block

// Words of which `low` and `high` hold the halves.
PYOPS_INLINE void interleave(const BFloat16* low, const BFloat16* high, int64_t count, float* dst) {
  WordInt* words = reinterpret_cast<WordInt*>(dst);
  for (int64_t i = 0; i < count; ++i) {
    words[i] = static_cast<int32_t>(low[i].bits | static_cast<uint32_t>(high[i].bits) << 16);
  }
}

template <class T>
PYOPS_INLINE void to_floats(const T* src, int64_t count, float* dst) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(dst + i, load(src + i));
  for (; i < count; ++i) dst[i] = to_float(src[i]);
}

// ---- packing

// dst[gate word][columns]: columns [first, first + count) of a weight (4 * hidden, features).
template <bool kPairs, class T>
void pack_columns(const LstmGradPlan& plan, const T* weight, int64_t features, int64_t first,
                  int64_t count, int64_t width, float* dst) {
  const int64_t H = plan.g.p.hidden_size, units = plan.units;
  const T zeros[kMostFloats] = {};
  const auto row = [&](int64_t k) {
    const int64_t unit = k / (4 * units) * units + k % units, gate = k / units % 4;
    return unit < H ? weight + (gate * H + unit) * features + first : zeros;
  };
  for (int64_t word = 0; word < plan.gate_words(); ++word, dst += width) {
    if constexpr (kPairs) {
      interleave(row(2 * word), row(2 * word + 1), count, dst);
    } else {
      to_floats(row(word), count, dst);
    }
    for (int64_t i = count; i < width; ++i) dst[i] = 0;
  }
}

template <bool kPairs, class T>
void prepare(const LstmGradPlan& plan, int64_t direction, int64_t column_block) {
  const LstmParams& p = plan.g.p;
  const int64_t index = plan.layer * p.directions + direction;
  const void* const* weights = p.weights + index * p.tensors_per_index();
  const LstmGradScratch& scratch = plan.directions[direction];
  const bool recurrent = column_block < plan.hidden_columns.blocks;
  const LstmColumns& columns = recurrent ? plan.hidden_columns : plan.in_columns;
  if (!recurrent) column_block -= plan.hidden_columns.blocks;
  const int64_t width = plan.column_floats(columns), first = column_block * width;
  pack_columns<kPairs>(
      plan, static_cast<const T*>(weights[recurrent ? 1 : 0]), columns.count, first,
      min(width, columns.count - first), width,
      (recurrent ? scratch.recurrent : scratch.input) + column_block * plan.gate_words() * width);
}

// ---- back through time

struct CellGradRow {
  const void* saved;     // [5][H]
  const void* previous;  // cell before the step
  const void* grad_out;  // or null
  const float* hidden;
  float* cell;
  void* gates;  // of the block, [4][units]
};

// The gates' gradients of `count` units, a vector or less, of one row.
template <class T, class Word>
PYOPS_INLINE void cell_grad(const CellGradRow& row, int64_t H, int64_t units, int count) {
  constexpr bool kShort = sizeof(Word) == 2;
  const T* saved = static_cast<const T*>(row.saved);
  const Vec one = splat(1.0f);
  const Vec i = load_first(saved, count), f = load_first(saved + H, count);
  const Vec g = load_first(saved + 2 * H, count), o = load_first(saved + 3 * H, count);
  const Vec c = tanh<kShort>(load_first(saved + 4 * H, count));
  const Vec before = load_first(static_cast<const T*>(row.previous), count);
  Vec dh = load_first(row.hidden, count);
  if (row.grad_out) dh += load_first(static_cast<const T*>(row.grad_out), count);
  const Vec dc = fma(dh * o, one - c * c, load_first(row.cell, count));
  Word* gates = static_cast<Word*>(row.gates);
  const int width = static_cast<int>(units);
  store_first(gates, dc * g * (i * (one - i)), width);
  store_first(gates + units, dc * before * (f * (one - f)), width);
  store_first(gates + 2 * units, dc * i * (one - g * g), width);
  store_first(gates + 3 * units, dh * c * (o * (one - o)), width);
  store_first(row.cell, dc * f, count);
}

PYOPS_INLINE int64_t active_rows(const LstmGradPlan& plan, const LstmGradChain& chain,
                                 int64_t step) {
  const int64_t active = plan.g.p.active(plan.time_of(chain.direction, step));
  return max(0, min(active, chain.row_end) - chain.row_begin);
}

// The state's gradients before the last step.
template <class T>
void start(const LstmGradPlan& plan, const LstmGradChain& chain) {
  const LstmParams& p = plan.g.p;
  const LstmGradScratch& scratch = plan.directions[chain.direction];
  const int64_t H = p.hidden_size, index = plan.layer * p.directions + chain.direction;
  const int64_t width = plan.hidden_columns.blocks * plan.column_floats(plan.hidden_columns);
  const int64_t first = chain.block_begin * plan.units;
  const int64_t count = min(H, chain.block_end * plan.units) - first;
  for (int64_t row = chain.row_begin; row < chain.row_end; ++row) {
    const int64_t at = (index * p.batch + row) * H + first;
    float* hidden = scratch.hidden + row * width + first;
    float* cell = scratch.cell + row * plan.padded_hidden() + first;
    for (int64_t i = 0; i < count; ++i) {
      hidden[i] = plan.g.grad_h_n ? to_float(static_cast<const T*>(plan.g.grad_h_n)[at + i]) : 0;
      cell[i] = plan.g.grad_c_n ? to_float(static_cast<const T*>(plan.g.grad_c_n)[at + i]) : 0;
    }
  }
}

template <class T>
void finish(const LstmGradPlan& plan, const LstmGradChain& chain) {
  const LstmParams& p = plan.g.p;
  const LstmGradScratch& scratch = plan.directions[chain.direction];
  const int64_t H = p.hidden_size, index = plan.layer * p.directions + chain.direction;
  const int64_t width = plan.hidden_columns.blocks * plan.column_floats(plan.hidden_columns);
  const int64_t first = chain.block_begin * plan.units;
  const int64_t count = min(H, chain.block_end * plan.units) - first;
  for (int64_t row = chain.row_begin; row < chain.row_end; ++row) {
    const int64_t at = (index * p.batch + row) * H + first;
    const float* hidden = scratch.hidden + row * width + first;
    const float* cell = scratch.cell + row * plan.padded_hidden() + first;
    for (int64_t i = 0; i < count; ++i) {
      if (plan.g.grad_h0) from_float(hidden[i], static_cast<T*>(plan.g.grad_h0) + at + i);
      if (plan.g.grad_c0) from_float(cell[i], static_cast<T*>(plan.g.grad_c0) + at + i);
    }
  }
}

template <bool kPairs, class T>
void run(const LstmGradPlan& plan, const LstmGradChain& chain, int64_t task) {
  using Word = std::conditional_t<kPairs, T, float>;
  const LstmParams& p = plan.g.p;
  const LstmGradScratch& scratch = plan.directions[chain.direction];
  const int64_t H = p.hidden_size, index = plan.layer * p.directions + chain.direction;
  const int64_t words = plan.gate_words();
  const int64_t block_width = plan.column_floats(plan.hidden_columns);
  const int64_t width = plan.hidden_columns.blocks * block_width;
  if (task == 0) {
    start<T>(plan, chain);
  } else {
    const int64_t later = p.steps - task;
    const char* gates =
        scratch.gates +
        (p.first_row(plan.time_of(chain.direction, later)) + chain.row_begin) * words * 4;
    const int64_t blocks = chain.column_end - chain.column_begin;
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t block = task % 2 ? chain.column_end - 1 - i : chain.column_begin + i;
      multiply<kPairs>(
          {gates, words * 4, 4, words, scratch.recurrent + block * words * block_width, block_width,
           scratch.hidden + chain.row_begin * width + block * block_width, width, false},
          active_rows(plan, chain, later), plan.hidden_columns.vectors);
    }
  }
  if (task == p.steps) return finish<T>(plan, chain);

  const int64_t step = p.steps - 1 - task, t = plan.time_of(chain.direction, step);
  const int64_t before = step > 0 ? plan.time_of(chain.direction, step - 1) : 0;
  const int64_t had = step > 0 ? active_rows(plan, chain, step - 1) : 0;
  const T* saved = static_cast<const T*>(p.saved) + p.saved_gates(index);
  const T* c0 = static_cast<const T*>(p.c0) + index * p.batch * H;
  const LstmSequence& dy = plan.grad_out;
  const int64_t rows = active_rows(plan, chain, step);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t row = chain.row_begin + i;
    const T* from = saved + (p.first_row(t) + row) * 5 * H;
    // A row that the step before does not have started here, from c0.
    const T* previous = i < had ? saved + ((p.first_row(before) + row) * 5 + 4) * H : c0 + row * H;
    const T* grad = dy.data ? static_cast<const T*>(dy.data) + p.offset(dy, t) +
                                  row * dy.row_stride + chain.direction * H
                            : nullptr;
    Word* gates = reinterpret_cast<Word*>(scratch.gates + (p.first_row(t) + row) * words * 4);
    for (int64_t block = chain.block_begin; block < chain.block_end; ++block) {
      const int64_t unit = block * plan.units;
      cell_grad<T, Word>(
          {from + unit, previous + unit, grad ? grad + unit : nullptr,
           scratch.hidden + row * width + unit, scratch.cell + row * plan.padded_hidden() + unit,
           gates + block * plan.block_floats()},
          H, plan.units, static_cast<int>(min(plan.units, H - unit)));
    }
  }
}

// ---- the input's gradient

// Rows of a sequence in the order of time: the one after a row.
struct RowCursor {
  int64_t t, b;

  static RowCursor at(const LstmParams& p, int64_t row) {
    if (!p.batch_sizes) return {row / p.batch, row % p.batch};
    int64_t t = 0;
    while (row >= p.row_begin[t] + p.batch_sizes[t]) ++t;
    return {t, row - p.row_begin[t]};
  }
  PYOPS_INLINE void advance(const LstmParams& p) {
    if (++b == p.active(t)) {
      b = 0;
      ++t;
    }
  }
};

template <bool kPairs, class T>
void input_gradient(const LstmGradPlan& plan, int64_t begin, int64_t end) {
  const LstmParams& p = plan.g.p;
  const int64_t words = plan.gate_words(), features = plan.in_features();
  const int64_t width = plan.column_floats(plan.in_columns);
  const LstmSequence& dx = plan.grad_in;
  alignas(64) float sums[kLstmRowsPerInputTask * kMostFloats];
  for (int64_t block = 0; block < plan.in_columns.blocks; ++block) {
    for (int64_t d = 0; d < p.directions; ++d) {
      const LstmGradScratch& scratch = plan.directions[d];
      multiply<kPairs>({scratch.gates + begin * words * 4, words * 4, 4, words,
                        scratch.input + block * words * width, width, sums, width, d > 0},
                       end - begin, plan.in_columns.vectors);
    }
    const int64_t first = block * width, count = min(width, features - first);
    RowCursor at = RowCursor::at(p, begin);
    for (int64_t row = begin; row < end; ++row, at.advance(p)) {
      T* to = static_cast<T*>(dx.data) + p.offset(dx, at.t) + at.b * dx.row_stride + first;
      const float* from = sums + (row - begin) * width;
      for (int64_t i = 0; i < count; i += kLanes) {
        store_first(to + i, load(from + i), static_cast<int>(min(kLanes, count - i)));
      }
    }
  }
}

// ---- the weights' gradients

// Elements [begin, end) of the row that a step's gates were made from: input, hidden state
// before, 1 for the bias.
template <class T, class Put>
PYOPS_INLINE void each_part(const LstmGradPlan& plan, int64_t direction, const RowCursor& at,
                            int64_t begin, int64_t end, const Put& put) {
  const LstmParams& p = plan.g.p;
  const int64_t in = plan.in_features(), H = p.hidden_size;
  const T* x =
      static_cast<const T*>(plan.in.data) + p.offset(plan.in, at.t) + at.b * plan.in.row_stride;
  const int64_t before = direction ? at.t + 1 : at.t - 1;
  const bool first = before < 0 || before >= p.steps || at.b >= p.active(before);
  const T* h = first ? static_cast<const T*>(p.h0) +
                           ((plan.layer * p.directions + direction) * p.batch + at.b) * H
                     : static_cast<const T*>(plan.out.data) + p.offset(plan.out, before) +
                           at.b * plan.out.row_stride + direction * H;
  if (begin < in) put(0, x + begin, min(end, in) - begin);
  const int64_t h_begin = max(begin, in) - in, h_end = min(end, in + H) - in;
  if (h_begin < h_end) put(in + h_begin - begin, h + h_begin, h_end - h_begin);
  T one;
  from_float(1.0f, &one);
  if (end > in + H) put(in + H - begin, &one, 1);
}

// to[word][columns] of rows [row, row + rows).
template <bool kPairs, class T>
void gather(const LstmGradPlan& plan, const LstmWeightTask& task, int64_t row, int64_t rows) {
  const LstmParams& p = plan.g.p;
  const int64_t columns = task.column_end - task.column_begin;
  RowCursor at = RowCursor::at(p, row);
  for (int64_t i = 0; i < rows; ++i, at.advance(p)) {
    if constexpr (kPairs) {
      // Even rows fill the low halves and clear the high ones.
      WordInt* to = reinterpret_cast<WordInt*>(task.gathered) + i / 2 * columns;
      each_part<T>(plan, task.direction, at, task.column_begin, task.column_end,
                   [&](int64_t to_column, const T* from, int64_t count) {
                     WordInt* words = to + to_column;
                     if (i % 2 == 0) {
                       for (int64_t j = 0; j < count; ++j) words[j] = from[j].bits;
                     } else {
                       for (int64_t j = 0; j < count; ++j) {
                         words[j] |=
                             static_cast<int32_t>(static_cast<uint32_t>(from[j].bits) << 16);
                       }
                     }
                   });
    } else {
      float* to = task.gathered + i * columns;
      each_part<T>(plan, task.direction, at, task.column_begin, task.column_end,
                   [&](int64_t to_column, const T* from, int64_t count) {
                     to_floats(from, count, to + to_column);
                   });
    }
  }
}

// Writes columns [begin, end) of a block's totals into the weights' gradients.
template <class T>
void write_weights(const LstmGradPlan& plan, const LstmWeightTask& task, int64_t block) {
  const LstmParams& p = plan.g.p;
  const int64_t index = plan.layer * p.directions + task.direction, H = p.hidden_size;
  const int64_t in = plan.in_features(), floats = plan.block_floats();
  void* const* grads = plan.g.grad_weights + index * p.tensors_per_index();
  const float* totals =
      plan.directions[task.direction].totals + block * plan.weight_columns() * floats;
  for (int64_t v = 0; v < plan.vectors; ++v) {
    for (int64_t column = task.column_begin; column < task.column_end;) {
      const bool is_input = column < in, is_hidden = !is_input && column < in + H;
      const int64_t part_begin = is_input ? 0 : is_hidden ? in : in + H;
      const int64_t part_end = is_input ? in : in + H + (is_hidden ? 0 : 1);
      const int64_t count = min(kLanes, min(part_end, task.column_end) - column);
      Vec cells[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        cells[i] = i < count ? load(totals + (column + i) * floats + v * kLanes) : Vec{};
      }
      transpose(cells);
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const int64_t at = v * kLanes + lane, gate = at / plan.units;
        const int64_t unit = block * plan.units + at % plan.units, row = gate * H + unit;
        if (unit >= H) continue;
        if (is_input || is_hidden) {
          const int64_t features = is_input ? in : H;
          store_first(
              static_cast<T*>(grads[is_input ? 0 : 1]) + row * features + column - part_begin,
              cells[lane], static_cast<int>(count));
        } else if (p.has_biases) {
          store_first(static_cast<T*>(grads[2]) + row, cells[lane], 1);
          store_first(static_cast<T*>(grads[3]) + row, cells[lane], 1);
        }
      }
      column += count;
    }
  }
}

template <bool kPairs, class T>
void weight_gradients(const LstmGradPlan& plan, const LstmWeightTask& task) {
  const LstmParams& p = plan.g.p;
  const LstmGradScratch& scratch = plan.directions[task.direction];
  const int64_t floats = plan.block_floats(), gate_words = plan.gate_words();
  const int64_t columns = task.column_end - task.column_begin;
  alignas(64) float panel[kPairs ? kLstmRowsPerSum / 2 * kMostFloats : 1];
  for (int64_t row = 0; row < p.rows; row += kLstmRowsPerSum) {
    const int64_t rows = min(kLstmRowsPerSum, p.rows - row);
    gather<kPairs, T>(plan, task, row, rows);
    for (int64_t block = task.block_begin; block < task.block_end; ++block) {
      Product product = {
          reinterpret_cast<const char*>(task.gathered),
          4,
          columns * 4,
          rows,
          reinterpret_cast<const float*>(scratch.gates) + row * gate_words + block * floats,
          gate_words,
          scratch.totals + (block * plan.weight_columns() + task.column_begin) * floats,
          floats,
          row > 0};
      if constexpr (kPairs) {
        const T* gates =
            reinterpret_cast<const T*>(scratch.gates) + row * 2 * gate_words + block * floats;
        const T zeros[kMostFloats] = {};
        for (int64_t i = 0; i < rows; i += 2) {
          const T* low = gates + i * 2 * gate_words;
          interleave(low, i + 1 < rows ? low + 2 * gate_words : zeros, floats,
                     panel + i / 2 * floats);
        }
        product.words = (rows + 1) / 2;
        product.w = panel;
        product.w_stride = floats;
      }
      multiply<kPairs>(product, columns, plan.vectors);
    }
  }
  for (int64_t block = task.block_begin; block < task.block_end; ++block) {
    write_weights<T>(plan, task, block);
  }
}

}  // namespace

#if defined(__AVX512BF16__)
#define PYOPS_LSTM_PAIRS(function, ...) \
  if (plan.pairs) return function<true, BFloat16>(plan, __VA_ARGS__);
#else
#define PYOPS_LSTM_PAIRS(function, ...)
#endif
#define PYOPS_LSTM_SELECT(function, ...)                                                 \
  PYOPS_LSTM_PAIRS(function, __VA_ARGS__)                                                \
  if (plan.g.p.dtype == DType::kFloat) return function<false, float>(plan, __VA_ARGS__); \
  if (plan.g.p.dtype == DType::kHalf) return function<false, Half>(plan, __VA_ARGS__);   \
  function<false, BFloat16>(plan, __VA_ARGS__)

void lstm_grad_prepare(const LstmGradPlan& plan, int64_t direction, int64_t column_block) {
  PYOPS_LSTM_SELECT(prepare, direction, column_block);
}

void lstm_grad_run(const LstmGradPlan& plan, const LstmGradChain& chain, int64_t task) {
  PYOPS_LSTM_SELECT(run, chain, task);
}

void lstm_grad_input(const LstmGradPlan& plan, int64_t begin, int64_t end) {
  PYOPS_LSTM_SELECT(input_gradient, begin, end);
}

void lstm_grad_weights(const LstmGradPlan& plan, const LstmWeightTask& task) {
  PYOPS_LSTM_SELECT(weight_gradients, task);
}

}  // namespace pyops::cpu::PYOPS_ISA
