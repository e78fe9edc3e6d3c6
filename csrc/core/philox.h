// Philox4x32-10, a counter-based generator: 128 random bits are a function of a 128-bit counter and a 64-bit key.
// Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
//
// The library's use of it: key = the seed, counter = {element index (64 bits), block, 0}. An element's draws are the
// outputs of blocks 0, 1, ... in order, so neither the instruction set nor the number of threads changes them.
#pragma once

#include <cstdint>

#include "core/inline.h"

namespace lowbit {

constexpr int kPhiloxRounds = 10;
constexpr int kPhiloxOutputs = 4;  // 32-bit words of one block
constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u, kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u, kPhiloxWeyl1 = 0xBB67AE85u;

// One block a lane. Lanes are 32-bit numbers and have operator^ and the static members `broadcast(uint32_t)` and
// `multiply(uint32_t, Lanes, Lanes& high) -> low`.
template <class Lanes>
LOWBIT_INLINE void philox(Lanes (&counter)[kPhiloxOutputs], uint64_t seed) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    Lanes high0, high1;
    const Lanes low0 = Lanes::multiply(kPhiloxMultiplier0, counter[0], high0);
    const Lanes low1 = Lanes::multiply(kPhiloxMultiplier1, counter[2], high1);
    counter[0] = high1 ^ counter[1] ^ Lanes::broadcast(key0);
    counter[2] = high0 ^ counter[3] ^ Lanes::broadcast(key1);
    counter[1] = low1;
    counter[3] = low0;
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
}

// A single lane.
struct OneLane {
  uint32_t value;
  LOWBIT_INLINE OneLane broadcast(uint32_t value) { return {value}; }
  LOWBIT_INLINE OneLane multiply(uint32_t a, OneLane b, OneLane& high) {
    const uint64_t product = uint64_t{a} * b.value;
    high = {static_cast<uint32_t>(product >> 32)};
    return {static_cast<uint32_t>(product)};
  }
};
LOWBIT_INLINE OneLane operator^(OneLane a, OneLane b) { return {a.value ^ b.value}; }

}  // namespace lowbit
