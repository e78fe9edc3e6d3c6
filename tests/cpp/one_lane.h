// One lane for the generator of core/philox.h.
#pragma once

#include <cstdint>

#include "core/philox.h"

namespace lowbit::test {

struct OneLane {
  uint32_t value;
  static OneLane broadcast(uint32_t value) { return {value}; }
  static OneLane multiply(uint32_t a, OneLane b, OneLane& high) {
    high.value = static_cast<uint32_t>(uint64_t{a} * b.value >> 32);
    return {a * b.value};
  }
  friend OneLane operator^(OneLane a, OneLane b) { return {a.value ^ b.value}; }
};

}  // namespace lowbit::test
