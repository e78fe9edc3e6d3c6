#include "cpu/quantized_activation/quantized_activation.h"

#include "../cpp/activation_values.h"
#include "tests.h"

namespace lowbit::test {
namespace {

template <class Value>
void check(Random& random, FloatType type) {
  const int64_t count = random.pick<int64_t>({0, random.size(640), random.between(1, 20000)});
  Buffer<Value> input(count, random_alignment(random)), output(count, random_alignment(random)), expected(count);
  for (int64_t i = 0; i < count; ++i) input[i] = static_cast<Value>(float_bits(activation_value(random), type));
  const bool with_mask = random.coin();
  Buffer<uint64_t> mask(with_mask ? words_for(count) : 0), expected_mask(mask.size());
  const Interval interval = random_interval(random);
  QuantizedActivationArgs args{input.data(),
                               type,
                               count,
                               random.pick({Activation::sign, Activation::step, Activation::ternary}),
                               interval.low,
                               interval.high,
                               interval.closed,
                               expected.data(),
                               with_mask ? expected_mask.data() : nullptr};
  scalar::quantized_activation(args, 0, words_for(count));
  args.output = output.data();
  args.mask = with_mask ? mask.data() : nullptr;
  const std::string what = std::to_string(count) + " of type " + std::to_string(static_cast<int>(type)) + ", levels " +
                           std::to_string(static_cast<int>(args.activation));
  expect_ok(what, cuda::quantized_activation(args, kStream));
  expect_same(what, output, expected);
  expect_same(what + ", mask", mask, expected_mask);
}

}  // namespace

LOWBIT_TEST(quantized_activation) {
  for (int i = 0; i < cases; ++i) {
    check<uint32_t>(random, FloatType::float32);
    check<uint16_t>(random, FloatType::bfloat16);
    check<uint16_t>(random, FloatType::float16);
  }
}

}  // namespace lowbit::test
