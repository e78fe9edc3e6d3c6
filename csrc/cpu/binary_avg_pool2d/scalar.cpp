#include "cpu/binary_avg_pool2d/binary_avg_pool2d.h"

namespace lowbit::scalar {
namespace {

constexpr int64_t kByteTaps = 255;  // additions of 1 that a byte holds
constexpr int kBytes = 8;           // of a word

// counts[j] holds 8 byte counters: byte k counts channel 8 k + j.
void add_counts(uint64_t (&counts)[kBytes], int32_t (&ones)[kWordBits]) {
  for (int j = 0; j < kBytes; ++j) {
    for (int k = 0; k < 8; ++k) ones[8 * k + j] += static_cast<int32_t>(counts[j] >> (8 * k) & 0xff);
    counts[j] = 0;
  }
}

// Averages of the channels of one packed word, at most 64.
void average_word(const BinaryAvgPool2dArgs& args, const uint64_t* image, const PoolWindow& window, int64_t word,
                  float* output) {
  const PoolShape& s = args.shape;
  const int64_t row_words = words_for(s.channels);
  int32_t ones[kWordBits] = {};
  uint64_t counts[kBytes] = {};
  int64_t room = kByteTaps;
  for (int64_t y = window.top; y < window.bottom; ++y) {
    for (int64_t x = window.left; x < window.right; ++x) {
      const uint64_t bits = image[(y * s.width + x) * row_words + word];
      for (int j = 0; j < kBytes; ++j) counts[j] += bits >> j & 0x0101010101010101;
      if (--room == 0) {
        add_counts(counts, ones);
        room = kByteTaps;
      }
    }
  }
  add_counts(counts, ones);
  for (int64_t bit = 0; bit < kWordBits && word * kWordBits + bit < s.channels; ++bit) {
    const int32_t sum = args.encoding == Encoding::sign ? 2 * ones[bit] - static_cast<int32_t>(window.taps) : ones[bit];
    output[word * kWordBits + bit] = static_cast<float>(sum) / window.divisor;
  }
}

}  // namespace

void binary_avg_pool2d(const BinaryAvgPool2dArgs& args, int64_t begin, int64_t end) noexcept {
  const PoolShape& s = args.shape;
  const int64_t row_words = words_for(s.channels);
  for (int64_t item = begin; item < end; ++item) {
    const uint64_t* image = args.input + item / s.out_height * s.height * s.width * row_words;
    const PoolSpan rows = row_span(s, item % s.out_height);
    for (int64_t x = 0; x < s.out_width; ++x) {
      const PoolWindow window = pool_window(args.count_include_pad, args.divisor_override, rows, column_span(s, x));
      float* output = args.output + (item * s.out_width + x) * s.channels;
      for (int64_t word = 0; word < row_words; ++word) average_word(args, image, window, word, output);
    }
  }
}

}  // namespace lowbit::scalar
