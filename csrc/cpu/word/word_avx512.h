// Sixteen 32-bit lanes, comparisons straight to mask registers. What the sampler (antithetic_sample/sampler.h) and the
// generator (core/philox.h) want of a vector.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace lowbit {
namespace {

struct Word {
  static constexpr int kLanes = 16;
  __m512i lanes;

  static Word load(const uint32_t* values) { return {_mm512_loadu_si512(values)}; }
  void store(uint32_t* values) const { _mm512_storeu_si512(values, lanes); }
  static Word broadcast(uint32_t value) { return {_mm512_set1_epi32(static_cast<int>(value))}; }
  static Word min(Word a, Word b) { return {_mm512_min_epu32(a.lanes, b.lanes)}; }
  static Word max(Word a, Word b) { return {_mm512_max_epu32(a.lanes, b.lanes)}; }
  static Word multiply(uint32_t a, Word b, Word& high) {
    const __m512i factor = broadcast(a).lanes;
    const __m512i even_u64x8 = _mm512_mul_epu32(b.lanes, factor);
    const __m512i odd_u64x8 = _mm512_mul_epu32(_mm512_srli_epi64(b.lanes, 32), factor);
    constexpr __mmask16 kOdd = 0xaaaa;
    high.lanes = _mm512_mask_blend_epi32(kOdd, _mm512_srli_epi64(even_u64x8, 32), odd_u64x8);
    return {_mm512_mask_blend_epi32(kOdd, even_u64x8, _mm512_slli_epi64(odd_u64x8, 32))};
  }
  static Word greater(Word a, Word b, uint32_t bit) {
    return {_mm512_maskz_mov_epi32(_mm512_cmpgt_epu32_mask(a.lanes, b.lanes), broadcast(bit).lanes)};
  }
  static uint32_t greater(Word a, Word b) { return _mm512_cmpgt_epu32_mask(a.lanes, b.lanes); }
  friend Word operator^(Word a, Word b) { return {_mm512_xor_si512(a.lanes, b.lanes)}; }
  friend Word operator+(Word a, Word b) { return {_mm512_add_epi32(a.lanes, b.lanes)}; }
  friend Word operator-(Word a, Word b) { return {_mm512_sub_epi32(a.lanes, b.lanes)}; }
};

}  // namespace
}  // namespace lowbit
