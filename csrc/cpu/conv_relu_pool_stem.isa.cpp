// 3x3 convolution of few input channels with activation and 2x2 pooling fused, straight from the
// definition: there is too little to sum for Winograd's transforms to pay.
//
// Output channels lie in the lanes; a register block is one row of kMaxWindows pooling windows by
// kBlockChannels, so that pooling needs no shuffles. Input rows are copied band by band into a
// padded float plane per channel that stays in L1, from which single pixels are broadcast.
#include "conv_relu_pool_epilogue.h"
#include "runtime.h"

namespace pyops::cpu::PYOPS_ISA {
namespace {

constexpr int kMaxChannels = 7;
#if defined(__AVX512F__)
constexpr int kMaxWindows = 3;  // 2 x 6 pixels x 2 vectors: 24 accumulators
#else
constexpr int kMaxWindows = 1;
#endif
constexpr int64_t kBandWindows = 64;     // pooled outputs finished in L1 before they are stored
constexpr int64_t kBandPixels = 8192;    // padded input floats of a band

PYOPS_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
PYOPS_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
PYOPS_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

template <class F>
PYOPS_INLINE void with_type(DType dtype, const F& f) {
  if (dtype == DType::kFloat) return f(float{});
  if (dtype == DType::kBFloat16) return f(BFloat16{});
  return f(Half{});
}

// packed: (output block, channel, tap, kBlockChannels), zeros beyond the last output channel.
template <class T>
void pack_weights(const ConvReluPoolParams& p, float* packed) {
  const T* const weight = static_cast<const T*>(p.weight);
  const int64_t taps = p.in_channels * 9;
  const int64_t blocks = ceil_div(p.out_channels, kBlockChannels);
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      for (int64_t lane = 0; lane < kBlockChannels; ++lane, ++packed) {
        const int64_t k = block * kBlockChannels + lane;
        *packed = k < p.out_channels ? to_float(weight[k * taps + tap]) : 0.0f;
      }
    }
  }
}

// Rows [y0, y0 + rows) of the padded image n -> (channel, rows, width).
template <class T>
void pack_rows(const ConvReluPoolParams& p, int64_t n, int64_t y0, int64_t rows, int64_t width,
               float* out) {
  const T* const input = static_cast<const T*>(p.input);
  const int64_t step = p.channels_last ? p.in_channels : 1;
  const int64_t last = smaller(width, p.in_w + p.pad_w);
  for (int64_t c = 0; c < p.in_channels; ++c) {
    for (int64_t r = 0; r < rows; ++r, out += width) {
      const int64_t y = y0 + r - p.pad_h;
      if (y < 0 || y >= p.in_h) {
        for (int64_t x = 0; x < width; ++x) out[x] = 0;
        continue;
      }
      for (int64_t x = 0; x < smaller(p.pad_w, width); ++x) out[x] = 0;
      const T* const from =
          p.channels_last ? input + (n * p.in_h + y) * p.in_w * p.in_channels + c
                          : input + ((n * p.in_channels + c) * p.in_h + y) * p.in_w;
      int64_t x = p.pad_w;
      if (step == 1) {
        for (; x + kLanes <= last; x += kLanes) store(out + x, load(from + x - p.pad_w));
      }
      for (; x < last; ++x) out[x] = to_float(from[(x - p.pad_w) * step]);
      for (x = larger(last, 0); x < width; ++x) out[x] = 0;
    }
  }
}

// One row of kWindows windows. in: first pixel, rows `width` and channels `plane` floats apart;
// values and codes: (window, kBlockChannels).
template <int kWindows, int kVecs>
void convolve_windows(const Epilogue& epilogue, const float* in, int64_t width, int64_t plane,
                      int64_t channels, const float* weight, const Vec* bias, float* values,
                      int32_t* codes) {
  Vec sum[kWindows][4][kVecs] = {};
  for (int64_t c = 0; c < channels; ++c, in += plane) {
#pragma GCC unroll 3
    for (int row = 0; row < 3; ++row) {
#pragma GCC unroll 3
      for (int column = 0; column < 3; ++column, weight += kBlockChannels) {
        Vec w[kVecs];
#pragma GCC unroll 2
        for (int v = 0; v < kVecs; ++v) w[v] = load(weight + v * kLanes);
#pragma GCC unroll 3
        for (int i = 0; i < kWindows; ++i) {
#pragma GCC unroll 4
          for (int place = 0; place < 4; ++place) {
            const Vec x =
                splat(in[(row + place / 2) * width + 2 * i + place % 2 + column]);
#pragma GCC unroll 2
            for (int v = 0; v < kVecs; ++v) sum[i][place][v] = fma(x, w[v], sum[i][place][v]);
          }
        }
      }
    }
  }
#pragma GCC unroll 3
  for (int i = 0; i < kWindows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) {
      const Vec x[4] = {sum[i][0][v] + bias[v], sum[i][1][v] + bias[v], sum[i][2][v] + bias[v],
                        sum[i][3][v] + bias[v]};
      VecInt code{};
      const int at = i * kBlockChannels + v * kLanes;
      store(values + at, pool_window<false>(epilogue, x, &code));
      if (codes) store(reinterpret_cast<float*>(codes) + at, reinterpret_cast<Vec>(code));
    }
  }
}

using ConvolveWindows = void (*)(const Epilogue&, const float*, int64_t, int64_t, int64_t,
                                 const float*, const Vec*, float*, int32_t*);
constexpr ConvolveWindows kConvolve[3][kBlockVecs] = {
    {convolve_windows<1, 1>, convolve_windows<1, 2>},
    {convolve_windows<2, 1>, convolve_windows<2, 2>},
    {convolve_windows<3, 1>, convolve_windows<3, 2>}};

class Stem {
 public:
  explicit Stem(const ConvReluPoolParams& params) : p(params), epilogue(params) {
    width = 2 * p.out_w + 2;
    const int64_t fit = larger(1, (kBandPixels / (width * p.in_channels) - 2) / 2);
    band = smaller(p.out_h, smaller(fit, larger(1, kBandWindows / p.out_w)));
    bands = ceil_div(p.out_h, band);
  }

  void run() const {
    const int64_t blocks = ceil_div(p.out_channels, kBlockChannels);
    float* const weight = static_cast<float*>(
        scratch(0, blocks * p.in_channels * 9 * kBlockChannels * sizeof(float)));
    with_type(p.dtype, [&](auto t) { pack_weights<decltype(t)>(p, weight); });
    const int64_t total = p.batch * bands, tasks = smaller(total, 8 * num_threads());
    parallel_for(tasks, [&](int64_t task) {
      for (int64_t i = total * task / tasks; i < total * (task + 1) / tasks; ++i) {
        run_band(i / bands, i % bands * band, weight);
      }
    });
  }

 private:
  const ConvReluPoolParams& p;
  const Epilogue epilogue;
  int64_t width;        // of a padded input row
  int64_t band, bands;  // pooled rows a band, bands an image

  void run_band(int64_t n, int64_t first_row, const float* weight) const {
    const int64_t pooled = smaller(band, p.out_h - first_row), rows = 2 * pooled + 2;
    float* const in =
        static_cast<float*>(scratch(4, p.in_channels * (2 * band + 2) * width * sizeof(float)));
    const int64_t tile = (band * p.out_w + kLanes) * kBlockChannels;
    float* const values = static_cast<float*>(scratch(5, 2 * tile * sizeof(float)));
    int32_t* const codes =
        epilogue.with_codes ? reinterpret_cast<int32_t*>(values + tile) : nullptr;
    const int64_t chunks = ceil_div(p.out_w, kMaxWindows);
    with_type(p.dtype, [&](auto t) {
      using T = decltype(t);
      pack_rows<T>(p, n, 2 * first_row, rows, width, in);
      for (int64_t k0 = 0; k0 < p.out_channels; k0 += kBlockChannels) {
        const int vecs = p.out_channels - k0 > kLanes ? 2 : 1;
        Vec bias[kBlockVecs] = {};
        for (int v = 0; p.bias != nullptr && v < vecs; ++v) {
          const int64_t k = k0 + v * kLanes;
          bias[v] = load_first(static_cast<const T*>(p.bias) + k,
                               static_cast<int>(smaller(kLanes, p.out_channels - k)));
        }
        int64_t at = 0;
        for (int64_t y = 0; y < pooled; ++y) {
          for (int64_t chunk = 0, x = 0; chunk < chunks; ++chunk) {
            const int64_t windows = (p.out_w - x) / (chunks - chunk);
            kConvolve[windows - 1][vecs - 1](
                epilogue, in + 2 * y * width + 2 * x, width, rows * width, p.in_channels,
                weight + k0 * p.in_channels * 9, bias, values + at * kBlockChannels,
                codes ? codes + at * kBlockChannels : nullptr);
            x += windows;
            at += windows;
          }
        }
        const Run run = {n, first_row * p.out_w, 0, static_cast<int>(at)};
        store_runs<T>(p, &run, 1, values, codes, k0);
      }
    });
  }
};

}  // namespace

bool conv_relu_pool_stem(const ConvReluPoolParams& p) {
  if (p.dtype == DType::kDouble || p.groups != 1 || p.in_channels > kMaxChannels ||
      p.kernel_h != 3 || p.kernel_w != 3 || p.stride_h != 1 || p.stride_w != 1 ||
      p.dilation_h != 1 || p.dilation_w != 1) {
    return false;
  }
  if (p.pool == Pool::kNone || p.pool_h != 2 || p.pool_w != 2 || p.pool_stride_h != 2 ||
      p.pool_stride_w != 2 || p.pool_pad_h != 0 || p.pool_pad_w != 0 || p.out_h * 2 > p.conv_h ||
      p.out_w * 2 > p.conv_w) {
    return false;
  }
  Stem(p).run();
  return true;
}

}  // namespace pyops::cpu::PYOPS_ISA
