// The nibble-count form (Mula): AVX2 has no vector popcount, so VPSHUFB looks up the ones of each half byte. Counts are
// summed in bytes and widened by VPSADBW before they can overflow: 8 operations for 256 bits, and a few for widening.
// Kernels that look up products instead of counts can pass this limit.
#include <immintrin.h>

#include "cpu/popcount_peak/popcount_peak.h"

namespace lowbit::avx2 {
namespace {

// 16 ymm: 4 weights, 4 byte counts, activation, table and mask leave 5 for what is in flight.
constexpr int kWeights = 4;
constexpr int kBytesPerWiden = 31;  // 31 counts of at most 8 fit a byte

inline __m256i ones_u8x32(__m256i bits_u8x32, __m256i table_u8x32, __m256i low_nibbles_u8x32) {
  const __m256i low_u8x32 = _mm256_and_si256(bits_u8x32, low_nibbles_u8x32);
  const __m256i high_u8x32 = _mm256_and_si256(_mm256_srli_epi16(bits_u8x32, 4), low_nibbles_u8x32);
  return _mm256_add_epi8(_mm256_shuffle_epi8(table_u8x32, low_u8x32), _mm256_shuffle_epi8(table_u8x32, high_u8x32));
}

}  // namespace

int64_t popcount_peak(int64_t iterations) noexcept {
  __m256i table_u8x32 = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4,  //
                                         0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
  __m256i low_nibbles_u8x32 = _mm256_set1_epi8(0x0f);
  __m256i activation_u8x32 = _mm256_setzero_si256();
  __m256i weight_u8x32[kWeights];
  for (int w = 0; w < kWeights; ++w) weight_u8x32[w] = _mm256_set1_epi8(static_cast<char>(0x35 * (w + 1)));
  // Constants that the compiler cannot see through stay in registers and are not folded.
  for (__m256i& bits_u8x32 : weight_u8x32) __asm__ volatile("" : "+x"(bits_u8x32));
  __asm__ volatile("" : "+x"(table_u8x32), "+x"(low_nibbles_u8x32));
  __m256i total_u64x4 = _mm256_setzero_si256();
  for (int64_t i = 0; i < iterations; ++i) {
    __m256i count_u8x32[kWeights];
    for (__m256i& count : count_u8x32) count = _mm256_setzero_si256();
    for (int step = 0; step < kBytesPerWiden; ++step) {
      // Unknown to the compiler from here on, so that nothing leaves the loop.
      __asm__ volatile("" : "+x"(activation_u8x32));
      for (int w = 0; w < kWeights; ++w) {
        const __m256i differing_u8x32 = _mm256_xor_si256(activation_u8x32, weight_u8x32[w]);
        count_u8x32[w] = _mm256_add_epi8(count_u8x32[w], ones_u8x32(differing_u8x32, table_u8x32, low_nibbles_u8x32));
      }
    }
    for (const __m256i& count : count_u8x32) {
      total_u64x4 = _mm256_add_epi64(total_u64x4, _mm256_sad_epu8(count, _mm256_setzero_si256()));
    }
  }
  __asm__ volatile("" : "+x"(total_u64x4));
  return iterations * kBytesPerWiden * kWeights * 256 * 2;
}

}  // namespace lowbit::avx2
