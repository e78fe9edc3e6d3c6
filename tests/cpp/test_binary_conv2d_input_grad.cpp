#include "conv_shapes.h"
#include "cpu/binary_conv2d_input_grad/binary_conv2d_input_grad.h"

namespace lowbit::test {
namespace {

constexpr int64_t kMostProducts = 500000;

void check(Random& random) {
  const ConvShape s = random_conv_shape(random, kMostProducts);
  const int64_t channels = channels_per_group(s), filters = filters_per_group(s);
  Buffer<float> grad_output(out_pixels(s) * s.filters), scale(s.filters);
  for (int64_t i = 0; i < grad_output.size(); ++i) grad_output[i] = random.normal();
  for (int64_t i = 0; i < s.filters; ++i) scale[i] = random.normal();
  Buffer<uint64_t> weight(s.filters * taps(s) * words_for(channels));
  Buffer<uint64_t> mask(s.batch * s.height * s.width * words_for(s.channels));
  fill_bits(weight, channels, random);
  fill_bits(mask, s.channels, random);

  BinaryConv2dInputGradArgs args{};
  args.shape = s;
  args.grad_output = grad_output.data();
  args.weight = weight.data();
  args.scale = random.coin() ? scale.data() : nullptr;
  args.scale_stride = random.between(0, 1);
  args.mask = random.coin() ? mask.data() : nullptr;

  const std::vector<int8_t> w = decode(weight, channels, Encoding::sign);
  std::vector<Sum> expected(static_cast<size_t>(s.batch * s.height * s.width * s.channels));
  for_each_tap(s, [&](int64_t out, int64_t tap, int64_t pixel) {
    if (pixel < 0) return;
    for (int64_t o = 0; o < s.filters; ++o) {
      const double factor = args.scale ? static_cast<double>(args.scale[o * args.scale_stride]) : 1.0;
      const double grad = factor * static_cast<double>(grad_output[out * s.filters + o]);
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t channel = o / filters * channels + c;
        if (args.mask && !bit_at(args.mask + pixel * words_for(s.channels), channel)) continue;
        expected[static_cast<size_t>(pixel * s.channels + channel)].add(
            grad * w[static_cast<size_t>((o * taps(s) + tap) * channels + c)]);
      }
    }
  });

  const std::string what = describe(s) + (args.scale ? ", scale" : "") + (args.mask ? ", mask" : "");
  Buffer<float> launched(static_cast<int64_t>(expected.size())), pieced(static_cast<int64_t>(expected.size()));
  Workspace workspace(launch::binary_conv2d_input_grad_workspace_bytes(args));
  args.workspace = workspace.data();
  args.grad_input = launched.data();
  expect_workspace(what, workspace.bytes(),
                   [&](int64_t bytes) { return launch::binary_conv2d_input_grad(args, bytes); });
  expect_near(what, launched, expected);
  args.grad_input = pieced.data();
  in_pieces(kernels().binary_conv2d_input_grad_items(args), random, [&](int64_t begin, int64_t end) {
    kernels().binary_conv2d_input_grad(args, begin, end, workspace.data());
  });
  expect_same(what + " in pieces", pieced, launched);  // deterministic: not a bit of difference
}

}  // namespace

LOWBIT_TEST(binary_conv2d_input_grad) {
  for (int i = 0; i < cases; ++i) check(random);
}

}  // namespace lowbit::test
