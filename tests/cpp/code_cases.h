// Random shapes, parameters and values for the tests of the low-memory ops, and codes read and written one at a time.
#pragma once

#include <algorithm>
#include <cmath>

#include "common.h"
#include "core/codes.h"

namespace lowbit::test {

// Up to a few chunks of pixels, lanes with more terms than one float takes, and rows on both sides of a block.
inline ChannelShape random_channel_shape(Random& random) {
  constexpr int64_t kMost = 12000;  // elements of one of `outer`
  const int64_t one = random.size(640), most = kMost / one;
  const int64_t other = random.pick({random.between(0, most), random.between(1, most), 8 * ceil_div(most, 16)});
  ChannelShape shape{random.between(0, 3), one, other, random.coin()};
  if (random.coin()) std::swap(shape.channels, shape.spatial);
  return shape;
}

inline int64_t elements(const ChannelShape& shape) { return shape.outer * shape.channels * shape.spatial; }
inline int64_t channel_of(const ChannelShape& shape, int64_t element) {
  return shape.channels_last ? element % shape.channels : element / shape.spatial % shape.channels;
}

inline std::string name_of(const ChannelShape& shape, FloatType type, int bits) {
  return std::to_string(shape.outer) + " x " + std::to_string(shape.channels) + " x " + std::to_string(shape.spatial) +
         (shape.channels_last ? " channels last" : "") + ", type " + std::to_string(static_cast<int>(type)) + ", " +
         std::to_string(bits) + " bits";
}

// Statistics and affine parameters of channels: gains of both signs and none, edges inside the grid and far from it.
struct ChannelParameters {
  Buffer<float> mean, invstd, gamma, beta;

  ChannelParameters(Random& random, int64_t channels, Alignment alignment = Alignment::value)
      : mean(channels, alignment), invstd(channels, alignment), gamma(channels, alignment), beta(channels, alignment) {
    for (int64_t i = 0; i < channels; ++i) {
      mean[i] = random.normal();
      invstd[i] = 1 / (0.1f + std::fabs(random.normal()));
      gamma[i] = random.pick({1.0f, random.normal(), random.normal(), 0.0f, -0.0f, 1e-30f});
      beta[i] = random.pick({0.0f, random.normal(), random.normal(), 100 * random.normal()});
    }
  }
};

// Gains and shifts at the ends of the range of floats, and some that are not finite.
inline void add_extreme_channels(ChannelParameters& channel, Random& random) {
  for (int64_t i = 0; i < channel.gamma.size(); ++i) {
    if (random.between(0, 3)) continue;
    const float end = random.pick({kGreatestFloat, 6e4f, 1e-38f, 1e-44f});
    channel.gamma[i] = random.pick({end, -end, random.normal(), INFINITY, NAN});
    channel.beta[i] = random.pick({end, -end, random.normal(), random.normal(), -INFINITY, NAN});
  }
}

inline float code_case_span(Random& random) { return random.pick({6.0f, 8.0f, 9.0f, 0.3f}); }

// A number, or now and then something special.
inline float code_value(Random& random) {
  if (random.between(0, 15)) return 2 * random.normal();
  return random.pick({0.0f, -0.0f, NAN, INFINITY, -INFINITY, 1e30f, -kGreatestFloat, kGreatestFloat, 1e-40f});
}

inline float greatest(FloatType type) {
  return type == FloatType::float32 ? kGreatestFloat : type == FloatType::bfloat16 ? 0x1.fep127f : 65504.0f;
}

// A finite number near an end of a type's range, or of the range of floats.
inline float extreme_value(Random& random, FloatType type) {
  const float large = greatest(type) * random.pick({1.0f, 1.0f, 1 - 0x1p-7f, 0.5f, 0.1f});
  const float small = random.pick({0.0f, 1.0f, 6e-8f, 1e-30f, 1e-37f, 3e-39f, 1e-40f, 1e-45f});
  const float magnitude = random.pick({large, small});
  return random.coin() ? magnitude : -magnitude;
}

// Codes of rows of `length`, each padded to whole bytes.
class CodeRows {
 public:
  CodeRows(int64_t length, int bits) : length_(length), row_bytes_(code_bytes(length, bits)), bits_(bits) {}

  int get(const uint8_t* codes, int64_t element) const {
    return codes[byte(element)] >> shift(element) & ((1 << bits_) - 1);
  }
  void put(uint8_t* codes, int64_t element, int code) const {
    uint8_t& place = codes[byte(element)];
    place = static_cast<uint8_t>(place | code << shift(element));
  }

 private:
  int64_t byte(int64_t element) const { return element / length_ * row_bytes_ + element % length_ * bits_ / 8; }
  int shift(int64_t element) const { return static_cast<int>(element % length_ * bits_ % 8); }

  int64_t length_, row_bytes_;
  int bits_;
};

inline int64_t channel_code_bytes(const ChannelShape& shape, int bits) {
  return row_count(shape) * code_bytes(row_length(shape), bits);
}

// Random codes without padding bits set.
inline void fill_codes(Buffer<uint8_t>& codes, int64_t count, int64_t length, int bits, Random& random) {
  const CodeRows rows(length, bits);
  for (int64_t i = 0; i < codes.size(); ++i) codes[i] = 0;
  for (int64_t i = 0; i < count; ++i) rows.put(codes.data(), i, static_cast<int>(random.bits() % (1u << bits)));
}

}  // namespace lowbit::test
