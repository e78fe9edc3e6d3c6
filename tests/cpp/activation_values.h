// Random values and intervals for the tests of quantized_activation.
#pragma once

#include <cmath>

#include "common.h"

namespace lowbit::test {

struct Interval {
  float low, high;
  bool closed;
};

// A number, or one of those next to the thresholds and the interval's ends, or something special.
inline float activation_value(Random& random) {
  if (random.coin()) return random.normal();
  const float point =
      random.pick({-1.0f, -0.5f, -0.0f, 0.0f, 0.25f, 0.5f, 0.75f, 1.0f, NAN, -NAN, INFINITY, -INFINITY});
  const float direction = random.pick({-INFINITY, INFINITY});
  return random.coin() ? point : std::nextafter(point, direction);
}

inline Interval random_interval(Random& random) {
  return random.pick<Interval>({{-1, 1, true}, {-0.5f, 0.5f, true}, {0, 1, false}, {0.25f, 0.75f, false}});
}

}  // namespace lowbit::test
