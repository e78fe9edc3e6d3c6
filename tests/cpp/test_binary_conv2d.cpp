// Accumulators and every epilogue, bit for bit.
#include "conv_case.h"
#include "cpu/binary_conv2d/binary_conv2d.h"
#include "epilogue_case.h"

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
        output[static_cast<size_t>(out * row + o)] =
            static_cast<Output>(integer ? static_cast<uint32_t>(sum) : float_bits(value, float_type(args.output_kind)));
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

// expect(what) after a launch, after the items in pieces and after those of the tiles, each after a reset().
template <class Reset, class Expect>
void check_runs(BinaryConv2dArgs args, Random& random, const Reset& reset, const Expect& expect) {
  const std::string what = describe(args);
  Workspace workspace(launch::binary_conv2d_workspace_bytes(args));
  args.workspace = workspace.data();
  expect_workspace(what, workspace.bytes(), [&](int64_t bytes) { return launch::binary_conv2d(args, bytes); });
  expect(what);
  const auto check_pieces = [&](const char* by, const BinaryConv2dPlan& plan) {
    reset();
    Workspace own(plan.workspace_bytes);
    in_pieces(plan.items, random,
              [&](int64_t begin, int64_t end) { kernels().binary_conv2d(args, plan, begin, end, own.data()); });
    expect(what + by);
  };
  check_pieces(" in pieces", kernels().binary_conv2d_plan(args));
  if (active_isa() == Isa::amx && amx::suits_tiles(args.shape)) {  // the level itself leaves small shapes to AVX-512
    check_pieces(" by tiles", amx::plan_of_tiles(args));
  }
}

template <class Output>
void check_output(BinaryConv2dArgs args, const std::vector<int32_t>& acc, Random& random) {
  const std::vector<Output> expected = expected_output<Output>(args, acc);
  Buffer<Output> output(static_cast<int64_t>(expected.size()));
  args.output = output.data();
  check_runs(
      args, random, [&] { memset(output.data(), 0xa5, static_cast<size_t>(output.bytes())); },
      [&](const std::string& what) { expect_same(what, output, expected); });
}

void check_program(BinaryConv2dArgs args, const std::vector<int32_t>& acc, Random& random) {
  EpilogueCase epilogue(random, std::vector<float>(acc.begin(), acc.end()), args.shape.filters, args.shape.batch, true);
  args.output_kind = ConvOutput::program;
  args.program = epilogue.program();
  check_runs(args, random, [&] { epilogue.reset(); }, [&](const std::string& what) { epilogue.expect(what); });
}

void check(Random& random) {
  const ConvShape s = random_conv_shape(random, kMostProducts);
  ConvCase operands(random, s, Alignment::value);
  BinaryConv2dArgs& args = operands.args;
  const int64_t channels = channels_per_group(s);
  const int64_t row = has_narrow_groups(s) ? s.channels : channels;
  const std::vector<int32_t> acc = accumulators(s, decode(operands.input, row, args.encoding),
                                                decode(operands.words, channels, Encoding::sign), args.padding_value);
  // Aligned to 8 bytes only, and watched at both ends.
  Buffer<uint64_t> blocked(ceil_div(kernels().binary_conv2d_weight_bytes(s), 8));
  kernels().binary_conv2d_block_weight(s, operands.words.data(), blocked.data());
  args.weight = blocked.data();
  // Thresholds are values that occur, so that equality is met, and the ends, always and never met.
  for (int64_t i = 0; i < 2 * s.filters; ++i) {
    const int64_t out = acc.empty() ? 0 : random.between(0, out_pixels(s) - 1);
    const int32_t sum = acc.empty() ? 0 : acc[static_cast<size_t>(out * s.filters + i % s.filters)];
    const bool extreme = random.between(0, 9) == 0;
    operands.integer_threshold[i] = extreme ? random.pick({INT32_MIN, INT32_MAX}) : sum;
    operands.float_threshold[i] = extreme       ? random.pick({-1e30f, 1e30f})
                                  : acc.empty() ? 0.0f
                                                : value_of(args, sum, out, i % s.filters);
  }
  operands.for_each_output(random, [&](const BinaryConv2dArgs& of_kind, auto element) {
    check_output<decltype(element)>(of_kind, acc, random);
  });
  check_program(args, acc, random);
}

}  // namespace

LOWBIT_TEST(binary_conv2d) {
  for (int i = 0; i < cases; ++i) check(random);
}

}  // namespace lowbit::test
