// Packed bits are mask registers: one masked blend between low and high per 64 bytes of output, bound by the stores.
#include <immintrin.h>

#include <cstring>

#include "core/float_type.h"
#include "cpu/unpack/unpack.h"

namespace lowbit::avx512 {
namespace {

struct Lanes32 {
  using Value = uint32_t;
  using Mask = __mmask16;
  static __m512i broadcast(uint32_t value) { return _mm512_set1_epi32(static_cast<int>(value)); }
  static __m512i blend(Mask mask, __m512i low_u32x16, __m512i high_u32x16) {
    return _mm512_mask_blend_epi32(mask, low_u32x16, high_u32x16);
  }
  static void store(uint32_t* output, Mask mask, __m512i values_u32x16) {
    _mm512_mask_storeu_epi32(output, mask, values_u32x16);
  }
};

struct Lanes16 {
  using Value = uint16_t;
  using Mask = __mmask32;
  static __m512i broadcast(uint16_t value) { return _mm512_set1_epi16(static_cast<short>(value)); }
  static __m512i blend(Mask mask, __m512i low_u16x32, __m512i high_u16x32) {
    return _mm512_mask_blend_epi16(mask, low_u16x32, high_u16x32);
  }
  static void store(uint16_t* output, Mask mask, __m512i values_u16x32) {
    _mm512_mask_storeu_epi16(output, mask, values_u16x32);
  }
};

template <class Lanes>
void unpack_range(const UnpackArgs& args, typename Lanes::Value low, typename Lanes::Value high, int64_t begin,
                  int64_t end) {
  using Value = typename Lanes::Value;
  using Mask = typename Lanes::Mask;
  constexpr int64_t kLanes = sizeof(__m512i) / sizeof(Value);
  const __m512i low_lanes = Lanes::broadcast(low);
  const __m512i high_lanes = Lanes::broadcast(high);
  const int64_t full_vectors = args.channels / kLanes;
  const Mask tail_lanes = static_cast<Mask>(low_mask(args.channels % kLanes));
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(args.words + pixel * words_for(args.channels));
    Value* output = static_cast<Value*>(args.output) + pixel * args.channels;
    const auto vector = [&](int64_t i) {
      Mask bits;
      memcpy(&bits, bytes + i * int64_t{sizeof bits}, sizeof bits);
      return Lanes::blend(bits, low_lanes, high_lanes);
    };
    for (int64_t i = 0; i < full_vectors; ++i) _mm512_storeu_si512(output + i * kLanes, vector(i));
    if (tail_lanes) Lanes::store(output + full_vectors * kLanes, tail_lanes, vector(full_vectors));
  }
}

}  // namespace

void unpack(const UnpackArgs& args, int64_t begin, int64_t end) noexcept {
  const uint32_t low = float_bits(args.low, args.output_type), high = float_bits(args.high, args.output_type);
  if (args.output_type == FloatType::float32) return unpack_range<Lanes32>(args, low, high, begin, end);
  unpack_range<Lanes16>(args, static_cast<uint16_t>(low), static_cast<uint16_t>(high), begin, end);
}

}  // namespace lowbit::avx512
