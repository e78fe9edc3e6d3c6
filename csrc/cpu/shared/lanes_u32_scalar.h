// Eight in short loops that the compiler may turn into baseline vectors.
#pragma once

#include <cstdint>

namespace lowbit {
namespace {

struct LanesU32 {
  static constexpr int kLanes = 8;
  uint32_t u32x8[kLanes];

  template <class Value>
  static LanesU32 each(Value value) {
    LanesU32 result;
    for (int i = 0; i < kLanes; ++i) result.u32x8[i] = value(i);
    return result;
  }
  static LanesU32 load(const uint32_t* values) {
    return each([&](int i) { return values[i]; });
  }
  void store(uint32_t* values) const {
    for (int i = 0; i < kLanes; ++i) values[i] = u32x8[i];
  }
  static LanesU32 broadcast(uint32_t value) {
    return each([&](int) { return value; });
  }
  static LanesU32 min(LanesU32 a, LanesU32 b) {
    return each([&](int i) { return a.u32x8[i] < b.u32x8[i] ? a.u32x8[i] : b.u32x8[i]; });
  }
  static LanesU32 max(LanesU32 a, LanesU32 b) {
    return each([&](int i) { return a.u32x8[i] < b.u32x8[i] ? b.u32x8[i] : a.u32x8[i]; });
  }
  static LanesU32 multiply(uint32_t a, LanesU32 b, LanesU32& high) {
    high = each([&](int i) { return static_cast<uint32_t>(uint64_t{a} * b.u32x8[i] >> 32); });
    return each([&](int i) { return a * b.u32x8[i]; });
  }
  static LanesU32 greater(LanesU32 a, LanesU32 b, uint32_t bit) {
    return each([&](int i) { return a.u32x8[i] > b.u32x8[i] ? bit : 0u; });
  }
  static uint32_t greater(LanesU32 a, LanesU32 b) {
    uint32_t bits = 0;
    for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(a.u32x8[i] > b.u32x8[i]) << i;
    return bits;
  }
  friend LanesU32 operator^(LanesU32 a, LanesU32 b) {
    return each([&](int i) { return a.u32x8[i] ^ b.u32x8[i]; });
  }
  friend LanesU32 operator+(LanesU32 a, LanesU32 b) {
    return each([&](int i) { return a.u32x8[i] + b.u32x8[i]; });
  }
  friend LanesU32 operator-(LanesU32 a, LanesU32 b) {
    return each([&](int i) { return a.u32x8[i] - b.u32x8[i]; });
  }
};

}  // namespace
}  // namespace lowbit
