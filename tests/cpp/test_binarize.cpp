#include <cmath>

#include "binarize_values.h"
#include "cpu/binarize/binarize.h"

#if defined(__x86_64__)
#include <pmmintrin.h>
#endif

namespace lowbit::test {
namespace {

// Makes the processor read and write subnormal numbers as zero, which some callers do; see the kernel's contract.
class ZeroSubnormals {
 public:
#if defined(__x86_64__)
  explicit ZeroSubnormals(bool on) : before_(_mm_getcsr()) {
    if (on) _mm_setcsr(before_ | _MM_FLUSH_ZERO_ON | _MM_DENORMALS_ZERO_ON);
  }
  ~ZeroSubnormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#else
  explicit ZeroSubnormals(bool) {}
#endif
};

// Input: float or the bits of a 16-bit float.
template <class Input>
void check(Random& random, FloatType type) {
  const bool channels_last = random.coin();
  const int64_t outer = random.between(0, 3), channels = random.size(300);
  const int64_t spatial = channels > 100 ? random.size(70) : random.size(200);
  const int64_t thresholds = random.between(1, 2);
  const int64_t row_words = words_for(thresholds * channels), count = outer * spatial * channels;
  Buffer<Input> input(count);
  for (int64_t i = 0; i < count; ++i) {
    if constexpr (sizeof(Input) == 4) {
      input[i] = binarize_value(random);
    } else {
      input[i] = static_cast<Input>(float_bits(binarize_value(random), type));
    }
  }
  Buffer<float> threshold(thresholds * channels);
  for (int64_t i = 0; i < threshold.size(); ++i) threshold[i] = random.coin() ? binarize_value(random) : 0.0f;
  Buffer<uint8_t> flip(thresholds * channels);
  for (int64_t i = 0; i < flip.size(); ++i) flip[i] = static_cast<uint8_t>(random.between(0, 1));

  BinarizeArgs args{};
  args.input = input.data();
  args.input_type = type;
  args.channels_last = channels_last;
  args.outer = outer;
  args.channels = channels;
  args.spatial = spatial;
  args.threshold = thresholds == 2 || random.coin() ? threshold.data() : nullptr;
  args.common_threshold = threshold[0];
  args.flip = random.coin() ? flip.data() : nullptr;
  args.encoding = random.pick({Encoding::sign, Encoding::step});
  args.thresholds = thresholds;
  const bool with_mask = thresholds == 1 && random.coin();

  std::vector<uint64_t> words(static_cast<size_t>(outer * spatial * row_words)), mask(words.size());
  for (int64_t pixel = 0; pixel < outer * spatial; ++pixel) {
    for (int64_t bit = 0; bit < thresholds * channels; ++bit) {
      const int64_t c = bit % channels;
      const int64_t n = pixel / spatial, s = pixel % spatial;
      const float x =
          load_float(args.input, type, channels_last ? pixel * channels + c : (n * channels + c) * spatial + s);
      const float t = threshold_of(args, bit);
      if (args.flip && args.flip[bit] ? x <= t : x >= t) set_bit(words.data() + pixel * row_words, bit);
      const bool inside = args.encoding == Encoding::sign ? std::fabs(x) <= 1.0f : x > 0.0f && x < 1.0f;
      if (inside) set_bit(mask.data() + pixel * row_words, bit);
    }
  }

  const std::string what = std::string(channels_last ? "channels-last " : "planar ") + std::to_string(outer) + " x " +
                           std::to_string(channels) + " x " + std::to_string(spatial) + ", type " +
                           std::to_string(static_cast<int>(type)) + ", encoding " +
                           std::to_string(static_cast<int>(args.encoding)) + (args.flip ? ", flips" : "") +
                           (thresholds == 2 ? ", two thresholds" : "");
  const auto expect = [&](const std::string& how, const auto& run) {
    Buffer<uint64_t> got_words(outer * spatial * row_words), got_mask(with_mask ? outer * spatial * row_words : 0);
    args.words = got_words.data();
    args.mask = with_mask ? got_mask.data() : nullptr;
    run();
    expect_same(what + how, got_words, words);
    if (with_mask) expect_same(what + how + ", mask", got_mask, mask);
  };
  expect("", [&] { expect_ok(what, launch::binarize(args)); });
  expect(" in pieces", [&] {
    const ZeroSubnormals subnormals(random.coin());
    in_pieces(binarize_items(args), random, [&](int64_t begin, int64_t end) { kernels().binarize(args, begin, end); });
  });
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
