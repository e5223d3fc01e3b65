// Attention forward in plain loops.
#include <cmath>

#include "attention.h"
#include "philox.h"
#include "runtime.h"
#include "vector_math.h"

namespace pyops::cpu::PYOPS_ISA {
namespace {

float element(const void* p, DType dtype, int64_t i) {
  if (dtype == DType::kFloat) return static_cast<const float*>(p)[i];
  if (dtype == DType::kHalf) return to_float(static_cast<const Half*>(p)[i]);
  return to_float(static_cast<const BFloat16*>(p)[i]);
}
void set_element(void* p, DType dtype, int64_t i, float x) {
  if (dtype == DType::kFloat)
    static_cast<float*>(p)[i] = x;
  else if (dtype == DType::kHalf)
    from_float(x, static_cast<Half*>(p) + i);
  else
    from_float(x, static_cast<BFloat16*>(p) + i);
}

float score(const AttentionProblem& p, const AttentionSequence& s, int64_t b, int64_t h, int64_t i,
            int64_t j) {
  const int64_t hk = h / (p.heads / p.heads_kv);
  const int64_t q =
      b * p.query_strides.batch + h * p.query_strides.head + (s.first_q + i) * p.query_strides.row;
  const int64_t k =
      b * p.key_strides.batch + hk * p.key_strides.head + (s.first_k + j) * p.key_strides.row;
  double sum = 0;
  for (int64_t d = 0; d < p.head_dim; ++d) {
    sum += static_cast<double>(element(p.query, p.dtype, q + d)) * element(p.key, p.dtype, k + d);
  }
  float x = static_cast<float>(sum) * p.scale;
  if (p.softcap > 0) x = p.softcap * std::tanh(x / p.softcap);
  if (p.alibi_slopes) {
    x -= p.alibi_slopes[b * p.alibi_batch_stride + h] *
         std::fabs(static_cast<float>(i + s.shift - j));
  }
  const int64_t at = b * p.bias_batch_stride + h * p.bias_head_stride + i * p.bias_row_stride +
                     j * p.bias_column_stride;
  if (p.bias_kind == BiasKind::kBool && !static_cast<const uint8_t*>(p.bias)[at]) return -INFINITY;
  if (p.bias_kind == BiasKind::kFloat) x += static_cast<const float*>(p.bias)[at];
  if (p.bias_kind == BiasKind::kOwn) x += element(p.bias, p.dtype, at);
  return x;
}

bool kept(const AttentionProblem& p, int64_t bh, int64_t i, int64_t j) {
  VecUint counter[4], words[4];
  counter[0] = VecUint{} + static_cast<uint32_t>(j / 4);
  counter[1] = VecUint{} + static_cast<uint32_t>(i);
  counter[2] = VecUint{} + static_cast<uint32_t>(bh);
  counter[3] = VecUint{} + p.philox_offset;
  philox(counter, p.philox_key, words);
  return words[j % 4][0] >= p.dropout_threshold;
}

}  // namespace

void attention_forward(const AttentionForward& f) {
  const AttentionProblem& p = f.p;
  parallel_for(p.batch * p.heads, [&](int64_t bh) {
    const int64_t b = bh / p.heads, h = bh % p.heads, hk = h / (p.heads / p.heads_kv);
    const AttentionSequence s = attention_sequence(p, b);
    float* scores = static_cast<float*>(scratch(4, s.seqlen_k * 4));
    for (int64_t i = 0; i < s.seqlen_q; ++i) {
      const int64_t first = first_visible(p, s, i), end = end_visible(p, s, i);
      float most = p.sinks ? p.sinks[h] : -INFINITY;
      for (int64_t j = first; j < end; ++j) {
        scores[j] = score(p, s, b, h, i, j);
        most = scores[j] > most ? scores[j] : most;
      }
      const float base = most == -INFINITY ? 0 : most;
      double sum = p.sinks ? std::exp(p.sinks[h] - base) : 0;
      for (int64_t j = first; j < end; ++j) sum += scores[j] = std::exp(scores[j] - base);
      f.lse[b * f.lse_batch_stride + h * f.lse_head_stride + s.first_q + i] =
          sum == 0 ? -INFINITY : base + static_cast<float>(std::log(sum));
      for (int64_t d = 0; d < p.head_dim_v; ++d) {
        double total = 0;
        for (int64_t j = first; j < end; ++j) {
          if (p.dropout && !kept(p, bh, i, j)) continue;
          total += static_cast<double>(scores[j]) * p.keep_scale *
                   element(p.value, p.dtype,
                           b * p.value_strides.batch + hk * p.value_strides.head +
                               (s.first_k + j) * p.value_strides.row + d);
        }
        set_element(f.output, p.dtype,
                    b * f.output_strides.batch + h * f.output_strides.head +
                        (s.first_q + i) * f.output_strides.row + d,
                    sum == 0 ? 0 : static_cast<float>(total / sum));
      }
    }
  });
}

}  // namespace pyops::cpu::PYOPS_ISA
