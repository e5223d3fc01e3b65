// Attention backward: the five products of a tile, and the passes around them.
#include "attention_backward_pack.h"
#include "attention_backward_scores.h"
#include "attention_dots.h"
#include "runtime.h"

namespace pyops::cpu::PYOPS_ISA {
namespace {

PYOPS_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
PYOPS_INLINE const T* head_rows(const void* data, const HeadStrides& s, int64_t b, int64_t h,
                                int64_t row) {
  return static_cast<const T*>(data) + b * s.batch + h * s.head + row * s.row;
}
template <class T>
PYOPS_INLINE T* head_rows(void* data, const HeadStrides& s, int64_t b, int64_t h, int64_t row) {
  return static_cast<T*>(data) + b * s.batch + h * s.head + row * s.row;
}

// Products over head_dim are summed in pieces of so many words: one long sum has several times the
// error. Scores as in forward, or exp(score - lse) would show the rounding of both; grad_output .
// value in shorter ones, as its leading digits cancel against delta.
constexpr int64_t kScoreWords = 128, kGradWords = 32;

// Cuts a thread's scratch into 64-byte aligned arrays of floats.
struct Carver {
  float* base;
  size_t used;
  float* take(int64_t floats) {
    float* p = base ? base + used : nullptr;
    used += static_cast<size_t>((floats + 15) / 16 * 16);
    return p;
  }
};

// A thread's arrays. d, dv: padded columns of query and value. "Stacked" and "transposed" are as in
// attention_backward_pack.h.
struct Workspace {
  float *key_transposed, *value_transposed;   // of a block of keys
  float* key_stacked;                         // (kBlockK / kPack, d)
  float *query_rows, *query_stacked;          // of a block of queries
  float *grad_rows, *grad_stacked;            // of grad_output
  float *scores, *grads;                      // (kBlockQ, kScoreRow)
  float *kept_stacked, *score_grads_stacked;  // (kBlockQ / kPack, kScoreRow)
  float* score_grads_rows;                    // (kBlockQ, kScoreRow)
  float* bias_columns;                        // (kBlockK,)
  float *grad_key, *grad_value;               // (keys of the chunk, d), (.., dv)
  float* grad_query;                          // (seqlen_q, d), of one query head

  template <class Words>
  void carve(Carver& c, int64_t d, int64_t dv, int64_t chunk_keys, int64_t seqlen_q) {
    constexpr int kPack = Words::kPack;
    key_transposed = c.take(kBlockK * d / kPack);
    value_transposed = c.take(kBlockK * dv / kPack);
    key_stacked = c.take(kBlockK * d / kPack);
    query_rows = c.take(kBlockQ * d / kPack);
    grad_rows = c.take(kBlockQ * dv / kPack);
    query_stacked = kPack == 1 ? query_rows : c.take(kBlockQ * d / kPack);
    grad_stacked = kPack == 1 ? grad_rows : c.take(kBlockQ * dv / kPack);
    scores = c.take(kBlockQ * kScoreRow);
    grads = c.take(kBlockQ * kScoreRow);
    kept_stacked = kPack == 1 ? scores : c.take(kBlockQ * kScoreRow / kPack);
    score_grads_stacked = kPack == 1 ? grads : c.take(kBlockQ * kScoreRow / kPack);
    score_grads_rows = kPack == 1 ? grads : c.take(kBlockQ * kScoreRow / kPack);
    bias_columns = c.take(kBlockK);
    grad_key = c.take(chunk_keys * d);
    grad_value = c.take(chunk_keys * dv);
    grad_query = c.take(seqlen_q * d);
  }
};

// One chunk of keys of one head of key and value.
template <class Words, class T>
struct Chunk {
  static constexpr int kPack = Words::kPack;
  const AttentionBackward& g;
  const AttentionProblem& p;
  const AttentionSequence seq;
  const int64_t b, kv_head, begin, end;  // keys [begin, end)
  const int64_t d, dv;                   // padded columns
  Workspace w;
  bool want_scores_grad, plain;
  bool dots;  // scores are summed as forward does for few queries

  Chunk(const AttentionBackward& g, int64_t b, int64_t kv_head, int64_t chunk)
      : g(g),
        p(g.p),
        seq(attention_sequence(g.p, b)),
        b(b),
        kv_head(kv_head),
        begin(least(chunk * g.chunk_keys, seq.seqlen_k)),
        end(least(begin + g.chunk_keys, seq.seqlen_k)),
        d(padded_columns(g.p.head_dim)),
        dv(padded_columns(g.p.head_dim_v)) {
    want_scores_grad = g.grad_query || g.grad_key || g.grad_bias;
    dots = p.dtype == DType::kFloat &&
           few_queries(seq.seqlen_q, seq.seqlen_k, p.head_dim, p.head_dim_v);
    plain = p.softcap == 0.0f && !p.alibi_slopes && p.bias_kind == BiasKind::kNone && !p.dropout;
    const int64_t keys = end - begin, rows = g.chunks == 1 ? seq.seqlen_q : 0;
    Carver size{nullptr, 0};
    w.carve<Words>(size, d, dv, keys, rows);
    Carver carver{static_cast<float*>(scratch(4, size.used * sizeof(float))), 0};
    w.carve<Words>(carver, d, dv, keys, rows);
  }

  // Rows that see any of the keys [k0, k1).
  void visible_rows(int64_t k0, int64_t k1, int64_t* row_begin, int64_t* row_end) const {
    int64_t lo = 0, hi = seq.seqlen_q;
    if (p.window_right >= 0 && k0 - seq.shift - p.window_right > lo) {
      lo = k0 - seq.shift - p.window_right;
    }
    if (p.window_left >= 0) hi = least(hi, k1 - seq.shift + p.window_left);
    *row_begin = lo;
    *row_end = hi;
  }

  void run() {
    if (begin == end && g.chunks > 1) return;  // a sequence shorter than others
    clear(w.grad_key, (end - begin) * d);
    clear(w.grad_value, (end - begin) * dv);
    const int64_t group = p.heads / p.heads_kv;
    for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
      const int64_t row = b * g.lse_batch_stride + h * g.lse_head_stride + seq.first_q;
      float* grad_query = w.grad_query;
      if (g.chunks > 1) {
        grad_query = g.partial_grad_query + (begin / g.chunk_keys * g.rows + row) * d;
        int64_t lo, hi;
        visible_rows(begin, end, &lo, &hi);
        if (g.grad_query && lo < hi) clear(grad_query + lo * d, (hi - lo) * d);
      } else if (g.grad_query) {
        clear(grad_query, seq.seqlen_q * d);
      }
      for (int64_t k0 = begin; k0 < end; k0 += kBlockK) key_block(h, row, k0, grad_query);
      if (g.grad_query && g.chunks == 1) {
        write_rows(grad_query, d, seq.seqlen_q, p.head_dim,
                   head_rows<T>(g.grad_query, g.grad_query_strides, b, h, seq.first_q),
                   g.grad_query_strides.row);
      }
    }
    if (g.grad_key) {
      write_rows(w.grad_key, d, end - begin, p.head_dim,
                 head_rows<T>(g.grad_key, g.grad_key_strides, b, kv_head, seq.first_k + begin),
                 g.grad_key_strides.row);
    }
    if (g.grad_value) {
      write_rows(w.grad_value, dv, end - begin, p.head_dim_v,
                 head_rows<T>(g.grad_value, g.grad_value_strides, b, kv_head, seq.first_k + begin),
                 g.grad_value_strides.row);
    }
  }

  static void clear(float* data, int64_t count) {
    __builtin_memset(data, 0, static_cast<size_t>(count) * sizeof(float));
  }

  void key_block(int64_t h, int64_t row, int64_t k0, float* grad_query) {
    const int keys = static_cast<int>(least(kBlockK, end - k0));
    int64_t lo, hi;
    visible_rows(k0, k0 + keys, &lo, &hi);
    if (lo >= hi) return;
    const T* key = head_rows<T>(p.key, p.key_strides, b, kv_head, seq.first_k + k0);
    const T* value = head_rows<T>(p.value, p.value_strides, b, kv_head, seq.first_k + k0);
    if (!dots) {
      pack_transposed<Words>(key, p.key_strides.row, keys, p.head_dim, w.key_transposed,
                             kPanel * d / kPack);
    }
    if (want_scores_grad) {
      pack_transposed<Words>(value, p.value_strides.row, keys, p.head_dim_v, w.value_transposed,
                             kPanel * dv / kPack);
    }
    if (g.grad_query) {
      pack_stacked<Words>(key, p.key_strides.row, keys, p.head_dim, w.key_stacked, d);
    }
    for (int64_t q0 = lo / kBlockQ * kBlockQ; q0 < hi; q0 += kBlockQ) {
      const int rows = static_cast<int>(least(kBlockQ, seq.seqlen_q - q0));
      ScoreTile t{&g,
                  b,
                  h,
                  q0,
                  k0,
                  rows,
                  keys,
                  q0 + seq.shift - k0,
                  g.lse + row + q0,
                  g.delta + row + q0,
                  w.scores,
                  w.grads,
                  w.bias_columns,
                  0.0f};
      tile(t, grad_query + q0 * d);
    }
  }

  void tile(ScoreTile& t, float* grad_query) {
    const T* query = head_rows<T>(p.query, p.query_strides, b, t.h, seq.first_q + t.q0);
    const T* grad = head_rows<T>(g.grad_output, g.grad_output_strides, b, t.h, seq.first_q + t.q0);
    pack_rows<Words>(query, p.query_strides.row, t.rows, p.head_dim, w.query_rows, d / kPack);
    pack_rows<Words>(grad, g.grad_output_strides.row, t.rows, p.head_dim_v, w.grad_rows,
                     dv / kPack);
    if constexpr (kPack > 1) {
      pack_stacked<Words>(query, p.query_strides.row, t.rows, p.head_dim, w.query_stacked, d);
      pack_stacked<Words>(grad, g.grad_output_strides.row, t.rows, p.head_dim_v, w.grad_stacked,
                          dv);
    }
    if (g.grad_bias) begin_grad_bias(t);
    if (dots) {
      static_assert(kBlockK <= kDotKeys && kDotQueries <= kBlockQ);
      alignas(64) float sums[kDotQueries * kDotKeys];
      const T* key = head_rows<T>(p.key, p.key_strides, b, kv_head, seq.first_k + t.k0);
      score_dots(w.query_rows, d, t.rows, reinterpret_cast<const char*>(key),
                 p.key_strides.row * static_cast<int64_t>(sizeof(T)), p.head_dim, sums, t.keys);
      for (int r = 0; r < t.rows; ++r) {
        for (int c = 0; c < t.keys; c += kLanes) {
          store(t.scores + r * kScoreRow + c, load(sums + r * kDotKeys + c));
        }
      }
    }
    for (int r = 0; r < t.rows; r += kTileRows) {
      const int count = t.rows - r < kTileRows ? t.rows - r : kTileRows;
      plain ? score_rows<true>(t, r, count) : score_rows<false>(t, r, count);
    }
    if (g.grad_bias) end_grad_bias(t);

    const auto rows_of_keys = [&t](int k, int count) {
      return Span{t.first_row(k) / kPack, (t.end_row(k, count) + kPack - 1) / kPack};
    };
    const auto keys_of_rows = [&t](int r, int count) {
      return Span{t.first(r) / kPack, (t.end(r + count - 1) + kPack - 1) / kPack};
    };
    const int64_t first_key = t.k0 - begin;
    if (g.grad_value) {
      multiply_add_rows<Words>(t.keys, vectors(p.head_dim_v), rows_of_keys, w.kept_stacked, 1,
                               kScoreRow, w.grad_stacked, dv, w.grad_value + first_key * dv, dv);
    }
    if (g.grad_key) {
      multiply_add_rows<Words>(t.keys, vectors(p.head_dim), rows_of_keys, w.score_grads_stacked, 1,
                               kScoreRow, w.query_stacked, d, w.grad_key + first_key * d, d);
    }
    if (g.grad_query) {
      multiply_add_rows<Words>(t.rows, vectors(p.head_dim), keys_of_rows, w.score_grads_rows,
                               kScoreRow / kPack, 1, w.key_stacked, d, grad_query, d);
    }
  }

  static int vectors(int64_t columns) { return static_cast<int>((columns + kLanes - 1) / kLanes); }

  // Scores of `count` rows and what follows from them.
  template <bool kPlain>
  void score_rows(ScoreTile& t, int r, int count) {
    const int vecs = vectors(t.keys);
    const int begin = t.first(r) / kLanes;
    int end = vectors(t.end(r + count - 1));
    if (end < begin) end = begin;
    for (int v = begin; v < end;) {
      const int panel = v / kTileVecs, in_panel = v % kTileVecs;
      const int count_vecs = static_cast<int>(least(kTileVecs - in_panel, end - v));
      if (!dots) {
        products(w.query_rows + r * (d / kPack), d / kPack, p.head_dim, kScoreWords,
                 w.key_transposed + panel * (kPanel * d / kPack) + in_panel * kLanes, count,
                 count_vecs, t.scores + r * kScoreRow + v * kLanes);
      }
      if (want_scores_grad) {
        products(w.grad_rows + r * (dv / kPack), dv / kPack, p.head_dim_v, kGradWords,
                 w.value_transposed + panel * (kPanel * dv / kPack) + in_panel * kLanes, count,
                 count_vecs, t.grads + r * kScoreRow + v * kLanes);
      }
      v += count_vecs;
    }
    constexpr int kExpDegree = kPack == 1 ? 6 : 3;  // bfloat16 rounds away what degree 3 lacks
    for (int i = r; i < r + count; ++i) {
      score_row<kPlain, kExpDegree>(t, i, begin, end, vecs);
    }
    if constexpr (kPack > 1) {
      for (int i = r; i < r + count; i += 2) stack_rows(t, i, vecs);
    }
  }

  // Sums run over pieces of at most `most` words.
  static PYOPS_INLINE void products(const float* rows, int64_t row, int64_t columns, int64_t most,
                                    const float* panel, int count, int vecs, float* out) {
    const int64_t words = (columns + kPack - 1) / kPack;
    multiply<Words, false>(count, vecs, least(words, most), rows, row, 1, panel, kPanel, out,
                           kScoreRow);
    for (int64_t t = most; t < words; t += most) {
      multiply<Words, true>(count, vecs, least(words - t, most), rows + t, row, 1,
                            panel + t * kPanel, kPanel, out, kScoreRow);
    }
  }

  // Rows r and r + 1 of scores and grads to bfloat16 pairs. A missing second row counts as zero.
  void stack_rows([[maybe_unused]] const ScoreTile& t, [[maybe_unused]] int r,
                  [[maybe_unused]] int vecs) {
#if defined(__AVX512BF16__)
    const bool second = r + 1 < t.rows;
    const __m512i by_column =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const auto pair = [&](const float* source, int c) {
      const float* at = source + r * kScoreRow + c;
      const Vec low = load(at), high = second ? load(at + kScoreRow) : Vec{};
      return _mm512_permutexvar_epi16(by_column,
                                      reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
    };
    const int64_t to = r / 2 * kScoreRow;
    for (int v = 0; v < vecs; ++v) {
      const int c = v * kLanes;
      store(w.kept_stacked + to + c, reinterpret_cast<Vec>(pair(t.scores, c)));
      store(w.score_grads_stacked + to + c, reinterpret_cast<Vec>(pair(t.grads, c)));
    }
    for (int i = r; i < r + 1 + second; ++i) {
      const float* grads = t.grads + i * kScoreRow;
      for (int v = 0; v < vecs; v += 2) {
        const Vec low = load(grads + v * kLanes);
        const Vec high = v + 1 < vecs ? load(grads + (v + 1) * kLanes) : Vec{};
        store(w.score_grads_rows + i * (kScoreRow / 2) + v * kLanes / 2,
              reinterpret_cast<Vec>(_mm512_cvtne2ps_pbh(high, low)));
      }
    }
#endif
  }
};

// Lanes are rows and the sum runs as in the product grad_output . value: where a row sees one key
// alone, as the first row of a causal mask does, the two cancel to the last bit.
template <class Words, class T>
void delta_block(const AttentionBackward& g, int64_t b, int64_t h, int64_t block) {
  const AttentionSequence seq = attention_sequence(g.p, b);
  const int64_t row0 = b * g.lse_batch_stride + h * g.lse_head_stride + seq.first_q;
  const int64_t dim = g.p.head_dim_v;
  const int64_t last = least(block * 64 + 64, seq.seqlen_q);
  for (int64_t i = block * 64; i < last; i += kLanes) {
    const T* out = head_rows<T>(g.output, g.output_strides, b, h, seq.first_q + i);
    const T* grad = head_rows<T>(g.grad_output, g.grad_output_strides, b, h, seq.first_q + i);
    const int rows = static_cast<int>(least(kLanes, last - i));
    Vec sum{}, piece{};
    for (int64_t c = 0; c < dim; c += kLanes * Words::kPack) {
      if (c % (kGradWords * Words::kPack) == 0) {
        sum += piece;
        piece = Vec{};
      }
      Vec outs[kLanes], grads[kLanes];
      for (int r = 0; r < kLanes; ++r) {
        outs[r] = r < rows ? load_words<Words>(out + r * g.output_strides.row + c, dim - c) : Vec{};
        grads[r] =
            r < rows ? load_words<Words>(grad + r * g.grad_output_strides.row + c, dim - c) : Vec{};
      }
      transpose(outs);
      transpose(grads);
      for (int w = 0; w < kLanes; ++w) piece = Words::multiply_add(grads[w], outs[w], piece);
    }
    sum += piece;
    for (int r = 0; r < rows; ++r) {
      float delta = sum[r];
      if (g.grad_lse) {
        delta -= *head_rows<float>(g.grad_lse, g.grad_lse_strides, b, h, seq.first_q + i + r);
      }
      g.delta[row0 + i + r] = g.lse[row0 + i + r] == -__builtin_inff() ? 0.0f : delta;
    }
  }
}

template <class T>
void sum_query_block(const AttentionBackward& g, int64_t b, int64_t h, int64_t block) {
  const AttentionProblem& p = g.p;
  const AttentionSequence seq = attention_sequence(p, b);
  const int64_t row0 = b * g.lse_batch_stride + h * g.lse_head_stride + seq.first_q;
  const int64_t d = padded_columns(p.head_dim);
  float sums[256];
  for (int64_t i = block * 64; i < least(block * 64 + 64, seq.seqlen_q); ++i) {
    for (int64_t c = 0; c < d; c += kLanes) store(sums + c, Vec{});
    const int64_t first = first_visible(p, seq, i), end = end_visible(p, seq, i);
    if (first < end) {
      for (int64_t chunk = first / g.chunk_keys; chunk * g.chunk_keys < end; ++chunk) {
        const float* part = g.partial_grad_query + (chunk * g.rows + row0 + i) * d;
        for (int64_t c = 0; c < d; c += kLanes) store(sums + c, load(sums + c) + load(part + c));
      }
    }
    write_rows(sums, d, 1, p.head_dim,
               head_rows<T>(g.grad_query, g.grad_query_strides, b, h, seq.first_q + i), 0);
  }
}

}  // namespace

#if defined(__AVX512BF16__)
using WordsOfBFloat16 = BFloat16Words;
#else
using WordsOfBFloat16 = FloatWords;
#endif

void attention_backward_delta(const AttentionBackward& g, int64_t b, int64_t h, int64_t block) {
  switch (g.p.dtype) {
    case DType::kFloat:
      return delta_block<FloatWords, float>(g, b, h, block);
    case DType::kBFloat16:
      return delta_block<WordsOfBFloat16, BFloat16>(g, b, h, block);
    default:
      return delta_block<FloatWords, Half>(g, b, h, block);
  }
}

void attention_backward_chunk(const AttentionBackward& g, int64_t b, int64_t kv_head,
                              int64_t chunk) {
  switch (g.p.dtype) {
    case DType::kFloat:
      return Chunk<FloatWords, float>(g, b, kv_head, chunk).run();
    case DType::kBFloat16:
      return Chunk<WordsOfBFloat16, BFloat16>(g, b, kv_head, chunk).run();
    default:
      return Chunk<FloatWords, Half>(g, b, kv_head, chunk).run();
  }
}

void attention_backward_sum_query(const AttentionBackward& g, int64_t b, int64_t h, int64_t block) {
  switch (g.p.dtype) {
    case DType::kFloat:
      return sum_query_block<float>(g, b, h, block);
    case DType::kBFloat16:
      return sum_query_block<BFloat16>(g, b, h, block);
    default:
      return sum_query_block<Half>(g, b, h, block);
  }
}

void attention_backward_round(const float* src, int64_t count, DType dtype, void* dst) {
  if (dtype == DType::kBFloat16) {
    write_rows(src, 0, 1, count, static_cast<BFloat16*>(dst), 0);
  } else {
    write_rows(src, 0, 1, count, static_cast<Half*>(dst), 0);
  }
}

}  // namespace pyops::cpu::PYOPS_ISA
