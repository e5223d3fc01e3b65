// attention_decode on the CPU: checks, rotary embedding, append, choice of splits, registration.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <tuple>
#include <vector>

#include "attention.h"
#include "attention_checks.h"
#include "runtime.h"

// Loops over single elements; the namespace keeps them apart from each instruction set's.
#define PYOPS_ISA generic
#include "simd.h"

namespace pyops::cpu {
namespace {

constexpr int64_t kMostHeadDim = 256;

// Where the keys of each sequence lie, checked.
struct Cache {
  int64_t batch, capacity, page;
  std::vector<int64_t> filled;
  const int32_t* block_table = nullptr;
  int64_t block_table_stride = 0;
  const int32_t* leftpad = nullptr;

  // Element offset of a position of sequence b in a cache with these strides.
  int64_t at(const HeadStrides& strides, int64_t b, int64_t position) const {
    const int64_t block = block_table ? block_table[b * block_table_stride + position / page] : b;
    return block * strides.batch + position % page * strides.row;
  }
};

void check_index(const char* name, const Tensor& t, const Tensor& query) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Int && t.is_contiguous(), name,
                  ": expected a contiguous int32 tensor");
  STD_TORCH_CHECK(t.device() == query.device(), name, ": expected the device of query");
}

Cache checked_cache(const Tensor& query, const Tensor& key_cache, const OptionalTensor& key,
                    const OptionalTensor& cache_seqlens, const OptionalTensor& cache_leftpad,
                    const OptionalTensor& block_table) {
  Cache cache{};
  cache.batch = query.size(0);
  cache.capacity = cache.page = key_cache.size(2);
  if (block_table) {
    check_index("block_table", *block_table, query);
    check_rank("block_table", *block_table, 2);
    check_shape("block_table", *block_table, {cache.batch, block_table->size(1)});
    cache.block_table = static_cast<const int32_t*>(block_table->const_data_ptr());
    cache.block_table_stride = block_table->size(1);
    cache.capacity *= block_table->size(1);
  } else {
    STD_TORCH_CHECK(key_cache.size(0) == cache.batch,
                    "key_cache: expected the batch size of query, ", cache.batch, ", got ",
                    shape_of(key_cache));
  }
  const int64_t appended = key ? key->size(2) : 0;
  cache.filled.assign(cache.batch, cache.capacity);
  if (cache_seqlens) {
    check_index("cache_seqlens", *cache_seqlens, query);
    check_shape("cache_seqlens", *cache_seqlens, {cache.batch});
    const int32_t* lengths = static_cast<const int32_t*>(cache_seqlens->const_data_ptr());
    std::copy(lengths, lengths + cache.batch, cache.filled.begin());
  } else {
    STD_TORCH_CHECK(!key, "cache_seqlens: expected where the new key is to go, got None");
  }
  if (cache_leftpad) {
    check_index("cache_leftpad", *cache_leftpad, query);
    check_shape("cache_leftpad", *cache_leftpad, {cache.batch});
    cache.leftpad = static_cast<const int32_t*>(cache_leftpad->const_data_ptr());
  }
  for (int64_t b = 0; b < cache.batch; ++b) {
    const int64_t end = cache.filled[b] + appended;
    STD_TORCH_CHECK(cache.filled[b] >= 0 && end <= cache.capacity,
                    "cache_seqlens: expected at least 0 and room for ", appended,
                    " more within the ", cache.block_table ? "block_table's " : "cache's ",
                    cache.capacity, ", got ", cache.filled[b], " for sequence ", b);
    STD_TORCH_CHECK(!cache.leftpad || (cache.leftpad[b] >= 0 && cache.leftpad[b] <= end),
                    "cache_leftpad: expected from 0 to the sequence's ", end, " keys, got ",
                    cache.leftpad[b], " for sequence ", b);
    for (int64_t i = 0; cache.block_table && i * cache.page < end; ++i) {
      const int32_t block = cache.block_table[b * cache.block_table_stride + i];
      STD_TORCH_CHECK(block >= 0 && block < key_cache.size(0),
                      "block_table: expected blocks from 0 to ", key_cache.size(0) - 1, ", got ",
                      block, " for sequence ", b);
    }
  }
  return cache;
}

struct Rotary {
  const void *cos, *sin;  // (positions, half), contiguous
  DType dtype;
  int64_t half;
  bool interleaved;
};

template <class T, class Table>
void rotate_row(const Rotary& rotary, int64_t position, const T* in, int64_t dim, T* out) {
  using generic::from_float;
  using generic::to_float;
  const Table* cos = static_cast<const Table*>(rotary.cos) + position * rotary.half;
  const Table* sin = static_cast<const Table*>(rotary.sin) + position * rotary.half;
  const int64_t step = rotary.interleaved ? 2 : 1, apart = rotary.interleaved ? 1 : rotary.half;
  for (int64_t i = 0; i < rotary.half; ++i) {
    const float first = to_float(in[i * step]), second = to_float(in[i * step + apart]);
    const float c = to_float(cos[i]), s = to_float(sin[i]);
    from_float(first * c - second * s, out + i * step);
    from_float(first * s + second * c, out + i * step + apart);
  }
  std::copy(in + 2 * rotary.half, in + dim, out + 2 * rotary.half);
}

// One row at its position; without tables a copy.
template <class T>
void place_row(const Rotary& rotary, int64_t position, const T* in, int64_t dim, T* out) {
  if (!rotary.cos) {
    std::memcpy(out, in, dim * sizeof(T));
  } else if (rotary.dtype == DType::kFloat) {
    rotate_row<T, float>(rotary, position, in, dim, out);
  } else {
    rotate_row<T, T>(rotary, position, in, dim, out);
  }
}

// (batch, heads, seqlen, dim) rows to wherever `out_of(b, h, t)` says.
template <class T, class F>
void place_rows(const Rotary& rotary, const Tensor& in, const char* name,
                const std::vector<int64_t>& first_position, int64_t step, const F& out_of) {
  const HeadStrides strides = head_strides(name, in);
  const T* data = static_cast<const T*>(in.const_data_ptr());
  for (int64_t b = 0; b < in.size(0); ++b) {
    for (int64_t h = 0; h < in.size(1); ++h) {
      for (int64_t t = 0; t < in.size(2); ++t) {
        place_row<T>(rotary, first_position[b] + step * t,
                     data + b * strides.batch + h * strides.head + t * strides.row, in.size(3),
                     out_of(b, h, t));
      }
    }
  }
}

template <class T>
void append(const Rotary& rotary, const Cache& cache, const char* name, const Tensor& in,
            const HeadStrides& strides, void* out) {
  place_rows<T>(rotary, in, name, cache.filled, 1, [&](int64_t b, int64_t h, int64_t t) {
    return static_cast<T*>(out) + cache.at(strides, b, cache.filled[b] + t) + h * strides.head;
  });
}

// Enough tasks for many cores where heads are few, of at least 512 keys. A rule of shapes alone:
// results must not depend on the number of threads.
int64_t choose_splits(const AttentionDecode& d, int64_t longest, int64_t wanted) {
  constexpr int64_t kTasks = 64, kLeastKeys = 512, kMostSplits = 256;
  if (wanted > 0) return std::min({wanted, kMostSplits, std::max<int64_t>(1, longest)});
  const int64_t by_tasks = (kTasks + d.batch * d.heads_kv - 1) / (d.batch * d.heads_kv);
  return std::clamp<int64_t>(longest / kLeastKeys, 1, by_tasks);
}

template <class T>
void prepare(const Rotary& rotary, const Cache& cache, const AttentionDecode& d,
             const Tensor& query, const OptionalTensor& key, const OptionalTensor& value,
             void* rotated, void* key_cache, void* value_cache) {
  const bool diagonal = d.window_left >= 0 || d.window_right >= 0;
  place_rows<T>(
      rotary, query, "query", cache.filled, diagonal, [&](int64_t b, int64_t h, int64_t t) {
        return static_cast<T*>(rotated) + ((b * d.heads + h) * d.seqlen_q + t) * d.head_dim;
      });
  if (!key) return;
  append<T>(rotary, cache, "key", *key, d.key_strides, key_cache);
  append<T>(Rotary{}, cache, "value", *value, d.value_strides, value_cache);
}

std::tuple<Tensor, Tensor> attention_decode_op(
    const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
    const OptionalTensor& key, const OptionalTensor& value, const OptionalTensor& cache_seqlens,
    const OptionalTensor& cache_leftpad, const OptionalTensor& block_table,
    const OptionalTensor& rotary_cos, const OptionalTensor& rotary_sin, bool rotary_interleaved,
    const OptionalTensor& alibi_slopes, const OptionalTensor& sinks, double scale, double softcap,
    int64_t window_left, int64_t window_right, int64_t num_splits) {
  check_rank("query", query, 4);
  check_rank("key_cache", key_cache, 4);
  check_rank("value_cache", value_cache, 4);
  check_same("key_cache", key_cache, "query", query);
  check_same("value_cache", value_cache, "query", query);
  AttentionDecode d{};
  d.batch = query.size(0), d.heads = query.size(1), d.seqlen_q = query.size(2);
  d.head_dim = query.size(3), d.heads_kv = key_cache.size(1), d.head_dim_v = value_cache.size(3);
  d.dtype = dtype_of("query", query);
  STD_TORCH_CHECK(d.dtype != DType::kDouble,
                  "query: expected dtype float32, bfloat16 or float16, got float64");
  check_shape("key_cache", key_cache,
              {key_cache.size(0), d.heads_kv, key_cache.size(2), d.head_dim});
  check_shape("value_cache", value_cache,
              {key_cache.size(0), d.heads_kv, key_cache.size(2), d.head_dim_v});
  STD_TORCH_CHECK(d.heads_kv > 0 ? d.heads % d.heads_kv == 0 : d.heads == 0,
                  "key_cache: ", d.heads_kv, " heads do not divide the ", d.heads, " of query");
  STD_TORCH_CHECK(d.head_dim <= kMostHeadDim && d.head_dim_v <= kMostHeadDim,
                  "query, value_cache: expected head dimensions of at most ", kMostHeadDim,
                  ", got ", d.head_dim, " and ", d.head_dim_v);
  STD_TORCH_CHECK(key.has_value() == value.has_value(), key ? "value" : "key",
                  ": expected a tensor where ", key ? "key" : "value", " is given, got None");
  if (key) {
    check_rank("key", *key, 4);
    check_shape("key", *key, {d.batch, d.heads_kv, key->size(2), d.head_dim});
    check_shape("value", *value, {d.batch, d.heads_kv, key->size(2), d.head_dim_v});
    check_same("key", *key, "query", query);
    check_same("value", *value, "query", query);
    head_strides("key", *key), head_strides("value", *value);
  }
  head_strides("query", query);
  d.key_strides = head_strides("key_cache", key_cache);
  d.value_strides = head_strides("value_cache", value_cache);
  STD_TORCH_CHECK(num_splits >= 0, "num_splits: expected at least 0, got ", num_splits);
  // The rest of the options are those of attention, of which this is a problem without keys.
  AttentionProblem options{};
  options.batch = d.batch, options.heads = d.heads;
  set_attention_options(options, query, alibi_slopes, sinks, {}, scale, softcap, window_left,
                        window_right, false, 0);
  d.alibi_slopes = options.alibi_slopes, d.alibi_batch_stride = options.alibi_batch_stride;
  d.sinks = options.sinks, d.scale = options.scale, d.softcap = options.softcap;
  d.window_left = window_left, d.window_right = window_right;

  const Cache cache =
      checked_cache(query, key_cache, key, cache_seqlens, cache_leftpad, block_table);
  const int64_t appended = key ? key->size(2) : 0;
  Rotary rotary{};
  STD_TORCH_CHECK(rotary_cos.has_value() == rotary_sin.has_value(),
                  rotary_cos ? "rotary_sin" : "rotary_cos", ": expected both or none");
  if (rotary_cos) {
    STD_TORCH_CHECK(cache_seqlens.has_value(),
                    "cache_seqlens: expected the positions to rotate by, got None");
    check_rank("rotary_cos", *rotary_cos, 2);
    check_shape("rotary_sin", *rotary_sin, {rotary_cos->size(0), rotary_cos->size(1)});
    check_same("rotary_sin", *rotary_sin, "rotary_cos", *rotary_cos);
    rotary.dtype = dtype_of("rotary_cos", *rotary_cos);
    STD_TORCH_CHECK(rotary.dtype == d.dtype || rotary.dtype == DType::kFloat,
                    "rotary_cos: expected dtype float32 or that of query");
    STD_TORCH_CHECK(rotary_cos->is_contiguous() && rotary_sin->is_contiguous(),
                    "rotary_cos, rotary_sin: expected contiguous tensors");
    rotary.half = rotary_cos->size(1);
    STD_TORCH_CHECK(2 * rotary.half <= d.head_dim, "rotary_cos: expected at most ", d.head_dim / 2,
                    " columns, got ", rotary.half);
    // Without a diagonal all queries stand at the first new position.
    const int64_t apart = window_left >= 0 || window_right >= 0 ? d.seqlen_q : 1;
    for (int64_t b = 0; b < d.batch; ++b) {
      const int64_t last = cache.filled[b] + std::max(appended, apart);
      STD_TORCH_CHECK(last <= rotary_cos->size(0), "rotary_cos: expected at least ", last,
                      " positions, got ", rotary_cos->size(0));
    }
    rotary.cos = rotary_cos->const_data_ptr(), rotary.sin = rotary_sin->const_data_ptr();
    rotary.interleaved = rotary_interleaved;
  }

  Tensor output = empty_heads_like(query, d.head_dim_v);
  Tensor lse = empty_contiguous<3>({d.batch, d.heads, d.seqlen_q}, ScalarType::Float);
  if (lse.numel() == 0) return {output, lse};
  std::vector<int64_t> seqlens = cache.filled;
  for (int64_t& length : seqlens) length += appended;
  const int64_t longest = *std::max_element(seqlens.begin(), seqlens.end());

  std::vector<char> rotated(query.numel() * element_size(d.dtype));
  void* key_data = key_cache.mutable_data_ptr();
  void* value_data = value_cache.mutable_data_ptr();
  const auto prepare_as = d.dtype == DType::kFloat  ? &prepare<float>
                          : d.dtype == DType::kHalf ? &prepare<generic::Half>
                                                    : &prepare<generic::BFloat16>;
  prepare_as(rotary, cache, d, query, key, value, rotated.data(), key_data, value_data);

  d.query = rotated.data(), d.key_cache = key_data, d.value_cache = value_data;
  d.seqlens = seqlens.data(), d.leftpad = cache.leftpad;
  d.block_table = cache.block_table, d.block_table_stride = cache.block_table_stride;
  d.page = std::max<int64_t>(1, cache.page);
  d.splits = choose_splits(d, longest, num_splits);
  d.split_keys = std::max<int64_t>(1, (longest + d.splits - 1) / d.splits);
  d.partial_floats = PYOPS_ISA_SELECT(attention_decode_partial_floats)(d);
  d.partial = static_cast<float*>(
      scratch(0, d.batch * d.heads_kv * d.splits * d.partial_floats * sizeof(float)));
  d.output = output.mutable_data_ptr(), d.output_strides = head_strides("output", output);
  d.lse = static_cast<float*>(lse.mutable_data_ptr());
  // Waking another thread costs some microseconds: about what reading this many numbers takes.
  const SingleThread scope(d.batch * d.heads_kv * longest * (d.head_dim + d.head_dim_v) < 20000);
  PYOPS_ISA_SELECT(attention_decode)(d);
  return {output, lse};
}

}  // namespace
}  // namespace pyops::cpu

STABLE_TORCH_LIBRARY_IMPL(pyops, CPU, m) {
  m.impl("attention_decode", TORCH_BOX(&pyops::cpu::attention_decode_op));
}
