#include "cpu/channel_dequantize/channel_dequantize.h"

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
  add_extreme_channels(channel, random);
  Buffer<uint8_t> codes(channel_code_bytes(shape, bits), random_alignment(random));
  fill_codes(codes, count, row_length(shape), bits, random);
  Buffer<Value> output(count, random_alignment(random)), expected(count);
  ChannelDequantizeArgs args{codes.data(),
                             shape,
                             channel.gamma.data(),
                             channel.beta.data(),
                             bits,
                             code_case_span(random),
                             relu,
                             expected.data(),
                             type,
                             nullptr};
  Buffer<float> grid(cuda::channel_dequantize_workspace_bytes(args) / 4), fresh(grid.size(), random_alignment(random));
  args.grid = grid.data();
  for (int64_t column = 0; column < grid_width(shape); ++column) fill_grid(args, column);
  scalar::channel_dequantize(args, 0, row_count(shape));
  args.output = output.data();
  args.grid = fresh.data();
  const std::string what = name_of(shape, type, bits) + (relu ? "" : " without ReLU");
  expect_workspace(what, fresh.bytes(), [&](int64_t bytes) { return cuda::channel_dequantize(args, bytes, kStream); });
  expect_same(what, output, expected);
}

}  // namespace

LOWBIT_TEST(channel_dequantize) {
  for (int i = 0; i < cases; ++i) {
    check<uint32_t>(random, FloatType::float32);
    check<uint16_t>(random, FloatType::bfloat16);
    check<uint16_t>(random, FloatType::float16);
  }
}

}  // namespace lowbit::test
