#include "cpu/group_dequantize/group_dequantize.h"

#include "../cpp/code_cases.h"
#include "tests.h"

namespace lowbit::test {
namespace {

template <class Value>
void check(Random& random, FloatType type) {
  const int64_t count = random.pick<int64_t>({0, random.size(640), random.between(1, 20000)});
  const int bits = random.pick({2, 4, 8});
  Buffer<uint8_t> codes(code_bytes(count, bits), random_alignment(random));
  fill_codes(codes, count, std::max<int64_t>(count, 1), bits, random);
  Buffer<uint16_t> scale_minimum(2 * ceil_div(count, kGroup), random_alignment(random));
  for (int64_t i = 0; i < scale_minimum.size(); ++i) {
    const float number = random.normal() * random.pick({1.0f, 1e37f, 1e38f, 1e-38f});
    scale_minimum[i] = float_to_bfloat16(i % 2 ? number : std::fabs(number));
  }
  Buffer<Value> output(count, random_alignment(random)), expected(count);
  GroupDequantizeArgs args{codes.data(), scale_minimum.data(), count, bits, expected.data(), type};
  scalar::group_dequantize(args, 0, ceil_div(count, kGroup));
  args.output = output.data();
  const std::string what = std::to_string(count) + " of type " + std::to_string(static_cast<int>(type)) + ", " +
                           std::to_string(bits) + " bits";
  expect_ok(what, cuda::group_dequantize(args, kStream));
  expect_same(what, output, expected);
}

}  // namespace

LOWBIT_TEST(group_dequantize) {
  for (int i = 0; i < cases; ++i) {
    check<uint32_t>(random, FloatType::float32);
    check<uint16_t>(random, FloatType::bfloat16);
    check<uint16_t>(random, FloatType::float16);
  }
}

}  // namespace lowbit::test
