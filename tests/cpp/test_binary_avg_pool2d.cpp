#include <algorithm>

#include "pool_shapes.h"

namespace lowbit::test {

LOWBIT_TEST(binary_avg_pool2d) {
  for (int i = 0; i < cases; ++i) {
    const PoolShape s = random_pool_shape(random, 1);
    const int64_t row_words = words_for(s.channels);
    Buffer<uint64_t> input(s.batch * s.height * s.width * row_words);
    fill_bits(input, s.channels, random);
    BinaryAvgPool2dArgs args{};
    args.shape = s;
    args.encoding = random.pick({Encoding::sign, Encoding::step});
    args.count_include_pad = random.coin();
    args.divisor_override = random.coin() ? random.between(1, 20) : 0;
    args.input = input.data();

    const int64_t out_count = s.batch * s.out_height * s.out_width * s.channels;
    std::vector<float> expected(static_cast<size_t>(out_count));
    for (int64_t out = 0; out < out_count; ++out) {
      const int64_t c = out % s.channels, x = out / s.channels % s.out_width;
      const int64_t y = out / s.channels / s.out_width % s.out_height;
      const int64_t n = out / s.channels / s.out_width / s.out_height;
      const int64_t top = y * s.stride_height - s.pad_top, left = x * s.stride_width - s.pad_left;
      // The padding below and to the right is as wide as that above and to the left; ceil_mode goes no further.
      const int64_t bottom = std::min(top + s.kernel_height, s.height + s.pad_top);
      const int64_t right = std::min(left + s.kernel_width, s.width + s.pad_left);
      int sum = 0, taps = 0;
      for (int64_t row = std::max<int64_t>(top, 0); row < std::min(bottom, s.height); ++row) {
        for (int64_t column = std::max<int64_t>(left, 0); column < std::min(right, s.width); ++column) {
          const bool bit = bit_at(input.data() + ((n * s.height + row) * s.width + column) * row_words, c);
          sum += bit ? 1 : args.encoding == Encoding::sign ? -1 : 0;
          ++taps;
        }
      }
      int64_t divisor = args.count_include_pad ? (bottom - top) * (right - left) : taps;
      if (args.divisor_override > 0) divisor = args.divisor_override;
      expected[static_cast<size_t>(out)] = taps == 0 ? 0.0f : static_cast<float>(sum) / static_cast<float>(divisor);
    }

    Buffer<float> launched(out_count), pieced(out_count);
    args.output = launched.data();
    expect_ok(describe(s), launch::binary_avg_pool2d(args));
    expect_same(describe(s), launched, expected);
    args.output = pieced.data();
    in_pieces(s.batch * s.out_height, random,
              [&](int64_t begin, int64_t end) { kernels().binary_avg_pool2d(args, begin, end); });
    expect_same(describe(s) + " in pieces", pieced, expected);
  }
}

}  // namespace lowbit::test
