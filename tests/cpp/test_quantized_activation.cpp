#include "activation_values.h"
#include "cpu/masked_gradient/masked_gradient.h"
#include "cpu/quantized_activation/quantized_activation.h"

namespace lowbit::test {
namespace {

template <class Value>
void check(Random& random, FloatType type) {
  const int64_t count = random.pick<int64_t>({0, random.size(640), random.between(1, 3000)});
  const Activation activation = random.pick({Activation::sign, Activation::step, Activation::ternary});
  const Interval interval = random_interval(random);
  Buffer<Value> input(count), output(count), pieced(count), gradient(count), masked(count);
  Buffer<uint64_t> mask(words_for(count)), pieced_mask(words_for(count));
  std::vector<Value> expected, expected_masked;
  std::vector<uint64_t> expected_mask(static_cast<size_t>(words_for(count)));
  for (int64_t i = 0; i < count; ++i) {
    input[i] = static_cast<Value>(float_bits(activation_value(random), type));
    gradient[i] = static_cast<Value>(random.bits());
    const float x = load_float(input.data(), type, i);
    const float level = activation == Activation::sign   ? (x >= 0 ? 1.0f : -1.0f)
                        : activation == Activation::step ? (x >= 0.5f ? 1.0f : 0.0f)
                        : x >= 0.75f                     ? 1.0f
                        : x >= 0.25f                     ? 0.5f
                                                         : 0.0f;
    const bool inside =
        interval.closed ? x >= interval.low && x <= interval.high : x > interval.low && x < interval.high;
    expected.push_back(static_cast<Value>(float_bits(level, type)));
    expected_masked.push_back(inside ? gradient[i] : Value{0});
    if (inside) set_bit(expected_mask.data(), i);
  }
  const std::string what = std::to_string(count) + " elements of type " + std::to_string(static_cast<int>(type)) +
                           ", levels " + std::to_string(static_cast<int>(activation));
  QuantizedActivationArgs args{input.data(),    type,          count,      activation, interval.low, interval.high,
                               interval.closed, output.data(), mask.data()};
  expect_ok(what, launch::quantized_activation(args));
  expect_same(what, output, expected);
  expect_same(what + ", mask", mask, expected_mask);
  args.output = pieced.data();
  args.mask = nullptr;
  in_pieces(words_for(count), random,
            [&](int64_t begin, int64_t end) { kernels().quantized_activation(args, begin, end); });
  expect_same(what + " in pieces", pieced, expected);

  MaskedGradientArgs backward{gradient.data(), type, count, mask.data(), masked.data()};
  expect_ok(what, launch::masked_gradient(backward));
  expect_same(what + ", gradient", masked, expected_masked);
  backward.output = pieced.data();
  in_pieces(words_for(count), random,
            [&](int64_t begin, int64_t end) { kernels().masked_gradient(backward, begin, end); });
  expect_same(what + ", gradient in pieces", pieced, expected_masked);
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
