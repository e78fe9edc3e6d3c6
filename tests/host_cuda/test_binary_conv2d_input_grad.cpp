#include "cpu/binary_conv2d_input_grad/binary_conv2d_input_grad.h"

#include "../cpp/conv_shapes.h"
#include "tests.h"

namespace lowbit::test {
namespace {

constexpr int64_t kMostProducts = 200000;

void check(Random& random) {
  const ConvShape s = random_conv_shape(random, kMostProducts);
  const int64_t pixels = s.batch * s.height * s.width;
  Buffer<float> grad_output(out_pixels(s) * s.filters), scale(s.filters);
  for (int64_t i = 0; i < grad_output.size(); ++i) grad_output[i] = random.normal();
  for (int64_t i = 0; i < s.filters; ++i) scale[i] = random.normal();
  Buffer<uint64_t> weight(s.filters * taps(s) * words_per_group(s)), mask(pixels * words_for(s.channels));
  fill_bits(weight, channels_per_group(s), random);
  fill_bits(mask, s.channels, random);
  Buffer<float> got(pixels * s.channels), expected(pixels * s.channels);
  BinaryConv2dInputGradArgs args{};
  args.shape = s;
  args.grad_output = grad_output.data();
  args.weight = weight.data();
  args.scale = random.coin() ? scale.data() : nullptr;
  args.scale_stride = random.between(0, 1);
  args.mask = random.coin() ? mask.data() : nullptr;
  args.grad_input = expected.data();
  scalar::binary_conv2d_input_grad(args, 0, scalar::binary_conv2d_input_grad_items(args), nullptr);
  args.grad_input = got.data();
  const std::string what = describe(s) + (args.scale ? ", scale" : "") + (args.mask ? ", mask" : "");
  expect_ok(what, cuda::binary_conv2d_input_grad(args, 0, kStream));
  expect_same(what, got, expected);
}

}  // namespace

LOWBIT_TEST(binary_conv2d_input_grad) {
  for (int i = 0; i < cases; ++i) check(random);
  BinaryConv2dInputGradArgs args{};
  if (cuda::binary_conv2d_input_grad(args, 0, kStream) != Status::bad_shape) fail("0 groups were not refused");
}

}  // namespace lowbit::test
