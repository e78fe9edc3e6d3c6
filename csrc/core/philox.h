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

// One block. Word is uint32_t or a vector of lanes that has operator^ and the static members `broadcast(uint32_t)` and
// `multiply(uint32_t, Word, Word& high) -> low`.
template <class Word>
LOWBIT_INLINE void philox(Word (&counter)[kPhiloxOutputs], uint64_t seed) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    Word high0, high1;
    const Word low0 = Word::multiply(kPhiloxMultiplier0, counter[0], high0);
    const Word low1 = Word::multiply(kPhiloxMultiplier1, counter[2], high1);
    counter[0] = high1 ^ counter[1] ^ Word::broadcast(key0);
    counter[2] = high0 ^ counter[3] ^ Word::broadcast(key1);
    counter[1] = low1;
    counter[3] = low0;
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
}

}  // namespace lowbit
