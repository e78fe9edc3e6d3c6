// A group at a time.
#pragma once

#include "cpu/codes/codes.h"
#include "cpu/group_dequantize/group_dequantize.h"

namespace lowbit {
namespace {

template <class Type>
inline void dequantize_groups(const GroupDequantizeArgs& args, int64_t begin, int64_t end, Type type) {
  for (int64_t group = begin; group < end; ++group) {
    const int64_t left = args.count - group * kGroup, count = left < kGroup ? left : kGroup;
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

inline void run_group_dequantize(const GroupDequantizeArgs& args, int64_t begin, int64_t end) {
  for_type(args.type, [&](auto type) { dequantize_groups(args, begin, end, type); });
}

}  // namespace
}  // namespace lowbit
