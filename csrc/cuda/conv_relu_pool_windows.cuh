// The gradient of one pooled window, spread over its places in registers: what the fused backward
// (windows of at most 2 x 2 that do not overlap) forms in place of an expanded tensor.
#pragma once

#include <cstring>

#include "conv_relu_pool_tile.cuh"

namespace pyops::cuda::conv {

struct alignas(16) Words {
  uint32_t at[4];
};

// One over what an average of at most 2 x 2 is divided by.
PYOPS_DEVICE float average_inverse(const ConvPoolBackward& p, int y, int x) {
  const float size = average_size(p, y, x);
  return size > 2.0f ? 0.25f : size > 1.0f ? 0.5f : 1.0f;
}

// 16 bytes of neighbouring channels of grad_output and their codes, as loaded.
template <class T>
struct PooledChunk {
  static constexpr int kElements = 16 / sizeof(T);
  Words gradients;
  uint32_t codes[kElements / 4];

  // `left` channels exist from element `at` on; `wide`: they come in whole aligned chunks. Without
  // codes they are zero.
  PYOPS_DEVICE void load(const void* grad_output, const uint8_t* code, int64_t at, int left,
                         bool wide) {
    const T* gradient = static_cast<const T*>(grad_output) + at;
    if (code) code += at;
    if (left <= 0 || !wide || !code) clear();
    if (left <= 0) return;
    if (wide) {
      gradients = *reinterpret_cast<const Words*>(gradient);
      if (!code) return;
      if constexpr (kElements == 8) {
        struct alignas(8) Codes {
          uint32_t at[2];
        };
        const Codes both = *reinterpret_cast<const Codes*>(code);
        codes[0] = both.at[0], codes[1] = both.at[1];
      } else {
        codes[0] = *reinterpret_cast<const uint32_t*>(code);
      }
    } else {
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        if (e >= left) break;
        uint32_t bits = 0;
        memcpy(&bits, &gradient[e], sizeof(T));
        constexpr int kPerWord = 4 / sizeof(T);
        gradients.at[e / kPerWord] |= bits << (e % kPerWord * 8 * sizeof(T) % 32);
        if (code) codes[e / 4] |= static_cast<uint32_t>(code[e]) << e % 4 * 8;
      }
    }
  }

  PYOPS_DEVICE void clear() {
    gradients = Words{};
#pragma unroll
    for (uint32_t& word : codes) word = 0;
  }
};

// Lanes: the 16 or 32 bits of an element in a word.
template <class T>
struct WindowGradient {
  static constexpr uint32_t kOnes = sizeof(T) == 2 ? 0x00010001u : 1u;  // bit 0 of every lane
  static constexpr uint32_t kFull = sizeof(T) == 2 ? 0xffffu : ~0u;

  Words marked, other;  // for the places that are marked, and for the rest
  uint32_t marks[4];    // bit p of a lane: place p

  // `inverse`: of an average's size.
  PYOPS_DEVICE WindowGradient(const ConvPoolBackward& p, const PooledChunk<T>& chunk,
                              float inverse) {
    const bool average = p.pool == Pool::kAvg;
    const bool leaky = p.activation == Activation::kLeakyRelu;
    const float slope = static_cast<float>(p.negative_slope);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t code = chunk.codes[i * (4 / sizeof(T)) / 4];
      if constexpr (sizeof(T) == 2) {
        code = code >> i % 2 * 16 & 0xffff;
        code = (code & 0xff) | (code & 0xff00) << 8;
      } else {
        code = code >> i * 8 & 0xff;
      }
      const uint32_t gradient = chunk.gradients.at[i];
      const uint32_t damped = leaky ? scaled(gradient, average ? inverse * slope : slope) : 0;
      if (average) {
        marked.at[i] = scaled(gradient, inverse);
        other.at[i] = damped;
        marks[i] = code;
      } else {
        const uint32_t live = p.activation == Activation::kNone ? ~0u : mask(code >> 7);
        marked.at[i] = (gradient & live) | (damped & ~live);
        other.at[i] = 0;
        const uint32_t right = kOnes + (code & kOnes), lower = mask(code >> 1);  // 1 << place
        marks[i] = (right & ~lower) | (right << 2 & lower);
      }
    }
  }

  PYOPS_DEVICE Words at(int place) const {
    Words words;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t here = mask(marks[i] >> place);
      words.at[i] = (marked.at[i] & here) | (other.at[i] & ~here);
    }
    return words;
  }

 private:
  PYOPS_DEVICE static uint32_t mask(uint32_t bits) { return (bits & kOnes) * kFull; }

  PYOPS_DEVICE static uint32_t scaled(uint32_t word, float by) {
    T lanes[4 / sizeof(T)];
    memcpy(lanes, &word, 4);
#pragma unroll
    for (T& lane : lanes) store_as(&lane, as_float(lane) * by);
    memcpy(&word, lanes, 4);
    return word;
  }
};

}  // namespace pyops::cuda::conv
