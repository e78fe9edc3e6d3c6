// Comparisons of ordered integers to mask registers, which blend the values and are the mask. Bound by the memory.
#include <immintrin.h>

#include "cpu/quantized_activation/blocks.h"

namespace lowbit::avx512 {
namespace {

struct Lanes32 {
  using Key = int32_t;
  using Bits = uint32_t;
  using Mask = __mmask16;
  static __m512i broadcast(int32_t value) { return _mm512_set1_epi32(value); }
  static Mask at_least(__m512i a_i32x16, __m512i b_i32x16) { return _mm512_cmpge_epi32_mask(a_i32x16, b_i32x16); }
  static __m512i blend(Mask mask, __m512i a_i32x16, __m512i b_i32x16) {
    return _mm512_mask_blend_epi32(mask, a_i32x16, b_i32x16);
  }
  static __m512i key(__m512i bits_i32x16) {
    return _mm512_xor_si512(bits_i32x16, _mm512_srli_epi32(_mm512_srai_epi32(bits_i32x16, 31), 1));
  }
};

struct Lanes16 {
  using Key = int16_t;
  using Bits = uint16_t;
  using Mask = __mmask32;
  static __m512i broadcast(int16_t value) { return _mm512_set1_epi16(value); }
  static Mask at_least(__m512i a_i16x32, __m512i b_i16x32) { return _mm512_cmpge_epi16_mask(a_i16x32, b_i16x32); }
  static __m512i blend(Mask mask, __m512i a_i16x32, __m512i b_i16x32) {
    return _mm512_mask_blend_epi16(mask, a_i16x32, b_i16x32);
  }
  static __m512i key(__m512i bits_i16x32) {
    return _mm512_xor_si512(bits_i16x32, _mm512_srli_epi16(_mm512_srai_epi16(bits_i16x32, 15), 1));
  }
};

template <class Lanes>
void activate(const QuantizedActivationArgs& args, int64_t begin, int64_t end) {
  using Key = typename Lanes::Key;
  using Bits = typename Lanes::Bits;
  using Mask = typename Lanes::Mask;
  constexpr int kLanes = sizeof(__m512i) / sizeof(Bits);
  const auto constants = activation_constants<Key, Bits>(args);
  const __m512i lower_lanes = Lanes::broadcast(constants.lower), upper_lanes = Lanes::broadcast(constants.upper);
  const __m512i infinity_lanes = Lanes::broadcast(constants.infinity);
  const __m512i mask_low_lanes = Lanes::broadcast(constants.mask_low),
                mask_high_lanes = Lanes::broadcast(constants.mask_high);
  const __m512i below_lanes = Lanes::broadcast(static_cast<Key>(constants.below));
  const __m512i between_lanes = Lanes::broadcast(static_cast<Key>(constants.between));
  const __m512i above_lanes = Lanes::broadcast(static_cast<Key>(constants.above));
  for_each_block<Bits>(args, begin, end, [&](const Bits* input, Bits* output) {
    uint64_t mask = 0;
    for (int i = 0; i < kWordBits / kLanes; ++i) {
      const __m512i key_lanes = Lanes::key(_mm512_loadu_si512(input + i * kLanes));
      const Mask number = Lanes::at_least(infinity_lanes, key_lanes);
      __m512i value_lanes = Lanes::blend(Lanes::at_least(key_lanes, lower_lanes) & number, below_lanes, between_lanes);
      value_lanes = Lanes::blend(Lanes::at_least(key_lanes, upper_lanes) & number, value_lanes, above_lanes);
      _mm512_storeu_si512(output + i * kLanes, value_lanes);
      const Mask inside = Lanes::at_least(key_lanes, mask_low_lanes) & Lanes::at_least(mask_high_lanes, key_lanes);
      mask |= static_cast<uint64_t>(inside) << i * kLanes;
    }
    return mask;
  });
}

}  // namespace

void quantized_activation(const QuantizedActivationArgs& args, int64_t begin, int64_t end) noexcept {
  if (args.type == FloatType::float32) return activate<Lanes32>(args, begin, end);
  activate<Lanes16>(args, begin, end);
}

}  // namespace lowbit::avx512
