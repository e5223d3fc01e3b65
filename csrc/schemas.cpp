// Every op's schema: the table of contents of the native libraries.
// Kernels register themselves beside their code: csrc/cpu/<op>.cpp, csrc/cuda/<op>.cu.
#include <torch/csrc/stable/library.h>

#include <string>

// Pairs as two scalars: a list through the stable ABI costs about a microsecond a call.
#define PYOPS_CONV_GEOMETRY                                                                  \
  "int stride_h, int stride_w, int padding_h, int padding_w, int dilation_h, int "           \
  "dilation_w, int groups, str activation, float negative_slope, str pool, int pool_h, int " \
  "pool_w, int pool_stride_h, int pool_stride_w, int pool_padding_h, int pool_padding_w, "   \
  "bool ceil_mode"

#define PYOPS_CONV_TRANSPOSE_GEOMETRY                                                  \
  "int stride_h, int stride_w, int padding_h, int padding_w, int output_padding_h, "   \
  "int output_padding_w, int dilation_h, int dilation_w, int groups, str activation, " \
  "float negative_slope"

#define PYOPS_ATTENTION_OPTIONS \
  "float scale, float softcap, int window_left, int window_right, bool top_left, float dropout_p"
#define PYOPS_ATTENTION_VARLEN                                                             \
  "Tensor cu_seqlens_q, Tensor cu_seqlens_k, int max_seqlen_q, int max_seqlen_k, Tensor? " \
  "alibi_slopes, Tensor? sinks, Tensor? rng_state, " PYOPS_ATTENTION_OPTIONS

#define PYOPS_LSTM_OPTIONS "bool has_biases, int num_layers, bool bidirectional"

STABLE_TORCH_LIBRARY(pyops, m) {
  // _tf32: where float32 may be rounded to TF32 (CUDA only). The precision is part of the op, so
  // that an exported model keeps it.
  for (const char* name : {"conv_relu_pool2d", "conv_relu_pool2d_tf32"}) {
    const std::string op = name;
    m.def((op + "(Tensor input, Tensor weight, Tensor? bias, " PYOPS_CONV_GEOMETRY
                ", bool with_codes) -> (Tensor output, Tensor codes)")
              .c_str());
    m.def((op + "_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor "
                "codes, " PYOPS_CONV_GEOMETRY
                ", bool[3] output_mask) -> (Tensor grad_input, Tensor grad_weight, Tensor "
                "grad_bias)")
              .c_str());
  }
  m.def(
      "conv_transpose2d_act(Tensor input, Tensor weight, Tensor? bias, Tensor? scale, Tensor? "
      "shift, " PYOPS_CONV_TRANSPOSE_GEOMETRY ") -> Tensor");
  m.def(
      "conv_transpose2d_act_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor? "
      "bias, Tensor? scale, Tensor output, " PYOPS_CONV_TRANSPOSE_GEOMETRY
      ", bool[5] output_mask) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias, Tensor "
      "grad_scale, Tensor grad_shift)");
  m.def(
      "linear_act(Tensor input, Tensor weight, Tensor? bias, str activation, float negative_slope) "
      "-> Tensor");
  m.def(
      "attention(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? alibi_slopes, "
      "Tensor? sinks, Tensor? rng_state, " PYOPS_ATTENTION_OPTIONS
      ") -> (Tensor output, Tensor lse)");
  // Without options, gradients or lse: a call of it costs half as much. CPU only.
  m.def(
      "attention_plain(Tensor query, Tensor key, Tensor value, float? scale, bool causal, bool "
      "top_left) -> Tensor");
  m.def(
      "attention_backward(Tensor grad_output, Tensor? grad_lse, Tensor query, Tensor key, Tensor "
      "value, Tensor output, Tensor lse, Tensor? bias, Tensor? alibi_slopes, Tensor? sinks, "
      "Tensor? rng_state, " PYOPS_ATTENTION_OPTIONS
      ", bool[5] output_mask) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor "
      "grad_bias, Tensor grad_sinks)");
  m.def("attention_varlen(Tensor query, Tensor key, Tensor value, " PYOPS_ATTENTION_VARLEN
        ") -> (Tensor output, Tensor lse)");
  m.def(
      "attention_varlen_backward(Tensor grad_output, Tensor? grad_lse, Tensor query, Tensor key, "
      "Tensor value, Tensor output, Tensor lse, " PYOPS_ATTENTION_VARLEN
      ", bool[4] output_mask) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor "
      "grad_sinks)");
  m.def(
      "attention_decode(Tensor query, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor? key, "
      "Tensor? value, Tensor? cache_seqlens, Tensor? cache_leftpad, Tensor? block_table, Tensor? "
      "rotary_cos, Tensor? rotary_sin, bool rotary_interleaved, Tensor? alibi_slopes, Tensor? "
      "sinks, float scale, float softcap, int window_left, int window_right, int num_splits) -> "
      "(Tensor output, Tensor lse)");
  m.def(
      "lstm(Tensor input, Tensor h0, Tensor c0, Tensor[] weights, Tensor? "
      "batch_sizes, " PYOPS_LSTM_OPTIONS
      ", bool save_for_backward) -> (Tensor output, Tensor h_n, Tensor c_n, Tensor saved)");
  m.def(
      "lstm_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor input, Tensor "
      "h0, Tensor c0, Tensor[] weights, Tensor? batch_sizes, Tensor output, Tensor "
      "saved, " PYOPS_LSTM_OPTIONS
      ", bool[4] output_mask) -> (Tensor grad_input, Tensor grad_h0, Tensor grad_c0, Tensor[] "
      "grad_weights)");
}
