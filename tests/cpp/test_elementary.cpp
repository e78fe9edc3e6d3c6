#include "core/elementary.h"

#include <cmath>

#include "common.h"

namespace lowbit::test {
namespace {

// Error of `got` in units in the last place of the double nearest to `exact`.
double error_in_ulps(double got, long double exact) {
  const double nearest = static_cast<double>(exact);
  const double ulp = std::nextafter(std::fabs(nearest), INFINITY) - std::fabs(nearest);
  return static_cast<double>(std::fabs(static_cast<long double>(got) - exact) / ulp);
}

}  // namespace

LOWBIT_TEST(elementary) {
  for (int i = 0; i < 20 * cases; ++i) {
    const double unit = static_cast<double>(random.bits() >> 11) * 0x1p-53;
    const double x = (unit - 0.5) * random.pick({1e-8, 1e-3, 1.0, 20.0, 1400.0});
    if (!(error_in_ulps(exp_double(x), std::exp(static_cast<long double>(x))) < 2)) {
      fail("exp(" + std::to_string(x) + ") is off by 2 units in the last place or more");
    }
    const double y = unit * random.pick({1e-300, 1e-17, 1e-3, 1.0});
    if (y > 0 && !(error_in_ulps(log1p_double(y), std::log1p(static_cast<long double>(y))) < 2)) {
      fail("log1p(" + std::to_string(y) + ") is off by 2 units in the last place or more");
    }
  }
  if (exp_double(0) != 1 || log1p_double(0) != 0) fail("exp(0) or log1p(0) is not exact");
}

}  // namespace lowbit::test
