// VPXORD + VPOPCNTD + VPADDD: 3 operations for 512 bits. A carry-save adder counts two words in 5: it can pass this
// limit.
#include <immintrin.h>

#include "cpu/popcount_peak/popcount_peak.h"

namespace lowbit::avx512 {
namespace {

// 12 independent sums hide the latency of 5 cycles (1 + 3 + 1) at 2 operations a cycle; with the 12 weights, the
// activation and what is in flight they fit 32 zmm.
constexpr int kWeights = 12;

}  // namespace

int64_t popcount_peak(int64_t iterations) noexcept {
  __m512i activation_u32x16 = _mm512_setzero_si512();
  __m512i weight_u32x16[kWeights];
  __m512i ones_u32x16[kWeights];
  for (int w = 0; w < kWeights; ++w) {
    weight_u32x16[w] = _mm512_set1_epi32(0x01234567 * (w + 1));
    ones_u32x16[w] = _mm512_setzero_si512();
  }
  // Constants that the compiler cannot see through stay in registers and are not folded.
  for (__m512i& bits_u32x16 : weight_u32x16) __asm__ volatile("" : "+v"(bits_u32x16));
  for (int64_t i = 0; i < iterations; ++i) {
    // Unknown to the compiler from here on, so that nothing leaves the loop.
    __asm__ volatile("" : "+v"(activation_u32x16));
    for (int w = 0; w < kWeights; ++w) {
      const __m512i differing_u32x16 = _mm512_xor_si512(activation_u32x16, weight_u32x16[w]);
      ones_u32x16[w] = _mm512_add_epi32(ones_u32x16[w], _mm512_popcnt_epi32(differing_u32x16));
    }
  }
  for (__m512i& sum : ones_u32x16) __asm__ volatile("" : "+v"(sum));
  return iterations * kWeights * 512 * 2;
}

}  // namespace lowbit::avx512
