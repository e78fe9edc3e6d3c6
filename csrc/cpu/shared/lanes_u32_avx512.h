// Sixteen, compared straight to mask registers.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace lowbit {
namespace {

struct LanesU32 {
  static constexpr int kLanes = 16;
  __m512i u32x16;

  static LanesU32 load(const uint32_t* values) { return {_mm512_loadu_si512(values)}; }
  void store(uint32_t* values) const { _mm512_storeu_si512(values, u32x16); }
  static LanesU32 broadcast(uint32_t value) { return {_mm512_set1_epi32(static_cast<int>(value))}; }
  static LanesU32 min(LanesU32 a, LanesU32 b) { return {_mm512_min_epu32(a.u32x16, b.u32x16)}; }
  static LanesU32 max(LanesU32 a, LanesU32 b) { return {_mm512_max_epu32(a.u32x16, b.u32x16)}; }
  static LanesU32 multiply(uint32_t a, LanesU32 b, LanesU32& high) {
    const __m512i factor_u32x16 = broadcast(a).u32x16;
    const __m512i even_u64x8 = _mm512_mul_epu32(b.u32x16, factor_u32x16);
    const __m512i odd_u64x8 = _mm512_mul_epu32(_mm512_srli_epi64(b.u32x16, 32), factor_u32x16);
    constexpr __mmask16 kOdd = 0xaaaa;
    high.u32x16 = _mm512_mask_blend_epi32(kOdd, _mm512_srli_epi64(even_u64x8, 32), odd_u64x8);
    return {_mm512_mask_blend_epi32(kOdd, even_u64x8, _mm512_slli_epi64(odd_u64x8, 32))};
  }
  static LanesU32 greater(LanesU32 a, LanesU32 b, uint32_t bit) {
    return {_mm512_maskz_mov_epi32(_mm512_cmpgt_epu32_mask(a.u32x16, b.u32x16), broadcast(bit).u32x16)};
  }
  static uint32_t greater(LanesU32 a, LanesU32 b) { return _mm512_cmpgt_epu32_mask(a.u32x16, b.u32x16); }
  friend LanesU32 operator^(LanesU32 a, LanesU32 b) { return {_mm512_xor_si512(a.u32x16, b.u32x16)}; }
  friend LanesU32 operator+(LanesU32 a, LanesU32 b) { return {_mm512_add_epi32(a.u32x16, b.u32x16)}; }
  friend LanesU32 operator-(LanesU32 a, LanesU32 b) { return {_mm512_sub_epi32(a.u32x16, b.u32x16)}; }
};

}  // namespace
}  // namespace lowbit
