// Random values for the tests of binarize.
#pragma once

#include <cmath>
#include <limits>

#include "common.h"

namespace lowbit::test {

// Mostly near the thresholds that decide, sometimes at the ends of the number line.
inline float binarize_value(Random& random) {
  using Limits = std::numeric_limits<float>;
  const float infinity = Limits::infinity(), tiny = Limits::denorm_min();
  switch (random.between(0, 9)) {
    case 0:
      return random.pick({Limits::quiet_NaN(), -Limits::quiet_NaN(), infinity, -infinity, Limits::max()});
    case 1:
      return random.pick({0.0f, -0.0f, tiny, -tiny, Limits::min(), 0x1p-130f, -0x1p-130f});
    case 2:
      return random.pick({1.0f, -1.0f, 0.5f, std::nextafter(1.0f, 2.0f), std::nextafter(1.0f, 0.0f)});
    default:
      return random.normal();
  }
}

}  // namespace lowbit::test
