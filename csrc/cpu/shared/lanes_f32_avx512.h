// Sixteen; parts of a vector by masks.
#pragma once

#include <immintrin.h>

namespace lowbit {
namespace {

struct LanesF32 {
  static constexpr int kLanes = 16;
  using Float32 = Stored<FloatType::float32>;
  using Bfloat16 = Stored<FloatType::bfloat16>;
  using Float16 = Stored<FloatType::float16>;
  __m512 f32x16;

  static LanesF32 broadcast(float value) { return {_mm512_set1_ps(value)}; }

  static LanesF32 load(const float* from, Float32) { return {_mm512_loadu_ps(from)}; }
  static LanesF32 load(const uint16_t* from, Bfloat16) {
    return of_bfloat16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static LanesF32 load(const uint16_t* from, Float16) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))};
  }
  static LanesF32 load(const int32_t* from, Integers) { return {_mm512_cvtepi32_ps(_mm512_loadu_si512(from))}; }

  static LanesF32 load(const float* from, int64_t count, Float32) {
    return {_mm512_maskz_loadu_ps(first(count), from)};
  }
  static LanesF32 load(const uint16_t* from, int64_t count, Bfloat16) {
    return of_bfloat16(_mm256_maskz_loadu_epi16(first(count), from));
  }
  static LanesF32 load(const uint16_t* from, int64_t count, Float16) {
    return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(count), from))};
  }
  static LanesF32 load(const int32_t* from, int64_t count, Integers) {
    return {_mm512_cvtepi32_ps(_mm512_maskz_loadu_epi32(first(count), from))};
  }

  void store(float* to, Float32) const { _mm512_storeu_ps(to, f32x16); }
  void store(uint16_t* to, Bfloat16) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bfloat16()); }
  void store(uint16_t* to, Float16) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), float16()); }

  void store(float* to, int64_t count, Float32) const { _mm512_mask_storeu_ps(to, first(count), f32x16); }
  void store(uint16_t* to, int64_t count, Bfloat16) const { _mm256_mask_storeu_epi16(to, first(count), bfloat16()); }
  void store(uint16_t* to, int64_t count, Float16) const { _mm256_mask_storeu_epi16(to, first(count), float16()); }

  friend LanesF32 operator+(LanesF32 a, LanesF32 b) { return {_mm512_add_ps(a.f32x16, b.f32x16)}; }
  friend LanesF32 operator*(LanesF32 a, LanesF32 b) { return {_mm512_mul_ps(a.f32x16, b.f32x16)}; }
  friend LanesF32 operator/(LanesF32 a, LanesF32 b) { return {_mm512_div_ps(a.f32x16, b.f32x16)}; }
  static LanesF32 multiply_add(LanesF32 value, LanesF32 factor, LanesF32 summand) {
    return {_mm512_fmadd_ps(value.f32x16, factor.f32x16, summand.f32x16)};
  }
  static LanesF32 prelu(LanesF32 value, LanesF32 slope) {
    const __mmask16 sloped = _mm512_cmp_ps_mask(value.f32x16, _mm512_setzero_ps(), _CMP_NGT_UQ);
    return {_mm512_mask_mul_ps(value.f32x16, sloped, value.f32x16, slope.f32x16)};
  }
  // VMAXPS and VMINPS return their second operand where the first is not greater, or not less.
  static LanesF32 at_least(LanesF32 value, LanesF32 lowest) { return {_mm512_max_ps(lowest.f32x16, value.f32x16)}; }
  static LanesF32 at_most(LanesF32 value, LanesF32 highest) { return {_mm512_min_ps(highest.f32x16, value.f32x16)}; }
  static LanesF32 later_maximum(LanesF32 a, LanesF32 b) {
    const __mmask16 nan = _mm512_cmp_ps_mask(b.f32x16, b.f32x16, _CMP_UNORD_Q);
    return {_mm512_mask_mov_ps(_mm512_max_ps(b.f32x16, a.f32x16), nan, b.f32x16)};
  }

  // All bits of a lane's sign: (value ^ f) >= (limit ^ f) is value <= limit.
  static LanesF32 flips(const uint8_t* bytes, int64_t count) {
    const __m128i bytes_u8x16 = _mm_maskz_loadu_epi8(first(count), bytes);
    const __m512i flips_u32x16 = _mm512_maskz_set1_epi32(_mm_test_epi8_mask(bytes_u8x16, bytes_u8x16), INT32_MIN);
    return {_mm512_castsi512_ps(flips_u32x16)};
  }
  static uint64_t reached(LanesF32 value, LanesF32 limit, LanesF32 flip) {
    return _mm512_cmp_ps_mask(_mm512_xor_ps(value.f32x16, flip.f32x16), _mm512_xor_ps(limit.f32x16, flip.f32x16),
                              _CMP_GE_OQ);
  }

 private:
  static __mmask16 first(int64_t count) { return static_cast<__mmask16>(low_mask(count)); }

  static LanesF32 of_bfloat16(__m256i half_u16x16) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half_u16x16), 16))};
  }
  // float_to_bfloat16 of half.h.
  __m256i bfloat16() const {
    const __m512i bits_u32x16 = _mm512_castps_si512(f32x16), upper_u32x16 = _mm512_srli_epi32(bits_u32x16, 16);
    const __m512i half_u32x16 =
        _mm512_add_epi32(_mm512_and_si512(upper_u32x16, _mm512_set1_epi32(1)), _mm512_set1_epi32(0x7fff));
    const __m512i rounded_u32x16 = _mm512_srli_epi32(_mm512_add_epi32(bits_u32x16, half_u32x16), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(f32x16, f32x16, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_or_epi32(rounded_u32x16, nan, upper_u32x16, _mm512_set1_epi32(0x40)));
  }
  __m256i float16() const { return _mm512_cvtps_ph(f32x16, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
};

}  // namespace
}  // namespace lowbit
