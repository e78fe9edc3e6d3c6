#include "code_cases.h"
#include "core/philox.h"
#include "cpu/group_quantize/group_quantize.h"

namespace lowbit::test {
namespace {

// Of element `index`: sixteen bits of its philox block.
float threshold_of(uint64_t seed, uint64_t offset, int64_t index) {
  const uint64_t block = offset + static_cast<uint64_t>(index / 256 * 16 + index % 16);
  OneLane words[4] = {{static_cast<uint32_t>(block)}, {static_cast<uint32_t>(block >> 32)}, {0}, {0}};
  philox(words, seed);
  const int64_t slot = index % 256 / 16;
  const uint64_t twice = uint64_t{words[slot / 4].value} << 32 | words[slot / 4].value;
  return (static_cast<float>(twice >> 8 * (slot % 4) & 0xffff) + 0.5f) / 65536.0f;
}

double value_of(uint16_t bfloat16) { return static_cast<double>(bfloat16_to_float(bfloat16)); }
bool is_infinite(double value, FloatType type) {
  const uint32_t bits = float_bits(static_cast<float>(value), type);
  return std::isinf(load_float(&bits, type, 0));
}
// The next bfloat16 towards 0, and below one that is not 0.
uint16_t smaller(uint16_t bfloat16) { return static_cast<uint16_t>(bfloat16 - 1); }
uint16_t next_below(uint16_t bfloat16) {
  return static_cast<uint16_t>(bfloat16 & 0x8000 ? bfloat16 + 1 : bfloat16 - 1);
}

// Scale and minimum of a group, and the unit of its codes, from the words of core/codes.h.
struct ExpectedScale {
  uint16_t scale = 0, minimum = 0;
  double unit = 1;

  ExpectedScale(float low, float high, int last, FloatType type, bool positive) {
    if (!positive && low <= high) {
      minimum = float_to_bfloat16(low + 0.0f);
      if (value_of(minimum) > static_cast<double>(low)) minimum = next_below(minimum);
      if (!std::isinf(low) && is_infinite(value_of(minimum), type)) minimum = smaller(minimum);
    }
    const double extent = static_cast<double>(high) - value_of(minimum);
    if (!(extent > 0)) return;
    if (extent > static_cast<double>(kGreatestFloat)) unit = 0x1p-24;
    // Of floats, but in a range without ends.
    const double step = static_cast<double>(static_cast<float>(extent * unit) / static_cast<float>(last)) / unit;
    const uint16_t nearest = std::min<uint16_t>(float_to_bfloat16(static_cast<float>(step)), 0x7f7f);
    scale = std::max<uint16_t>(nearest, 2) - 1;
    while (scale < 0x7f7f && value_of(scale) < step) scale = static_cast<uint16_t>(scale + 1);
    const double top = value_of(minimum) + last * value_of(scale);
    if (!std::isinf(high) && top > 0 && is_infinite(top, type)) scale = smaller(scale);
    if (value_of(scale) < 0x1p-126) unit = 0x1p24;
  }
};

// Codes decode to what core/codes.h says of finite and infinite elements, and finite ones to near themselves.
template <class Value>
void check_values(const std::string& what, const GroupQuantizeArgs& args) {
  Buffer<Value> output(args.count);
  expect_ok(what, launch::group_dequantize(
                      {args.codes, args.scale_minimum, args.count, args.bits, output.data(), args.type}));
  const float last = static_cast<float>((1 << args.bits) - 1);
  for (int64_t i = 0; i < args.count; ++i) {
    const float x = load_float(args.input, args.type, i), value = load_float(output.data(), args.type, i);
    const float scale = bfloat16_to_float(args.scale_minimum[i / kGroup * 2]);
    const float minimum = bfloat16_to_float(args.scale_minimum[i / kGroup * 2 + 1]);
    if (minimum == -INFINITY ? value != minimum : std::isinf(x) && x > 0 && value != x) {
      return fail(what + ": an infinite element decodes to " + std::to_string(value));
    }
    if (args.positive && !(x > 0) && value != 0) return fail(what + ": code 0 is not 0");
    if (args.positive && x > 0 && !(value > 0)) return fail(what + ": a positive element decodes to 0");
    if (!std::isfinite(x) || std::isinf(minimum) || bfloat16_to_float(0x7f7f) == scale) continue;
    if (!std::isfinite(value)) return fail(what + ": " + std::to_string(x) + " decodes to infinity");
    // Half a step, a whole one of stochastic rounding; what is cut off at the end of the type's range.
    const bool at_end = std::max(std::fabs(minimum), std::fabs(minimum + last * scale)) > 0.98f * greatest(args.type);
    const double cut = at_end ? static_cast<double>(last) * 0x1p-7 : 0.0;
    const double steps = (args.positive || args.stochastic ? 1.0 : 0.5) + cut;
    const double rounding = std::fabs(static_cast<double>(value)) * 0x1p-8 + 6e-8;
    const double least = args.positive ? 0.0 : -INFINITY;
    const double error = std::fabs(static_cast<double>(value) - std::max(static_cast<double>(x), least));
    if (error > steps * static_cast<double>(scale) + rounding) {
      return fail(what + ": " + std::to_string(x) + " decodes to " + std::to_string(value));
    }
  }
}

template <class Value>
void check(Random& random, FloatType type) {
  const int64_t count = random.pick<int64_t>({0, random.size(640), random.between(1, 3000)});
  const int bits = random.pick({2, 4, 8});
  const bool positive = random.coin(), stochastic = random.coin();
  // The blocks' numbers may pass 2^32.
  const uint64_t seed = random.bits(), offset = random.pick<uint64_t>({0, 0xffffffffu - 70, random.bits()});
  const float width = random.pick({1.0f, 100.0f, 1e-6f, 0.0f}), centre = random.pick({0.0f, 3.0f, -100.0f});
  Buffer<Value> input(count);
  const bool extreme = random.between(0, 3) == 0;
  const float factor = random.pick({1.0f, 1.0f, 1e-3f, 1e-30f});
  for (int64_t i = 0; i < count; ++i) {
    float number = random.between(0, 400) ? centre + width * random.normal() : code_value(random);
    if (extreme) number = factor * extreme_value(random, type);
    input[i] = static_cast<Value>(float_bits(number, type));
  }
  const int last = (1 << bits) - 1;
  std::vector<uint16_t> expected_scale;
  std::vector<uint8_t> expected(static_cast<size_t>(code_bytes(count, bits)));
  const CodeRows row(std::max<int64_t>(count, 1), bits);
  const std::string what = std::to_string(count) + " of type " + std::to_string(static_cast<int>(type)) + ", " +
                           std::to_string(bits) + " bits" + (positive ? ", positive" : "") +
                           (stochastic ? ", stochastic" : "");
  for (int64_t first = 0; first < count; first += 256) {
    const int64_t past = std::min<int64_t>(first + 256, count);
    float low = INFINITY, high = -INFINITY;
    for (int64_t i = first; i < past; ++i) {
      const float x = load_float(input.data(), type, i);
      if (x < low) low = x;
      if (x > high) high = x;
    }
    const ExpectedScale scale(low, high, last, type, positive);
    expected_scale.push_back(scale.scale);
    expected_scale.push_back(scale.minimum);
    const float unit = static_cast<float>(scale.unit), minimum = bfloat16_to_float(scale.minimum) * unit;
    const float inverse = scale.scale ? 1 / (bfloat16_to_float(scale.scale) * unit) : 0.0f;
    for (int64_t i = first; i < past; ++i) {
      const float x = load_float(input.data(), type, i);
      const float threshold = stochastic ? threshold_of(seed, offset, i) : 0.5f;
      float code = std::floor((x * unit - minimum) * inverse + threshold);
      code = code > 0 ? std::min(code, static_cast<float>(last)) : 0;  // 0 for NaN
      if (positive) code = x > 0 ? std::max(code, 1.0f) : 0;
      row.put(expected.data(), i, static_cast<int>(code));
    }
  }
  Buffer<uint8_t> codes(code_bytes(count, bits)), pieced(codes.size());
  Buffer<uint16_t> scale_minimum(2 * ceil_div(count, 256)), pieced_scale(scale_minimum.size());
  GroupQuantizeArgs args{input.data(), type, count,  bits,         positive,
                         stochastic,   seed, offset, codes.data(), scale_minimum.data()};
  expect_ok(what, launch::group_quantize(args));
  expect_same(what, codes, expected);
  expect_same(what + ", scale and minimum", scale_minimum, expected_scale);
  check_values<Value>(what, args);
  args.codes = pieced.data();
  args.scale_minimum = pieced_scale.data();
  in_pieces(ceil_div(count, 256), random,
            [&](int64_t begin, int64_t end) { kernels().group_quantize(args, begin, end); });
  expect_same(what + " in pieces", pieced, expected);
  expect_same(what + ", scale and minimum in pieces", pieced_scale, expected_scale);
}

// Which zero is a group's minimum does not depend on where they stand.
void check_zeros(Random& random) {
  Buffer<float> input(256);
  Buffer<uint8_t> codes(128);
  Buffer<uint16_t> scale_minimum(2);
  for (int64_t i = 0; i < 256; ++i) input[i] = random.pick({0.0f, -0.0f, 1.0f});
  const GroupQuantizeArgs args{input.data(), FloatType::float32,  256, 4, false, false, 0, 0,
                               codes.data(), scale_minimum.data()};
  expect_ok("zeros", launch::group_quantize(args));
  if (scale_minimum[1] != 0) fail("the minimum of zeros of both signs is -0");
}

// The ends of each type's range with every minimum: nothing decodes to infinity, and little is cut off.
void check_limits() {
  for (const FloatType type : {FloatType::float32, FloatType::bfloat16, FloatType::float16}) {
    const float limit = finite_limit(type), most = greatest(type);
    if (is_infinite(static_cast<double>(limit), type)) fail("the limit of a type rounds to infinity");
    if (limit < kGreatestFloat && !is_infinite(static_cast<double>(std::nextafter(limit, INFINITY)), type)) {
      fail("the limit of a type is not the greatest float that rounds to a finite number");
    }
    for (const float high : {most, std::nextafter(most, 0.0f), most * (1 - 0x1p-8f), most / 2}) {
      for (uint32_t low_bits = 0; low_bits < 0xffffffffu - 0x8000; low_bits += 0x7fff) {
        const float low = bits_to_float(low_bits);
        if (!(low <= high) || std::fabs(low) > most) continue;
        for (const int bits : {2, 4, 8}) {
          const float last = static_cast<float>((1 << bits) - 1);
          const GroupScale found = group_scale(low, high, last, limit, false);
          const float scale = bfloat16_to_float(found.scale), minimum = bfloat16_to_float(found.minimum);
          const float top = group_value(last, scale, minimum);
          const double extent = std::fabs(static_cast<double>(high) - static_cast<double>(minimum));
          const bool covers = static_cast<double>(top) + extent * 0x1p-7 + 1e-36 >= static_cast<double>(high);
          if (minimum < -limit || top > limit || !covers) {
            return fail("a group from " + std::to_string(low) + " to " + std::to_string(high) + " has codes from " +
                        std::to_string(minimum) + " to " + std::to_string(top));
          }
        }
      }
    }
  }
}

}  // namespace

LOWBIT_TEST(group_quantize) {
  check_limits();
  for (int i = 0; i < cases; ++i) {
    check<uint32_t>(random, FloatType::float32);
    check<uint16_t>(random, FloatType::bfloat16);
    check<uint16_t>(random, FloatType::float16);
    check_zeros(random);
  }
}

}  // namespace lowbit::test
