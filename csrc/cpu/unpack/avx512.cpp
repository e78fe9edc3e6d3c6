// Packed bits are mask registers: one masked blend between low and high per 64 bytes of output, bound by the stores.
#include <immintrin.h>

#include <cstring>

#include "core/half.h"
#include "cpu/unpack/unpack.h"

namespace lowbit::avx512 {
namespace {

void unpack_u32(const UnpackArgs& args, uint32_t low, uint32_t high, int64_t begin, int64_t end) {
  constexpr int64_t kLanes = 16;
  const __m512i low_u32x16 = _mm512_set1_epi32(static_cast<int>(low));
  const __m512i high_u32x16 = _mm512_set1_epi32(static_cast<int>(high));
  const int64_t full_vectors = args.channels / kLanes;
  const __mmask16 tail_lanes = static_cast<__mmask16>(low_mask(args.channels % kLanes));
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(args.words + pixel * words_for(args.channels));
    uint32_t* output = static_cast<uint32_t*>(args.output) + pixel * args.channels;
    const auto vector = [&](int64_t i) {
      __mmask16 bits;
      memcpy(&bits, bytes + i * int64_t{sizeof bits}, sizeof bits);
      return _mm512_mask_blend_epi32(bits, low_u32x16, high_u32x16);
    };
    for (int64_t i = 0; i < full_vectors; ++i) _mm512_storeu_si512(output + i * kLanes, vector(i));
    if (tail_lanes) _mm512_mask_storeu_epi32(output + full_vectors * kLanes, tail_lanes, vector(full_vectors));
  }
}

void unpack_u16(const UnpackArgs& args, uint16_t low, uint16_t high, int64_t begin, int64_t end) {
  constexpr int64_t kLanes = 32;
  const __m512i low_u16x32 = _mm512_set1_epi16(static_cast<short>(low));
  const __m512i high_u16x32 = _mm512_set1_epi16(static_cast<short>(high));
  const int64_t full_vectors = args.channels / kLanes;
  const __mmask32 tail_lanes = static_cast<__mmask32>(low_mask(args.channels % kLanes));
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(args.words + pixel * words_for(args.channels));
    uint16_t* output = static_cast<uint16_t*>(args.output) + pixel * args.channels;
    const auto vector = [&](int64_t i) {
      __mmask32 bits;
      memcpy(&bits, bytes + i * int64_t{sizeof bits}, sizeof bits);
      return _mm512_mask_blend_epi16(bits, low_u16x32, high_u16x32);
    };
    for (int64_t i = 0; i < full_vectors; ++i) _mm512_storeu_si512(output + i * kLanes, vector(i));
    if (tail_lanes) _mm512_mask_storeu_epi16(output + full_vectors * kLanes, tail_lanes, vector(full_vectors));
  }
}

}  // namespace

void unpack(const UnpackArgs& args, int64_t begin, int64_t end) noexcept {
  switch (args.output_type) {
    case FloatType::float32:
      return unpack_u32(args, float_to_bits(args.low), float_to_bits(args.high), begin, end);
    case FloatType::bfloat16:
      return unpack_u16(args, float_to_bfloat16(args.low), float_to_bfloat16(args.high), begin, end);
    case FloatType::float16:
      return unpack_u16(args, float_to_float16(args.low), float_to_float16(args.high), begin, end);
  }
}

}  // namespace lowbit::avx512
