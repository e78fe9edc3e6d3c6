// A table of 16 sums is two registers of 8; VPERMPS looks both up and bit 3 of the nibble chooses.
#include <immintrin.h>

#include "cpu/antithetic_gradient/driver.h"

namespace lowbit::avx2 {
namespace {

struct Floats {
  static constexpr int kLanes = 8;
  __m256 f32x8;

  static Floats zero() { return {_mm256_setzero_ps()}; }
  static Floats broadcast(float value) { return {_mm256_set1_ps(value)}; }
  static Floats load(const float* values) { return {_mm256_loadu_ps(values)}; }
  void store(float* values) const { _mm256_storeu_ps(values, f32x8); }
  static __m256i load_bits(const uint8_t* elements, int) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(elements)));
  }
  static __m256i load_bits(const uint16_t* elements, int) {
    return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(elements)));
  }
  static __m256i load_bits(const uint32_t* elements, int) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(elements));
  }
  static __m256i load_bits(const uint64_t* elements, int half) {
    alignas(32) uint32_t halves[kLanes];
    for (int i = 0; i < kLanes; ++i) halves[i] = static_cast<uint32_t>(elements[i] >> 32 * half);
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(halves));
  }
  static Floats lookup(const float* table, __m256i& nibbles_u32x8) {
    const __m256 low_f32x8 = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), nibbles_u32x8);
    const __m256 high_f32x8 = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), nibbles_u32x8);
    const __m256 bit3_f32x8 =
        _mm256_castsi256_ps(_mm256_slli_epi32(nibbles_u32x8, 28));  // to the sign, where the blend looks
    nibbles_u32x8 = _mm256_srli_epi32(nibbles_u32x8, 4);
    return {_mm256_blendv_ps(low_f32x8, high_f32x8, bit3_f32x8)};
  }
  static Floats add_where(Floats sum, uint32_t mask, Floats value) {
    const __m256i own_bit_u32x8 = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i chosen_u32x8 = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(mask)), own_bit_u32x8);
    const __m256 lanes_f32x8 = _mm256_castsi256_ps(_mm256_cmpeq_epi32(chosen_u32x8, own_bit_u32x8));
    return {_mm256_blendv_ps(sum.f32x8, _mm256_add_ps(sum.f32x8, value.f32x8), lanes_f32x8)};
  }
  friend Floats operator+(Floats a, Floats b) { return {_mm256_add_ps(a.f32x8, b.f32x8)}; }
  friend Floats operator*(Floats a, Floats b) { return {_mm256_mul_ps(a.f32x8, b.f32x8)}; }
};

}  // namespace

void antithetic_gradient(const AntitheticGradientArgs& args, int64_t begin, int64_t end) noexcept {
  antithetic_gradient_range<Floats>(args, begin, end);
}

}  // namespace lowbit::avx2
