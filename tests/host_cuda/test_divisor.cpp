#include "core/divisor.h"

#include "tests.h"

namespace lowbit::test {

LOWBIT_TEST(divisor) {
  constexpr int64_t kLargest = INT64_MAX;
  for (int i = 0; i < 100 * cases; ++i) {
    const int64_t divisor = 1 + static_cast<int64_t>(random.bits() >> random.between(3, 63));
    const Divisor by = make_divisor(divisor);
    const int64_t any = static_cast<int64_t>(random.bits() >> random.between(1, 63));
    for (const int64_t value : {int64_t{0}, divisor - 1, divisor, any, any / divisor * divisor, kLargest,
                                kLargest / divisor * divisor, kLargest / divisor * divisor - 1}) {
      const Division got = divide_with_remainder(value, by);
      if (got.quotient == value / divisor && got.remainder == value % divisor) continue;
      return fail(std::to_string(value) + " / " + std::to_string(divisor) + " is " + std::to_string(got.quotient) +
                  " rest " + std::to_string(got.remainder));
    }
  }
}

}  // namespace lowbit::test
