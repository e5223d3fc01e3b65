// Plain loops, correctness before speed.
#include <cmath>
#include <vector>

#include "lstm.h"

#define PYOPS_ISA generic
#include "simd.h"

namespace pyops::cpu::generic {
namespace {

template <class T>
void backward(const LstmGradParams& g) {
  const LstmParams& p = g.p;
  const int64_t H = p.hidden_size, D = p.directions, B = p.batch, per = p.tensors_per_index();
  std::vector<float> d_out(p.rows * D * H), d_in;
  if (g.grad_output.data) {
    for (int64_t t = 0; t < p.steps; ++t)
      for (int64_t b = 0; b < p.active(t); ++b)
        for (int64_t k = 0; k < D * H; ++k)
          d_out[(p.first_row(t) + b) * D * H + k] = to_float(static_cast<const T*>(
              g.grad_output.data)[p.offset(g.grad_output, t) + b * g.grad_output.row_stride + k]);
  }
  for (int64_t layer = p.layers; layer-- > 0;) {
    auto hidden = [&](int64_t l) {
      return LstmSequence{static_cast<T*>(p.saved) + p.saved_output(l), B * D * H, D * H};
    };
    const LstmSequence in = layer ? hidden(layer - 1) : p.input;
    const LstmSequence out = layer + 1 < p.layers ? hidden(layer) : p.output;
    const int64_t I = p.in_features(layer);
    d_in.assign(p.rows * I, 0.0f);
    for (int64_t dir = 0; dir < D; ++dir) {
      const int64_t index = layer * D + dir;
      const T* w_ih = static_cast<const T*>(p.weights[index * per]);
      const T* w_hh = static_cast<const T*>(p.weights[index * per + 1]);
      std::vector<float> dh(B * H), dc(B * H), gates(4 * H), dw_ih(4 * H * I), dw_hh(4 * H * H),
          db(4 * H);
      for (int64_t i = 0; i < B * H; ++i) {
        if (g.grad_h_n) dh[i] = to_float(static_cast<const T*>(g.grad_h_n)[index * B * H + i]);
        if (g.grad_c_n) dc[i] = to_float(static_cast<const T*>(g.grad_c_n)[index * B * H + i]);
      }
      for (int64_t s = p.steps; s-- > 0;) {
        const int64_t t = dir ? p.steps - 1 - s : s, before = dir ? t + 1 : t - 1;
        for (int64_t b = 0; b < p.active(t); ++b) {
          // Whether this row's state came from h0.
          const bool first = s == 0 || b >= p.active(before);
          const int64_t row = p.first_row(t) + b;
          const T* kept = static_cast<const T*>(p.saved) + p.saved_gates(index) + row * 5 * H;
          const T* c_old = first ? static_cast<const T*>(p.c0) + (index * B + b) * H
                                 : static_cast<const T*>(p.saved) + p.saved_gates(index) +
                                       (p.first_row(before) + b) * 5 * H + 4 * H;
          const T* h_old = first ? static_cast<const T*>(p.h0) + (index * B + b) * H
                                 : static_cast<const T*>(out.data) + p.offset(out, before) +
                                       b * out.row_stride + dir * H;
          for (int64_t u = 0; u < H; ++u) {
            const float i = to_float(kept[u]), f = to_float(kept[H + u]),
                        c = to_float(kept[2 * H + u]), o = to_float(kept[3 * H + u]),
                        th = std::tanh(to_float(kept[4 * H + u]));
            const float d = dh[b * H + u] + d_out[row * D * H + dir * H + u];
            const float cell = dc[b * H + u] + d * o * (1 - th * th);
            gates[3 * H + u] = d * th * o * (1 - o);
            gates[u] = cell * c * i * (1 - i);
            gates[H + u] = cell * to_float(c_old[u]) * f * (1 - f);
            gates[2 * H + u] = cell * i * (1 - c * c);
            dc[b * H + u] = cell * f;
            dh[b * H + u] = 0;
          }
          const T* x = static_cast<const T*>(in.data) + p.offset(in, t) + b * in.row_stride;
          for (int64_t j = 0; j < 4 * H; ++j) {
            for (int64_t k = 0; k < I; ++k) {
              d_in[row * I + k] += gates[j] * to_float(w_ih[j * I + k]);
              dw_ih[j * I + k] += gates[j] * to_float(x[k]);
            }
            for (int64_t k = 0; k < H; ++k) {
              dh[b * H + k] += gates[j] * to_float(w_hh[j * H + k]);
              dw_hh[j * H + k] += gates[j] * to_float(h_old[k]);
            }
            db[j] += gates[j];
          }
        }
      }
      for (int64_t i = 0; i < B * H; ++i) {
        if (g.grad_h0) from_float(dh[i], static_cast<T*>(g.grad_h0) + index * B * H + i);
        if (g.grad_c0) from_float(dc[i], static_cast<T*>(g.grad_c0) + index * B * H + i);
      }
      if (g.grad_weights) {
        void* const* to = g.grad_weights + index * per;
        for (int64_t i = 0; i < 4 * H * I; ++i) from_float(dw_ih[i], static_cast<T*>(to[0]) + i);
        for (int64_t i = 0; i < 4 * H * H; ++i) from_float(dw_hh[i], static_cast<T*>(to[1]) + i);
        for (int64_t i = 0; i < 4 * H && p.has_biases; ++i) {
          from_float(db[i], static_cast<T*>(to[2]) + i);
          from_float(db[i], static_cast<T*>(to[3]) + i);
        }
      }
    }
    d_out = d_in;
  }
  if (g.grad_input.data) {
    for (int64_t t = 0; t < p.steps; ++t)
      for (int64_t b = 0; b < p.active(t); ++b)
        for (int64_t k = 0; k < p.input_size; ++k)
          from_float(d_out[(p.first_row(t) + b) * p.input_size + k],
                     static_cast<T*>(g.grad_input.data) + p.offset(g.grad_input, t) +
                         b * g.grad_input.row_stride + k);
  }
}

}  // namespace
}  // namespace pyops::cpu::generic

namespace pyops::cpu {

void lstm_backward_generic(const LstmGradParams& g) {
  if (g.p.dtype == DType::kFloat) return generic::backward<float>(g);
  if (g.p.dtype == DType::kHalf) return generic::backward<generic::Half>(g);
  generic::backward<generic::BFloat16>(g);
}

}  // namespace pyops::cpu
