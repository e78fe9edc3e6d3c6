// Eight 32-bit lanes. Their products come from VPMULUDQ, four at a time. What the sampler (antithetic_sample/sampler.h)
// and the generator (core/philox.h) want of a vector.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace lowbit {
namespace {

struct Word {
  static constexpr int kLanes = 8;
  __m256i lanes;

  static Word load(const uint32_t* values) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values))}; }
  void store(uint32_t* values) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(values), lanes); }
  static Word broadcast(uint32_t value) { return {_mm256_set1_epi32(static_cast<int>(value))}; }
  static Word min(Word a, Word b) { return {_mm256_min_epu32(a.lanes, b.lanes)}; }
  static Word max(Word a, Word b) { return {_mm256_max_epu32(a.lanes, b.lanes)}; }
  static Word multiply(uint32_t a, Word b, Word& high) {
    const __m256i factor = broadcast(a).lanes;
    const __m256i even_u64x4 = _mm256_mul_epu32(b.lanes, factor);
    const __m256i odd_u64x4 = _mm256_mul_epu32(_mm256_srli_epi64(b.lanes, 32), factor);
    high.lanes = _mm256_blend_epi32(_mm256_srli_epi64(even_u64x4, 32), odd_u64x4, 0xaa);
    return {_mm256_blend_epi32(even_u64x4, _mm256_slli_epi64(odd_u64x4, 32), 0xaa)};
  }
  static Word greater(Word a, Word b, uint32_t bit) {
    return {_mm256_andnot_si256(not_greater(a, b), broadcast(bit).lanes)};
  }
  static uint32_t greater(Word a, Word b) {
    return ~static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(not_greater(a, b)))) & 0xffu;
  }
  friend Word operator^(Word a, Word b) { return {_mm256_xor_si256(a.lanes, b.lanes)}; }
  friend Word operator+(Word a, Word b) { return {_mm256_add_epi32(a.lanes, b.lanes)}; }
  friend Word operator-(Word a, Word b) { return {_mm256_sub_epi32(a.lanes, b.lanes)}; }

 private:
  // AVX2 compares signed integers only.
  static __m256i not_greater(Word a, Word b) { return _mm256_cmpeq_epi32(max(a, b).lanes, b.lanes); }
};

}  // namespace
}  // namespace lowbit
