#include "cpu/group_quantize/group_quantize.h"

#include "../cpp/code_cases.h"
#include "tests.h"

namespace lowbit::test {
namespace {

template <class Value>
void check(Random& random, FloatType type) {
  const int64_t count = random.pick<int64_t>({0, random.size(640), random.between(1, 20000)});
  const int bits = random.pick({2, 4, 8});
  const bool positive = random.coin(), stochastic = random.coin();
  Buffer<Value> input(count, random_alignment(random));
  const bool extreme = random.between(0, 3) == 0;
  for (int64_t i = 0; i < count; ++i) {
    const float usual = random.between(0, 400) ? random.normal() : code_value(random);
    const float number = extreme ? extreme_value(random, type) : usual;
    input[i] = static_cast<Value>(float_bits(number, type));
  }
  Buffer<uint8_t> codes(code_bytes(count, bits), random_alignment(random)), expected(codes.size());
  Buffer<uint16_t> scale_minimum(2 * ceil_div(count, kGroup), random_alignment(random)),
      expected_scale(scale_minimum.size());
  GroupQuantizeArgs args{
      input.data(),         type, count, bits, positive, stochastic, random.bits(), random.bits(), expected.data(),
      expected_scale.data()};
  scalar::group_quantize(args, 0, ceil_div(count, kGroup));
  args.codes = codes.data();
  args.scale_minimum = scale_minimum.data();
  const std::string what = std::to_string(count) + " of type " + std::to_string(static_cast<int>(type)) + ", " +
                           std::to_string(bits) + " bits" + (positive ? ", positive" : "") +
                           (stochastic ? ", stochastic" : "");
  expect_ok(what, cuda::group_quantize(args, kStream));
  expect_same(what, codes, expected);
  expect_same(what + ", scale and minimum", scale_minimum, expected_scale);
}

}  // namespace

LOWBIT_TEST(group_quantize) {
  for (int i = 0; i < cases; ++i) {
    check<uint32_t>(random, FloatType::float32);
    check<uint16_t>(random, FloatType::bfloat16);
    check<uint16_t>(random, FloatType::float16);
  }
}

}  // namespace lowbit::test
