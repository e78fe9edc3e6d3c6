// The mask's bits are mask registers of masked loads; lanes past the end are masked too.
#include <immintrin.h>

#include "cpu/masked_gradient/masked_gradient.h"

namespace lowbit::avx512 {
namespace {

struct Lanes32 {
  using Bits = uint32_t;
  static __m512i load(uint64_t mask, const uint32_t* source) {
    return _mm512_maskz_loadu_epi32(static_cast<__mmask16>(mask), source);
  }
  static void store(uint64_t mask, uint32_t* destination, __m512i values_u32x16) {
    _mm512_mask_storeu_epi32(destination, static_cast<__mmask16>(mask), values_u32x16);
  }
};

struct Lanes16 {
  using Bits = uint16_t;
  static __m512i load(uint64_t mask, const uint16_t* source) {
    return _mm512_maskz_loadu_epi16(static_cast<__mmask32>(mask), source);
  }
  static void store(uint64_t mask, uint16_t* destination, __m512i values_u16x32) {
    _mm512_mask_storeu_epi16(destination, static_cast<__mmask32>(mask), values_u16x32);
  }
};

template <class Lanes>
void mask_range(const MaskedGradientArgs& args, int64_t begin, int64_t end) {
  using Bits = typename Lanes::Bits;
  constexpr int kLanes = sizeof(__m512i) / sizeof(Bits);
  const Bits* gradient = static_cast<const Bits*>(args.gradient);
  Bits* output = static_cast<Bits*>(args.output);
  for (int64_t word = begin; word < end; ++word) {
    const int64_t first = word * kWordBits, left = args.count - first;
    const uint64_t mask = args.mask[word];
    if (left >= kWordBits) {
      for (int i = 0; i < kWordBits; i += kLanes) {
        _mm512_storeu_si512(output + first + i, Lanes::load(mask >> i, gradient + first + i));
      }
    } else {
      const uint64_t present = low_mask(left);
      for (int i = 0; i < left; i += kLanes) {
        Lanes::store(present >> i, output + first + i, Lanes::load((mask & present) >> i, gradient + first + i));
      }
    }
  }
}

}  // namespace

void masked_gradient(const MaskedGradientArgs& args, int64_t begin, int64_t end) noexcept {
  if (args.type == FloatType::float32) return mask_range<Lanes32>(args, begin, end);
  mask_range<Lanes16>(args, begin, end);
}

}  // namespace lowbit::avx512
