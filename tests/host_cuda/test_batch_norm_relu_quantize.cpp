#include "cpu/batch_norm_relu_quantize/batch_norm_relu_quantize.h"

#include "../cpp/code_cases.h"
#include "tests.h"

namespace lowbit::test {
namespace {

template <class Value>
void check(Random& random, FloatType type) {
  const ChannelShape shape = random_channel_shape(random);
  const int64_t count = elements(shape);
  const int bits = random.pick({2, 4, 8});
  const bool relu = random.coin();
  ChannelParameters channel(random, shape.channels, random_alignment(random));
  Buffer<Value> input(count, random_alignment(random)), y(count, random_alignment(random)), expected_y(count);
  for (int64_t i = 0; i < count; ++i) {
    input[i] = static_cast<Value>(float_bits(code_value(random), type));
    y[i] = expected_y[i] = static_cast<Value>(float_bits(code_value(random), type));
  }
  Buffer<uint8_t> codes(channel_code_bytes(shape, bits), random_alignment(random)), expected(codes.size());
  BatchNormReluQuantizeArgs args{input.data(),
                                 type,
                                 shape,
                                 channel.mean.data(),
                                 channel.invstd.data(),
                                 channel.gamma.data(),
                                 channel.beta.data(),
                                 bits,
                                 code_case_span(random),
                                 relu,
                                 relu ? expected_y.data() : nullptr,
                                 expected.data(),
                                 nullptr};
  Buffer<float> grid(cuda::batch_norm_relu_quantize_workspace_bytes(args) / 4, random_alignment(random));
  args.grid = grid.data();
  for (int64_t column = 0; column < grid_width(shape); ++column) fill_grid(args, column);
  scalar::batch_norm_relu_quantize(args, 0, row_count(shape));
  Buffer<float> fresh(grid.size(), random_alignment(random));
  args.output = relu ? y.data() : nullptr;
  args.codes = codes.data();
  args.grid = fresh.data();
  const std::string what = name_of(shape, type, bits) + (relu ? "" : " without ReLU");
  expect_workspace(what, fresh.bytes(),
                   [&](int64_t bytes) { return cuda::batch_norm_relu_quantize(args, bytes, kStream); });
  expect_same(what, codes, expected);
  expect_same(what + ", y", y, expected_y);
}

void check_refused() {
  BatchNormReluQuantizeArgs args{};
  args.bits = 3, args.span = 6;
  if (cuda::batch_norm_relu_quantize(args, 0, kStream) != Status::bad_argument) fail("3 bits are not refused");
  args.bits = 4, args.span = 0;
  if (cuda::batch_norm_relu_quantize(args, 0, kStream) != Status::bad_argument) fail("span 0 is not refused");
  args.type = static_cast<FloatType>(3), args.span = 6;
  if (cuda::batch_norm_relu_quantize(args, 0, kStream) != Status::bad_argument) fail("type 3 is not refused");
  args.type = FloatType::float32, args.shape = {1, -1, 1, false};
  if (cuda::batch_norm_relu_quantize(args, 0, kStream) != Status::bad_shape) fail("-1 channels are not refused");
}

}  // namespace

LOWBIT_TEST(batch_norm_relu_quantize) {
  for (int i = 0; i < cases; ++i) {
    check<uint32_t>(random, FloatType::float32);
    check<uint16_t>(random, FloatType::bfloat16);
    check<uint16_t>(random, FloatType::float16);
  }
  check_refused();
}

}  // namespace lowbit::test
