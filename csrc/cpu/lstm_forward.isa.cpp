// One chain of the LSTM's forward pass: products and cell fused, step after step.
#include <type_traits>

#include "lstm_cell.h"
#include "lstm_plan.h"
#include "lstm_tile.h"

namespace pyops::cpu::PYOPS_ISA {
namespace {

constexpr int64_t kRowsAtOnce = 48;  // rows whose sums wait for the cell, in the first-level cache
constexpr int64_t kMostVectors = 4;

// ---- packing

// Words [word, word + kLanes) of a row of `features` elements, zeros after them.
template <bool kPairs, class T>
PYOPS_INLINE Vec load_words(const T* row, int64_t features, int64_t word) {
  if constexpr (kPairs) {
    const int64_t left = features - 2 * word;
    if (left >= 2 * kLanes) return load(reinterpret_cast<const float*>(row + 2 * word));
    T part[2 * kLanes] = {};
    for (int64_t i = 0; i < left; ++i) part[i] = row[2 * word + i];
    return load(reinterpret_cast<const float*>(part));
  } else {
    return load_first(row + word, static_cast<int>(min(features - word, kLanes)));
  }
}

// dst[word][vector][lane] of the weights' rows that belong to a block's units.
template <bool kPairs, class T>
void pack_block(const LstmPlan& plan, const T* weight, int64_t features, int64_t block,
                float* dst) {
  const int64_t H = plan.p.hidden_size, words = plan.words(features), V = plan.vectors;
  for (int64_t v = 0; v < V; ++v) {
    const T* rows[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t gate = V == 4 ? v : 2 * v + lane / plan.units;
      const int64_t unit = block * plan.units + (V == 4 ? lane : lane % plan.units);
      rows[lane] = unit < H ? weight + (gate * H + unit) * features : nullptr;
    }
    for (int64_t word = 0; word < words; word += kLanes) {
      Vec cells[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) {
        cells[lane] = rows[lane] ? load_words<kPairs>(rows[lane], features, word) : Vec{};
      }
      transpose(cells);
      const int64_t count = min(kLanes, words - word);
      for (int64_t i = 0; i < count; ++i) {
        store(dst + ((word + i) * V + v) * kLanes, cells[i]);
      }
    }
  }
}

// Calls of memcpy cost more than these few bytes do.
PYOPS_INLINE void copy_floats(const float* src, int64_t count, float* dst) {
  for (; count >= 16; count -= 16, src += 16, dst += 16) std::memcpy(dst, src, 64);
  if (count & 8) std::memcpy(dst, src, 32), src += 8, dst += 8;
  if (count & 4) std::memcpy(dst, src, 16), src += 4, dst += 4;
  for (int64_t i = 0; i < (count & 3); ++i) dst[i] = src[i];
}

// A row of features as words; an odd last bfloat16 gets a zero beside it.
template <bool kPairs, class T>
PYOPS_INLINE void copy_features(const T* src, int64_t features, char* dst) {
  float* to = reinterpret_cast<float*>(dst);
  if constexpr (kPairs) {
    copy_floats(reinterpret_cast<const float*>(src), features / 2, to);
    if (features % 2) {
      reinterpret_cast<T*>(dst)[features - 1] = src[features - 1];
      reinterpret_cast<T*>(dst)[features] = T{0};
    }
  } else if constexpr (sizeof(T) == 4) {
    copy_floats(src, features, to);
  } else {
    int64_t i = 0;
    for (; i + kLanes <= features; i += kLanes) store(to + i, load(src + i));
    for (; i < features; ++i) to[i] = to_float(src[i]);
  }
}

template <bool kPairs, class T>
void prepare(const LstmPlan& plan, int64_t index, int64_t block) {
  const LstmParams& p = plan.p;
  const LstmLayerScratch& scratch = plan.layers[index];
  const void* const* weights = p.weights + index * p.tensors_per_index();
  const int64_t H = p.hidden_size, in = p.in_features(index / p.directions);
  float* packed = scratch.packed + block * plan.block_words(index) * plan.block_floats();
  pack_block<kPairs>(plan, static_cast<const T*>(weights[1]), H, block, packed);
  pack_block<kPairs>(plan, static_cast<const T*>(weights[0]), in, block,
                     packed + plan.hidden_words() * plan.block_floats());

  const int64_t first = block * plan.units, units = min(plan.units, H - first);
  float* bias = scratch.bias + block * plan.block_floats();
  for (int64_t i = 0; i < plan.block_floats(); ++i) {
    const int64_t gate = i / plan.units, unit = i % plan.units;
    bias[i] = 0;
    if (!p.has_biases || unit >= units) continue;
    const int64_t at = gate * H + first + unit;
    bias[i] = to_float(static_cast<const T*>(weights[2])[at]) +
              to_float(static_cast<const T*>(weights[3])[at]);
  }

  const int64_t row_bytes = plan.activation_bytes(index), padded = plan.padded_hidden();
  for (int64_t row = 0; row < p.batch; ++row) {
    const int64_t at = (index * p.batch + row) * H + first;
    float* cell = scratch.cell + row * padded + first;
    for (int64_t i = 0; i < plan.units; ++i) {
      cell[i] = i < units ? to_float(static_cast<const T*>(p.c0)[at + i]) : 0;
    }
    // Both parities: a row of a reversed packed sequence starts at a step of its own.
    for (int64_t parity = 0; parity < 2; ++parity) {
      char* to = scratch.activations + (parity * p.batch + row) * row_bytes;
      for (int64_t i = 0; i < units; ++i) {
        const T h = static_cast<const T*>(p.h0)[at + i];
        if constexpr (kPairs) {
          reinterpret_cast<T*>(to)[first + i] = h;
          if (first + i == H - 1 && H % 2) reinterpret_cast<T*>(to)[H] = T{0};
        } else {
          reinterpret_cast<float*>(to)[first + i] = to_float(h);
        }
      }
    }
  }
}

// ---- the cell

// Where the results of a vector of units of one row go.
template <class T, class Word>
struct CellRow {
  float* cell;
  Word* hidden;  // the next step's input
  T* output;
  T* saved;  // [5][H], or null
};

struct Gates {
  Vec i, f, g, o;
};

// Gives the new hidden state and cell; gates are activated in place.
template <bool kShort>
PYOPS_INLINE Vec update_cell(Gates* gates, Vec* cell) {
  gates->i = sigmoid<kShort>(gates->i);
  gates->f = sigmoid<kShort>(gates->f);
  gates->g = tanh<kShort>(gates->g);
  gates->o = sigmoid<kShort>(gates->o);
  *cell = fma(gates->f, *cell, gates->i * gates->g);
  return gates->o * tanh<kShort>(*cell);
}

PYOPS_INLINE VecInt half_lanes(bool high) {
  VecInt lanes;
  for (int i = 0; i < kLanes; ++i) {
    lanes[i] = i % (kLanes / 2) + (i < kLanes / 2 ? 0 : kLanes) + (high ? kLanes / 2 : 0);
  }
  return lanes;
}

// All units of a block exist: whole vectors (or halves of one) instead of masks.
template <bool kFull, bool kHalf, class T>
PYOPS_INLINE void store_part(T* p, Vec v, int count) {
  if (!kFull) return store_first(p, v, count);
  if (!kHalf) return store(p, v);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    _mm256_storeu_ps(p, _mm512_castps512_ps256(v));
    return;
  }
#endif
  T all[kLanes];
  store(all, v);
  std::memcpy(p, all, kLanes / 2 * sizeof(T));
}

template <bool kFull, bool kHalf, class T, class Word>
PYOPS_INLINE void store_units(const CellRow<T, Word>& to, int64_t H, const Gates& gates, Vec cell,
                              Vec hidden, int count) {
  store_part<kFull, kHalf>(to.hidden, hidden, count);
  store_part<kFull, kHalf>(to.output, hidden, count);
  if (to.saved) {
    store_part<kFull, kHalf>(to.saved, gates.i, count);
    store_part<kFull, kHalf>(to.saved + H, gates.f, count);
    store_part<kFull, kHalf>(to.saved + 2 * H, gates.g, count);
    store_part<kFull, kHalf>(to.saved + 3 * H, gates.o, count);
    store_part<kFull, kHalf>(to.saved + 4 * H, cell, count);
  }
}

struct CellBlock {
  const float* sums;       // [row][block_floats]
  const float* projected;  // the same, or null
  const float* bias;       // [block_floats]
  int64_t rows, H;
  int count;  // units of the block that exist
  float* cell;
  int64_t cell_stride;
  char* hidden;
  int64_t hidden_bytes;
  void* output;
  int64_t output_stride;
  void* saved;
};

PYOPS_INLINE Vec gate_sum(const CellBlock& c, int64_t row, int64_t v, int64_t V) {
  const int64_t at = (row * V + v) * kLanes;
  Vec sum = load(c.sums + at);
  if (c.projected) sum += load(c.projected + at);
  return sum + load(c.bias + v * kLanes);
}

template <class T, class Word>
PYOPS_INLINE CellRow<T, Word> cell_row(const CellBlock& c, int64_t row) {
  return {c.cell + row * c.cell_stride, reinterpret_cast<Word*>(c.hidden + row * c.hidden_bytes),
          static_cast<T*>(c.output) + row * c.output_stride,
          c.saved ? static_cast<T*>(c.saved) + row * 5 * c.H : nullptr};
}

template <bool kFull, class T, class Word>
void cell_wide(const CellBlock& c) {
  constexpr bool kShort = sizeof(Word) == 2;
  for (int64_t row = 0; row < c.rows; ++row) {
    const CellRow<T, Word> to = cell_row<T, Word>(c, row);
    Gates gates = {gate_sum(c, row, 0, 4), gate_sum(c, row, 1, 4), gate_sum(c, row, 2, 4),
                   gate_sum(c, row, 3, 4)};
    Vec cell = load(to.cell);
    const Vec hidden = update_cell<kShort>(&gates, &cell);
    store(to.cell, cell);
    store_units<kFull, false>(to, c.H, gates, cell, hidden, c.count);
  }
}

// A block of half a vector of units: two rows share a vector.
template <bool kFull, class T, class Word>
void cell_narrow(const CellBlock& c) {
  constexpr bool kShort = sizeof(Word) == 2;
  constexpr int kHalf = kLanes / 2;
  const VecInt low = half_lanes(false), high = half_lanes(true);
  for (int64_t row = 0; row < c.rows; row += 2) {
    const int64_t other = min(row + 1, c.rows - 1);
    const Vec a0 = gate_sum(c, row, 0, 2), a1 = gate_sum(c, row, 1, 2);
    const Vec b0 = gate_sum(c, other, 0, 2), b1 = gate_sum(c, other, 1, 2);
    Gates gates = {__builtin_shuffle(a0, b0, low), __builtin_shuffle(a0, b0, high),
                   __builtin_shuffle(a1, b1, low), __builtin_shuffle(a1, b1, high)};
    const CellRow<T, Word> to = cell_row<T, Word>(c, row), to_other = cell_row<T, Word>(c, other);
    Vec cell = __builtin_shuffle(load_first(to.cell, kHalf), load_first(to_other.cell, kHalf), low);
    Vec hidden = update_cell<kShort>(&gates, &cell);
    store_part<true, true>(to.cell, cell, kHalf);
    store_units<kFull, true>(to, c.H, gates, cell, hidden, c.count);
    if (other == row) continue;
    const auto upper = [&](Vec v) { return __builtin_shuffle(v, v, high); };
    gates = {upper(gates.i), upper(gates.f), upper(gates.g), upper(gates.o)};
    cell = upper(cell);
    hidden = upper(hidden);
    store_part<true, true>(to_other.cell, cell, kHalf);
    store_units<kFull, true>(to_other, c.H, gates, cell, hidden, c.count);
  }
}

template <class T, class Word>
PYOPS_INLINE void update_cells(const CellBlock& c, bool wide, bool full) {
  if (wide) return full ? cell_wide<true, T, Word>(c) : cell_wide<false, T, Word>(c);
  full ? cell_narrow<true, T, Word>(c) : cell_narrow<false, T, Word>(c);
}

// ---- a chain

// out[row][block_floats] = a[row][words] * w[words][block_floats]; `next` as in Product.
template <bool kPairs>
PYOPS_INLINE void multiply_block(const LstmPlan& plan, const char* a, int64_t row_bytes,
                                 int64_t rows, int64_t words, const float* w, const float* next,
                                 float* out) {
  const int64_t floats = plan.block_floats();
  multiply<kPairs>({a, row_bytes, 4, words, w, floats, out, floats, false, next}, rows,
                   plan.vectors);
}

PYOPS_INLINE int64_t active_rows(const LstmPlan& plan, const LstmChain& chain, int64_t step) {
  const int64_t active = plan.p.active(plan.time_of(chain.index, step));
  return max(0, min(active, chain.row_end) - chain.row_begin);
}

template <bool kPairs, class T>
void copy_inputs(const LstmPlan& plan, const LstmChain& chain, int64_t step, int64_t rows,
                 char* dst, int64_t row_bytes) {
  const int64_t layer = chain.index / plan.p.directions, in = plan.p.in_features(layer);
  const LstmSequence& s = layer ? plan.hidden[layer - 1] : plan.p.input;
  const T* src = static_cast<const T*>(s.data) + plan.p.offset(s, plan.time_of(chain.index, step)) +
                 chain.row_begin * s.row_stride;
  for (int64_t row = 0; row < rows; ++row) {
    copy_features<kPairs>(src + row * s.row_stride, in, dst + row * row_bytes);
  }
}

// Where the inputs of a chain's steps from `begin` on lie, if as evenly spaced rows of words, which
// then need no copy; else null.
template <bool kPairs, class T>
PYOPS_INLINE const T* inputs_as_words(const LstmPlan& plan, const LstmChain& chain, int64_t begin,
                                      int64_t* row_bytes) {
  const int64_t layer = chain.index / plan.p.directions, in = plan.p.in_features(layer);
  const LstmSequence& s = layer ? plan.hidden[layer - 1] : plan.p.input;
  const bool words = sizeof(T) == 4 || (kPairs && in % 2 == 0);
  const bool forwards = chain.index % plan.p.directions == 0;
  const bool even = s.step_stride == s.row_stride * (chain.row_end - chain.row_begin);
  if (!words || !forwards || !even || plan.p.batch_sizes) return nullptr;
  *row_bytes = s.row_stride * static_cast<int64_t>(sizeof(T));
  return static_cast<const T*>(s.data) + plan.p.offset(s, begin) + chain.row_begin * s.row_stride;
}

// Input products of the chain's blocks for the steps of a chunk.
template <bool kPairs, class T>
void project(const LstmPlan& plan, const LstmChain& chain, int64_t begin, int64_t end) {
  const int64_t words = plan.input_words(chain.index);
  const char* a = chain.projected_in;
  int64_t row_bytes = 4 * words, rows = 0;
  if (const T* lies = inputs_as_words<kPairs, T>(plan, chain, begin, &row_bytes)) {
    a = reinterpret_cast<const char*>(lies);
    rows = (end - begin) * (chain.row_end - chain.row_begin);
  } else {
    for (int64_t step = begin; step < end; ++step) {
      const int64_t count = active_rows(plan, chain, step);
      copy_inputs<kPairs, T>(plan, chain, step, count, chain.projected_in + rows * row_bytes,
                             row_bytes);
      rows += count;
    }
  }
  const int64_t floats = plan.block_floats();
  for (int64_t block = chain.block_begin; block < chain.block_end; ++block) {
    const float* w = plan.layers[chain.index].packed +
                     (block * plan.block_words(chain.index) + plan.hidden_words()) * floats;
    const float* next =
        block + 1 < chain.block_end ? w + plan.block_words(chain.index) * floats : nullptr;
    multiply_block<kPairs>(
        plan, a, row_bytes, rows, words, w, next,
        chain.projected + (block - chain.block_begin) * plan.projected_rows(chain) * floats);
  }
}

template <bool kPairs, class T>
void run(const LstmPlan& plan, const LstmChain& chain, int64_t begin, int64_t end) {
  using Word = std::conditional_t<kPairs, T, float>;
  const LstmParams& p = plan.p;
  const int64_t index = chain.index, layer = index / p.directions, H = p.hidden_size;
  const LstmLayerScratch& scratch = plan.layers[index];
  const LstmSequence& out = layer + 1 < p.layers ? plan.hidden[layer] : p.output;
  const int64_t row_bytes = plan.activation_bytes(index), floats = plan.block_floats();
  const int64_t words = row_bytes / 4, padded = plan.padded_hidden();
  int64_t projected_row = 0;
  if (plan.apart) {
    const int64_t chunk_begin = begin / plan.chunk * plan.chunk;
    if (begin == chunk_begin) {
      project<kPairs, T>(plan, chain, begin, min(begin + plan.chunk, p.steps));
    }
    for (int64_t step = chunk_begin; step < begin; ++step) {
      projected_row += active_rows(plan, chain, step);
    }
  }
  alignas(64) float sums[kRowsAtOnce * kMostVectors * kLanes];
  for (int64_t step = begin; step < end; ++step) {
    const int64_t t = plan.time_of(index, step), rows = active_rows(plan, chain, step);
    char* now = scratch.activations + (step % 2 * p.batch + chain.row_begin) * row_bytes;
    char* next = scratch.activations + ((step + 1) % 2 * p.batch + chain.row_begin) * row_bytes;
    if (!plan.apart) {
      copy_inputs<kPairs, T>(plan, chain, step, rows, now + 4 * plan.hidden_words(), row_bytes);
    }
    const int64_t blocks = chain.block_end - chain.block_begin;
    for (int64_t i = 0; i < blocks; ++i) {
      // There and back, so that a step starts with the weights that are still in the cache.
      const int64_t block = step % 2 ? chain.block_end - 1 - i : chain.block_begin + i;
      const int64_t first = block * plan.units;
      const int64_t block_floats = plan.block_words(index) * floats;
      const float* w = scratch.packed + block * block_floats;
      const float* next_block = step % 2 ? w - block_floats : w + block_floats;
      const float* wanted = plan.apart && i + 1 < blocks ? next_block : nullptr;
      for (int64_t row = 0; row < rows; row += kRowsAtOnce) {
        CellBlock c{};
        c.rows = min(kRowsAtOnce, rows - row);
        c.sums = sums;
        if (plan.apart) {
          c.projected =
              chain.projected +
              ((block - chain.block_begin) * plan.projected_rows(chain) + projected_row + row) *
                  floats;
          for (int64_t at = 0; at < c.rows * floats; at += 16) {
            __builtin_prefetch(c.projected + at, 0, 2);
          }
        }
        multiply_block<kPairs>(plan, now + row * row_bytes, row_bytes, c.rows, words, w, wanted,
                               sums);
        c.bias = scratch.bias + block * floats;
        c.H = H;
        c.count = static_cast<int>(min(plan.units, H - first));
        c.cell_stride = padded;
        c.cell = scratch.cell + (chain.row_begin + row) * padded + first;
        c.hidden = next + row * row_bytes + first * sizeof(Word);
        c.hidden_bytes = row_bytes;
        c.output = static_cast<T*>(out.data) + p.offset(out, t) +
                   (chain.row_begin + row) * out.row_stride + index % p.directions * H + first;
        c.output_stride = out.row_stride;
        if (p.saved) {
          c.saved = static_cast<T*>(p.saved) + p.saved_gates(index) +
                    (p.first_row(t) + chain.row_begin + row) * 5 * H + first;
        }
        update_cells<T, Word>(c, plan.vectors == 4, c.count == plan.units);
      }
    }
    projected_row += rows;

    // Rows that end here: those that the next step does not have.
    const int64_t staying = step + 1 < p.steps ? min(rows, active_rows(plan, chain, step + 1)) : 0;
    const int64_t first = chain.block_begin * plan.units;
    const int64_t units = min(H, chain.block_end * plan.units) - first;
    for (int64_t row = staying; row < rows; ++row) {
      const int64_t at = (index * p.batch + chain.row_begin + row) * H + first;
      const T* y = static_cast<const T*>(out.data) + p.offset(out, t) +
                   (chain.row_begin + row) * out.row_stride + index % p.directions * H + first;
      std::memcpy(static_cast<T*>(p.h_n) + at, y, units * sizeof(T));
      const float* cell = scratch.cell + (chain.row_begin + row) * padded + first;
      for (int64_t i = 0; i < units; ++i) from_float(cell[i], static_cast<T*>(p.c_n) + at + i);
    }
  }
}

}  // namespace

void lstm_prepare(const LstmPlan& plan, int64_t index, int64_t block) {
  if (plan.p.dtype == DType::kFloat) return prepare<false, float>(plan, index, block);
  if (plan.p.dtype == DType::kHalf) return prepare<false, Half>(plan, index, block);
#if defined(__AVX512BF16__)
  if (plan.pairs) return prepare<true, BFloat16>(plan, index, block);
#endif
  prepare<false, BFloat16>(plan, index, block);
}

void lstm_run(const LstmPlan& plan, const LstmChain& chain, int64_t begin, int64_t end) {
  if (plan.p.dtype == DType::kFloat) return run<false, float>(plan, chain, begin, end);
  if (plan.p.dtype == DType::kHalf) return run<false, Half>(plan, chain, begin, end);
#if defined(__AVX512BF16__)
  if (plan.pairs) return run<true, BFloat16>(plan, chain, begin, end);
#endif
  run<false, BFloat16>(plan, chain, begin, end);
}

}  // namespace pyops::cpu::PYOPS_ISA
