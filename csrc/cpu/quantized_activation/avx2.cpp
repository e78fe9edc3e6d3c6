// Comparisons of ordered integers, 8 or 16 lanes; a value is one blend a threshold. Bound by the memory.
#include <immintrin.h>

#include "cpu/quantized_activation/blocks.h"

namespace lowbit::avx2 {
namespace {

struct Lanes32 {
  using Key = int32_t;
  using Bits = uint32_t;
  static __m256i broadcast(int32_t value) { return _mm256_set1_epi32(value); }
  static __m256i greater(__m256i a_i32x8, __m256i b_i32x8) { return _mm256_cmpgt_epi32(a_i32x8, b_i32x8); }
  static __m256i key(__m256i bits_i32x8) {
    return _mm256_xor_si256(bits_i32x8, _mm256_srli_epi32(_mm256_srai_epi32(bits_i32x8, 31), 1));
  }
  // Bits of 64 lanes of 0 or -1.
  static uint64_t collect(const __m256i (&lanes_i32x8)[8]) {
    uint64_t bits = 0;
    for (int i = 0; i < 8; ++i) {
      bits |= static_cast<uint64_t>(_mm256_movemask_ps(_mm256_castsi256_ps(lanes_i32x8[i]))) << 8 * i;
    }
    return bits;
  }
};

struct Lanes16 {
  using Key = int16_t;
  using Bits = uint16_t;
  static __m256i broadcast(int16_t value) { return _mm256_set1_epi16(value); }
  static __m256i greater(__m256i a_i16x16, __m256i b_i16x16) { return _mm256_cmpgt_epi16(a_i16x16, b_i16x16); }
  static __m256i key(__m256i bits_i16x16) {
    return _mm256_xor_si256(bits_i16x16, _mm256_srli_epi16(_mm256_srai_epi16(bits_i16x16, 15), 1));
  }
  static uint64_t collect(const __m256i (&lanes_i16x16)[4]) {
    uint64_t bits = 0;
    for (int i = 0; i < 2; ++i) {
      const __m256i bytes_i8x32 =
          _mm256_permute4x64_epi64(_mm256_packs_epi16(lanes_i16x16[2 * i], lanes_i16x16[2 * i + 1]), 0xd8);
      bits |= static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_epi8(bytes_i8x32))) << 32 * i;
    }
    return bits;
  }
};

template <class Lanes>
void activate(const QuantizedActivationArgs& args, int64_t begin, int64_t end) {
  using Key = typename Lanes::Key;
  using Bits = typename Lanes::Bits;
  constexpr int kLanes = sizeof(__m256i) / sizeof(Bits), kVectors = kWordBits / kLanes;
  const auto constants = activation_constants<Key, Bits>(args);
  const __m256i lower_lanes = Lanes::broadcast(constants.lower), upper_lanes = Lanes::broadcast(constants.upper);
  const __m256i infinity_lanes = Lanes::broadcast(constants.infinity);
  const __m256i mask_low_lanes = Lanes::broadcast(constants.mask_low),
                mask_high_lanes = Lanes::broadcast(constants.mask_high);
  const __m256i below_lanes = Lanes::broadcast(static_cast<Key>(constants.below));
  const __m256i between_lanes = Lanes::broadcast(static_cast<Key>(constants.between));
  const __m256i above_lanes = Lanes::broadcast(static_cast<Key>(constants.above));
  for_each_block<Bits>(args, begin, end, [&](const Bits* input, Bits* output) {
    __m256i outside_lanes[kVectors];
    for (int i = 0; i < kVectors; ++i) {
      const __m256i key_lanes = Lanes::key(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(input + i * kLanes)));
      __m256i value_lanes = _mm256_blendv_epi8(between_lanes, below_lanes, Lanes::greater(lower_lanes, key_lanes));
      value_lanes = _mm256_blendv_epi8(above_lanes, value_lanes, Lanes::greater(upper_lanes, key_lanes));
      value_lanes = _mm256_blendv_epi8(value_lanes, below_lanes, Lanes::greater(key_lanes, infinity_lanes));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(output + i * kLanes), value_lanes);
      outside_lanes[i] =
          _mm256_or_si256(Lanes::greater(mask_low_lanes, key_lanes), Lanes::greater(key_lanes, mask_high_lanes));
    }
    return ~Lanes::collect(outside_lanes);
  });
}

}  // namespace

void quantized_activation(const QuantizedActivationArgs& args, int64_t begin, int64_t end) noexcept {
  if (args.type == FloatType::float32) return activate<Lanes32>(args, begin, end);
  activate<Lanes16>(args, begin, end);
}

}  // namespace lowbit::avx2
