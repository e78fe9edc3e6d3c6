// Eight, whose products come from VPMULUDQ, four at a time.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace lowbit {
namespace {

struct LanesU32 {
  static constexpr int kLanes = 8;
  __m256i u32x8;

  static LanesU32 load(const uint32_t* values) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values))};
  }
  void store(uint32_t* values) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(values), u32x8); }
  static LanesU32 broadcast(uint32_t value) { return {_mm256_set1_epi32(static_cast<int>(value))}; }
  static LanesU32 min(LanesU32 a, LanesU32 b) { return {_mm256_min_epu32(a.u32x8, b.u32x8)}; }
  static LanesU32 max(LanesU32 a, LanesU32 b) { return {_mm256_max_epu32(a.u32x8, b.u32x8)}; }
  static LanesU32 multiply(uint32_t a, LanesU32 b, LanesU32& high) {
    const __m256i factor_u32x8 = broadcast(a).u32x8;
    const __m256i even_u64x4 = _mm256_mul_epu32(b.u32x8, factor_u32x8);
    const __m256i odd_u64x4 = _mm256_mul_epu32(_mm256_srli_epi64(b.u32x8, 32), factor_u32x8);
    high.u32x8 = _mm256_blend_epi32(_mm256_srli_epi64(even_u64x4, 32), odd_u64x4, 0xaa);
    return {_mm256_blend_epi32(even_u64x4, _mm256_slli_epi64(odd_u64x4, 32), 0xaa)};
  }
  static LanesU32 greater(LanesU32 a, LanesU32 b, uint32_t bit) {
    return {_mm256_andnot_si256(not_greater(a, b), broadcast(bit).u32x8)};
  }
  static uint32_t greater(LanesU32 a, LanesU32 b) {
    return ~static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(not_greater(a, b)))) & 0xffu;
  }
  friend LanesU32 operator^(LanesU32 a, LanesU32 b) { return {_mm256_xor_si256(a.u32x8, b.u32x8)}; }
  friend LanesU32 operator+(LanesU32 a, LanesU32 b) { return {_mm256_add_epi32(a.u32x8, b.u32x8)}; }
  friend LanesU32 operator-(LanesU32 a, LanesU32 b) { return {_mm256_sub_epi32(a.u32x8, b.u32x8)}; }

 private:
  // AVX2 compares signed integers only.
  static __m256i not_greater(LanesU32 a, LanesU32 b) { return _mm256_cmpeq_epi32(max(a, b).u32x8, b.u32x8); }
};

}  // namespace
}  // namespace lowbit
