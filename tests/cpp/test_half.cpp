// core/half.h over all 65536 values and the halfway points between neighbours, against the formats' definitions.
#include <cmath>

#include "common.h"

namespace lowbit::test {
namespace {

// Value of a 16-bit format with an exponent of `exponent_bits` bits, from its definition.
double value_of(uint32_t half, int exponent_bits) {
  const int mantissa_bits = 15 - exponent_bits;
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = static_cast<int>(half >> mantissa_bits) & ((1 << exponent_bits) - 1);
  const double mantissa = static_cast<double>(half & ((1u << mantissa_bits) - 1));
  const double sign = half & 0x8000u ? -1.0 : 1.0;
  if (exponent == (1 << exponent_bits) - 1) return mantissa == 0 ? sign * INFINITY : NAN;
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * std::ldexp(mantissa + std::ldexp(1.0, mantissa_bits), exponent - bias - mantissa_bits);
}

void check_format(const char* name, int exponent_bits, float (*to_float)(uint16_t), uint16_t (*from_float)(float)) {
  const auto expect = [&](float value, uint32_t half) {
    if (from_float(value) != half) {
      fail(std::string(name) + ": " + std::to_string(value) + " rounds to " + std::to_string(from_float(value)) +
           ", expected " + std::to_string(half));
    }
  };
  const uint32_t infinity = ((1u << exponent_bits) - 1) << (15 - exponent_bits);
  for (uint32_t half = 0; half < 0x10000; ++half) {
    const float value = to_float(static_cast<uint16_t>(half));
    const double exact = value_of(half, exponent_bits);
    if (std::isnan(exact)) {
      if (!std::isnan(value)) fail(std::string(name) + ": a NaN was lost");
      if (!std::isnan(to_float(from_float(value)))) fail(std::string(name) + ": a NaN does not round to a NaN");
      continue;
    }
    if (static_cast<double>(value) != exact || std::signbit(value) != std::signbit(exact)) {
      fail(std::string(name) + ": wrong value of " + std::to_string(half));
    }
    expect(value, half);
    const uint32_t magnitude = half & 0x7fffu, sign = half & 0x8000u;
    if (magnitude >= infinity) continue;
    // Between this value and the next away from zero; past the last finite one as if the format went on.
    const double next = magnitude + 1 == infinity ? 2 * std::fabs(exact) - value_of(magnitude - 1, exponent_bits)
                                                  : value_of(magnitude + 1, exponent_bits);
    const float middle = static_cast<float>((std::fabs(exact) + next) / 2);
    if (static_cast<double>(middle) * 2 != std::fabs(exact) + next) continue;  // not a float32
    const float signed_middle = sign ? -middle : middle;
    expect(signed_middle, sign | (magnitude % 2 == 0 ? magnitude : magnitude + 1));
    expect(std::nextafter(signed_middle, 0.0f), half);
    expect(std::nextafter(signed_middle, sign ? -INFINITY : INFINITY), sign | (magnitude + 1));
  }
}

}  // namespace

LOWBIT_TEST(half) {
  check_format("bfloat16", 8, bfloat16_to_float, float_to_bfloat16);
  check_format("float16", 5, float16_to_float, float_to_float16);
}

}  // namespace lowbit::test
