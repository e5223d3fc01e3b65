// Attention of few queries to a long cache: what costs is reading the keys and values, once.
//
// The rows of all query heads that share a key head are the lanes of one vector (or of several, one
// after the other on each block of keys). Splits of the keys are independent tasks; each leaves a
// partial result, and a second pass merges those of a row in their order.
#include "attention_softmax.h"
#include "runtime.h"

namespace pyops::cpu::PYOPS_ISA {
namespace {

constexpr int64_t kBlockKeys = kDotKeys;

// Up to kLanes rows; a row is a query head of the group and a query.
struct Rows {
  int count;
  bool dots;                // see score_dots
  const float* query;       // (words, kLanes), or with dots (count, head_dim)
  float *most, *sum, *out;  // (kLanes,), (kLanes,), (kLanes, head_dim_v rounded up)
  Vec slope;                // of ALiBi
  VecInt diagonal;
};

int64_t chunks_of(const AttentionDecode& d) {
  return ceil_div(d.heads / d.heads_kv * d.seqlen_q, kLanes);
}
int64_t chunk_floats(const AttentionDecode& d) {
  return kLanes * (2 + round_up(d.head_dim_v, kLanes));
}

// Points at a chunk's part of a split's result.
Rows place_rows(const AttentionDecode& d, int64_t b, int64_t head_kv, int64_t chunk,
                float* partial) {
  const int64_t group = d.heads / d.heads_kv, first = chunk * kLanes;
  Rows rows{};
  rows.count = static_cast<int>(min(kLanes, group * d.seqlen_q - first));
  rows.most = partial + chunk * chunk_floats(d);
  rows.sum = rows.most + kLanes;
  rows.out = rows.sum + kLanes;
  for (int i = 0; i < rows.count; ++i) {
    const int64_t head = head_kv * group + (first + i) / d.seqlen_q;
    rows.diagonal[i] = static_cast<int32_t>(d.seqlens[b] - d.seqlen_q + (first + i) % d.seqlen_q);
    if (d.alibi_slopes) rows.slope[i] = d.alibi_slopes[b * d.alibi_batch_stride + head];
  }
  return rows;
}

// From q . k to the score, natural units, for `count` keys from `key` on. s: (count, kLanes).
void finish(const AttentionDecode& d, const Rows& rows, int64_t key, int64_t count,
            int64_t seqlen_k, float* s) {
  const Vec scale = splat(d.scale), hidden = splat(-kInfinity);
  const int64_t first_diagonal = seqlen_k - d.seqlen_q, last_diagonal = seqlen_k - 1;
  const bool cut_right = d.window_right >= 0 && key + count - 1 > first_diagonal + d.window_right;
  const bool cut_left = d.window_left >= 0 && key < last_diagonal - d.window_left;
  for (int64_t j = 0; j < count; ++j, s += kLanes) {
    Vec x = load(s) * scale;
    if (d.softcap > 0) x = d.softcap * tanh(x / d.softcap);
    const VecInt right = static_cast<int32_t>(key + j) - rows.diagonal;  // how far the key lies
    if (d.alibi_slopes) {
      const Vec away = __builtin_convertvector(right, Vec);
      const Vec distance = away < Vec{} ? -away : away;
      x = x - rows.slope * distance;
    }
    if (cut_right) x = right > static_cast<int32_t>(d.window_right) ? hidden : x;
    if (cut_left) x = right < -static_cast<int32_t>(d.window_left) ? hidden : x;
    store(s, x);
  }
}

// Adds `count` keys from `key` on, given q . k, where scores need only scale and window. s:
// (rows.count, kDotKeys).
void add_dots(const AttentionDecode& d, Rows& rows, int64_t key, int64_t count, const float* v,
              int64_t v_row, bool first, float* s) {
  float alpha[kDotQueries];
  for (int r = 0; r < rows.count; ++r) {
    float* row = s + r * kDotKeys;
    for (int64_t j = 0; j < count; j += kLanes) store(row + j, load(row + j) * d.scale);
    const int64_t diagonal = rows.diagonal[r] - key;
    int64_t begin = 0, end = count;
    if (d.window_right >= 0) end = max(0, min(end, diagonal + d.window_right + 1));
    if (d.window_left >= 0) begin = max(0, min(end, diagonal - d.window_left));
    softmax_dots(row, begin, end, count, kLog2e, rows.most + r, rows.sum + r, alpha + r);
  }
  output_rows<kDotQueries>(rows.count, s, 1, kDotKeys, v, v_row, 0, count, alpha, first, rows.out,
                           d.head_dim_v);
}

// Adds `count` keys from `key` on. k, v: rows of words and of floats; s: (kBlockKeys, kLanes).
template <bool kPairs>
void add_keys(const AttentionDecode& d, Rows& rows, int64_t key, int64_t count, int64_t seqlen_k,
              const char* k, int64_t k_row, const float* v, int64_t v_row, bool first, float* s) {
  if (rows.dots) {
    alignas(64) float dots[kDotQueries * kDotKeys];
    score_dots(rows.query, d.head_dim, rows.count, k, k_row, d.head_dim, dots, count);
    if (!(d.softcap > 0) && !d.alibi_slopes) {
      return add_dots(d, rows, key, count, v, v_row, first, dots);
    }
    spread_dots(dots, rows.count, count, s);
  } else {
    score_keys<kPairs, 1>(rows.query, kLanes, k, k_row, d.head_dim, s, count);
  }
  finish(d, rows, key, count, seqlen_k, s);
  const Vec hidden = splat(-kInfinity), to_log2 = splat(kLog2e);
  const int64_t padded = round_up(count, kQuad);
  for (int64_t j = count; j < padded; ++j) store(s + j * kLanes, hidden);
  const Vec before = load(rows.most), most = maximum(s, kLanes, padded, before);
  const Vec base = most == hidden ? Vec{} : most;
  const Vec rescale = exp2((before - base) * to_log2);
  const Vec sum =
      exponentials<false, false>(s, s, kLanes, padded, base, to_log2, QueryLanes{}, key);
  store(rows.most, most);
  store(rows.sum, fma(load(rows.sum), rescale, sum));
  alignas(64) float alpha[kLanes];
  store(alpha, rescale);
  output_rows(rows.count, s, kLanes, 1, v, v_row, 0, count, alpha, first, rows.out, d.head_dim_v);
}

template <class T, bool kPairs>
void run_split(const AttentionDecode& d, int64_t task) {
  constexpr bool kConvert = sizeof(T) < sizeof(float);
  const int64_t split = task % d.splits, head_kv = task / d.splits % d.heads_kv;
  const int64_t b = task / d.splits / d.heads_kv, seqlen_k = d.seqlens[b];
  const int64_t rows_all = d.heads / d.heads_kv * d.seqlen_q, chunks = chunks_of(d);
  const int64_t words = ceil_div(d.head_dim, kPairs ? 2 : 1);

  const int64_t query_floats = chunks * words * kLanes;
  const int64_t key_floats = kConvert && !kPairs ? round_up(kBlockKeys * d.head_dim, 16) : 0;
  const int64_t value_floats = kConvert ? round_up(kBlockKeys * d.head_dim_v, 16) : 0;
  float* const scores = static_cast<float*>(
      scratch(4, (kBlockKeys * kLanes + query_floats + key_floats + value_floats) * 4));
  float* const queries = scores + kBlockKeys * kLanes;
  float* const keys = queries + query_floats;
  float* const values = keys + key_floats;

  float* const partial = d.partial + task * d.partial_floats;
  Rows* const rows = static_cast<Rows*>(scratch(5, chunks * sizeof(Rows)));
  const T* query =
      static_cast<const T*>(d.query) + (b * d.heads_kv + head_kv) * rows_all * d.head_dim;
  for (int64_t c = 0; c < chunks; ++c) {
    Rows& r = rows[c] = place_rows(d, b, head_kv, c, partial);
    float* const packed = queries + c * words * kLanes;
    const T* first = query + c * kLanes * d.head_dim;
    r.dots = !kPairs && few_queries(r.count, kBlockKeys, d.head_dim, d.head_dim_v);
    if (r.dots) {
      convert_rows(first, d.head_dim, r.count, d.head_dim, packed);
    } else {
      pack_query<T, kPairs>(first, d.head_dim, r.count, d.head_dim, packed, kLanes);
    }
    r.query = packed;
    store(r.most, splat(-kInfinity));
    store(r.sum, Vec{});
    std::memset(r.out, 0, kLanes * round_up(d.head_dim_v, kLanes) * 4);
  }

  int64_t key = split * d.split_keys;
  const int64_t end = min(seqlen_k, key + d.split_keys);
  if (d.leftpad) key = max(key, static_cast<int64_t>(d.leftpad[b]));
  if (d.window_left >= 0) key = max(key, seqlen_k - d.seqlen_q - d.window_left);
  for (bool first = true; key < end; first = false) {
    const int64_t page = key / d.page, offset = key - page * d.page;
    const int64_t count = min(min(d.page - offset, end - key), kBlockKeys);
    const int64_t at = d.block_table ? d.block_table[b * d.block_table_stride + page] : b;
    const T* k = static_cast<const T*>(d.key_cache) + at * d.key_strides.batch +
                 head_kv * d.key_strides.head + offset * d.key_strides.row;
    const T* v = static_cast<const T*>(d.value_cache) + at * d.value_strides.batch +
                 head_kv * d.value_strides.head + offset * d.value_strides.row;
    const char* k_words = reinterpret_cast<const char*>(k);
    const float* v_floats = reinterpret_cast<const float*>(v);
    int64_t k_row = d.key_strides.row * static_cast<int64_t>(sizeof(T));
    int64_t v_row = d.value_strides.row;
    if constexpr (kConvert) {
      convert_rows(v, v_row, count, d.head_dim_v, values);
      v_floats = values, v_row = d.head_dim_v;
      if constexpr (!kPairs) {
        convert_rows(k, d.key_strides.row, count, d.head_dim, keys);
        k_words = reinterpret_cast<const char*>(keys), k_row = d.head_dim * 4;
      }
    }
    for (int64_t c = 0; c < chunks; ++c) {
      add_keys<kPairs>(d, rows[c], key, count, seqlen_k, k_words, k_row, v_floats, v_row, first,
                       scores);
    }
    key += count;
  }
}

// Merges the splits of one chunk of rows.
template <class T>
void merge(const AttentionDecode& d, int64_t task) {
  const int64_t chunks = chunks_of(d), group = d.heads / d.heads_kv;
  const int64_t c = task % chunks, head_kv = task / chunks % d.heads_kv;
  const int64_t b = task / chunks / d.heads_kv, head = b * d.heads_kv + head_kv;
  const Rows rows = place_rows(d, b, head_kv, c, d.partial + head * d.splits * d.partial_floats);
  const int count = rows.count;
  Vec sink = splat(-kInfinity);
  for (int i = 0; d.sinks && i < count; ++i) {
    sink[i] = d.sinks[head_kv * group + (c * kLanes + i) / d.seqlen_q];
  }
  Vec most = sink;
  for (int64_t s = 0; s < d.splits; ++s)
    most = max_or_second(load(rows.most + s * d.partial_floats), most);
  const Vec base = most == splat(-kInfinity) ? Vec{} : most;
  Vec total = exp(sink - base);
  float* weights = static_cast<float*>(scratch(4, (d.splits + 1) * kLanes * 4));
  for (int64_t s = 0; s < d.splits; ++s) {
    const Vec weight = exp(load(rows.most + s * d.partial_floats) - base);
    total = fma(load(rows.sum + s * d.partial_floats), weight, total);
    store(weights + s * kLanes, weight);
  }
  const Vec inverse = total == Vec{} ? Vec{} : 1.0f / total, lse = most + log(total);
  for (int i = 0; i < count; ++i) {
    const int64_t row = c * kLanes + i, h = head_kv * group + row / d.seqlen_q;
    const int64_t t = row % d.seqlen_q, o_row = round_up(d.head_dim_v, kLanes);
    d.lse[(b * d.heads + h) * d.seqlen_q + t] = lse[i];
    T* out = static_cast<T*>(d.output) + b * d.output_strides.batch + h * d.output_strides.head +
             t * d.output_strides.row;
    for (int64_t at = 0; at < d.head_dim_v; at += kLanes) {
      Vec sum = {};
      for (int64_t s = 0; s < d.splits; ++s) {
        sum = fma(load(rows.out + s * d.partial_floats + i * o_row + at),
                  splat(weights[s * kLanes + i]), sum);
      }
      store_first(out + at, sum * inverse[i], static_cast<int>(min(kLanes, d.head_dim_v - at)));
    }
  }
}

template <class T, bool kPairs>
void run(const AttentionDecode& d) {
  parallel_for(d.batch * d.heads_kv * d.splits,
               [&](int64_t task) { run_split<T, kPairs>(d, task); });
  parallel_for(d.batch * d.heads_kv * chunks_of(d), [&](int64_t task) { merge<T>(d, task); });
}

}  // namespace

int64_t attention_decode_partial_floats(const AttentionDecode& d) {
  return chunks_of(d) * chunk_floats(d);
}

void attention_decode(const AttentionDecode& d) {
  switch (d.dtype) {
    case DType::kFloat:
      return run<float, false>(d);
    case DType::kHalf:
      return run<Half, false>(d);
    default:
      return run<BFloat16, kHasPairs>(d);
  }
}

}  // namespace pyops::cpu::PYOPS_ISA
