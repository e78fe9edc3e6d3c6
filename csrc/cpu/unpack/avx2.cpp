// Every lane receives the packed bits, keeps its own bit and compares: the result selects low or high.
#include <immintrin.h>

#include <cstring>

#include "core/float_type.h"
#include "cpu/unpack/unpack.h"

namespace lowbit::avx2 {
namespace {

// A vector's worth of packed bits is one byte or one 16-bit word.
struct Lanes32 {
  using Value = uint32_t;
  using Bits = uint8_t;
  static __m256i broadcast(uint32_t value) { return _mm256_set1_epi32(static_cast<int>(value)); }
  static __m256i own_bit() { return _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128); }
  static __m256i equal(__m256i a_u32x8, __m256i b_u32x8) { return _mm256_cmpeq_epi32(a_u32x8, b_u32x8); }
};

struct Lanes16 {
  using Value = uint16_t;
  using Bits = uint16_t;
  static __m256i broadcast(uint16_t value) { return _mm256_set1_epi16(static_cast<short>(value)); }
  static __m256i own_bit() {
    return _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, -32768);
  }
  static __m256i equal(__m256i a_u16x16, __m256i b_u16x16) { return _mm256_cmpeq_epi16(a_u16x16, b_u16x16); }
};

template <class Lanes>
void unpack_range(const UnpackArgs& args, typename Lanes::Value low, typename Lanes::Value high, int64_t begin,
                  int64_t end) {
  using Value = typename Lanes::Value;
  constexpr int64_t kLanes = sizeof(__m256i) / sizeof(Value);
  const __m256i low_lanes = Lanes::broadcast(low);
  const __m256i high_lanes = Lanes::broadcast(high);
  const __m256i own_bit_lanes = Lanes::own_bit();
  const int64_t full_vectors = args.channels / kLanes;
  const int64_t tail = args.channels % kLanes;
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(args.words + pixel * words_for(args.channels));
    Value* output = static_cast<Value*>(args.output) + pixel * args.channels;
    const auto vector = [&](int64_t i) {
      typename Lanes::Bits bits;
      memcpy(&bits, bytes + i * int64_t{sizeof bits}, sizeof bits);
      const __m256i is_high_lanes =
          Lanes::equal(_mm256_and_si256(Lanes::broadcast(bits), own_bit_lanes), own_bit_lanes);
      return _mm256_blendv_epi8(low_lanes, high_lanes, is_high_lanes);
    };
    for (int64_t i = 0; i < full_vectors; ++i) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(output + i * kLanes), vector(i));
    }
    if (tail) {
      alignas(32) Value values[kLanes];
      _mm256_store_si256(reinterpret_cast<__m256i*>(values), vector(full_vectors));
      for (int64_t i = 0; i < tail; ++i) output[full_vectors * kLanes + i] = values[i];
    }
  }
}

}  // namespace

void unpack(const UnpackArgs& args, int64_t begin, int64_t end) noexcept {
  const uint32_t low = float_bits(args.low, args.output_type), high = float_bits(args.high, args.output_type);
  if (args.output_type == FloatType::float32) return unpack_range<Lanes32>(args, low, high, begin, end);
  unpack_range<Lanes16>(args, static_cast<uint16_t>(low), static_cast<uint16_t>(high), begin, end);
}

}  // namespace lowbit::avx2
