// output[i] = the level of input[i], elementwise in memory order and in the input's type:
//   sign     x >= 0 ? 1 : -1
//   step     x >= 1/2 ? 1 : 0
//   ternary  x >= 3/4 ? 1 : x >= 1/4 ? 1/2 : 0
// A NaN gives the lowest level; -0 equals +0, and subnormal numbers keep their value whatever the caller's
// floating-point control says. Optionally one bit an element, 64 a word, of whether the input lies in the interval
// where the straight-through estimator lets gradients pass; a NaN does not. Bits past the last element are 0. Source:
// Kim et al., "BinaryDuo", ICLR 2020 (step and ternary).
#pragma once

#include "core/float_type.h"
#include "core/status.h"

namespace lowbit {

enum class Activation : int { sign = 0, step = 1, ternary = 2 };

struct QuantizedActivationArgs {
  const void* input;  // [count] of type
  FloatType type;
  int64_t count;
  Activation activation;
  float low, high;  // ends of the interval, exact in every type
  bool closed;      // whether the ends belong to it
  void* output;     // [count] of type
  uint64_t* mask;   // [words_for(count)], or null
};

// Integers that order floats: key(x) < key(y) if and only if x < y, but that -0 is next below +0; NaN lie outside
// [key(-inf), key(inf)].
LOWBIT_INLINE int32_t ordered_key(uint32_t bits) {
  const int32_t value = static_cast<int32_t>(bits);
  return value ^ ((value >> 31) & 0x7fffffff);
}
LOWBIT_INLINE int16_t ordered_key(uint16_t bits) {
  const int16_t value = static_cast<int16_t>(bits);
  return static_cast<int16_t>(value ^ ((value >> 15) & 0x7fff));
}

// The comparisons and values of one call. Key and Bits: int32_t and uint32_t, or int16_t and uint16_t.
template <class Key, class Bits>
struct ActivationConstants {
  Key lower, upper;         // thresholds, as keys; equal for two levels
  Key infinity;             // greatest key that is no NaN
  Key mask_low, mask_high;  // ends of the interval that belong to it
  Bits below, between, above;
};

template <class Key, class Bits>
LOWBIT_INLINE ActivationConstants<Key, Bits> activation_constants(const QuantizedActivationArgs& args) {
  const auto bits = [&](float value) { return static_cast<Bits>(float_bits(value, args.type)); };
  const auto key = [&](float value) { return ordered_key(bits(value)); };
  const Key inside = args.closed ? 0 : 1;
  ActivationConstants<Key, Bits> constants{};
  constants.infinity = key(__builtin_inff());
  constants.mask_low = static_cast<Key>(key(args.low) + inside);
  constants.mask_high = static_cast<Key>(key(args.high) - inside);
  constants.above = bits(1.0f);
  switch (args.activation) {
    case Activation::sign:
      constants.lower = constants.upper = key(-0.0f);
      constants.below = constants.between = bits(-1.0f);
      break;
    case Activation::step:
      constants.lower = constants.upper = key(0.5f);
      constants.below = constants.between = bits(0.0f);
      break;
    case Activation::ternary:
      constants.lower = key(0.25f);
      constants.upper = key(0.75f);
      constants.below = bits(0.0f);
      constants.between = bits(0.5f);
      break;
  }
  return constants;
}

template <class Key, class Bits>
LOWBIT_INLINE Bits level_of(Key key, const ActivationConstants<Key, Bits>& constants) {
  const bool number = key <= constants.infinity;
  return number && key >= constants.upper   ? constants.above
         : number && key >= constants.lower ? constants.between
                                            : constants.below;
}

template <class Key, class Bits>
LOWBIT_INLINE bool in_interval(Key key, const ActivationConstants<Key, Bits>& constants) {
  return key >= constants.mask_low && key <= constants.mask_high;
}

}  // namespace lowbit
