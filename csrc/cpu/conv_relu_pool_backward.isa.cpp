// Sparse backward of pool(activation(conv)) under max pooling: a window's winner alone carries
// gradient, and the gradient before the pool is never written.
#include "conv_relu_pool_backward.h"

namespace pyops::cpu::PYOPS_ISA {

#if defined(__AVX512F__)
namespace {

constexpr int64_t kFlush = 64;  // values a lane sums in float before they join a double

PYOPS_INLINE void flush(__m512 v, double (&sum)[16]) {
  alignas(64) float lanes[16];
  _mm512_store_ps(lanes, v);
  for (int i = 0; i < 16; ++i) sum[i] += lanes[i];
}

template <class T>
void backward_bias(const ConvReluPoolGradParams& q) {
  const ConvReluPoolParams& p = q.p;
  const Passing passing(p);
  const T* grad = static_cast<const T*>(q.grad_output);
  T* out = static_cast<T*>(q.grad_bias);
  const int64_t plane = p.out_h * p.out_w;
  if (p.channels_last) {
    parallel_for(ceil_div(p.out_channels, 16), [&](int64_t task) {
      const int64_t channels = min64(16, p.out_channels - task * 16);
      const __mmask16 m = first_lanes(channels);
      double sum[16] = {};
      for (int64_t i = 0; i < p.batch * plane; i += kFlush) {
        const int64_t end = min64(p.batch * plane, i + kFlush);
        __m512 v = _mm512_setzero_ps();
        for (int64_t j = i; j < end; ++j) {
          const int64_t at = j * p.out_channels + task * 16;
          const __m128i codes = _mm_maskz_loadu_epi8(m, p.codes + at);
          v = _mm512_add_ps(v, passing.apply(load16(grad + at, m), codes, m));
        }
        flush(v, sum);
      }
      for (int64_t k = 0; k < channels; ++k) {
        from_float(static_cast<float>(sum[k]), out + task * 16 + k);
      }
    });
    return;
  }
  const int64_t each = max64(1, (1 << 14) / (p.batch * plane));
  parallel_for(ceil_div(p.out_channels, each), [&](int64_t task) {
    const int64_t last = min64(p.out_channels, (task + 1) * each);
    for (int64_t k = task * each; k < last; ++k) {
      double sum[16] = {};
      for (int64_t n = 0; n < p.batch; ++n) {
        const int64_t at = (n * p.out_channels + k) * plane;
        for (int64_t i = 0; i < plane; i += 16 * kFlush) {
          const int64_t end = min64(plane, i + 16 * kFlush);
          __m512 v = _mm512_setzero_ps();
          for (int64_t j = i; j < end; j += 16) {
            const __mmask16 m = first_lanes(end - j);
            const __m128i codes = _mm_maskz_loadu_epi8(m, p.codes + at + j);
            v = _mm512_add_ps(v, passing.apply(load16(grad + at + j, m), codes, m));
          }
          flush(v, sum);
        }
      }
      double total = 0;
      for (int i = 0; i < 16; ++i) total += sum[i];
      from_float(static_cast<float>(total), out + k);
    }
  });
}

bool takes(const ConvReluPoolParams& p) {
  if (p.dtype == DType::kDouble || p.pool != Pool::kMax || p.groups != 1) return false;
  if (p.dilation_h != 1 || p.dilation_w != 1 || !p.codes) return false;
  // Places are compared one by one; windows that overlap much leave little to skip.
  if (p.pool_h * p.pool_w > 16) return false;
  if (p.in_w > 1 << 17) return false;  // offsets within a row of tiles are 32-bit
  return 2 * p.out_h * p.out_w <= p.conv_h * p.conv_w;
}

bool is_3x3_pool_2x2(const ConvReluPoolParams& p) {
  return p.kernel_h == 3 && p.kernel_w == 3 && p.stride_h == 1 && p.stride_w == 1 &&
         p.pool_h == 2 && p.pool_w == 2 && p.pool_stride_h == 2 && p.pool_stride_w == 2 &&
         p.pool_pad_h == 0 && p.pool_pad_w == 0;
}

}  // namespace

bool conv_relu_pool_backward_sparse(const ConvReluPoolGradParams& q) {
  const ConvReluPoolParams& p = q.p;
  if (!takes(p)) return false;
  const bool common = is_3x3_pool_2x2(p);
  if (common && p.in_channels <= kStemChannels) {
    backward_stem(q);
    return true;
  }
  if (q.grad_bias) {
    with_type(p.dtype, [&](auto t) { backward_bias<decltype(t)>(q); });
  }
  if (q.grad_input) common ? backward_data_3x3(q) : backward_data_any(q);
  if (q.grad_weight) backward_weight_any(q);
  return true;
}
#else
bool conv_relu_pool_backward_sparse(const ConvReluPoolGradParams&) { return false; }
#endif  // __AVX512F__

}  // namespace pyops::cpu::PYOPS_ISA
