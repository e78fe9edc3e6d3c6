#include "cpu/masked_gradient/masked_gradient.h"

namespace lowbit::scalar {
namespace {

template <class Bits>
void mask_range(const MaskedGradientArgs& args, int64_t begin, int64_t end) {
  const Bits* gradient = static_cast<const Bits*>(args.gradient);
  Bits* output = static_cast<Bits*>(args.output);
  const int64_t last = min(end * kWordBits, args.count);
  for (int64_t i = begin * kWordBits; i < last; ++i) {
    output[i] = args.mask[i / kWordBits] >> (i % kWordBits) & 1 ? gradient[i] : Bits{0};
  }
}

}  // namespace

void masked_gradient(const MaskedGradientArgs& args, int64_t begin, int64_t end) noexcept {
  if (args.type == FloatType::float32) return mask_range<uint32_t>(args, begin, end);
  mask_range<uint16_t>(args, begin, end);
}

}  // namespace lowbit::scalar
