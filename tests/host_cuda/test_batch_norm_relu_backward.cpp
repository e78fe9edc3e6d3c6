#include "cpu/batch_norm_relu_backward/batch_norm_relu_backward.h"

#include "../cpp/code_cases.h"
#include "tests.h"

namespace lowbit::test {
namespace {

template <class Value>
void check(Random& random, FloatType type, ChannelShape shape) {
  const int64_t count = elements(shape), channels = shape.channels;
  const int bits = random.pick({2, 4, 8});
  const bool relu = random.coin(), training = random.coin();
  ChannelParameters channel(random, channels, random_alignment(random));
  Buffer<uint8_t> codes(channel_code_bytes(shape, bits), random_alignment(random));
  fill_codes(codes, count, row_length(shape), bits, random);
  Buffer<Value> grad(count, random_alignment(random));
  for (int64_t i = 0; i < count; ++i) grad[i] = static_cast<Value>(float_bits(random.normal(), type));
  Buffer<Value> grad_input(count, random_alignment(random)), expected(count);
  Buffer<float> grad_gamma(channels), grad_beta(channels), expected_gamma(channels), expected_beta(channels);
  BatchNormReluBackwardArgs args{grad.data(),
                                 type,
                                 shape,
                                 codes.data(),
                                 channel.gamma.data(),
                                 channel.beta.data(),
                                 channel.invstd.data(),
                                 bits,
                                 code_case_span(random),
                                 relu,
                                 training,
                                 expected.data(),
                                 expected_gamma.data(),
                                 expected_beta.data(),
                                 nullptr,
                                 nullptr};
  Buffer<double> scalar_workspace(cuda::batch_norm_relu_backward_workspace_bytes(args) / 8);
  Buffer<double> workspace(scalar_workspace.size(), random_alignment(random));
  set_workspace(args, scalar_workspace.data());
  for (int64_t column = 0; column < grid_width(shape); ++column) fill_grid(args, column);
  scalar::batch_norm_relu_sums(args, 0, chunks(shape));
  for (int64_t c = 0; c < channels; ++c) finish_sums(args, c);
  scalar::batch_norm_relu_backward(args, 0, row_count(shape));
  args.grad_input = grad_input.data();
  args.grad_gamma = grad_gamma.data();
  args.grad_beta = grad_beta.data();
  const std::vector<double> expected_sums(args.sums, args.sums + sums_count(shape));
  set_workspace(args, workspace.data());
  const std::string what =
      name_of(shape, type, bits) + (relu ? "" : " without ReLU") + (training ? "" : " in evaluation");
  expect_workspace(what, workspace.bytes(),
                   [&](int64_t bytes) { return cuda::batch_norm_relu_backward(args, bytes, kStream); });
  const std::vector<double> sums(args.sums, args.sums + sums_count(shape));
  if (count > 0 && memcmp(sums.data(), expected_sums.data(), sums.size() * sizeof(double)) != 0) {
    fail(what + ": the sums differ");
  }
  expect_same(what + ", grad of gamma", grad_gamma, expected_gamma);
  expect_same(what + ", grad of beta", grad_beta, expected_beta);
  expect_same(what, grad_input, expected);
}

}  // namespace

LOWBIT_TEST(batch_norm_relu_backward) {
  for (int i = 0; i < cases; ++i) {
    check<uint32_t>(random, FloatType::float32, random_channel_shape(random));
    check<uint16_t>(random, FloatType::bfloat16, random_channel_shape(random));
    check<uint16_t>(random, FloatType::float16, random_channel_shape(random));
  }
  // Rows of more pieces than a block makes at a time.
  for (const int64_t spatial : {int64_t{262144}, int64_t{300001}}) {
    check<uint32_t>(random, FloatType::float32, {1, 1, spatial, false});
    check<uint16_t>(random, FloatType::bfloat16, {1, 1, spatial, false});
  }
}

}  // namespace lowbit::test
