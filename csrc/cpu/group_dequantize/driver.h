// A group at a time.
#pragma once

#include "cpu/codes/codes.h"
#include "cpu/group_dequantize/group_dequantize.h"

namespace lowbit {
namespace {

template <class Type>
inline void dequantize_groups(const GroupDequantizeArgs& args, int64_t begin, int64_t end, Type type) {
  const auto dequantize = [&](int64_t group, auto count) {
    const float scale = bfloat16_to_float(args.scale_minimum[2 * group]);
    const float minimum = bfloat16_to_float(args.scale_minimum[2 * group + 1]);
    alignas(64) uint8_t codes[kGroup];
    alignas(64) float values[kGroup];
    unpack_block(args.codes + group * kGroup * args.bits / 8, count, args.bits, codes);
    for (int64_t i = 0; i < count; ++i) values[i] = static_cast<float>(codes[i]) * scale + minimum;
    store_block(values, count, static_cast<typename Type::type*>(args.output) + group * kGroup, type);
  };
  for_each_group(args.count, begin, end, dequantize);
}

inline void run_group_dequantize(const GroupDequantizeArgs& args, int64_t begin, int64_t end) {
  for_type(args.type, [&](auto type) { dequantize_groups(args, begin, end, type); });
}

}  // namespace
}  // namespace lowbit
