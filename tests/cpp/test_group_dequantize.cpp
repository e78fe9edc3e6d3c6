#include "code_cases.h"
#include "cpu/group_dequantize/group_dequantize.h"

namespace lowbit::test {
namespace {

template <class Value>
void check(Random& random, FloatType type) {
  const int64_t count = random.pick<int64_t>({0, random.size(640), random.between(1, 3000)});
  const int bits = random.pick({2, 4, 8});
  const std::string what = std::to_string(count) + " of type " + std::to_string(static_cast<int>(type)) + ", " +
                           std::to_string(bits) + " bits";
  const int64_t length = std::max<int64_t>(count, 1);
  Buffer<uint8_t> codes(code_bytes(count, bits));
  fill_codes(codes, count, length, bits, random);
  Buffer<uint16_t> scale_minimum(2 * ceil_div(count, 256));
  for (int64_t i = 0; i < scale_minimum.size(); ++i) {
    const float number = random.normal() * random.pick({1.0f, 1e-6f, 1e4f, 1e37f, 1e-38f});
    scale_minimum[i] = float_to_bfloat16(i % 2 ? number : std::fabs(number));
    if (random.between(0, 15) == 0) scale_minimum[i] = i % 2 ? 0xff7f : 0x7f7f;  // the greatest, of opposite signs
  }
  Buffer<Value> output(count), pieced(count);
  std::vector<Value> expected;
  const CodeRows row(length, bits);
  for (int64_t i = 0; i < count; ++i) {
    const double scale = static_cast<double>(bfloat16_to_float(scale_minimum[i / 256 * 2]));
    const double minimum = static_cast<double>(bfloat16_to_float(scale_minimum[i / 256 * 2 + 1]));
    const double number = row.get(codes.data(), i) * scale + minimum;
    expected.push_back(static_cast<Value>(float_bits(static_cast<float>(number), type)));
  }
  GroupDequantizeArgs args{codes.data(), scale_minimum.data(), count, bits, output.data(), type};
  expect_ok(what, launch::group_dequantize(args));
  expect_same(what, output, expected);
  args.output = pieced.data();
  in_pieces(ceil_div(count, 256), random,
            [&](int64_t begin, int64_t end) { kernels().group_dequantize(args, begin, end); });
  expect_same(what + " in pieces", pieced, expected);
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
