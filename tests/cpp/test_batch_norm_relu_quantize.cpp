#include "code_cases.h"
#include "cpu/batch_norm_relu_quantize/batch_norm_relu_quantize.h"

namespace lowbit::test {
namespace {

template <class Value>
void check(Random& random, FloatType type) {
  const ChannelShape shape = random_channel_shape(random);
  const int64_t count = elements(shape);
  const int bits = random.pick({2, 4, 8});
  const float span = code_case_span(random), last = static_cast<float>((1 << bits) - 1);
  const bool relu = random.coin();
  const std::string what = name_of(shape, type, bits) + (relu ? "" : " without ReLU");
  ChannelParameters channel(random, shape.channels);
  Buffer<Value> input(count), y(count), pieced_y(count);
  Buffer<uint8_t> codes(channel_code_bytes(shape, bits)), pieced(codes.size());
  std::vector<Value> expected_y;
  std::vector<uint8_t> expected(static_cast<size_t>(codes.size()));
  const CodeRows rows(row_length(shape), bits);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t c = channel_of(shape, i);
    const float gamma = channel.gamma[c], beta = channel.beta[c];
    input[i] = static_cast<Value>(float_bits(code_value(random), type));
    const float x = load_float(input.data(), type, i);
    // What the batch norm made of it, or a sign that has nothing to do with it.
    const float xhat = (x - channel.mean[c]) * channel.invstd[c];
    y[i] = static_cast<Value>(float_bits(random.between(0, 7) ? gamma * xhat + beta : code_value(random), type));
    const float own = load_float(y.data(), type, i);
    pieced_y[i] = y[i];
    expected_y.push_back(relu && own <= 0 ? Value{0} : y[i]);

    const ChannelGrid g = channel_grid(gamma, beta, bits, span, relu);
    const float multiplier = g.sign * channel.invstd[c] * (g.cells / span), offset = g.cells / 2 + g.edge;
    float code = std::floor((x - channel.mean[c]) * multiplier + offset);
    code = code > 0 ? code < last ? code : last : 0;  // 0 for NaN
    if (relu) {
      // The sign is exact, but where the channel has no codes of that sign.
      code = own > 0 ? std::max(code, g.shift) : std::min(code, g.shift - 1);
      code = std::min(std::max(code, 0.0f), last);
      if (g.shift > 0 && g.shift <= last && (code >= g.shift) != (own > 0)) fail(what + ": a sign is lost");
    }
    rows.put(expected.data(), i, static_cast<int>(code));
  }
  BatchNormReluQuantizeArgs args{input.data(),
                                 type,
                                 shape,
                                 channel.mean.data(),
                                 channel.invstd.data(),
                                 channel.gamma.data(),
                                 channel.beta.data(),
                                 bits,
                                 span,
                                 relu,
                                 relu ? y.data() : nullptr,
                                 codes.data(),
                                 nullptr};
  Buffer<float> grid(launch::batch_norm_relu_quantize_workspace_bytes(args) / 4);
  args.grid = grid.data();
  expect_workspace(what, grid.bytes(), [&](int64_t bytes) { return launch::batch_norm_relu_quantize(args, bytes); });
  expect_same(what, codes, expected);
  expect_same(what + ", y", y, expected_y);
  args.codes = pieced.data();
  args.output = relu ? pieced_y.data() : nullptr;
  in_pieces(row_count(shape), random,
            [&](int64_t begin, int64_t end) { kernels().batch_norm_relu_quantize(args, begin, end); });
  expect_same(what + " in pieces", pieced, expected);
  expect_same(what + ", y in pieces", pieced_y, expected_y);
}

}  // namespace

LOWBIT_TEST(batch_norm_relu_quantize) {
  for (int i = 0; i < cases / 4 + 1; ++i) {
    check<uint32_t>(random, FloatType::float32);
    check<uint16_t>(random, FloatType::bfloat16);
    check<uint16_t>(random, FloatType::float16);
  }
}

}  // namespace lowbit::test
