// Eight; parts of a vector pass through memory.
#pragma once

#include <immintrin.h>

#include <cstring>

namespace lowbit {
namespace {

struct LanesF32 {
  static constexpr int kLanes = 8;
  using Float32 = Stored<FloatType::float32>;
  using Bfloat16 = Stored<FloatType::bfloat16>;
  using Float16 = Stored<FloatType::float16>;
  __m256 f32x8;

  static LanesF32 broadcast(float value) { return {_mm256_set1_ps(value)}; }

  static LanesF32 load(const float* from, Float32) { return {_mm256_loadu_ps(from)}; }
  static LanesF32 load(const uint16_t* from, Bfloat16) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_u16x8(from)), 16))};
  }
  static LanesF32 load(const uint16_t* from, Float16) { return {_mm256_cvtph_ps(load_u16x8(from))}; }
  static LanesF32 load(const int32_t* from, Integers) {
    return {_mm256_cvtepi32_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))};
  }
  template <class Element, class Type>
  static LanesF32 load(const Element* from, int64_t count, Type type) {
    Element part[kLanes] = {};
    memcpy(part, from, static_cast<size_t>(count) * sizeof *from);
    return load(part, type);
  }

  void store(float* to, Float32) const { _mm256_storeu_ps(to, f32x8); }
  void store(uint16_t* to, Bfloat16) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bfloat16()); }
  void store(uint16_t* to, Float16) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm256_cvtps_ph(f32x8, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  template <class Element, class Type>
  void store(Element* to, int64_t count, Type type) const {
    Element part[kLanes];
    store(part, type);
    memcpy(to, part, static_cast<size_t>(count) * sizeof *to);
  }

  friend LanesF32 operator+(LanesF32 a, LanesF32 b) { return {_mm256_add_ps(a.f32x8, b.f32x8)}; }
  friend LanesF32 operator*(LanesF32 a, LanesF32 b) { return {_mm256_mul_ps(a.f32x8, b.f32x8)}; }
  friend LanesF32 operator/(LanesF32 a, LanesF32 b) { return {_mm256_div_ps(a.f32x8, b.f32x8)}; }
  static LanesF32 multiply_add(LanesF32 value, LanesF32 factor, LanesF32 summand) {
    return {_mm256_fmadd_ps(value.f32x8, factor.f32x8, summand.f32x8)};
  }
  static LanesF32 prelu(LanesF32 value, LanesF32 slope) {
    const __m256 positive_f32x8 = _mm256_cmp_ps(value.f32x8, _mm256_setzero_ps(), _CMP_GT_OQ);
    return {_mm256_blendv_ps((value * slope).f32x8, value.f32x8, positive_f32x8)};
  }
  // VMAXPS and VMINPS return their second operand where the first is not greater, or not less.
  static LanesF32 at_least(LanesF32 value, LanesF32 lowest) { return {_mm256_max_ps(lowest.f32x8, value.f32x8)}; }
  static LanesF32 at_most(LanesF32 value, LanesF32 highest) { return {_mm256_min_ps(highest.f32x8, value.f32x8)}; }
  static LanesF32 later_maximum(LanesF32 a, LanesF32 b) {
    const __m256 nan_f32x8 = _mm256_cmp_ps(b.f32x8, b.f32x8, _CMP_UNORD_Q);
    return {_mm256_blendv_ps(_mm256_max_ps(b.f32x8, a.f32x8), b.f32x8, nan_f32x8)};
  }

  // The sign bit of a lane: (value ^ f) >= (limit ^ f) is value <= limit.
  static LanesF32 flips(const uint8_t* bytes, int64_t count) {
    uint8_t part[kLanes] = {};
    memcpy(part, bytes, static_cast<size_t>(count));
    const __m256i wide_u32x8 = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(part)));
    const __m256i kept_i32x8 = _mm256_cmpeq_epi32(wide_u32x8, _mm256_setzero_si256());
    return {_mm256_castsi256_ps(_mm256_andnot_si256(kept_i32x8, _mm256_set1_epi32(INT32_MIN)))};
  }
  static uint64_t reached(LanesF32 value, LanesF32 limit, LanesF32 flip) {
    const __m256 reached_f32x8 =
        _mm256_cmp_ps(_mm256_xor_ps(value.f32x8, flip.f32x8), _mm256_xor_ps(limit.f32x8, flip.f32x8), _CMP_GE_OQ);
    return static_cast<uint64_t>(_mm256_movemask_ps(reached_f32x8));
  }

 private:
  static __m128i load_u16x8(const uint16_t* from) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)); }

  // float_to_bfloat16 of half.h.
  __m128i bfloat16() const {
    const __m256i bits_u32x8 = _mm256_castps_si256(f32x8), upper_u32x8 = _mm256_srli_epi32(bits_u32x8, 16);
    const __m256i half_u32x8 =
        _mm256_add_epi32(_mm256_and_si256(upper_u32x8, _mm256_set1_epi32(1)), _mm256_set1_epi32(0x7fff));
    const __m256i rounded_u32x8 = _mm256_srli_epi32(_mm256_add_epi32(bits_u32x8, half_u32x8), 16);
    const __m256i quiet_u32x8 = _mm256_or_si256(upper_u32x8, _mm256_set1_epi32(0x40));
    const __m256i nan_u32x8 = _mm256_castps_si256(_mm256_cmp_ps(f32x8, f32x8, _CMP_UNORD_Q));
    const __m256i half_or_nan_u32x8 = _mm256_blendv_epi8(rounded_u32x8, quiet_u32x8, nan_u32x8);
    return _mm_packus_epi32(_mm256_castsi256_si128(half_or_nan_u32x8), _mm256_extracti128_si256(half_or_nan_u32x8, 1));
  }
};

}  // namespace
}  // namespace lowbit
