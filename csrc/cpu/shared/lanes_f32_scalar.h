// Eight in short loops that the compiler may turn into baseline vectors.
#pragma once

#include "core/epilogue.h"
#include "core/ops/pointwise.h"

namespace lowbit {
namespace {

struct LanesF32 {
  static constexpr int kLanes = 8;
  float f32x8[kLanes];

  template <class Value>
  static LanesF32 each(const Value& value, int64_t count = kLanes) {
    LanesF32 result = {};
    for (int i = 0; i < count; ++i) result.f32x8[i] = value(i);
    return result;
  }
  static LanesF32 broadcast(float value) {
    return each([&](int) { return value; });
  }

  static float element(const float* from, Stored<FloatType::float32>) { return *from; }
  static float element(const uint16_t* from, Stored<FloatType::bfloat16>) { return bfloat16_to_float(*from); }
  static float element(const uint16_t* from, Stored<FloatType::float16>) { return float16_to_float(*from); }
  static float element(const int32_t* from, Integers) { return static_cast<float>(*from); }
  // Out of line, like the stores: float16 in integer arithmetic is long.
  template <class Element, class Type>
  [[gnu::noinline]] static LanesF32 load(const Element* from, int64_t count, Type type) {
    return each([&](int i) { return element(from + i, type); }, count);
  }
  template <class Element, class Type>
  static LanesF32 load(const Element* from, Type type) {
    return load(from, int64_t{kLanes}, type);
  }

  template <class Element, class Type>
  [[gnu::noinline]] void store(Element* to, int64_t count, Type) const {
    for (int i = 0; i < count; ++i) {
      if constexpr (Type::value == FloatType::float32) {
        to[i] = f32x8[i];
      } else {
        to[i] = static_cast<uint16_t>(float_bits(f32x8[i], Type::value));
      }
    }
  }
  template <class Element, class Type>
  void store(Element* to, Type type) const {
    store(to, int64_t{kLanes}, type);
  }

  friend LanesF32 operator+(LanesF32 a, LanesF32 b) {
    return each([&](int i) { return a.f32x8[i] + b.f32x8[i]; });
  }
  friend LanesF32 operator*(LanesF32 a, LanesF32 b) {
    return each([&](int i) { return a.f32x8[i] * b.f32x8[i]; });
  }
  friend LanesF32 operator/(LanesF32 a, LanesF32 b) {
    return each([&](int i) { return a.f32x8[i] / b.f32x8[i]; });
  }
  static LanesF32 multiply_add(LanesF32 value, LanesF32 factor, LanesF32 summand) {
    return each([&](int i) { return lowbit::multiply_add(value.f32x8[i], factor.f32x8[i], summand.f32x8[i]); });
  }
  static LanesF32 prelu(LanesF32 value, LanesF32 slope) {
    return each([&](int i) { return lowbit::prelu(value.f32x8[i], slope.f32x8[i]); });
  }
  static LanesF32 at_least(LanesF32 value, LanesF32 lowest) {
    return each([&](int i) { return lowbit::at_least(value.f32x8[i], lowest.f32x8[i]); });
  }
  static LanesF32 at_most(LanesF32 value, LanesF32 highest) {
    return each([&](int i) { return lowbit::at_most(value.f32x8[i], highest.f32x8[i]); });
  }
  static LanesF32 later_maximum(LanesF32 a, LanesF32 b) {
    return each([&](int i) { return lowbit::later_maximum(a.f32x8[i], b.f32x8[i]); });
  }

  static LanesF32 flips(const uint8_t* bytes, int64_t count) {
    return each([&](int i) { return static_cast<float>(bytes[i] != 0); }, count);
  }
  static uint64_t reached(LanesF32 value, LanesF32 limit, LanesF32 flip) {
    uint64_t bits = 0;
    for (int i = 0; i < kLanes; ++i) {
      bits |= uint64_t{lowbit::reached(value.f32x8[i], limit.f32x8[i], flip.f32x8[i] != 0)} << i;
    }
    return bits;
  }
};

}  // namespace
}  // namespace lowbit
