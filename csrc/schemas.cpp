// Every op's schema: the table of contents of the native libraries.
// Kernels register themselves beside their code: csrc/cpu/<op>.cpp, csrc/cuda/<op>.cu.
#include <torch/csrc/stable/library.h>

#define PYOPS_CONV_GEOMETRY                                                            \
  "int[2] stride, int[2] padding, int[2] dilation, int groups, str activation, float " \
  "negative_slope, "                                                                   \
  "str pool, int[2] pool_size, int[2] pool_stride, int[2] pool_padding, bool ceil_mode"

#define PYOPS_LSTM_OPTIONS "bool has_biases, int num_layers, bool bidirectional"

STABLE_TORCH_LIBRARY(pyops, m) {
  m.def("conv_relu_pool2d(Tensor input, Tensor weight, Tensor? bias, " PYOPS_CONV_GEOMETRY
        ", bool with_codes) -> (Tensor output, Tensor codes)");
  m.def(
      "conv_relu_pool2d_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor "
      "codes, " PYOPS_CONV_GEOMETRY
      ", bool[3] output_mask) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
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
