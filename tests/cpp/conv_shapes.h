// Random convolution geometry and decoded operands for the convolution tests.
#pragma once

#include "common.h"
#include "core/conv_shape.h"

namespace lowbit::test {

// A geometry of at most about `most_products` multiply-adds, or one filter a group.
inline ConvShape random_conv_shape(Random& random, int64_t most_products) {
  ConvShape s{};
  s.groups = random.pick<int64_t>({1, 1, 1, 2, 3, 4});
  // Now and then deep enough that counters of 8 and 16 bits would overflow.
  const bool deep = random.between(0, 9) == 0;
  s.channels = s.groups * (deep ? random.between(4000, 9000) : random.size(640));
  s.filters = s.groups * random.size(200);
  if (random.between(0, 3) == 0) {  // many groups of a few channels
    s.groups = random.size(200);
    s.channels = s.groups * random.pick<int64_t>({1, 1, 1, 2, 3, 4, 5, 7, 8, 9, 12, 16, 17, 24, 25, 26, 32, 33, 48});
    s.filters = s.groups * random.pick<int64_t>({1, 1, 2, 3, 8, 16, 20, 32, 33, 65});
  }
  s.batch = random.between(0, 9) == 0 ? 0 : random.between(1, 3);
  if (random.between(0, 3) == 0) {  // a linear layer or a 1 x 1 convolution
    s.kernel_height = s.kernel_width = s.stride_height = s.stride_width = s.dilation_height = s.dilation_width = 1;
    s.height = random.coin() ? 1 : random.between(1, 9);
    s.width = random.between(1, deep ? 4 : 40);
  } else {
    s.kernel_height = random.between(1, 5);
    s.kernel_width = random.between(1, 5);
    s.stride_height = random.between(1, 3);
    s.stride_width = random.between(1, 3);
    s.dilation_height = random.coin() ? 1 : random.between(1, 3);
    s.dilation_width = random.coin() ? 1 : random.between(1, 3);
    // The padding may exceed the image, so that some windows see nothing of it.
    s.pad_top = random.coin() ? s.kernel_height / 2 : random.between(0, 6);
    s.pad_left = random.coin() ? s.kernel_width / 2 : random.between(0, 6);
    s.height = random.between(1, deep ? 5 : 12);
    s.width = random.between(1, deep ? 5 : 20);
  }
  // Bottom and right may have a padding of their own.
  const auto out_size = [&](int64_t size, int64_t pad, int64_t dilation, int64_t kernel, int64_t stride) {
    const int64_t other_pad = random.coin() ? pad : random.between(0, 6);
    const int64_t span = size + pad + other_pad - dilation * (kernel - 1) - 1;
    return span < 0 ? 0 : span / stride + 1;
  };
  s.out_height = out_size(s.height, s.pad_top, s.dilation_height, s.kernel_height, s.stride_height);
  s.out_width = out_size(s.width, s.pad_left, s.dilation_width, s.kernel_width, s.stride_width);
  const int64_t per_filter = out_pixels(s) * taps(s) * channels_per_group(s);
  while (s.filters > s.groups && s.filters * per_filter > most_products) {
    s.filters = s.groups * ceil_div(filters_per_group(s), 2);
  }
  return s;
}

inline std::string describe(const ConvShape& s) {
  char text[300];
  snprintf(
      text, sizeof text, "N%d C%d %dx%d -> O%d %dx%d, kernel %dx%d stride %dx%d pad %dx%d dilation %dx%d groups %d",
      static_cast<int>(s.batch), static_cast<int>(s.channels), static_cast<int>(s.height), static_cast<int>(s.width),
      static_cast<int>(s.filters), static_cast<int>(s.out_height), static_cast<int>(s.out_width),
      static_cast<int>(s.kernel_height), static_cast<int>(s.kernel_width), static_cast<int>(s.stride_height),
      static_cast<int>(s.stride_width), static_cast<int>(s.pad_top), static_cast<int>(s.pad_left),
      static_cast<int>(s.dilation_height), static_cast<int>(s.dilation_width), static_cast<int>(s.groups));
  return text;
}

// Values of packed rows of `channels` each, dense.
inline std::vector<int8_t> decode(const Buffer<uint64_t>& words, int64_t channels, Encoding encoding) {
  const int64_t row_words = words_for(channels), rows = words.size() / row_words;
  std::vector<int8_t> values(static_cast<size_t>(rows * channels));
  for (int64_t i = 0; i < rows * channels; ++i) {
    const bool bit = bit_at(words.data() + i / channels * row_words, i % channels);
    values[static_cast<size_t>(i)] = bit ? 1 : encoding == Encoding::sign ? -1 : 0;
  }
  return values;
}

// Calls body(output pixel, tap, input pixel) for all; the input pixel is -1 in the padding.
template <class Body>
void for_each_tap(const ConvShape& s, const Body& body) {
  for (int64_t out = 0; out < out_pixels(s); ++out) {
    const int64_t x = out % s.out_width, y = out / s.out_width % s.out_height, n = out / s.out_width / s.out_height;
    for (int64_t tap = 0; tap < taps(s); ++tap) {
      const int64_t row = y * s.stride_height - s.pad_top + tap / s.kernel_width * s.dilation_height;
      const int64_t column = x * s.stride_width - s.pad_left + tap % s.kernel_width * s.dilation_width;
      const bool inside = row >= 0 && row < s.height && column >= 0 && column < s.width;
      body(out, tap, inside ? (n * s.height + row) * s.width + column : -1);
    }
  }
}

// A float sum in double precision and what its float32 evaluation in any order may be off by.
struct Sum {
  double value = 0;
  double magnitude = 0;
  int64_t terms = 0;

  void add(double term) {
    value += term;
    magnitude += term < 0 ? -term : term;
    ++terms;
  }
  // Each of terms - 1 additions and the rounding of each term is off by at most 2^-24 of the magnitude so far.
  double tolerance() const { return 0x1p-24 * static_cast<double>(terms) * magnitude * 1.01; }
};

inline void expect_near(const std::string& what, const Buffer<float>& got, const std::vector<Sum>& expected) {
  for (int64_t i = 0; i < got.size(); ++i) {
    const Sum& sum = expected[static_cast<size_t>(i)];
    const double error = static_cast<double>(got[i]) - sum.value;
    if (error <= sum.tolerance() && error >= -sum.tolerance()) continue;
    return fail(what + ": element " + std::to_string(i) + " is " + std::to_string(got[i]) + ", expected " +
                std::to_string(sum.value) + " within " + std::to_string(sum.tolerance()));
  }
}

}  // namespace lowbit::test
