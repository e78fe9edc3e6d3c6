// Random operands and optional arguments of a convolution, and the kinds of its output.
#pragma once

#include "conv_shapes.h"
#include "core/ops/binary_conv2d.h"
#include "cpu/binary_conv2d/narrow_groups.h"

namespace lowbit::test {

// Its thresholds are not yet values.
struct ConvCase {
  BinaryConv2dArgs args{};  // without weight, output and workspace
  Buffer<uint64_t> input, words;
  Buffer<float> scale, bias, float_threshold, residual32;
  Buffer<uint16_t> residual16;
  Buffer<int32_t> integer_threshold;
  Buffer<uint8_t> flip;

  ConvCase(Random& random, const ConvShape& s, Alignment alignment)
      : input(s.batch * s.height * s.width * input_words(s), alignment),
        words(s.filters * taps(s) * words_per_group(s), alignment),
        scale(s.filters),
        bias(s.filters),
        float_threshold(2 * s.filters),
        residual32(out_pixels(s) * s.filters),
        residual16(out_pixels(s) * s.filters),
        integer_threshold(2 * s.filters),
        flip(2 * s.filters) {
    args.shape = s;
    args.encoding = random.pick({Encoding::sign, Encoding::step});
    args.padding_value = args.encoding == Encoding::sign ? random.pick({0, 1, -1}) : random.pick({0, 1});
    fill_bits(input, has_narrow_groups(s) ? s.channels : channels_per_group(s), random);
    fill_bits(words, channels_per_group(s), random);
    args.input = input.data();
    for (int64_t o = 0; o < s.filters; ++o) {
      scale[o] = random.normal();
      bias[o] = 10 * random.normal();
    }
    args.scale_stride = random.between(0, 1);
    args.scale = random.coin() ? scale.data() : nullptr;
    args.bias = random.coin() ? bias.data() : nullptr;
    args.residual_type = random.pick({FloatType::float32, FloatType::bfloat16, FloatType::float16});
    for (int64_t i = 0; i < residual32.size(); ++i) {
      residual32[i] = 10 * random.normal();
      residual16[i] = static_cast<uint16_t>(float_bits(residual32[i], args.residual_type));
    }
    const bool wide = args.residual_type == FloatType::float32;
    if (random.coin()) {
      args.residual = wide ? static_cast<const void*>(residual32.data()) : static_cast<const void*>(residual16.data());
    }
    for (int64_t i = 0; i < flip.size(); ++i) flip[i] = static_cast<uint8_t>(random.between(0, 1));
    args.flip = random.coin() ? flip.data() : nullptr;
  }

  // Calls check(args, an element of the output) for every kind of output; of the 16-bit floats for one.
  template <class Check>
  void for_each_output(Random& random, const Check& check) {
    args.output_kind = ConvOutput::int32;
    check(args, uint32_t{});
    args.output_kind = ConvOutput::float32;
    check(args, uint32_t{});
    args.output_kind = random.pick({ConvOutput::bfloat16, ConvOutput::float16});
    check(args, uint16_t{});
    for (args.thresholds = 1; args.thresholds <= 2; ++args.thresholds) {
      args.output_kind = ConvOutput::bits_by_integer;
      args.threshold = integer_threshold.data();
      check(args, uint64_t{});
      args.output_kind = ConvOutput::bits_by_float;
      args.threshold = float_threshold.data();
      check(args, uint64_t{});
    }
  }
};

inline std::string describe(const BinaryConv2dArgs& args) {
  return describe(args.shape) + ", encoding " + std::to_string(static_cast<int>(args.encoding)) + ", padding " +
         std::to_string(args.padding_value) + ", output " + std::to_string(static_cast<int>(args.output_kind)) +
         ", thresholds " + std::to_string(args.thresholds);
}

}  // namespace lowbit::test
