// Bound by the memory where rounding is to nearest. Minimum and maximum give their second operand for NaN: the order of
// operands is that of the formulas in core/codes.h.
#include <immintrin.h>

#include "cpu/group_quantize/driver.h"

namespace lowbit::avx512 {
namespace {

struct Coder {
  static constexpr int64_t kLanes = 16;

  static Extremes extremes(const float* x) {
    __m512 low_f32x16[2], high_f32x16[2];  // two chains of four cycles' latency
    for (int chain = 0; chain < 2; ++chain) {
      low_f32x16[chain] = _mm512_set1_ps(__builtin_inff());
      high_f32x16[chain] = _mm512_set1_ps(-__builtin_inff());
    }
    for (int64_t i = 0; i < kGroup; i += 2 * kLanes) {
      for (int chain = 0; chain < 2; ++chain) {
        const __m512 x_f32x16 = _mm512_loadu_ps(x + i + chain * kLanes);
        low_f32x16[chain] = _mm512_min_ps(x_f32x16, low_f32x16[chain]);
        high_f32x16[chain] = _mm512_max_ps(x_f32x16, high_f32x16[chain]);
      }
    }
    return {_mm512_reduce_min_ps(_mm512_min_ps(low_f32x16[0], low_f32x16[1])),
            _mm512_reduce_max_ps(_mm512_max_ps(high_f32x16[0], high_f32x16[1]))};
  }

  static void encode(const float* x, const GroupCoding& coding, const float* thresholds, uint8_t* codes) {
    const __m512 minimum_f32x16 = _mm512_set1_ps(coding.minimum), inverse_f32x16 = _mm512_set1_ps(coding.inverse);
    const __m512 last_f32x16 = _mm512_set1_ps(coding.last), zero_f32x16 = _mm512_setzero_ps();
    const __m512i least_i32x16 = _mm512_set1_epi32(coding.positive ? 1 : 0);
    for (int64_t i = 0; i < kGroup; i += kLanes) {
      const __m512 x_f32x16 = _mm512_loadu_ps(x + i);
      const __m512 threshold_f32x16 = thresholds == nullptr ? _mm512_set1_ps(0.5f) : _mm512_load_ps(thresholds + i);
      const __m512 cells_f32x16 = _mm512_mul_ps(_mm512_sub_ps(x_f32x16, minimum_f32x16), inverse_f32x16);
      const __m512 position_f32x16 = _mm512_add_ps(cells_f32x16, threshold_f32x16);
      const __m512 within_f32x16 = _mm512_min_ps(_mm512_max_ps(position_f32x16, zero_f32x16), last_f32x16);
      __m512i code_i32x16 = _mm512_max_epi32(_mm512_cvttps_epi32(within_f32x16), least_i32x16);
      if (coding.positive) {
        const __mmask16 above = _mm512_cmp_ps_mask(x_f32x16, zero_f32x16, _CMP_GT_OQ);
        code_i32x16 = _mm512_maskz_mov_epi32(above, code_i32x16);
      }
      _mm_store_si128(reinterpret_cast<__m128i*>(codes + i), _mm512_cvtepi32_epi8(code_i32x16));
    }
  }
};

}  // namespace

void group_quantize(const GroupQuantizeArgs& args, int64_t begin, int64_t end) noexcept {
  run_group_quantize<Coder>(args, begin, end);
}

}  // namespace lowbit::avx512
