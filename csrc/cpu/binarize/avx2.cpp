// Channels-last, VMOVMSKPS turns 8 comparisons into one byte of the packed word. Planar, a comparison gives all-ones
// lanes for one channel of 8 pixels: ANDed with the channel's bit and ORed into the pixels' 32-bit lanes.
#include <immintrin.h>

#include "cpu/binarize/driver.h"

namespace lowbit::avx2 {
namespace {

struct Vector {
  static constexpr int kLanes = 8;
  using Floats = __m256;
  using Words = __m256i;
  using Lanes = int64_t;
  using Passed = __m256;
  using Bits = uint8_t;
  static constexpr Lanes kAllLanes = kLanes;
  static Lanes first_lanes(int64_t count) { return count; }

  template <FloatType kType>
  static __m256 load(const uint8_t* from, Lanes lanes) {
    if constexpr (kType == FloatType::float32) {
      const float* values = reinterpret_cast<const float*>(from);
      return lanes == kLanes ? _mm256_loadu_ps(values) : _mm256_maskload_ps(values, lane_mask(lanes));
    } else {
      if (lanes == kLanes) return to_float<kType>(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
      if (lanes < 4) return to_float<kType>(_mm_cvtsi64_si128(static_cast<long long>(load_halves(from, lanes))));
      const __m128i first_u16x4 = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
      const long long last = static_cast<long long>(load_halves(from + 8, lanes - 4));
      return to_float<kType>(_mm_insert_epi64(first_u16x4, last, 1));
    }
  }
  static __m256 load_thresholds(const float* from, Lanes lanes) { return _mm256_maskload_ps(from, lane_mask(lanes)); }
  static __m256 load_signs(const uint8_t* flip, Lanes lanes) {
    uint64_t flip_u8x8 = 0;
    if (lanes == kLanes) {
      memcpy(&flip_u8x8, flip, kLanes);
    } else {
      for (int64_t i = 0; i < lanes; ++i) flip_u8x8 |= uint64_t{flip[i]} << (8 * i);
    }
    const __m256i flip_u32x8 = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(flip_u8x8)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(flip_u32x8, 31));
  }
  static __m256 broadcast(float value) { return _mm256_set1_ps(value); }
  static __m256 exclusive_or(__m256 a_f32x8, __m256 b_f32x8) { return _mm256_xor_ps(a_f32x8, b_f32x8); }
  static __m256 at_least(__m256 x_f32x8, __m256 limit_f32x8) { return _mm256_cmp_ps(x_f32x8, limit_f32x8, _CMP_GE_OQ); }
  static __m256 is_inside(__m256 x_f32x8, MaskInterval interval) {
    return _mm256_and_ps(_mm256_cmp_ps(x_f32x8, _mm256_set1_ps(interval.lowest), _CMP_GE_OQ),
                         _mm256_cmp_ps(x_f32x8, _mm256_set1_ps(interval.highest), _CMP_LE_OQ));
  }
  static Bits bits(__m256 passed_f32x8, Lanes lanes) {
    return static_cast<Bits>(static_cast<uint32_t>(_mm256_movemask_ps(passed_f32x8)) &
                             static_cast<uint32_t>(low_mask(lanes)));
  }

  static __m256i first_bits() { return _mm256_set1_epi32(1); }
  static __m256i next_bits(__m256i bit_u32x8) { return _mm256_add_epi32(bit_u32x8, bit_u32x8); }
  static __m256i or_where(__m256i words_u32x8, __m256 passed_f32x8, __m256i bit_u32x8) {
    return _mm256_or_si256(words_u32x8, _mm256_and_si256(_mm256_castps_si256(passed_f32x8), bit_u32x8));
  }

  template <int kVectors>
  struct HalfWords {
    alignas(32) uint32_t words[kVectors * kLanes];
    void put(int vector, __m256i words_u32x8) {
      _mm256_store_si256(reinterpret_cast<__m256i*>(words + vector * kLanes), words_u32x8);
    }
  };
  template <int kVectors>
  static void store_words(const HalfWords<kVectors> (&halves)[2], int64_t pixels, uint64_t* words, int64_t row_words) {
    for (int64_t pixel = 0; pixel < pixels; ++pixel) {
      words[pixel * row_words] = halves[0].words[pixel] | uint64_t{halves[1].words[pixel]} << 32;
    }
  }

  // First in blocks of kVectors vectors, the rest in blocks of half as many. 8 accumulators of the 16 registers.
  template <FloatType kType, bool kUniform, bool kMask, int kVectors = kMask ? 4 : 8>
  static void pack_pixels(const BinarizeArgs& args, const uint8_t* input, int64_t first_pixel, int64_t pixels) {
    constexpr int64_t kPixels = kVectors * kLanes;
    int64_t done = 0;
    for (; pixels - done > (kVectors == 1 ? 0 : kPixels - 1); done += kPixels) {
      pack_planar_block<Vector, kType, kUniform, kMask, kVectors>(args, input + done * float_bytes(kType),
                                                                  first_pixel + done, min(pixels - done, kPixels));
    }
    if constexpr (kVectors > 1) {
      pack_pixels<kType, kUniform, kMask, kVectors / 2>(args, input + done * float_bytes(kType), first_pixel + done,
                                                        pixels - done);
    }
  }

 private:
  template <FloatType kType>
  static __m256 to_float(__m128i half_u16x8) {
    if constexpr (kType == FloatType::float16) return _mm256_cvtph_ps(half_u16x8);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half_u16x8), 16));
  }
  static __m256i lane_mask(Lanes lanes) {
    const __m256i index_u32x8 = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(lanes)), index_u32x8);
  }
  // The first `count` < 4 of 16-bit values, then zeros.
  static uint64_t load_halves(const uint8_t* from, int64_t count) {
    uint32_t pair = 0;
    uint16_t last = 0;
    if (count & 2) memcpy(&pair, from, sizeof pair);
    if (count & 1) memcpy(&last, from + (count - 1) * int64_t{sizeof last}, sizeof last);
    return pair | uint64_t{last} << (count & 2 ? 32 : 0);
  }
};

}  // namespace

void binarize(const BinarizeArgs& args, int64_t begin, int64_t end) noexcept { run_binarize<Vector>(args, begin, end); }

}  // namespace lowbit::avx2
