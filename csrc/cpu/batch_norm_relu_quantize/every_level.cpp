// Reads x and y, writes y and the codes, a block at a time.
#include "cpu/batch_norm_relu_quantize/batch_norm_relu_quantize.h"
#include "cpu/shared/codes.h"

namespace lowbit::LOWBIT_LEVEL {
namespace {

template <class Type>
inline void quantize_rows(const BatchNormReluQuantizeArgs& args, int64_t begin, int64_t end, Type type) {
  using Value = typename Type::type;
  const float last = static_cast<float>((1 << args.bits) - 1);
  const auto quantize = [&](int64_t element, int64_t count, auto size, int64_t byte, const auto& parameter) {
    alignas(64) float x_buffer[kBlock], y_buffer[kBlock];
    alignas(64) uint8_t codes[kBlock];
    const float* x = load_block(static_cast<const Value*>(args.input) + element, count, size, x_buffer, type);
    const auto mean = parameter(kCenter), multiplier = parameter(kMultiplier), offset = parameter(kOffset);
    const auto shift = parameter(kQuantizeShift);
    if (args.relu) {
      Value* output = static_cast<Value*>(args.output) + element;
      const float* y = load_block(output, count, size, y_buffer, type);
      for (int64_t i = 0; i < size; ++i) {
        codes[i] = static_cast<uint8_t>(
            static_cast<int32_t>(channel_code(x[i], y[i], mean(i), multiplier(i), offset(i), shift(i), last, true)));
      }
      for (int64_t i = 0; i < count; ++i) output[i] = y[i] <= 0 ? Value{0} : output[i];
    } else {
      for (int64_t i = 0; i < size; ++i) {
        codes[i] = static_cast<uint8_t>(
            static_cast<int32_t>(channel_code(x[i], 0.0f, mean(i), multiplier(i), offset(i), 0.0f, last, false)));
      }
    }
    pack_block(codes, count, size, args.bits, args.codes + byte);
  };
  for_each_block(args.shape, args.bits, args.grid, begin, end, quantize);
}

}  // namespace

void batch_norm_relu_quantize(const BatchNormReluQuantizeArgs& args, int64_t begin, int64_t end) noexcept {
  for_type(args.type, [&](auto type) { quantize_rows(args, begin, end, type); });
}

}  // namespace lowbit::LOWBIT_LEVEL
