#include "../cpp/pool_shapes.h"
#include "cpu/binary_max_pool2d/binary_max_pool2d.h"
#include "tests.h"

namespace lowbit::test {

LOWBIT_TEST(binary_max_pool2d) {
  for (int i = 0; i < cases; ++i) {
    const PoolShape s = random_pool_shape(random, 3);
    const int64_t row_words = words_for(s.channels);
    Buffer<uint64_t> input(s.batch * s.height * s.width * row_words, random_alignment(random)), invert(row_words);
    fill_bits(input, s.channels, random);
    fill_bits(invert, s.channels, random);
    Buffer<uint64_t> got(s.batch * s.out_height * s.out_width * row_words, random_alignment(random));
    Buffer<uint64_t> expected(got.size());
    BinaryMaxPool2dArgs args{s, input.data(), random.coin() ? invert.data() : nullptr, expected.data()};
    scalar::binary_max_pool2d(args, 0, s.batch * s.out_height);
    args.output = got.data();
    expect_ok(describe(s), cuda::binary_max_pool2d(args, kStream));
    expect_same(describe(s), got, expected);
  }
}

}  // namespace lowbit::test
