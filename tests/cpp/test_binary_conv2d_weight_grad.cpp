#include "conv_shapes.h"
#include "cpu/binary_conv2d_weight_grad/binary_conv2d_weight_grad.h"

namespace lowbit::test {
namespace {

constexpr int64_t kMostProducts = 500000;

void check(Random& random) {
  const ConvShape s = random_conv_shape(random, kMostProducts);
  const int64_t channels = channels_per_group(s), filters = filters_per_group(s);
  Buffer<float> grad_output(out_pixels(s) * s.filters);
  for (int64_t i = 0; i < grad_output.size(); ++i) grad_output[i] = random.normal();
  Buffer<uint64_t> input(s.batch * s.height * s.width * s.groups * words_for(channels));
  fill_bits(input, channels, random);

  BinaryConv2dWeightGradArgs args{};
  args.shape = s;
  args.encoding = random.pick({Encoding::sign, Encoding::step});
  args.padding_value = args.encoding == Encoding::sign ? random.pick({0, 1, -1}) : random.pick({0, 1});
  args.grad_output = grad_output.data();
  args.input = input.data();

  const std::vector<int8_t> a = decode(input, channels, args.encoding);
  std::vector<Sum> expected(static_cast<size_t>(s.filters * taps(s) * channels));
  for_each_tap(s, [&](int64_t out, int64_t tap, int64_t pixel) {
    for (int64_t o = 0; o < s.filters; ++o) {
      const double grad = static_cast<double>(grad_output[out * s.filters + o]);
      for (int64_t c = 0; c < channels; ++c) {
        const int activation =
            pixel < 0 ? args.padding_value : a[static_cast<size_t>((pixel * s.groups + o / filters) * channels + c)];
        expected[static_cast<size_t>((o * taps(s) + tap) * channels + c)].add(grad * activation);
      }
    }
  });

  const std::string what = describe(s) + ", encoding " + std::to_string(static_cast<int>(args.encoding)) +
                           ", padding " + std::to_string(args.padding_value);
  Buffer<float> launched(static_cast<int64_t>(expected.size())), pieced(static_cast<int64_t>(expected.size()));
  Workspace workspace(launch::binary_conv2d_weight_grad_workspace_bytes(args));
  args.workspace = workspace.data();
  args.grad_weight = launched.data();
  expect_workspace(what, workspace.bytes(),
                   [&](int64_t bytes) { return launch::binary_conv2d_weight_grad(args, bytes); });
  expect_near(what, launched, expected);
  args.grad_weight = pieced.data();
  in_pieces(kernels().binary_conv2d_weight_grad_items(args), random, [&](int64_t begin, int64_t end) {
    kernels().binary_conv2d_weight_grad(args, begin, end, workspace.data());
  });
  expect_same(what + " in pieces", pieced, launched);  // deterministic: not a bit of difference
}

}  // namespace

LOWBIT_TEST(binary_conv2d_weight_grad) {
  for (int i = 0; i < cases; ++i) check(random);
}

}  // namespace lowbit::test
