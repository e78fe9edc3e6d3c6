// A group at a time.
#include "cpu/group_dequantize/group_dequantize.h"
#include "cpu/shared/codes.h"

namespace lowbit::LOWBIT_LEVEL {
namespace {

template <class Type>
inline void dequantize_groups(const GroupDequantizeArgs& args, int64_t begin, int64_t end, Type type) {
  for (int64_t group = begin; group < end; ++group) {
    const int64_t count = min(args.count - group * kGroup, kGroup);
    const float scale = bfloat16_to_float(args.scale_minimum[2 * group]);
    const float minimum = bfloat16_to_float(args.scale_minimum[2 * group + 1]);
    alignas(64) uint8_t codes[kGroup];
    alignas(64) float buffer[kGroup];
    auto* output = static_cast<typename Type::type*>(args.output) + group * kGroup;
    float* __restrict values = floats_of(output, count, Whole{}, buffer, type);
    unpack_block(args.codes + group * kGroup * args.bits / 8, count, Whole{}, args.bits, codes);
    for (int64_t i = 0; i < kGroup; ++i) values[i] = group_value(static_cast<float>(codes[i]), scale, minimum);
    store_block(values, count, Whole{}, output, type);
  }
}

}  // namespace

void group_dequantize(const GroupDequantizeArgs& args, int64_t begin, int64_t end) noexcept {
  for_type(args.type, [&](auto type) { dequantize_groups(args, begin, end, type); });
}

}  // namespace lowbit::LOWBIT_LEVEL
