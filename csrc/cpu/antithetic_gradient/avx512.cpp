// A table of 16 sums is one register; VPERMPS reads the low four bits of each lane and looks 16 elements up at once.
#include <immintrin.h>

#include "cpu/antithetic_gradient/driver.h"

namespace lowbit::avx512 {
namespace {

struct Floats {
  static constexpr int kLanes = 16;
  __m512 f32x16;

  static Floats zero() { return {_mm512_setzero_ps()}; }
  static Floats broadcast(float value) { return {_mm512_set1_ps(value)}; }
  static Floats load(const float* values) { return {_mm512_loadu_ps(values)}; }
  void store(float* values) const { _mm512_storeu_ps(values, f32x16); }
  static __m512i load_bits(const uint8_t* elements, int) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(elements)));
  }
  static __m512i load_bits(const uint16_t* elements, int) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(elements)));
  }
  static __m512i load_bits(const uint32_t* elements, int) { return _mm512_loadu_si512(elements); }
  static __m512i load_bits(const uint64_t* elements, int half) {
    const __m128i shift_u64x2 = _mm_cvtsi32_si128(32 * half);
    const __m256i low_u32x8 = _mm512_cvtepi64_epi32(_mm512_srl_epi64(_mm512_loadu_si512(elements), shift_u64x2));
    const __m256i high_u32x8 = _mm512_cvtepi64_epi32(_mm512_srl_epi64(_mm512_loadu_si512(elements + 8), shift_u64x2));
    return _mm512_inserti64x4(_mm512_castsi256_si512(low_u32x8), high_u32x8, 1);
  }
  static Floats lookup(const float* table, __m512i& nibbles_u32x16) {
    const Floats result{_mm512_permutexvar_ps(nibbles_u32x16, _mm512_loadu_ps(table))};
    nibbles_u32x16 = _mm512_srli_epi32(nibbles_u32x16, 4);
    return result;
  }
  static Floats add_where(Floats sum, uint32_t mask, Floats value) {
    return {_mm512_mask_add_ps(sum.f32x16, static_cast<__mmask16>(mask), sum.f32x16, value.f32x16)};
  }
  friend Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.f32x16, b.f32x16)}; }
  friend Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.f32x16, b.f32x16)}; }
};

}  // namespace

void antithetic_gradient(const AntitheticGradientArgs& args, int64_t begin, int64_t end) noexcept {
  antithetic_gradient_range<Floats>(args, begin, end);
}

}  // namespace lowbit::avx512
