#include "../cpp/pointwise_case.h"
#include "tests.h"

namespace lowbit::test {

LOWBIT_TEST(pointwise) {
  for (int i = 0; i < cases; ++i) {
    PointwiseCase one(random);
    expect_ok(one.what(), cuda::pointwise(one.args(), kStream));
    one.after().expect(one.what());
  }
}

}  // namespace lowbit::test
