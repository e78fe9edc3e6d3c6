#include "cpu/quantized_activation/blocks.h"

namespace lowbit::scalar {
namespace {

template <class Key, class Bits>
void activate(const QuantizedActivationArgs& args, int64_t begin, int64_t end) {
  const auto constants = activation_constants<Key, Bits>(args);
  for_each_block<Bits>(args, begin, end, [&](const Bits* input, Bits* output) {
    uint64_t mask = 0;
    for (int i = 0; i < kWordBits; ++i) {
      const Key key = ordered_key(input[i]);
      output[i] = level_of(key, constants);
      mask |= static_cast<uint64_t>(in_interval(key, constants)) << i;
    }
    return mask;
  });
}

}  // namespace

void quantized_activation(const QuantizedActivationArgs& args, int64_t begin, int64_t end) noexcept {
  if (args.type == FloatType::float32) return activate<int32_t, uint32_t>(args, begin, end);
  activate<int16_t, uint16_t>(args, begin, end);
}

}  // namespace lowbit::scalar
