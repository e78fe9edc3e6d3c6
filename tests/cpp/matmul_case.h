// Random operands of a binary matrix product, the kinds of its output, and what is expected.
#pragma once

#include "conv_shapes.h"
#include "core/ops/binary_matmul.h"

namespace lowbit::test {

struct MatmulCase {
  BinaryMatmulArgs args{};  // without output and workspace
  Buffer<uint64_t> a, b;
  Buffer<float> scale;

  MatmulCase(Random& random, int64_t most_products, Alignment alignment = Alignment::value)
      : args(sizes(random, most_products)),
        a(args.batch * args.rows * words_for(args.depth), alignment),
        b(args.batch * args.columns * words_for(args.depth), alignment),
        scale(1) {
    fill_bits(a, args.depth, random);
    fill_bits(b, args.depth, random);
    args.a = a.data();
    args.b = b.data();
    scale[0] = random.normal();
    scaled_ = random.coin();
  }

  // Calls check(an element of the output) for every kind of output.
  template <class Check>
  void for_each_output(const Check& check) {
    args.output_kind = ConvOutput::int32;
    check(uint32_t{});
    args.scale = scaled_ ? scale.data() : nullptr;
    args.output_kind = ConvOutput::float32;
    check(uint32_t{});
    if (args.b_encoding == Encoding::step) return;
    for (const ConvOutput kind : {ConvOutput::bfloat16, ConvOutput::float16}) {
      args.output_kind = kind;
      check(uint16_t{});
    }
  }

  // Of args.output_kind, by the loops of the definition.
  template <class Output>
  std::vector<Output> expected() const {
    const std::vector<int8_t> left = decode(a, args.depth, args.a_encoding),
                              right = decode(b, args.depth, args.b_encoding);
    std::vector<Output> output;
    for (int64_t row = 0; row < args.batch * args.rows; ++row) {
      for (int64_t n = 0; n < args.columns; ++n) {
        const int8_t* of_a = left.data() + row * args.depth;
        const int8_t* of_b = right.data() + (row / args.rows * args.columns + n) * args.depth;
        int32_t sum = 0;
        for (int64_t k = 0; k < args.depth; ++k) sum += of_a[k] * of_b[k];
        const float value = static_cast<float>(sum) * (args.scale == nullptr ? 1.0f : *args.scale);
        output.push_back(static_cast<Output>(args.output_kind == ConvOutput::int32 ? static_cast<uint32_t>(sum)
                                                                                   : float_bits(value, type())));
      }
    }
    return output;
  }

  std::string describe() const {
    std::string text = "sizes";
    for (const int64_t size : {args.batch, args.rows, args.columns, args.depth}) text += " " + std::to_string(size);
    for (const Encoding encoding : {args.a_encoding, args.b_encoding}) {
      text += encoding == Encoding::sign ? ", signs" : ", steps";
    }
    return text + ", output " + std::to_string(static_cast<int>(args.output_kind));
  }

 private:
  FloatType type() const {
    if (args.output_kind == ConvOutput::bfloat16) return FloatType::bfloat16;
    return args.output_kind == ConvOutput::float16 ? FloatType::float16 : FloatType::float32;
  }

  static BinaryMatmulArgs sizes(Random& random, int64_t most_products) {
    BinaryMatmulArgs args{};
    args.batch = random.between(0, 3);
    args.rows = random.between(0, 9) == 0 ? random.between(0, 600) : random.between(0, 40);
    args.columns = random.between(0, 9) == 0 ? 0 : random.size(200);
    args.depth = random.size(640);
    while (args.rows * args.columns * args.depth > most_products) (random.coin() ? args.rows : args.columns) /= 2;
    args.a_encoding = random.pick({Encoding::sign, Encoding::step});
    args.b_encoding = random.pick({Encoding::sign, Encoding::step});
    return args;
  }

  bool scaled_;
};

}  // namespace lowbit::test
