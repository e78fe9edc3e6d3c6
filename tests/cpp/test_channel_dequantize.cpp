#include "code_cases.h"
#include "cpu/channel_dequantize/channel_dequantize.h"

namespace lowbit::test {
namespace {

template <class Value>
void check(Random& random, FloatType type) {
  const ChannelShape shape = random_channel_shape(random);
  const int64_t count = elements(shape);
  const int bits = random.pick({2, 4, 8});
  const float span = code_case_span(random);
  const bool relu = random.coin();
  const std::string what = name_of(shape, type, bits) + (relu ? "" : " without ReLU");
  ChannelParameters channel(random, shape.channels);
  add_extreme_channels(channel, random);
  Buffer<uint8_t> codes(channel_code_bytes(shape, bits));
  fill_codes(codes, count, row_length(shape), bits, random);
  Buffer<Value> output(count), pieced(count);
  std::vector<Value> expected;
  const CodeRows rows(row_length(shape), bits);
  for (int64_t i = 0; i < count; ++i) {
    const float gamma = channel.gamma[channel_of(shape, i)], beta = channel.beta[channel_of(shape, i)];
    const ChannelGrid g = channel_grid(gamma, beta, bits, span, relu);
    const float code = static_cast<float>(rows.get(codes.data(), i));
    const float scale = std::min(std::fabs(gamma) * g.width, kGreatestFloat);
    float number = (code + (0.5f - g.cells / 2 - g.edge)) * scale + beta;
    if (relu && (code < g.shift || number < 0)) number = 0;
    number = std::min(std::max(number, -greatest(type)), greatest(type));
    if (!std::isfinite(gamma) || !std::isfinite(beta)) number = NAN;
    expected.push_back(static_cast<Value>(float_bits(number, type)));
    const bool finite = std::isfinite(load_float(expected.data(), type, i));
    if (finite != !std::isnan(number)) fail(what + ": a finite channel decodes to infinity");
  }
  ChannelDequantizeArgs args{
      codes.data(), shape, channel.gamma.data(), channel.beta.data(), bits, span, relu, output.data(), type, nullptr};
  Buffer<float> grid(launch::channel_dequantize_workspace_bytes(args) / 4);
  args.grid = grid.data();
  expect_workspace(what, grid.bytes(), [&](int64_t bytes) { return launch::channel_dequantize(args, bytes); });
  expect_same(what, output, expected);
  args.output = pieced.data();
  in_pieces(row_count(shape), random,
            [&](int64_t begin, int64_t end) { kernels().channel_dequantize(args, begin, end); });
  expect_same(what + " in pieces", pieced, expected);
}

}  // namespace

LOWBIT_TEST(channel_dequantize) {
  for (int i = 0; i < cases / 4 + 1; ++i) {
    check<uint32_t>(random, FloatType::float32);
    check<uint16_t>(random, FloatType::bfloat16);
    check<uint16_t>(random, FloatType::float16);
  }
}

}  // namespace lowbit::test
