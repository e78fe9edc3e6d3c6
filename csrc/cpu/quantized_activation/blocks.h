// Splits a range into whole blocks of 64 elements, worked in place, and the tail, worked in a copy. Internal linkage:
// each level compiles its own.
#pragma once

#include <cstring>

#include "cpu/quantized_activation/quantized_activation.h"

namespace lowbit {
namespace {

// block(input, output) works 64 elements and returns their mask.
template <class Bits, class Block>
inline void for_each_block(const QuantizedActivationArgs& args, int64_t begin, int64_t end, const Block& block) {
  const Bits* input = static_cast<const Bits*>(args.input);
  Bits* output = static_cast<Bits*>(args.output);
  for (int64_t word = begin; word < end; ++word) {
    const int64_t first = word * kWordBits, left = args.count - first;
    uint64_t mask;
    if (left >= kWordBits) {
      mask = block(input + first, output + first);
    } else {
      Bits values[kWordBits] = {}, levels[kWordBits];
      memcpy(values, input + first, static_cast<size_t>(left) * sizeof(Bits));
      mask = block(values, levels) & low_mask(left);
      memcpy(output + first, levels, static_cast<size_t>(left) * sizeof(Bits));
    }
    if (args.mask != nullptr) args.mask[word] = mask;
  }
}

}  // namespace
}  // namespace lowbit
