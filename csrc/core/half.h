// bfloat16 and float16 <-> float32 in plain integer arithmetic, for units without the conversion instructions.
// Rounding is to nearest even; NaN stays NaN.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/inline.h"

namespace lowbit {

LOWBIT_INLINE float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

LOWBIT_INLINE uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

LOWBIT_INLINE float bfloat16_to_float(uint16_t half) { return bits_to_float(uint32_t{half} << 16); }

LOWBIT_INLINE uint16_t float_to_bfloat16(float value) {
  uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40);  // keep NaN quiet
  bits += 0x7fffu + ((bits >> 16) & 1);
  return static_cast<uint16_t>(bits >> 16);
}

LOWBIT_INLINE float float16_to_float(uint16_t half) {
  const uint32_t sign = uint32_t{half & 0x8000u} << 16;
  const uint32_t exponent = (half >> 10) & 0x1f;
  const uint32_t mantissa = half & 0x3ffu;
  if (exponent == 0x1f) return bits_to_float(sign | 0x7f800000u | (mantissa << 13));
  if (exponent != 0) return bits_to_float(sign | ((exponent + 112) << 23) | (mantissa << 13));
  const float subnormal = static_cast<float>(mantissa) * (1.0f / 16777216.0f);  // mantissa * 2^-24
  return bits_to_float(sign | float_to_bits(subnormal));
}

LOWBIT_INLINE uint16_t float_to_float16(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7e00u;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and above round to infinity
  if (magnitude < 0x38800000u) {                        // below 2^-14: a multiple of 2^-24
    const float scaled = bits_to_float(magnitude) * 16777216.0f;
    const float shifted = scaled + 8388608.0f;  // adding 2^23 rounds to an integer, ties to even
    return sign | static_cast<uint16_t>(float_to_bits(shifted) & 0x7ffu);
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1);
  return sign | static_cast<uint16_t>((rounded - 0x38000000u) >> 13);
}

}  // namespace lowbit
