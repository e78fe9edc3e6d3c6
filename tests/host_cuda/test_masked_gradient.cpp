#include "cpu/masked_gradient/masked_gradient.h"

#include "tests.h"

namespace lowbit::test {
namespace {

template <class Value>
void check(Random& random, FloatType type) {
  const int64_t count = random.pick<int64_t>({0, random.size(640), random.between(1, 20000)});
  Buffer<Value> gradient(count, random_alignment(random)), output(count, random_alignment(random)), expected(count);
  for (int64_t i = 0; i < count; ++i) gradient[i] = static_cast<Value>(random.bits());
  Buffer<uint64_t> mask(words_for(count));
  fill_bits(mask, count, random);
  MaskedGradientArgs args{gradient.data(), type, count, mask.data(), expected.data()};
  scalar::masked_gradient(args, 0, words_for(count));
  args.output = output.data();
  const std::string what = std::to_string(count) + " of type " + std::to_string(static_cast<int>(type));
  expect_ok(what, cuda::masked_gradient(args, kStream));
  expect_same(what, output, expected);
}

}  // namespace

LOWBIT_TEST(masked_gradient) {
  for (int i = 0; i < cases; ++i) {
    check<uint32_t>(random, FloatType::float32);
    check<uint16_t>(random, FloatType::bfloat16);
    check<uint16_t>(random, FloatType::float16);
  }
}

}  // namespace lowbit::test
