#include "common.h"
#include "cpu/unpack/unpack.h"

namespace lowbit::test {
namespace {

// Value: the bits of one output element.
template <class Value>
void check(Random& random, FloatType type) {
  const int64_t pixels = random.between(0, 40), channels = random.size(640);
  const int64_t row_words = words_for(channels);
  Buffer<uint64_t> words(pixels * row_words);
  fill_bits(words, channels, random);
  const float low = random.pick({-1.0f, 0.0f, random.normal()}), high = random.pick({1.0f, random.normal()});

  std::vector<Value> expected(static_cast<size_t>(pixels * channels));
  for (int64_t i = 0; i < pixels * channels; ++i) {
    const bool bit = bit_at(words.data() + i / channels * row_words, i % channels);
    expected[static_cast<size_t>(i)] = static_cast<Value>(float_bits(bit ? high : low, type));
  }

  Buffer<Value> launched(pixels * channels), pieced(pixels * channels);
  UnpackArgs args{words.data(), pixels, channels, low, high, launched.data(), type};
  const std::string what = std::to_string(pixels) + " pixels of " + std::to_string(channels) + " channels, type " +
                           std::to_string(static_cast<int>(type));
  expect_ok(what, launch::unpack(args));
  expect_same(what, launched, expected);
  args.output = pieced.data();
  in_pieces(pixels, random, [&](int64_t begin, int64_t end) { kernels().unpack(args, begin, end); });
  expect_same(what + " in pieces", pieced, expected);
}

}  // namespace

LOWBIT_TEST(unpack) {
  for (int i = 0; i < cases; ++i) {
    check<uint32_t>(random, FloatType::float32);
    check<uint16_t>(random, FloatType::bfloat16);
    check<uint16_t>(random, FloatType::float16);
  }
}

}  // namespace lowbit::test
