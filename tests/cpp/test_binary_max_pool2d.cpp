#include "pool_shapes.h"

namespace lowbit::test {

LOWBIT_TEST(binary_max_pool2d) {
  for (int i = 0; i < cases; ++i) {
    const PoolShape s = random_pool_shape(random, 3);
    const int64_t row_words = words_for(s.channels);
    Buffer<uint64_t> input(s.batch * s.height * s.width * row_words), invert(row_words);
    fill_bits(input, s.channels, random);
    fill_bits(invert, s.channels, random);
    BinaryMaxPool2dArgs args{s, input.data(), random.coin() ? invert.data() : nullptr, nullptr};

    const int64_t out_words = s.batch * s.out_height * s.out_width * row_words;
    std::vector<uint64_t> expected(static_cast<size_t>(out_words));
    for (int64_t out = 0; out < out_words; ++out) {
      const int64_t word = out % row_words, x = out / row_words % s.out_width;
      const int64_t y = out / row_words / s.out_width % s.out_height, n = out / row_words / s.out_width / s.out_height;
      const uint64_t inverted = args.invert ? args.invert[word] : 0;
      uint64_t bits = 0;
      for (int64_t ky = 0; ky < s.kernel_height; ++ky) {
        for (int64_t kx = 0; kx < s.kernel_width; ++kx) {
          const int64_t row = y * s.stride_height - s.pad_top + ky * s.dilation_height;
          const int64_t column = x * s.stride_width - s.pad_left + kx * s.dilation_width;
          if (row < 0 || row >= s.height || column < 0 || column >= s.width) continue;
          bits |= input[((n * s.height + row) * s.width + column) * row_words + word] ^ inverted;
        }
      }
      expected[static_cast<size_t>(out)] = bits ^ inverted;
    }

    Buffer<uint64_t> launched(out_words), pieced(out_words);
    args.output = launched.data();
    expect_ok(describe(s), launch::binary_max_pool2d(args));
    expect_same(describe(s), launched, expected);
    args.output = pieced.data();
    in_pieces(s.batch * s.out_height, random,
              [&](int64_t begin, int64_t end) { kernels().binary_max_pool2d(args, begin, end); });
    expect_same(describe(s) + " in pieces", pieced, expected);
  }
}

}  // namespace lowbit::test
