// The float types that kernels read and write, told apart when a call comes in and when code is compiled.
#pragma once

#include "core/half.h"
#include "core/layout.h"

namespace lowbit {

LOWBIT_INLINE constexpr bool valid(FloatType type) {
  return type == FloatType::float32 || type == FloatType::bfloat16 || type == FloatType::float16;
}

LOWBIT_INLINE constexpr int64_t float_bytes(FloatType type) { return type == FloatType::float32 ? 4 : 2; }

// The nearest bit pattern of `type`; of a 16-bit type in the lower half.
LOWBIT_INLINE uint32_t float_bits(float value, FloatType type) {
  if (type == FloatType::float32) return float_to_bits(value);
  return type == FloatType::bfloat16 ? float_to_bfloat16(value) : float_to_float16(value);
}

// A float type as the type of an argument, and what holds its elements in memory.
template <FloatType kType>
struct Stored {
  static constexpr FloatType value = kType;
  using type = uint16_t;
};
template <>
struct Stored<FloatType::float32> {
  static constexpr FloatType value = FloatType::float32;
  using type = float;
};

// body(Stored<type>{}). The launchers refuse what is not valid(type).
template <class Body>
static inline auto for_type(FloatType type, const Body& body) {
  switch (type) {
    case FloatType::float32:
      return body(Stored<FloatType::float32>{});
    case FloatType::bfloat16:
      return body(Stored<FloatType::bfloat16>{});
    default:
      return body(Stored<FloatType::float16>{});
  }
}

}  // namespace lowbit
