// xor + population count + add on 64-bit words. The baseline has no popcount instruction: ones are summed in fields of
// 2, 4 and 8 bits, and a multiplication sums the 8 bytes.
#include "cpu/popcount_peak/popcount_peak.h"

namespace lowbit::scalar {
namespace {

inline uint64_t popcount(uint64_t bits) {
  bits -= (bits >> 1) & 0x5555555555555555;
  bits = (bits & 0x3333333333333333) + ((bits >> 2) & 0x3333333333333333);
  bits = (bits + (bits >> 4)) & 0x0f0f0f0f0f0f0f0f;
  return (bits * 0x0101010101010101) >> 56;
}

}  // namespace

int64_t popcount_peak(int64_t iterations) noexcept {
  constexpr int kWeights = 4;
  const uint64_t weight[kWeights] = {0x0123456789abcdef, 0x00ff00ff00ff00ff, 0x3333333333333333, 0x5555555555555555};
  uint64_t ones[kWeights] = {};
  uint64_t activation = 0;
  for (int64_t i = 0; i < iterations; ++i) {
    // Unknown to the compiler from here on, so that nothing leaves the loop.
    __asm__ volatile("" : "+r"(activation));
    for (int w = 0; w < kWeights; ++w) ones[w] += popcount(activation ^ weight[w]);
  }
  for (uint64_t& sum : ones) __asm__ volatile("" : "+r"(sum));
  return iterations * kWeights * kWordBits * 2;
}

}  // namespace lowbit::scalar
