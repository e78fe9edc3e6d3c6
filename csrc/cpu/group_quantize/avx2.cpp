// Minimum and maximum give their second operand for NaN: the order of operands is that of the formulas in core/codes.h.
#include <immintrin.h>

#include "cpu/group_quantize/driver.h"

namespace lowbit::avx2 {
namespace {

struct Coder {
  static constexpr int64_t kLanes = 8;

  static Extremes extremes(const float* x) {
    __m256 low_f32x8[2], high_f32x8[2];  // two chains of four cycles' latency
    for (int chain = 0; chain < 2; ++chain) {
      low_f32x8[chain] = _mm256_set1_ps(__builtin_inff());
      high_f32x8[chain] = _mm256_set1_ps(-__builtin_inff());
    }
    for (int64_t i = 0; i < kGroup; i += 2 * kLanes) {
      for (int chain = 0; chain < 2; ++chain) {
        const __m256 x_f32x8 = _mm256_loadu_ps(x + i + chain * kLanes);
        low_f32x8[chain] = _mm256_min_ps(x_f32x8, low_f32x8[chain]);
        high_f32x8[chain] = _mm256_max_ps(x_f32x8, high_f32x8[chain]);
      }
    }
    alignas(32) float lows[kLanes], highs[kLanes];
    _mm256_store_ps(lows, _mm256_min_ps(low_f32x8[0], low_f32x8[1]));
    _mm256_store_ps(highs, _mm256_max_ps(high_f32x8[0], high_f32x8[1]));
    Extremes found{lows[0], highs[0]};
    for (int64_t lane = 1; lane < kLanes; ++lane) {
      found.low = lows[lane] < found.low ? lows[lane] : found.low;
      found.high = highs[lane] > found.high ? highs[lane] : found.high;
    }
    return found;
  }

  static void encode(const float* x, const GroupCoding& coding, const float* thresholds, uint8_t* codes) {
    for (int64_t i = 0; i < kGroup; i += 4 * kLanes) {
      const __m256i low_i16x16 =
          _mm256_packus_epi32(encode(x, coding, thresholds, i), encode(x, coding, thresholds, i + kLanes));
      const __m256i high_i16x16 = _mm256_packus_epi32(encode(x, coding, thresholds, i + 2 * kLanes),
                                                      encode(x, coding, thresholds, i + 3 * kLanes));
      // The packs work in halves of a vector: four bytes of each argument in the lower, four in the upper.
      const __m256i order_i32x8 = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
      const __m256i codes_u8x32 =
          _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low_i16x16, high_i16x16), order_i32x8);
      _mm256_store_si256(reinterpret_cast<__m256i*>(codes + i), codes_u8x32);
    }
  }

 private:
  static __m256i encode(const float* x, const GroupCoding& coding, const float* thresholds, int64_t i) {
    const __m256 x_f32x8 = _mm256_loadu_ps(x + i), zero_f32x8 = _mm256_setzero_ps();
    const __m256 threshold_f32x8 = thresholds == nullptr ? _mm256_set1_ps(0.5f) : _mm256_load_ps(thresholds + i);
    const __m256 cells_f32x8 =
        _mm256_mul_ps(_mm256_sub_ps(x_f32x8, _mm256_set1_ps(coding.minimum)), _mm256_set1_ps(coding.inverse));
    const __m256 position_f32x8 = _mm256_add_ps(cells_f32x8, threshold_f32x8);
    const __m256 within_f32x8 = _mm256_min_ps(_mm256_max_ps(position_f32x8, zero_f32x8), _mm256_set1_ps(coding.last));
    const __m256i code_i32x8 = _mm256_cvttps_epi32(within_f32x8);
    if (!coding.positive) return code_i32x8;
    const __m256i above_i32x8 = _mm256_castps_si256(_mm256_cmp_ps(x_f32x8, zero_f32x8, _CMP_GT_OQ));
    return _mm256_and_si256(_mm256_max_epi32(code_i32x8, _mm256_set1_epi32(1)), above_i32x8);
  }
};

}  // namespace

void group_quantize(const GroupQuantizeArgs& args, int64_t begin, int64_t end) noexcept {
  run_group_quantize<Coder>(args, begin, end);
}

}  // namespace lowbit::avx2
