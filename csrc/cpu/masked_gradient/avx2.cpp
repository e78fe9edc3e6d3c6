// Every lane receives the mask's bits and keeps its own: all ones or 0 to AND with.
#include <immintrin.h>

#include <cstring>

#include "cpu/masked_gradient/masked_gradient.h"

namespace lowbit::avx2 {
namespace {

struct Lanes32 {
  using Bits = uint32_t;
  static __m256i chosen(uint64_t mask) {
    const __m256i own_bit_u32x8 = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i bits_u32x8 = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(mask & 0xff)), own_bit_u32x8);
    return _mm256_cmpeq_epi32(bits_u32x8, own_bit_u32x8);
  }
};

struct Lanes16 {
  using Bits = uint16_t;
  static __m256i chosen(uint64_t mask) {
    const __m256i own_bit_u16x16 =
        _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, -32768);
    const __m256i bits_u16x16 = _mm256_and_si256(_mm256_set1_epi16(static_cast<short>(mask & 0xffff)), own_bit_u16x16);
    return _mm256_cmpeq_epi16(bits_u16x16, own_bit_u16x16);
  }
};

template <class Lanes>
void mask_range(const MaskedGradientArgs& args, int64_t begin, int64_t end) {
  using Bits = typename Lanes::Bits;
  constexpr int kLanes = sizeof(__m256i) / sizeof(Bits);
  const Bits* gradient = static_cast<const Bits*>(args.gradient);
  Bits* output = static_cast<Bits*>(args.output);
  for (int64_t word = begin; word < end; ++word) {
    const int64_t first = word * kWordBits, left = args.count - first;
    const Bits* source = gradient + first;
    Bits* destination = output + first;
    Bits copy[kWordBits];
    if (left < kWordBits) {
      memcpy(copy, source, static_cast<size_t>(left) * sizeof(Bits));
      source = destination = copy;
    }
    for (int i = 0; i < kWordBits; i += kLanes) {
      const __m256i value_lanes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + i));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(destination + i),
                          _mm256_and_si256(value_lanes, Lanes::chosen(args.mask[word] >> i)));
    }
    if (left < kWordBits) memcpy(output + first, copy, static_cast<size_t>(left) * sizeof(Bits));
  }
}

}  // namespace

void masked_gradient(const MaskedGradientArgs& args, int64_t begin, int64_t end) noexcept {
  if (args.type == FloatType::float32) return mask_range<Lanes32>(args, begin, end);
  mask_range<Lanes16>(args, begin, end);
}

}  // namespace lowbit::avx2
