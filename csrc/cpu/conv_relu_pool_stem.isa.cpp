// 3x3 convolution of few input channels with activation and 2x2 pooling fused, straight from the
// definition: there is too little to sum for Winograd's transforms to pay.
//
// Input rows are copied, band by band, into padded float planes that stay in L1. Then
//   windows in the lanes (NCHW)   a register block is kLanes pooling windows of a row by
//                                 kColumnChannels; even and odd columns lie apart, so that one of
//                                 the four pixels of every window is one load
//   channels in the lanes         a register block is kMaxWindows windows by kBlockChannels
// and neither needs a shuffle to pool.
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
constexpr int64_t kBandWindows = 64;   // pooled outputs finished in L1 before they are stored
constexpr int64_t kBandPixels = 8192;  // padded input floats of a band

PYOPS_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
PYOPS_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
PYOPS_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Hides where a pointer comes from: the compiler would otherwise keep pixels that the next taps
// read again in registers, and spill the sums.
PYOPS_INLINE const float* opaque(const float* p) {
  asm("" : "+r"(p));
  return p;
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

// The first `width` pixels of row y of the padded image n, channel c.
template <class T>
PYOPS_INLINE void pad_row(const ConvReluPoolParams& p, int64_t n, int64_t c, int64_t y,
                          int64_t width, float* out) {
  const int64_t row = y - p.pad_h;
  const int64_t last = row < 0 || row >= p.in_h ? 0 : larger(0, smaller(width, p.in_w + p.pad_w));
  int64_t x = 0;
  if (last > 0) {
    for (; x < smaller(p.pad_w, width); ++x) out[x] = 0;
    const T* const input = static_cast<const T*>(p.input);
    if (p.channels_last) {
      const T* from = input + (n * p.in_h + row) * p.in_w * p.in_channels + c;
      for (; x < last; ++x, from += p.in_channels) out[x] = to_float(*from);
    } else {
      const T* from = input + ((n * p.in_channels + c) * p.in_h + row) * p.in_w;
      for (; x + kLanes <= last; x += kLanes, from += kLanes) store(out + x, load(from));
      if (x < last) {
        store_first(out + x, load_first(from, static_cast<int>(last - x)),
                    static_cast<int>(last - x));
        x = last;
      }
    }
  }
  for (; x + kLanes <= width; x += kLanes) store(out + x, Vec{});
  for (; x < width; ++x) out[x] = 0;
}

// Rows [y0, y0 + rows) of the padded image n -> (channel, rows, width).
template <class T>
void pack_rows(const ConvReluPoolParams& p, int64_t n, int64_t y0, int64_t rows, int64_t width,
               float* out) {
  for (int64_t c = 0; c < p.in_channels; ++c) {
    for (int64_t r = 0; r < rows; ++r, out += width) pad_row<T>(p, n, c, y0 + r, width, out);
  }
}

// The same -> (channel, rows, parity of the column, pitch); pitch is a multiple of kLanes, and out
// has room for another 2 * pitch at its end.
template <class T>
void pack_split_rows(const ConvReluPoolParams& p, int64_t n, int64_t y0, int64_t rows,
                     int64_t pitch, float* out) {
  float* const line = out + p.in_channels * rows * 2 * pitch;
  for (int64_t c = 0; c < p.in_channels; ++c) {
    for (int64_t r = 0; r < rows; ++r, out += 2 * pitch) {
      pad_row<T>(p, n, c, y0 + r, 2 * pitch, line);
      for (int64_t x = 0; x < pitch; x += kLanes) {
        Vec even, odd;
        split_even_odd(load(line + 2 * x), load(line + 2 * x + kLanes), &even, &odd);
        store(out + x, even);
        store(out + pitch + x, odd);
      }
    }
  }
}

// kLanes windows of one row by kChannels output channels. in: as pack_split_rows has it, first
// window; weight: taps kBlockChannels floats apart; output and codes: channels `step` apart.
template <int kChannels, class T>
void convolve_columns(const Epilogue& epilogue, const float* in, int64_t pitch, int64_t plane,
                      int64_t channels, const float* weight, const float* bias, int count,
                      int64_t step, T* output, uint8_t* codes) {
  Vec sum[kChannels][4] = {};
  for (int64_t c = 0; c < channels; ++c, in += plane) {
#pragma GCC unroll 1
    for (int row = 0; row < 3; ++row) {
#pragma GCC unroll 3
      for (int column = 0; column < 3; ++column, weight += kBlockChannels) {
        const float* const from = opaque(in + row * 2 * pitch);
        Vec x[4];
#pragma GCC unroll 4
        for (int place = 0; place < 4; ++place) {
          const int along = column + place % 2;
          x[place] = load(from + (place / 2 * 2 + along % 2) * pitch + along / 2);
        }
#pragma GCC unroll 6
        for (int k = 0; k < kChannels; ++k) {
          const Vec w = splat(weight[k]);
#pragma GCC unroll 4
          for (int place = 0; place < 4; ++place) sum[k][place] = fma(x[place], w, sum[k][place]);
        }
      }
    }
  }
#pragma GCC unroll 6
  for (int k = 0; k < kChannels; ++k) {
    const Vec b = splat(bias[k]);
    const Vec x[4] = {sum[k][0] + b, sum[k][1] + b, sum[k][2] + b, sum[k][3] + b};
    VecInt code{};
    store_first(output + k * step, pool_window<false>(epilogue, x, &code), count);
    if (codes) store_bytes(codes + k * step, code, count);
  }
}

// One row of kWindows windows. in: first pixel, rows `width` and channels `plane` floats apart;
// values and codes: (window, kBlockChannels).
template <int kWindows, int kVecs>
void convolve_windows(const Epilogue& epilogue, const float* in, int64_t width, int64_t plane,
                      int64_t channels, const float* weight, const float* bias, float* values,
                      int32_t* codes) {
  Vec sum[kWindows][4][kVecs] = {};
  for (int64_t c = 0; c < channels; ++c, in += plane) {
#pragma GCC unroll 1
    for (int row = 0; row < 3; ++row) {
#pragma GCC unroll 3
      for (int column = 0; column < 3; ++column, weight += kBlockChannels) {
        const float* const from = opaque(in + row * width + column);
        Vec w[kVecs];
#pragma GCC unroll 2
        for (int v = 0; v < kVecs; ++v) w[v] = load(weight + v * kLanes);
#pragma GCC unroll 3
        for (int i = 0; i < kWindows; ++i) {
#pragma GCC unroll 4
          for (int place = 0; place < 4; ++place) {
            const Vec x = splat(from[place / 2 * width + 2 * i + place % 2]);
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
      const Vec b = load(bias + v * kLanes);
      const Vec x[4] = {sum[i][0][v] + b, sum[i][1][v] + b, sum[i][2][v] + b, sum[i][3][v] + b};
      VecInt code{};
      const int at = i * kBlockChannels + v * kLanes;
      store(values + at, pool_window<false>(epilogue, x, &code));
      if (codes) store(reinterpret_cast<float*>(codes) + at, reinterpret_cast<Vec>(code));
    }
  }
}

using ConvolveWindows = void (*)(const Epilogue&, const float*, int64_t, int64_t, int64_t,
                                 const float*, const float*, float*, int32_t*);
constexpr ConvolveWindows kConvolve[3][kBlockVecs] = {
    {convolve_windows<1, 1>, convolve_windows<1, 2>},
    {convolve_windows<2, 1>, convolve_windows<2, 2>},
    {convolve_windows<3, 1>, convolve_windows<3, 2>}};

template <class T>
using ConvolveColumns = void (*)(const Epilogue&, const float*, int64_t, int64_t, int64_t,
                                 const float*, const float*, int, int64_t, T*, uint8_t*);
#if defined(__AVX512F__)
constexpr int kColumnChannels = 6;  // 24 accumulators
template <class T>
constexpr ConvolveColumns<T> kColumns[kColumnChannels] = {
    convolve_columns<1, T>, convolve_columns<2, T>, convolve_columns<3, T>,
    convolve_columns<4, T>, convolve_columns<5, T>, convolve_columns<6, T>};
#else
constexpr int kColumnChannels = 2;
template <class T>
constexpr ConvolveColumns<T> kColumns[kColumnChannels] = {convolve_columns<1, T>,
                                                          convolve_columns<2, T>};
#endif

class Stem {
 public:
  explicit Stem(const ConvReluPoolParams& params) : p(params), epilogue(params) {
    const int64_t vectors = ceil_div(p.out_w, kLanes);
    // Narrow outputs would leave too many of a row's lanes empty.
    lanes_are_windows = !p.channels_last && p.out_w * 3 >= vectors * kLanes * 2;
    // A padded input row; the last window reads a column beyond its own pair.
    width = lanes_are_windows ? 2 * (vectors + 1) * kLanes : 2 * p.out_w + 2;
    const int64_t fit = larger(1, (kBandPixels / (width * p.in_channels) - 2) / 2);
    band = smaller(p.out_h, fit);
    if (!lanes_are_windows) band = smaller(band, larger(1, kBandWindows / p.out_w));
    bands = ceil_div(p.out_h, band);
  }

  void run() const {
    const int64_t blocks = ceil_div(p.out_channels, kBlockChannels);
    const int64_t block = p.in_channels * 9 * kBlockChannels;
    float* const weight =
        static_cast<float*>(scratch(0, blocks * (block + kBlockChannels) * sizeof(float)));
    float* const bias = weight + blocks * block;
    with_type(p.dtype, [&](auto t) {
      using T = decltype(t);
      pack_weights<T>(p, weight);
      for (int64_t k = 0; k < blocks * kBlockChannels; ++k) {
        const bool given = p.bias != nullptr && k < p.out_channels;
        bias[k] = given ? to_float(static_cast<const T*>(p.bias)[k]) : 0.0f;
      }
    });
    const int64_t total = p.batch * bands, tasks = smaller(total, 8 * num_threads());
    parallel_for(tasks, [&](int64_t task) {
      for (int64_t i = total * task / tasks; i < total * (task + 1) / tasks; ++i) {
        const int64_t n = i / bands, first_row = i % bands * band;
        with_type(p.dtype, [&](auto t) {
          using T = decltype(t);
          if (lanes_are_windows) {
            run_columns<T>(n, first_row, weight, bias);
          } else {
            run_windows<T>(n, first_row, weight, bias);
          }
        });
      }
    });
  }

 private:
  const ConvReluPoolParams& p;
  const Epilogue epilogue;
  bool lanes_are_windows;
  int64_t width;        // of a padded input row
  int64_t band, bands;  // pooled rows a band, bands an image

  float* input_rows() const {
    const int64_t rows = p.in_channels * (2 * band + 2) + 1;
    return static_cast<float*>(scratch(4, rows * width * sizeof(float)));
  }

  template <class T>
  void run_columns(int64_t n, int64_t first_row, const float* weight, const float* bias) const {
    const int64_t pooled = smaller(band, p.out_h - first_row), rows = 2 * pooled + 2;
    const int64_t pitch = width / 2, plane = p.out_h * p.out_w;
    float* const in = input_rows();
    pack_split_rows<T>(p, n, 2 * first_row, rows, pitch, in);
    for (int64_t k0 = 0; k0 < p.out_channels; k0 += kBlockChannels) {
      const int64_t end = smaller(p.out_channels, k0 + kBlockChannels);
      const int64_t chunks = ceil_div(end - k0, kColumnChannels);
      for (int64_t chunk = 0, k = k0; chunk < chunks; ++chunk) {
        const int64_t count = (end - k + chunks - chunk - 1) / (chunks - chunk);
        for (int64_t y = 0; y < pooled; ++y) {
          for (int64_t x = 0; x < p.out_w; x += kLanes) {
            const int64_t at = (n * p.out_channels + k) * plane + (first_row + y) * p.out_w + x;
            kColumns<T>[count - 1](epilogue, in + 2 * y* width + x, pitch, rows* width,
                                   p.in_channels, weight + k0* p.in_channels* 9 + (k - k0),
                                   bias + k, static_cast<int>(smaller(kLanes, p.out_w - x)), plane,
                                   static_cast<T*>(p.output) + at,
                                   p.codes ? p.codes + at : nullptr);
          }
        }
        k += count;
      }
    }
  }

  template <class T>
  void run_windows(int64_t n, int64_t first_row, const float* weight, const float* bias) const {
    const int64_t pooled = smaller(band, p.out_h - first_row), rows = 2 * pooled + 2;
    const int64_t chunks = ceil_div(p.out_w, kMaxWindows);
    const int64_t tile = (band * p.out_w + kLanes) * kBlockChannels;
    float* const values = static_cast<float*>(scratch(5, 2 * tile * sizeof(float)));
    int32_t* const codes =
        epilogue.with_codes ? reinterpret_cast<int32_t*>(values + tile) : nullptr;
    float* const in = input_rows();
    pack_rows<T>(p, n, 2 * first_row, rows, width, in);
    for (int64_t k0 = 0; k0 < p.out_channels; k0 += kBlockChannels) {
      const int vecs = p.out_channels - k0 > kLanes ? 2 : 1;
      int64_t at = 0;
      for (int64_t y = 0; y < pooled; ++y) {
        for (int64_t chunk = 0, x = 0; chunk < chunks; ++chunk) {
          const int64_t windows = (p.out_w - x) / (chunks - chunk);
          kConvolve[windows - 1][vecs - 1](
              epilogue, in + 2 * y * width + 2 * x, width, rows * width, p.in_channels,
              weight + k0 * p.in_channels * 9, bias + k0, values + at * kBlockChannels,
              codes ? codes + at * kBlockChannels : nullptr);
          x += windows;
          at += windows;
        }
      }
      const Run run = {n, first_row * p.out_w, 0, static_cast<int>(at)};
      store_runs<T>(p, &run, 1, values, codes, k0);
    }
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
