#include "../cpp/pool_shapes.h"
#include "cpu/binary_avg_pool2d/binary_avg_pool2d.h"
#include "tests.h"

namespace lowbit::test {

LOWBIT_TEST(binary_avg_pool2d) {
  for (int i = 0; i < cases; ++i) {
    PoolShape s = random_pool_shape(random, 1);
    if (random.between(0, 9) == 0) {  // a window of more taps than a byte counts
      s.kernel_height = s.height = s.kernel_width = s.width = 17;
      s.pad_top = s.pad_left = 0;
      s.out_height = s.out_width = 1;
    }
    Buffer<uint64_t> input(s.batch * s.height * s.width * words_for(s.channels));
    fill_bits(input, s.channels, random);
    Buffer<float> got(s.batch * s.out_height * s.out_width * s.channels, random_alignment(random));
    Buffer<float> expected(got.size());
    BinaryAvgPool2dArgs args{s,
                             random.pick({Encoding::sign, Encoding::step}),
                             random.coin(),
                             random.coin() ? 0 : random.between(1, 20),
                             input.data(),
                             expected.data()};
    scalar::binary_avg_pool2d(args, 0, s.batch * s.out_height);
    args.output = got.data();
    expect_ok(describe(s), cuda::binary_avg_pool2d(args, kStream));
    expect_same(describe(s), got, expected);
  }
}

}  // namespace lowbit::test
