// Blocks of query, key, value and grad_output as the products want them.
// Only for *.isa.cpp files.
#pragma once

#include "attention_backward_gemm.h"

namespace pyops::cpu::PYOPS_ISA {
namespace {

// kLanes words that start at p, of which `count` elements exist; zeros after them.
template <class Words, class T>
PYOPS_INLINE Vec load_words(const T* p, int64_t count) {
  if constexpr (Words::kPack == 1) {
    return load_first(p, count < kLanes ? static_cast<int>(count) : kLanes);
  } else {
#if defined(__AVX512BW__)
    const __mmask32 mask = count >= 32 ? ~0u : (1u << count) - 1;
    return reinterpret_cast<Vec>(_mm512_maskz_loadu_epi16(mask, p));
#endif
  }
}

// dst[row][word]: rows as they lie, for use as the left operand, summed along the row.
template <class Words, class T>
void pack_rows(const T* src, int64_t src_row, int rows, int64_t columns, float* dst,
               int64_t dst_row) {
  constexpr int kStep = kLanes * Words::kPack;
  for (int r = 0; r < rows; ++r, src += src_row, dst += dst_row) {
    for (int64_t d = 0; d < columns; d += kStep) {
      store(dst + d / Words::kPack, load_words<Words>(src + d, columns - d));
    }
  }
}

// dst[row / kPack][column]: the right operand, summed over the rows. A missing last row is zero.
template <class Words, class T>
void pack_stacked(const T* src, int64_t src_row, int rows, int64_t columns, float* dst,
                  int64_t dst_row) {
  if constexpr (Words::kPack == 1) {
    pack_rows<Words>(src, src_row, rows, columns, dst, dst_row);
  } else {
#if defined(__AVX512BW__)
    for (int r = 0; r < rows; r += 2, src += 2 * src_row, dst += dst_row) {
      for (int64_t d = 0; d < columns; d += kLanes) {
        const __mmask16 mask = first_lanes(columns - d < kLanes ? columns - d : kLanes);
        const __mmask16 second = r + 1 < rows ? mask : 0;
        const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, src + d));
        const __m512i high =
            _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(second, src + src_row + d));
        store(dst + d, reinterpret_cast<Vec>(_mm512_or_si512(low, _mm512_slli_epi32(high, 16))));
      }
    }
#endif
  }
}

constexpr int kPanel = kTileVecs * kLanes;  // rows of src side by side in a panel

// dst[row / kPanel][word][row % kPanel]: the right operand whose columns are the rows of src.
// Missing rows are zeros up to a full vector. panel_size: words from one panel to the next.
template <class Words, class T>
void pack_transposed(const T* src, int64_t src_row, int rows, int64_t columns, float* dst,
                     int64_t panel_size) {
  const int64_t words = (columns + Words::kPack - 1) / Words::kPack;
  for (int r = 0; r < rows; r += kLanes) {
    float* panel = dst + r / kPanel * panel_size + r % kPanel;
    for (int64_t w = 0; w < words; w += kLanes) {
      Vec cells[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const int64_t d = w * Words::kPack;
        cells[i] =
            r + i < rows ? load_words<Words>(src + (r + i) * src_row + d, columns - d) : Vec{};
      }
      transpose(cells);
      for (int i = 0; i < kLanes && w + i < words; ++i) store(panel + (w + i) * kPanel, cells[i]);
    }
  }
}

// Rows of float32 to a tensor.
template <class T>
void write_rows(const float* src, int64_t src_row, int64_t rows, int64_t columns, T* dst,
                int64_t dst_row) {
  for (int64_t r = 0; r < rows; ++r, src += src_row, dst += dst_row) {
    for (int64_t d = 0; d < columns; d += kLanes) {
      const int64_t left = columns - d;
      store_first(dst + d, load(src + d), left < kLanes ? static_cast<int>(left) : kLanes);
    }
  }
}

}  // namespace
}  // namespace pyops::cpu::PYOPS_ISA
