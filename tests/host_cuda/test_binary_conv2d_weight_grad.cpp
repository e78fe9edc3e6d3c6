#include "cpu/binary_conv2d_weight_grad/binary_conv2d_weight_grad.h"

#include "../cpp/conv_shapes.h"
#include "tests.h"

namespace lowbit::test {
namespace {

constexpr int64_t kMostProducts = 200000;

// Several partial sums of output pixels, for few elements.
ConvShape long_conv_shape(Random& random) {
  ConvShape s = random_conv_shape(random, 1);
  s.channels = s.groups * random.between(1, 70);
  if (s.out_height * s.out_width > 0) s.batch = ceil_div(random.between(1000, 3100), s.out_height * s.out_width);
  return s;
}

// More elements than threads of a GPU, so that a thread adds partial sums itself.
ConvShape wide_conv_shape() {
  ConvShape s{};
  s.batch = 1025;
  s.filters = 1 << 12;
  s.channels = 64;
  s.height = s.width = s.out_height = s.out_width = s.groups = 1;
  s.kernel_height = s.kernel_width = s.stride_height = s.stride_width = s.dilation_height = s.dilation_width = 1;
  return s;
}

void check(const ConvShape& s, Random& random) {
  const int64_t count = s.filters * taps(s) * channels_per_group(s);
  Buffer<float> grad_output(out_pixels(s) * s.filters);
  for (int64_t i = 0; i < grad_output.size(); ++i) grad_output[i] = random.normal();
  Buffer<uint64_t> input(s.batch * s.height * s.width * s.groups * words_per_group(s));
  fill_bits(input, channels_per_group(s), random);
  Buffer<float> got(count), expected(count);
  BinaryConv2dWeightGradArgs args{};
  args.shape = s;
  args.encoding = random.pick({Encoding::sign, Encoding::step});
  args.padding_value = args.encoding == Encoding::sign ? random.pick({0, 1, -1}) : random.pick({0, 1});
  args.grad_output = grad_output.data();
  args.input = input.data();
  args.grad_weight = expected.data();
  Workspace scalar_workspace(scalar::binary_conv2d_weight_grad_workspace_bytes(args));
  scalar::binary_conv2d_weight_grad(args, 0, scalar::binary_conv2d_weight_grad_items(args), scalar_workspace.data());
  args.grad_weight = got.data();
  Buffer<float> workspace(cuda::binary_conv2d_weight_grad_workspace_bytes(args) / 4);
  args.workspace = workspace.data();
  const std::string what = describe(s) + ", encoding " + std::to_string(static_cast<int>(args.encoding)) +
                           ", padding " + std::to_string(args.padding_value);
  expect_workspace(what, workspace.bytes(),
                   [&](int64_t bytes) { return cuda::binary_conv2d_weight_grad(args, bytes, kStream); });
  expect_same(what, got, expected);
}

}  // namespace

LOWBIT_TEST(binary_conv2d_weight_grad) {
  for (int i = 0; i < cases; ++i) {
    check(i % 4 == 0 ? long_conv_shape(random) : random_conv_shape(random, kMostProducts), random);
  }
  check(wide_conv_shape(), random);
  BinaryConv2dWeightGradArgs args{};
  if (cuda::binary_conv2d_weight_grad(args, 0, kStream) != Status::bad_shape) fail("0 groups were not refused");
}

}  // namespace lowbit::test
