// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3; SC 2011),
// one counter a lane. Only for *.isa.cpp files.
#pragma once

#include "simd.h"

namespace pyops::cpu::PYOPS_ISA {
namespace {

typedef uint32_t VecUint __attribute__((vector_size(kLanes * 4)));

// The high and low 32 bits of a * factor.
PYOPS_INLINE void multiply_wide(VecUint a, uint32_t factor, VecUint* high, VecUint* low) {
#if defined(__AVX512F__)
  const __m512i x = reinterpret_cast<__m512i>(a), f = _mm512_set1_epi32(static_cast<int>(factor));
  const __m512i even = _mm512_mul_epu32(x, f), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), f);
  *high =
      reinterpret_cast<VecUint>(_mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xaaaa, odd));
  *low = reinterpret_cast<VecUint>(_mm512_mask_mov_epi32(even, 0xaaaa, _mm512_slli_epi64(odd, 32)));
#elif defined(__AVX2__)
  const __m256i x = reinterpret_cast<__m256i>(a), f = _mm256_set1_epi32(static_cast<int>(factor));
  const __m256i even = _mm256_mul_epu32(x, f), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), f);
  *high = reinterpret_cast<VecUint>(_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa));
  *low = reinterpret_cast<VecUint>(_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa));
#else
  for (int i = 0; i < kLanes; ++i) {
    const uint64_t product = static_cast<uint64_t>(a[i]) * factor;
    (*high)[i] = static_cast<uint32_t>(product >> 32);
    (*low)[i] = static_cast<uint32_t>(product);
  }
#endif
}

// counter[0..3] -> words[0..3].
PYOPS_INLINE void philox(const VecUint (&counter)[4], const uint32_t (&key)[2],
                         VecUint (&words)[4]) {
  VecUint a = counter[0], b = counter[1], c = counter[2], d = counter[3];
  uint32_t key0 = key[0], key1 = key[1];
  for (int round = 0; round < 10; ++round) {
    VecUint high_a, low_a, high_c, low_c;
    multiply_wide(a, 0xD2511F53u, &high_a, &low_a);
    multiply_wide(c, 0xCD9E8D57u, &high_c, &low_c);
    a = high_c ^ b ^ key0;
    b = low_c;
    c = high_a ^ d ^ key1;
    d = low_a;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  words[0] = a, words[1] = b, words[2] = c, words[3] = d;
}

}  // namespace
}  // namespace pyops::cpu::PYOPS_ISA
