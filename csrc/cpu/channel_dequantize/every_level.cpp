// Reads codes and writes elements, a block at a time.
#include "cpu/channel_dequantize/channel_dequantize.h"
#include "cpu/shared/codes.h"

namespace lowbit::LOWBIT_LEVEL {
namespace {

template <class Type>
inline void dequantize_rows(const ChannelDequantizeArgs& args, int64_t begin, int64_t end, Type type) {
  const float floor = args.relu ? 0.0f : -__builtin_inff();
  const auto dequantize = [&](int64_t element, int64_t count, auto size, int64_t byte, const auto& parameter) {
    alignas(64) uint8_t codes[kBlock];
    alignas(64) float values[kBlock];
    unpack_block(args.codes + byte, count, size, args.bits, codes);
    const auto scale = parameter(kScale), origin = parameter(kOrigin), shift = parameter(kDequantizeShift);
    for (int64_t i = 0; i < size; ++i) {
      const float code = static_cast<float>(codes[i]);
      const float value = code * scale(i) + origin(i);
      const float clipped = value > floor ? value : floor;
      values[i] = code >= shift(i) ? clipped : 0.0f;
    }
    store_block(values, count, size, static_cast<typename Type::type*>(args.output) + element, type);
  };
  for_each_block(args.shape, args.bits, args.grid, begin, end, dequantize);
}

}  // namespace

void channel_dequantize(const ChannelDequantizeArgs& args, int64_t begin, int64_t end) noexcept {
  for_type(args.type, [&](auto type) { dequantize_rows(args, begin, end, type); });
}

}  // namespace lowbit::LOWBIT_LEVEL
