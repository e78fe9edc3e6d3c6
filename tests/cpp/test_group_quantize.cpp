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

// Every bfloat16 that is a number, in order; one zero.
const std::vector<float>& all_bfloat16() {
  static const std::vector<float> values = [] {
    std::vector<float> all;
    for (uint32_t bits = 0; bits < 0x10000; ++bits) {
      const float value = bits_to_float(bits << 16);
      if (value == value && bits != 0x8000) all.push_back(value);
    }
    std::sort(all.begin(), all.end());
    return all;
  }();
  return values;
}

// The least scale and the greatest minimum with which `last` steps cover a group from low to high; 0 for nothing.
struct Scale {
  float step, minimum;

  Scale(float low, float high, float last, bool positive) : step(0), minimum(0) {
    const std::vector<float>& all = all_bfloat16();
    if (!positive && low <= high) minimum = *(std::upper_bound(all.begin(), all.end(), low) - 1);
    const float extent = high - minimum;
    if (extent > 0) step = std::min(*std::lower_bound(all.begin(), all.end(), extent / last), 0x1.fep127f);
  }
};

template <class Value>
void check(Random& random, FloatType type) {
  const int64_t count = random.pick<int64_t>({0, random.size(640), random.between(1, 3000)});
  const int bits = random.pick({2, 4, 8});
  const bool positive = random.coin(), stochastic = random.coin();
  // The blocks' numbers may pass 2^32.
  const uint64_t seed = random.bits(), offset = random.pick<uint64_t>({0, 0xffffffffu - 70, random.bits()});
  const float width = random.pick({1.0f, 100.0f, 1e-6f, 0.0f}), centre = random.pick({0.0f, 3.0f, -100.0f});
  Buffer<Value> input(count);
  for (int64_t i = 0; i < count; ++i) {
    const float number = random.between(0, 400) ? centre + width * random.normal() : code_value(random);
    input[i] = static_cast<Value>(float_bits(number, type));
  }
  const float last = static_cast<float>((1 << bits) - 1);
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
    const Scale scale(low, high, last, positive);
    const float minimum = scale.minimum, step = scale.step, inverse = step > 0 ? 1 / step : 0;
    expected_scale.push_back(static_cast<uint16_t>(float_to_bits(step) >> 16));
    expected_scale.push_back(static_cast<uint16_t>(float_to_bits(minimum) >> 16));
    if (low <= high && high - low < 1e30f && (minimum > low || minimum + last * step < high) && !positive) {
      fail(what + ": the codes do not cover a group");
    }
    for (int64_t i = first; i < past; ++i) {
      const float x = load_float(input.data(), type, i);
      const float threshold = stochastic ? threshold_of(seed, offset, i) : 0.5f;
      float code = std::floor((x - minimum) * inverse + threshold);
      code = code > 0 ? code < last ? code : last : 0;  // 0 for NaN
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

}  // namespace

LOWBIT_TEST(group_quantize) {
  for (int i = 0; i < cases; ++i) {
    check<uint32_t>(random, FloatType::float32);
    check<uint16_t>(random, FloatType::bfloat16);
    check<uint16_t>(random, FloatType::float16);
    check_zeros(random);
  }
}

}  // namespace lowbit::test
