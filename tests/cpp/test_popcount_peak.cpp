#include "common.h"
#include "cpu/popcount_peak/popcount_peak.h"

namespace lowbit::test {

// Only what a rate needs: the count of operations grows with the iterations.
LOWBIT_TEST(popcount_peak) {
  const int64_t iterations = random.between(1, 1000);
  const int64_t once = kernels().popcount_peak(iterations), twice = kernels().popcount_peak(2 * iterations);
  if (once <= 0 || twice != 2 * once) fail("operations do not follow iterations");
}

}  // namespace lowbit::test
