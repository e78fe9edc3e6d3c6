#include "cpu/unpack/unpack.h"

#include "tests.h"

namespace lowbit::test {
namespace {

template <class Value>
void check(Random& random, FloatType type) {
  const int64_t pixels = random.between(0, 200), channels = random.size(640);
  Buffer<uint64_t> words(pixels * words_for(channels), random_alignment(random));
  fill_bits(words, channels, random);
  Buffer<Value> got(pixels * channels, random_alignment(random)), expected(pixels * channels);
  UnpackArgs args{words.data(), pixels, channels, random.normal(), random.normal(), expected.data(), type};
  scalar::unpack(args, 0, pixels);
  args.output = got.data();
  const std::string what = std::to_string(pixels) + " pixels of " + std::to_string(channels) + " channels, type " +
                           std::to_string(static_cast<int>(type));
  expect_ok(what, cuda::unpack(args, kStream));
  expect_same(what, got, expected);
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
