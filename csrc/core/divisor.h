// Division by a number that is known before a kernel starts: a multiplication and a shift.
// Granlund and Montgomery, "Division by Invariant Integers using Multiplication", PLDI 1994, theorem 4.2.
#pragma once

#include "core/layout.h"

namespace lowbit {

struct Divisor {
  uint64_t divisor;
  uint64_t multiplier;  // ceil(2^(63 + shift) / divisor)
  int shift;            // ceil(log2(divisor))
};

// 0 < divisor < 2^62.
static inline Divisor make_divisor(int64_t divisor) {
  const uint64_t d = static_cast<uint64_t>(divisor);
  int shift = 0;
  while ((uint64_t{1} << shift) < d) ++shift;
  const unsigned __int128 numerator = static_cast<unsigned __int128>(1) << (63 + shift);
  return {d, static_cast<uint64_t>((numerator + d - 1) / d), shift};
}

// value / divisor for 0 <= value < 2^63.
LOWBIT_INLINE int64_t divide(int64_t value, const Divisor& by) {
  const uint64_t twice = static_cast<uint64_t>(value) << 1;
#if defined(__CUDA_ARCH__)
  const uint64_t high = __umul64hi(twice, by.multiplier);
#else
  const uint64_t high = static_cast<uint64_t>((static_cast<unsigned __int128>(twice) * by.multiplier) >> 64);
#endif
  return static_cast<int64_t>(high >> by.shift);
}

struct Division {
  int64_t quotient, remainder;
};

LOWBIT_INLINE Division divide_with_remainder(int64_t value, const Divisor& by) {
  const int64_t quotient = divide(value, by);
  return {quotient, value - quotient * static_cast<int64_t>(by.divisor)};
}

}  // namespace lowbit
