// 3x3 and 5x5 convolution by Winograd's method under a pool whose windows are no Winograd tiles:
// overlapping ones, padded ones, larger ones. The sums of a few images are written out, then pooled
// while they are in cache.
#include "conv_relu_pool_finish.h"

namespace pyops::cpu::PYOPS_ISA {

bool conv_relu_pool_winograd_any_pool(const ConvReluPoolParams& p) {
  constexpr int64_t kSumsBytes = 8 << 20;
  if (p.pool == Pool::kNone || p.dtype == DType::kDouble) return false;
  const int64_t vectors = ceil_div(p.out_channels, kLanes);
  const int64_t image = p.conv_h * p.conv_w * vectors * kLanes;
  const int64_t images = min(p.batch, max(1, kSumsBytes / (image * 4)));
  if (image * 4 > 8 * kSumsBytes) return false;
  // The activation and the codes are for the second pass; that there are codes matters to the
  // first.
  ConvReluPoolParams conv = p;
  conv.pool = Pool::kNone;
  conv.pool_h = conv.pool_w = conv.pool_stride_h = conv.pool_stride_w = 1;
  conv.pool_pad_h = conv.pool_pad_w = 0;
  conv.out_h = p.conv_h, conv.out_w = p.conv_w;
  conv.activation = Activation::kNone;
  conv.bias = nullptr;
  // Slots 0 to 2 are those kernels' own.
  conv.sums = static_cast<float*>(scratch(3, images * image * 4));
  const int64_t parts = images < num_threads() ? num_threads() : 1;
  for (int64_t n = 0; n < p.batch; n += images) {
    conv.batch = min(images, p.batch - n);
    conv.input = static_cast<const char*>(p.input) +
                 n * p.in_channels * p.in_h * p.in_w * element_size(p.dtype);
    if (!conv_relu_pool_winograd_int16(conv) && !conv_relu_pool_winograd(conv)) return false;
    parallel_for(conv.batch * parts, [&](int64_t index) {
      const int64_t local = index / parts, part = index % parts;
      const Channels channels{n + local, 0, p.out_channels, vectors};
      with_type(p.dtype, [&](auto t) {
        finish_rows<decltype(t)>(p, channels, conv.sums + local * image, 0, p.out_h * part / parts,
                                 p.out_h * (part + 1) / parts);
      });
    });
  }
  return true;
}

}  // namespace pyops::cpu::PYOPS_ISA
