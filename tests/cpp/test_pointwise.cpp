// Programs before and after windows of every kind, bit for bit.
#include "pointwise_case.h"

namespace lowbit::test {

LOWBIT_TEST(pointwise) {
  for (int i = 0; i < cases; ++i) {
    PointwiseCase one(random);
    const PointwiseArgs& args = one.args();
    expect_ok(one.what(), launch::pointwise(args));
    one.after().expect(one.what());
    one.after().reset();
    in_pieces(pointwise_items(args), random,
              [&](int64_t begin, int64_t end) { kernels().pointwise(args, begin, end); });
    one.after().expect(one.what() + " in pieces");
  }
}

}  // namespace lowbit::test
