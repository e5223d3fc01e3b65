// Attention forward: online softmax over blocks of keys, on transposed scores.
//
// A unit is up to kBlockQueries queries of one head; a task is a few units that share keys and
// values, one block of which is converted or paired for all of them. Each block's P V is summed
// from zero and then added to the rescaled output: one long running sum has several times the
// rounding error.
#include "attention.h"
#include "attention_short.h"
#include "attention_softmax.h"
#include "runtime.h"

namespace pyops::cpu::PYOPS_ISA {
namespace {

constexpr int kMostUnits = 4;

struct Plan {
  AttentionForward f;
  bool finish;            // scores need more than a positive scale, which exp2 takes along
  float to_log2, to_log;  // from a score to an exponent of 2, and to a natural one
  int64_t group;          // query heads that share a key head
  int64_t blocks;         // of queries of one head
  int64_t units, tasks;   // units a task has at most; tasks of one (batch, key head)
  int64_t words;          // of one query
  int64_t block_keys;
  bool convert;  // keys and values go to float scratch
};

struct Unit {
  int64_t h, row, rows, vectors, width;
  int64_t begin, end;  // keys that any of its rows sees; begin % kQuad == 0
  bool first;          // no block has been added yet
  bool by_rows;        // see output_rows
  bool dots;           // see score_dots; q is (rows, head_dim)
  float *q, *o;        // (words, width), (head_dim_v, width)
  float *most, *sum;   // (width,): running maximum of the scores, sum of exp(score - most)
};

// ---- one block of keys

// Calls score_keys / output_dims for a run-time number of vectors.
template <bool kPairs, int Vectors = kBlockVectors>
void score_vectors(int64_t vectors, const float* q, int64_t width, const char* k, int64_t k_row,
                   int64_t dim, float* s, int64_t count) {
  if constexpr (Vectors > 1) {
    if (vectors < Vectors) {
      return score_vectors<kPairs, Vectors - 1>(vectors, q, width, k, k_row, dim, s, count);
    }
  }
  score_keys<kPairs, Vectors>(q, width, k, k_row, dim, s, count);
}
template <bool kPairs, int Vectors = kBlockVectors>
void output_vectors(int64_t vectors, const float* p, int64_t width, const char* v, int64_t v_row,
                    const WordRange& range, const float* alpha, bool first, float* o, int64_t dim) {
  if constexpr (Vectors > 1) {
    if (vectors < Vectors) {
      return output_vectors<kPairs, Vectors - 1>(vectors, p, width, v, v_row, range, alpha, first,
                                                 o, dim);
    }
  }
  output_dims<kPairs, Vectors>(p, width, v, v_row, range, alpha, first, o, dim);
}

// Adds keys [begin, end), which k and v begin at, to a unit of dots whose scores need nothing but
// the window.
inline void add_dots(const Plan& plan, const AttentionSequence& sequence, Unit& u, int64_t begin,
                     int64_t end, const char* k, int64_t k_row, const float* v, int64_t v_row) {
  const AttentionProblem& p = plan.f.p;
  alignas(64) float s[kDotQueries * kDotKeys];
  float alpha[kDotQueries];
  const int64_t count = end - begin;
  score_dots(u.q, p.head_dim, u.rows, k, k_row, p.head_dim, s, count);
  for (int64_t r = 0; r < u.rows; ++r) {
    const int64_t seen_end = max(0, min(count, end_visible(p, sequence, u.row + r) - begin));
    const int64_t seen = max(0, min(seen_end, first_visible(p, sequence, u.row + r) - begin));
    softmax_dots(s + r * kDotKeys, seen, seen_end, count, plan.to_log2, u.most + r, u.sum + r,
                 alpha + r);
  }
  output_rows<kDotQueries>(static_cast<int>(u.rows), s, 1, kDotKeys, v, v_row, 0, count, alpha,
                           u.first, u.o, p.head_dim_v);
  u.first = false;
}

// Adds keys [from, to) to the unit. k, v: row 0 is key `from`; v holds words. s: (block_keys,
// width).
template <bool kPairs>
void add_block(const Plan& plan, const AttentionSequence& sequence, int64_t b, Unit& u,
               int64_t from, int64_t to, const char* k, int64_t k_row, const char* v, int64_t v_row,
               float* scores) {
  const AttentionProblem& p = plan.f.p;
  const int64_t key_begin = max(from, u.begin), key_end = min(to, u.end);
  if (key_begin >= key_end) return;
  float* s = scores - from * u.width;  // row j is key j

  if constexpr (!kPairs) {
    if (u.dots && !plan.finish && !p.dropout) {
      return add_dots(plan, sequence, u, key_begin, key_end, k + (key_begin - from) * k_row, k_row,
                      reinterpret_cast<const float*>(v + (key_begin - from) * v_row), v_row / 4);
    }
  }
  int64_t begin[kBlockVectors], end[kBlockVectors];  // what each vector sees
  for (int64_t i = 0; i < u.vectors; ++i) {
    const int64_t row = u.row + i * kLanes, last = min(row + kLanes, u.row + u.rows) - 1;
    end[i] = max(key_begin, min(key_end, end_visible(p, sequence, last)));
    begin[i] = min(end[i], max(key_begin, round_down(first_visible(p, sequence, row), kQuad)));
  }

  if (u.dots) {
    alignas(64) float dots[kDotQueries * kDotKeys];
    score_dots(u.q, p.head_dim, u.rows, k + (key_begin - from) * k_row, k_row, p.head_dim, dots,
               key_end - key_begin);
    spread_dots(dots, u.rows, key_end - key_begin, s + key_begin * u.width);
  }
  for (int64_t j = u.dots ? key_end : key_begin; j < key_end;) {
    int64_t low = 0, high = u.vectors, next = key_end;
    while (low < u.vectors && end[low] <= j) ++low;
    while (high > low && begin[high - 1] > j) --high;
    if (low < high) next = min(next, end[low]);
    if (high < u.vectors) next = min(next, begin[high]);
    if (low < high) {
      score_vectors<kPairs>(high - low, u.q + low * kLanes, u.width, k + (j - from) * k_row, k_row,
                            p.head_dim, s + j * u.width + low * kLanes, next - j);
    }
    j = next;
  }

  alignas(64) float alpha[kBlockQueries];
  const Vec to_log2 = splat(plan.to_log2), hidden = splat(-kInfinity);
  WordRange range{};
  const int64_t per_word = kPairs ? 2 : 1;
  range.begin = (key_begin - from) / per_word;
  for (int64_t i = 0; i < u.vectors; ++i) {
    const int64_t row = u.row + i * kLanes;
    const QueryLanes lanes =
        query_lanes(p, sequence, b, u.h, row, min(kLanes, u.row + u.rows - row));
    float* column = s + i * kLanes;
    if (plan.finish) finish_scores(lanes, begin[i], end[i], column, u.width);
    apply_window(lanes, begin[i], end[i], column, u.width);
    const int64_t count = round_up(end[i] - begin[i], kQuad);
    for (int64_t j = end[i]; j < begin[i] + count; ++j) store(column + j * u.width, hidden);

    const float* seen = column + begin[i] * u.width;
    const Vec before = load(u.most + i * kLanes);
    const Vec most = maximum(seen, u.width, count, before);
    const Vec base = most == hidden ? Vec{} : most;  // nothing seen: -infinity less itself is NaN
    const Vec rescale = exp2((before - base) * to_log2);
    // Words take the place of the scores: row (key - from) / per_word.
    const int64_t first_word = (begin[i] - from) / per_word;
    float* words = scores + i * kLanes + first_word * u.width;
    const Vec sum = p.dropout ? exponentials<kPairs, true>(seen, words, u.width, count, base,
                                                           to_log2, lanes, begin[i])
                              : exponentials<kPairs, false>(seen, words, u.width, count, base,
                                                            to_log2, lanes, begin[i]);
    range.end[i] = ceil_div(end[i] - from, per_word);
    for (int64_t j = range.begin; j < (count > 0 ? first_word : range.end[i]); ++j) {
      store(scores + i * kLanes + j * u.width, Vec{});
    }
    store(u.most + i * kLanes, most);
    store(u.sum + i * kLanes, fma(load(u.sum + i * kLanes), rescale, sum));
    store(alpha + i * kLanes, rescale);
  }
  if (u.by_rows) {
    output_rows(static_cast<int>(u.rows), scores, u.width, 1, reinterpret_cast<const float*>(v),
                v_row / 4, range.begin, range.end[0], alpha, u.first, u.o, p.head_dim_v);
  } else {
    output_vectors<kPairs>(u.vectors, scores, u.width, v, v_row, range, alpha, u.first, u.o,
                           p.head_dim_v);
  }
  u.first = false;
}

// ---- tasks

template <class T>
void store_output(const Plan& plan, const Unit& u, T* output, float* lse) {
  const AttentionForward& f = plan.f;
  const int64_t row_stride = f.output_strides.row, dim = f.p.head_dim_v;
  for (int64_t v = 0; v < u.vectors; ++v) {
    const int rows = static_cast<int>(min(kLanes, u.rows - v * kLanes));
    const Vec sum = load(u.sum + v * kLanes);
    const Vec factor = sum == Vec{} ? Vec{} : f.p.keep_scale / sum;
    if (lse) {
      const Vec total = fma(load(u.most + v * kLanes), splat(plan.to_log), log(sum));
      store_first(lse + v * kLanes, total, rows);
    }
    if (u.by_rows) {
      for (int i = 0; i < rows; ++i) {
        const float* row = u.o + i * round_up(dim, kLanes);
        for (int64_t d = 0; d < dim; d += kLanes) {
          const Vec out = u.first ? Vec{} : load(row + d) * factor[i];
          store_first(output + i * row_stride + d, out, static_cast<int>(min(kLanes, dim - d)));
        }
      }
      continue;
    }
    for (int64_t d = 0; d < dim; d += kLanes) {
      const int count = static_cast<int>(min(kLanes, dim - d));
      Vec block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        block[i] =
            i < count && !u.first ? load(u.o + (d + i) * u.width + v * kLanes) * factor : Vec{};
      }
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        if (i < rows) store_first(output + (v * kLanes + i) * row_stride + d, block[i], count);
      }
    }
  }
}

// Where a task lies: units [first, end) of one (batch, key head).
struct Place {
  int64_t b, head_kv, first, end;
};

PYOPS_INLINE Place place_of(const Plan& plan, int64_t task) {
  const int64_t head = task / plan.tasks, first = (task - head * plan.tasks) * plan.units;
  const int64_t b = head / plan.f.p.heads_kv;
  return {b, head - b * plan.f.p.heads_kv, first,
          min(first + plan.units, plan.blocks * plan.group)};
}

// Sets head and rows of a unit, the longest of a causal head first; false if it has no rows.
PYOPS_INLINE bool set_rows(const Plan& plan, const AttentionSequence& sequence, const Place& place,
                           int64_t i, Unit* u) {
  const int64_t block = plan.group == 1 ? i : i / plan.group;
  u->h = place.head_kv * plan.group + i - block * plan.group;
  u->row = (plan.blocks - 1 - block) * kBlockQueries;
  u->rows = min(kBlockQueries, sequence.seqlen_q - u->row);
  return u->rows > 0;
}

template <class T>
PYOPS_INLINE const T* query_of(const AttentionProblem& p, const AttentionSequence& sequence,
                               int64_t b, const Unit& u) {
  return static_cast<const T*>(p.query) + b * p.query_strides.batch + u.h * p.query_strides.head +
         (sequence.first_q + u.row) * p.query_strides.row;
}

template <class T, bool kPairs>
void run_task(const Plan& plan, int64_t task) {
  const AttentionForward& f = plan.f;
  const AttentionProblem& p = f.p;
  const Place place = place_of(plan, task);
  const int64_t head_kv = place.head_kv, b = place.b;
  const AttentionSequence sequence = attention_sequence(p, b);

  constexpr int64_t kWidth = kBlockQueries;
  const int64_t unit_floats = (round_up(plan.words, kLanes) + p.head_dim_v + 2) * kWidth;
  const int64_t score_floats = plan.block_keys * kWidth;
  const int64_t key_floats = plan.convert ? round_up(plan.block_keys * p.head_dim, 16) : 0;
  const int64_t value_floats =
      plan.convert || kPairs ? round_up(plan.block_keys * p.head_dim_v, 16) : 0;
  float* memory = static_cast<float*>(scratch(
      4, (plan.units * unit_floats + score_floats + key_floats + value_floats) * sizeof(float)));
  float* const scores = memory;
  float* const keys = scores + score_floats;
  float* const values = keys + key_floats;
  memory = values + value_floats;

  Unit units[kMostUnits];
  int64_t count = 0, begin = sequence.seqlen_k, end = 0;
  for (int64_t i = place.first; i < place.end; ++i) {
    Unit& u = units[count];
    if (!set_rows(plan, sequence, place, i, &u)) continue;
    ++count;
    u.vectors = ceil_div(u.rows, kLanes), u.width = u.vectors * kLanes;
    u.begin = round_down(min(first_visible(p, sequence, u.row), sequence.seqlen_k), kQuad);
    u.end = end_visible(p, sequence, u.row + u.rows - 1);
    if (u.begin < u.end) begin = min(begin, u.begin), end = max(end, u.end);
    u.first = true;
    u.by_rows =
        !kPairs && u.vectors == 1 && u.rows * ceil_div(p.head_dim_v, kLanes) <= p.head_dim_v;
    // In float32 only where backward does so too, which looks at the whole sequence.
    const int64_t queries = p.dtype == DType::kFloat ? sequence.seqlen_q : u.rows;
    u.dots = !kPairs && few_queries(queries, sequence.seqlen_k, p.head_dim, p.head_dim_v);
    u.most = memory, u.sum = u.most + kWidth, u.q = u.sum + kWidth;
    u.o = u.q + round_up(plan.words, kLanes) * kWidth;
    memory += unit_floats;
    for (int64_t v = 0; v < u.vectors; ++v) {
      store(u.most + v * kLanes, splat(p.sinks ? p.sinks[u.h] : -kInfinity));
      store(u.sum + v * kLanes, splat(p.sinks ? 1.0f : 0.0f));
    }
    if (u.begin >= u.end) continue;
    const T* query = query_of<T>(p, sequence, b, u);
    if (u.dots) {
      convert_rows(query, p.query_strides.row, u.rows, p.head_dim, u.q);
    } else {
      pack_query<T, kPairs>(query, p.query_strides.row, u.rows, p.head_dim, u.q, u.width);
    }
  }

  const T* key = static_cast<const T*>(p.key) + b * p.key_strides.batch +
                 head_kv * p.key_strides.head + sequence.first_k * p.key_strides.row;
  const T* value = static_cast<const T*>(p.value) + b * p.value_strides.batch +
                   head_kv * p.value_strides.head + sequence.first_k * p.value_strides.row;
  // Blocks begin at multiples of their size, whatever the task: so the units' results do not
  // depend on which of them share a task.
  for (int64_t from = round_down(begin, plan.block_keys); from < end; from += plan.block_keys) {
    const int64_t to = min(from + plan.block_keys, end), low = max(from, begin);
    const char* k = reinterpret_cast<const char*>(key + from * p.key_strides.row);
    const char* v = reinterpret_cast<const char*>(value + from * p.value_strides.row);
    int64_t k_row = p.key_strides.row * static_cast<int64_t>(sizeof(T));
    int64_t v_row = p.value_strides.row * static_cast<int64_t>(sizeof(T));
    if constexpr (kPairs) {
#if defined(__AVX512BF16__)
      pair_rows(value + low * p.value_strides.row, p.value_strides.row, to - low, p.head_dim_v,
                values + (low - from) / 2 * p.head_dim_v);
#endif
      v = reinterpret_cast<const char*>(values), v_row = p.head_dim_v * 4;
    } else if (plan.convert) {
      convert_rows(key + low * p.key_strides.row, p.key_strides.row, to - low, p.head_dim,
                   keys + (low - from) * p.head_dim);
      convert_rows(value + low * p.value_strides.row, p.value_strides.row, to - low, p.head_dim_v,
                   values + (low - from) * p.head_dim_v);
      k = reinterpret_cast<const char*>(keys), k_row = p.head_dim * 4;
      v = reinterpret_cast<const char*>(values), v_row = p.head_dim_v * 4;
    }
    for (int64_t i = 0; i < count; ++i) {
      add_block<kPairs>(plan, sequence, b, units[i], from, to, k, k_row, v, v_row, scores);
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    const Unit& u = units[i];
    const int64_t row = sequence.first_q + u.row;
    store_output(plan, u,
                 static_cast<T*>(f.output) + b * f.output_strides.batch +
                     u.h * f.output_strides.head + row * f.output_strides.row,
                 f.lse ? f.lse + b * f.lse_batch_stride + u.h * f.lse_head_stride + row : nullptr);
  }
}

template <class T, bool kPairs>
void run(Plan plan) {
  const AttentionProblem& p = plan.f.p;
  const int64_t units = plan.blocks * plan.group, heads = p.batch * p.heads_kv;
  plan.words = ceil_div(p.head_dim, kPairs ? 2 : 1);
  plan.block_keys = kPairs ? 256 : kDotKeys;
  plan.convert = !kPairs && sizeof(T) < sizeof(float);
  // Converted keys and values serve several units, unless that leaves threads idle.
  const int64_t threads = num_threads();
  plan.units = plan.convert || kPairs ? kMostUnits : 1;
  while (plan.units > 1 && ceil_div(units, plan.units) * heads < 4 * threads) --plan.units;
  plan.units = max(1, min(plan.units, units));
  plan.tasks = ceil_div(units, plan.units);
  const int64_t tasks = plan.tasks * heads;
  const int64_t batch = max(1, min(16, tasks / (32 * threads)));
  parallel_for(ceil_div(tasks, batch), [&](int64_t index) {
    for (int64_t i = index * batch; i < min((index + 1) * batch, tasks); ++i) {
      run_task<T, kPairs>(plan, i);
    }
  });
}

void run_short(const Plan& plan) {
  const AttentionProblem& p = plan.f.p;
  const AttentionSequence sequence = attention_sequence(p, 0);
  const int64_t begin = round_down(min(first_visible(p, sequence, 0), p.seqlen_k), kQuad);
  const int64_t end = end_visible(p, sequence, p.seqlen_q - 1);
  const ShortAttention a{&plan.f, begin, max(begin, end), plan.to_log2, plan.to_log};
  const int64_t heads = p.batch * p.heads, threads = num_threads();
  const int64_t each = max(1, ceil_div(heads, 8 * threads));
  parallel_for(ceil_div(heads, each), [&](int64_t index) {
    short_heads(a, index * each, min((index + 1) * each, heads));
  });
}

}  // namespace

void attention_forward(const AttentionForward& f) {
  const AttentionProblem& p = f.p;
  if (p.heads_kv == 0 || p.seqlen_q == 0) return;
  Plan plan{};
  plan.f = f;
  plan.finish = p.softcap > 0 || p.alibi_slopes || p.bias_kind != BiasKind::kNone || p.sinks ||
                !(p.scale > 0);
  plan.to_log = plan.finish ? 1.0f : p.scale;
  plan.to_log2 = plan.to_log * kLog2e;
  plan.group = p.heads / p.heads_kv;
  plan.blocks = ceil_div(p.seqlen_q, kBlockQueries);
  if (!plan.finish && is_short(f)) return run_short(plan);
  switch (p.dtype) {
    case DType::kFloat:
      return run<float, false>(plan);
    case DType::kHalf:
      return run<Half, false>(plan);
    default:
      return run<BFloat16, kHasPairs>(plan);
  }
}

}  // namespace pyops::cpu::PYOPS_ISA
