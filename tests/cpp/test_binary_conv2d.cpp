// Accumulators and every epilogue, bit for bit.
#include "conv_shapes.h"
#include "cpu/binary_conv2d/binary_conv2d.h"

namespace lowbit::test {
namespace {

constexpr int64_t kMostProducts = 1500000;

// acc[n, y, x, o] from decoded operands.
std::vector<int32_t> accumulators(const ConvShape& s, const std::vector<int8_t>& input,
                                  const std::vector<int8_t>& weight, int padding_value) {
  const int64_t channels = channels_per_group(s), filters = filters_per_group(s);
  std::vector<int32_t> acc(static_cast<size_t>(out_pixels(s) * s.filters));
  for_each_tap(s, [&](int64_t out, int64_t tap, int64_t pixel) {
    for (int64_t o = 0; o < s.filters; ++o) {
      const int8_t* w = weight.data() + (o * taps(s) + tap) * channels;
      int32_t sum = 0;
      if (pixel < 0) {
        for (int64_t c = 0; c < channels; ++c) sum += padding_value * w[c];
      } else {
        const int8_t* a = input.data() + (pixel * s.groups + o / filters) * channels;
        for (int64_t c = 0; c < channels; ++c) sum += a[c] * w[c];
      }
      acc[static_cast<size_t>(out * s.filters + o)] += sum;
    }
  });
  return acc;
}

FloatType float_type(ConvOutput kind) {
  if (kind == ConvOutput::bfloat16) return FloatType::bfloat16;
  return kind == ConvOutput::float16 ? FloatType::float16 : FloatType::float32;
}

// ((scale * acc) + bias) + residual; each step is one float32 operation.
float value_of(const BinaryConv2dArgs& args, int32_t acc, int64_t out, int64_t o) {
  float value = static_cast<float>(acc);
  if (args.scale) value = args.scale[o * args.scale_stride] * value;
  if (args.bias) value = value + args.bias[o];
  if (args.residual) value = value + load_float(args.residual, args.residual_type, out * args.shape.filters + o);
  return value;
}

// Output of the kernel: uint64 words, or one value of 4 or 2 bytes an element.
template <class Output>
std::vector<Output> expected_output(const BinaryConv2dArgs& args, const std::vector<int32_t>& acc) {
  const ConvShape& s = args.shape;
  const bool bits = is_bits(args.output_kind);
  const int64_t row = bits ? words_for(args.thresholds * s.filters) : s.filters;
  std::vector<Output> output(static_cast<size_t>(out_pixels(s) * row));
  for (int64_t out = 0; out < out_pixels(s); ++out) {
    for (int64_t o = 0; o < s.filters; ++o) {
      const int32_t sum = acc[static_cast<size_t>(out * s.filters + o)];
      const float value = value_of(args, sum, out, o);
      if (!bits) {
        const bool integer = args.output_kind == ConvOutput::int32;
        output[static_cast<size_t>(out * row + o)] = static_cast<Output>(
            integer ? static_cast<uint32_t>(sum) : rounded_bits(value, float_type(args.output_kind)));
        continue;
      }
      for (int64_t t = 0; t < args.thresholds; ++t) {
        const int64_t channel = t * s.filters + o;
        const bool flip = args.flip && args.flip[channel];
        bool bit;
        if (args.output_kind == ConvOutput::bits_by_integer) {
          const int32_t threshold = static_cast<const int32_t*>(args.threshold)[channel];
          bit = flip ? sum <= threshold : sum >= threshold;
        } else {
          const float threshold = static_cast<const float*>(args.threshold)[channel];
          bit = flip ? value <= threshold : value >= threshold;
        }
        if (!bit) continue;
        Output& word = output[static_cast<size_t>(out * row + channel / kWordBits)];
        word = static_cast<Output>(word | uint64_t{1} << (channel % kWordBits));
      }
    }
  }
  return output;
}

template <class Output>
void check_output(BinaryConv2dArgs args, const std::vector<int32_t>& acc, Random& random) {
  const std::vector<Output> expected = expected_output<Output>(args, acc);
  const std::string what = describe(args.shape) + ", encoding " + std::to_string(static_cast<int>(args.encoding)) +
                           ", padding " + std::to_string(args.padding_value) + ", output " +
                           std::to_string(static_cast<int>(args.output_kind)) + ", thresholds " +
                           std::to_string(args.thresholds);
  Buffer<Output> launched(static_cast<int64_t>(expected.size())), pieced(static_cast<int64_t>(expected.size()));
  Workspace workspace(launch::binary_conv2d_workspace_bytes(args));
  args.workspace = workspace.data();
  args.output = launched.data();
  expect_ok(what, launch::binary_conv2d(args, workspace.bytes()));
  expect_same(what, launched, expected);
  args.output = pieced.data();
  in_pieces(kernels().binary_conv2d_items(args), random,
            [&](int64_t begin, int64_t end) { kernels().binary_conv2d(args, begin, end, workspace.data()); });
  expect_same(what + " in pieces", pieced, expected);
}

void check(Random& random) {
  const ConvShape s = random_conv_shape(random, kMostProducts);
  const int64_t channels = channels_per_group(s), outputs = out_pixels(s) * s.filters;
  BinaryConv2dArgs args{};
  args.shape = s;
  args.encoding = random.pick({Encoding::sign, Encoding::step});
  args.padding_value = args.encoding == Encoding::sign ? random.pick({0, 1, -1}) : random.pick({0, 1});

  Buffer<uint64_t> input(s.batch * s.height * s.width * s.groups * words_for(channels));
  Buffer<uint64_t> weight(s.filters * taps(s) * words_for(channels));
  fill_bits(input, channels, random);
  fill_bits(weight, channels, random);
  args.input = input.data();
  const std::vector<int32_t> acc = accumulators(s, decode(input, channels, args.encoding),
                                                decode(weight, channels, Encoding::sign), args.padding_value);

  // Aligned to 8 bytes only, and watched at both ends.
  Buffer<uint64_t> blocked(ceil_div(kernels().binary_conv2d_weight_bytes(s), 8));
  kernels().binary_conv2d_block_weight(s, weight.data(), blocked.data());
  args.weight = blocked.data();

  Buffer<float> scale(s.filters), bias(s.filters), float_threshold(2 * s.filters), residual32(outputs);
  Buffer<uint16_t> residual16(outputs);
  Buffer<int32_t> integer_threshold(2 * s.filters);
  Buffer<uint8_t> flip(2 * s.filters);
  for (int64_t o = 0; o < s.filters; ++o) {
    scale[o] = random.normal();
    bias[o] = 10 * random.normal();
  }
  args.scale_stride = random.between(0, 1);
  args.scale = random.coin() ? scale.data() : nullptr;
  args.bias = random.coin() ? bias.data() : nullptr;
  args.residual_type = random.pick({FloatType::float32, FloatType::bfloat16, FloatType::float16});
  for (int64_t i = 0; i < outputs; ++i) {
    residual32[i] = 10 * random.normal();
    residual16[i] = static_cast<uint16_t>(rounded_bits(residual32[i], args.residual_type));
  }
  if (random.coin()) {
    args.residual = args.residual_type == FloatType::float32 ? static_cast<const void*>(residual32.data())
                                                             : static_cast<const void*>(residual16.data());
  }
  // Thresholds are values that occur, so that equality is met, and the ends, always and never met.
  for (int64_t i = 0; i < 2 * s.filters; ++i) {
    const int64_t out = outputs > 0 ? random.between(0, out_pixels(s) - 1) : 0;
    const int32_t sum = outputs > 0 ? acc[static_cast<size_t>(out * s.filters + i % s.filters)] : 0;
    const bool extreme = random.between(0, 9) == 0;
    integer_threshold[i] = extreme ? random.pick({INT32_MIN, INT32_MAX}) : sum;
    float_threshold[i] = extreme       ? random.pick({-1e30f, 1e30f})
                         : outputs > 0 ? value_of(args, sum, out, i % s.filters)
                                       : 0.0f;
    flip[i] = static_cast<uint8_t>(random.between(0, 1));
  }
  args.flip = random.coin() ? flip.data() : nullptr;

  args.output_kind = ConvOutput::int32;
  check_output<uint32_t>(args, acc, random);
  args.output_kind = ConvOutput::float32;
  check_output<uint32_t>(args, acc, random);
  args.output_kind = random.pick({ConvOutput::bfloat16, ConvOutput::float16});
  check_output<uint16_t>(args, acc, random);
  for (int64_t thresholds = 1; thresholds <= 2; ++thresholds) {
    args.thresholds = thresholds;
    args.output_kind = ConvOutput::bits_by_integer;
    args.threshold = integer_threshold.data();
    check_output<uint64_t>(args, acc, random);
    args.output_kind = ConvOutput::bits_by_float;
    args.threshold = float_threshold.data();
    check_output<uint64_t>(args, acc, random);
  }
}

}  // namespace

void test_binary_conv2d(Random& random, int cases) {
  for (int i = 0; i < cases; ++i) check(random);
}

}  // namespace lowbit::test
