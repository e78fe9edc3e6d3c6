// Eight 32-bit lanes in short loops that the compiler may turn into baseline vectors. What the sampler
// (antithetic_sample/sampler.h) and the generator (core/philox.h) want of a vector.
#pragma once

#include <cstdint>

namespace lowbit {
namespace {

struct Word {
  static constexpr int kLanes = 8;
  uint32_t lanes[kLanes];

  template <class Value>
  static Word each(Value value) {
    Word result;
    for (int i = 0; i < kLanes; ++i) result.lanes[i] = value(i);
    return result;
  }
  static Word load(const uint32_t* values) {
    return each([&](int i) { return values[i]; });
  }
  void store(uint32_t* values) const {
    for (int i = 0; i < kLanes; ++i) values[i] = lanes[i];
  }
  static Word broadcast(uint32_t value) {
    return each([&](int) { return value; });
  }
  static Word min(Word a, Word b) {
    return each([&](int i) { return a.lanes[i] < b.lanes[i] ? a.lanes[i] : b.lanes[i]; });
  }
  static Word max(Word a, Word b) {
    return each([&](int i) { return a.lanes[i] < b.lanes[i] ? b.lanes[i] : a.lanes[i]; });
  }
  static Word multiply(uint32_t a, Word b, Word& high) {
    high = each([&](int i) { return static_cast<uint32_t>(uint64_t{a} * b.lanes[i] >> 32); });
    return each([&](int i) { return a * b.lanes[i]; });
  }
  static Word greater(Word a, Word b, uint32_t bit) {
    return each([&](int i) { return a.lanes[i] > b.lanes[i] ? bit : 0u; });
  }
  static uint32_t greater(Word a, Word b) {
    uint32_t bits = 0;
    for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(a.lanes[i] > b.lanes[i]) << i;
    return bits;
  }
  friend Word operator^(Word a, Word b) {
    return each([&](int i) { return a.lanes[i] ^ b.lanes[i]; });
  }
  friend Word operator+(Word a, Word b) {
    return each([&](int i) { return a.lanes[i] + b.lanes[i]; });
  }
  friend Word operator-(Word a, Word b) {
    return each([&](int i) { return a.lanes[i] - b.lanes[i]; });
  }
};

}  // namespace
}  // namespace lowbit
