// exp and log1p in double precision from additions, multiplications, divisions and integer operations alone, each
// rounded on its own: every compiler, instruction set and device gives the same bits, which no mathematics library
// promises. Branch-free, so that loops over them vectorise. Errors below 2 units in the last place (tests/cpp).
#pragma once

#include <cstdint>
#include <cstring>

#include "core/inline.h"

namespace lowbit {

// exp(x) for |x| <= 700.
LOWBIT_INLINE double exp_double(double x) {
  constexpr double kLog2E = 0x1.71547652b82fep+0;
  constexpr double kLn2High = 0x1.62e42fefa3800p-1, kLn2Low = 0x1.ef35793c76730p-45;  // the high part times k is exact
  constexpr double kRound = 0x1.8p52;  // adding it leaves the nearest integer in the low bits
  const double shifted = x * kLog2E + kRound;
  const double k = shifted - kRound;
  const double r = (x - k * kLn2High) - k * kLn2Low;  // |r| <= ln(2) / 2: 14 Taylor terms leave 2^-57
  double sum = 1.0 / 6227020800.0;
  sum = sum * r + 1.0 / 479001600.0;
  sum = sum * r + 1.0 / 39916800.0;
  sum = sum * r + 1.0 / 3628800.0;
  sum = sum * r + 1.0 / 362880.0;
  sum = sum * r + 1.0 / 40320.0;
  sum = sum * r + 1.0 / 5040.0;
  sum = sum * r + 1.0 / 720.0;
  sum = sum * r + 1.0 / 120.0;
  sum = sum * r + 1.0 / 24.0;
  sum = sum * r + 1.0 / 6.0;
  sum = sum * r + 0.5;
  sum = sum * r + 1.0;
  sum = sum * r + 1.0;
  uint64_t bits;
  memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 1023) << 52;  // 2^k
  double scale;
  memcpy(&scale, &bits, sizeof scale);
  return sum * scale;
}

// log(1 + x) for 0 <= x <= 1, as 2 atanh(x / (2 + x)); its argument is at most 1/3, where 17 terms leave 2^-58.
LOWBIT_INLINE double log1p_double(double x) {
  const double s = x / (2.0 + x);
  const double t = s * s;
  double sum = 1.0 / 33.0;
  sum = sum * t + 1.0 / 31.0;
  sum = sum * t + 1.0 / 29.0;
  sum = sum * t + 1.0 / 27.0;
  sum = sum * t + 1.0 / 25.0;
  sum = sum * t + 1.0 / 23.0;
  sum = sum * t + 1.0 / 21.0;
  sum = sum * t + 1.0 / 19.0;
  sum = sum * t + 1.0 / 17.0;
  sum = sum * t + 1.0 / 15.0;
  sum = sum * t + 1.0 / 13.0;
  sum = sum * t + 1.0 / 11.0;
  sum = sum * t + 1.0 / 9.0;
  sum = sum * t + 1.0 / 7.0;
  sum = sum * t + 1.0 / 5.0;
  sum = sum * t + 1.0 / 3.0;
  return 2.0 * (s + s * (sum * t));
}

}  // namespace lowbit
