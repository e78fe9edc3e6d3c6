#include "cpu/binarize/binarize.h"

#include "../cpp/binarize_values.h"
#include "tests.h"

namespace lowbit::test {
namespace {

// Input: float or the bits of a 16-bit float.
template <class Input>
void check(Random& random, FloatType type) {
  BinarizeArgs args{};
  args.input_type = type;
  args.channels_last = random.coin();
  args.outer = random.between(0, 5);
  args.channels = random.size(640);
  args.spatial = random.coin() ? random.between(1, 300) : 8 * random.between(1, 40);
  args.encoding = random.pick({Encoding::sign, Encoding::step});
  args.thresholds = random.between(1, 2);

  Buffer<Input> input(args.outer * args.channels * args.spatial, random_alignment(random));
  for (int64_t i = 0; i < input.size(); ++i) {
    if constexpr (sizeof(Input) == 4) {
      input[i] = binarize_value(random);
    } else {
      input[i] = static_cast<Input>(float_bits(binarize_value(random), type));
    }
  }
  Buffer<float> threshold(bits_per_pixel(args), random_alignment(random));
  Buffer<uint8_t> flip(bits_per_pixel(args), random_alignment(random));
  for (int64_t bit = 0; bit < bits_per_pixel(args); ++bit) {
    threshold[bit] = random.coin() ? binarize_value(random) : 0.0f;
    flip[bit] = static_cast<uint8_t>(random.between(0, 1));
  }
  args.input = input.data();
  args.threshold = args.thresholds == 2 || random.coin() ? threshold.data() : nullptr;
  args.common_threshold = threshold[0];
  args.flip = random.coin() ? flip.data() : nullptr;

  const bool with_mask = args.thresholds == 1 && random.coin();
  Buffer<uint64_t> words(args.outer * args.spatial * words_for(bits_per_pixel(args))), expected_words(words.size());
  Buffer<uint64_t> mask(with_mask ? words.size() : 0), expected_mask(mask.size());
  args.words = expected_words.data();
  args.mask = with_mask ? expected_mask.data() : nullptr;
  scalar::binarize(args, 0, binarize_items(args));
  args.words = words.data();
  args.mask = with_mask ? mask.data() : nullptr;
  const std::string what = std::string(args.channels_last ? "channels-last " : "planar ") + std::to_string(args.outer) +
                           " x " + std::to_string(args.channels) + " x " + std::to_string(args.spatial) + ", type " +
                           std::to_string(static_cast<int>(type)) + ", encoding " +
                           std::to_string(static_cast<int>(args.encoding)) +
                           (args.thresholds == 2 ? ", two thresholds"
                            : args.threshold     ? ", thresholds"
                                                 : "") +
                           (args.flip ? ", flips" : "");
  expect_ok(what, cuda::binarize(args, kStream));
  expect_same(what, words, expected_words);
  expect_same(what + ", mask", mask, expected_mask);
}

}  // namespace

LOWBIT_TEST(binarize) {
  for (int i = 0; i < cases; ++i) {
    check<float>(random, FloatType::float32);
    check<uint16_t>(random, FloatType::bfloat16);
    check<uint16_t>(random, FloatType::float16);
  }
}

}  // namespace lowbit::test
