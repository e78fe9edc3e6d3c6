// Reads codes and writes elements, a block at a time.
#include "cpu/channel_dequantize/channel_dequantize.h"
#include "cpu/shared/codes.h"

namespace lowbit::LOWBIT_LEVEL {
namespace {

template <class Type>
inline void dequantize_rows(const ChannelDequantizeArgs& args, int64_t begin, int64_t end, Type type) {
  const float ceiling = finite_limit(Type::value), floor = args.relu ? 0.0f : -ceiling;
  const auto dequantize = [&](int64_t element, int64_t count, auto size, int64_t byte, const auto& parameter) {
    alignas(64) uint8_t codes[kBlock];
    alignas(64) float buffer[kBlock];
    auto* output = static_cast<typename Type::type*>(args.output) + element;
    float* __restrict values = floats_of(output, count, size, buffer, type);
    unpack_block(args.codes + byte, count, size, args.bits, codes);
    const auto offset = parameter(kCodeOffset), scale = parameter(kScale), beta = parameter(kBeta);
    const auto shift = parameter(kDequantizeShift);
    for (int64_t i = 0; i < size; ++i) {
      values[i] = channel_value(static_cast<float>(codes[i]), offset(i), scale(i), beta(i), shift(i), floor, ceiling);
    }
    store_block(values, count, size, output, type);
  };
  for_each_block(args.shape, args.bits, args.grid, begin, end, dequantize);
}

}  // namespace

void channel_dequantize(const ChannelDequantizeArgs& args, int64_t begin, int64_t end) noexcept {
  for_type(args.type, [&](auto type) { dequantize_rows(args, begin, end, type); });
}

}  // namespace lowbit::LOWBIT_LEVEL
