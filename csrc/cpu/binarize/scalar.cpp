#include <cstring>

#include "cpu/binarize/binarize.h"

namespace lowbit::scalar {
namespace {

constexpr int32_t kInfinity = 0x7f800000;

// Maps a float to an integer of the same order, both zeros to 0. Beyond +-kInfinity lie the NaNs. Integers, because a
// caller may have told the processor to read subnormal numbers as zero.
int32_t ordered(float value) {
  const int32_t bits = static_cast<int32_t>(float_to_bits(value));
  return bits >= 0 ? bits : -(bits & 0x7fffffff);
}

struct Interval {
  int32_t lowest, highest;
  uint64_t contains(float value) const {
    const int32_t position = ordered(value);
    return static_cast<uint64_t>((position >= lowest) & (position <= highest));
  }
};

Interval channel_interval(const BinarizeArgs& args, int64_t channel) {
  const int32_t threshold = ordered(threshold_of(args, channel));
  if (threshold > kInfinity || threshold < -kInfinity) return {1, 0};  // NaN: empty
  if (args.flip && args.flip[channel]) return {-kInfinity, threshold};
  return {threshold, kInfinity};
}

template <FloatType kType>
float load(const uint8_t* from) {
  if constexpr (kType == FloatType::float32) {
    float value;
    memcpy(&value, from, sizeof value);
    return value;
  } else {
    uint16_t half;
    memcpy(&half, from, sizeof half);
    return kType == FloatType::bfloat16 ? bfloat16_to_float(half) : float16_to_float(half);
  }
}

// Packs the channels of `pixels` <= kBinarizePixels neighbouring pixels. Strides are in bytes of the input.
template <FloatType kType>
void pack_pixels(const BinarizeArgs& args, const uint8_t* input, int64_t pixel_stride, int64_t channel_stride,
                 int64_t first_pixel, int64_t pixels) {
  const int64_t row_bits = bits_per_pixel(args), row_words = words_for(row_bits);
  const MaskInterval mask_ends = mask_interval(args.encoding);
  const Interval mask_interval = {ordered(mask_ends.lowest), ordered(mask_ends.highest)};
  for (int64_t word = 0; word < row_words; ++word) {
    uint64_t bits[kBinarizePixels] = {};
    uint64_t inside[kBinarizePixels] = {};
    for (int64_t bit = 0; bit < kWordBits && word * kWordBits + bit < row_bits; ++bit) {
      const int64_t at = word * kWordBits + bit;
      const Interval interval = channel_interval(args, at);
      const uint8_t* from = input + at % args.channels * channel_stride;
      for (int64_t pixel = 0; pixel < pixels; ++pixel) {
        const float value = load<kType>(from + pixel * pixel_stride);
        bits[pixel] |= interval.contains(value) << bit;
        if (args.mask) inside[pixel] |= mask_interval.contains(value) << bit;
      }
    }
    for (int64_t pixel = 0; pixel < pixels; ++pixel) {
      args.words[(first_pixel + pixel) * row_words + word] = bits[pixel];
      if (args.mask) args.mask[(first_pixel + pixel) * row_words + word] = inside[pixel];
    }
  }
}

template <FloatType kType>
void binarize_range(const BinarizeArgs& args, int64_t begin, int64_t end) {
  const uint8_t* input = static_cast<const uint8_t*>(args.input);
  const int64_t value_bytes = float_bytes(kType);
  const int64_t row_bytes = args.channels * value_bytes;
  if (args.channels_last) {
    for (int64_t pixel = begin; pixel < end; pixel += kBinarizePixels) {
      const int64_t pixels = min(end - pixel, kBinarizePixels);
      pack_pixels<kType>(args, input + pixel * row_bytes, row_bytes, value_bytes, pixel, pixels);
    }
    return;
  }
  const int64_t blocks = ceil_div(args.spatial, kBinarizePixels);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t image = item / blocks;
    const int64_t pixel = item % blocks * kBinarizePixels;
    const int64_t pixels = min(args.spatial - pixel, kBinarizePixels);
    pack_pixels<kType>(args, input + image * args.spatial * row_bytes + pixel * value_bytes, value_bytes,
                       args.spatial * value_bytes, image * args.spatial + pixel, pixels);
  }
}

}  // namespace

void binarize(const BinarizeArgs& args, int64_t begin, int64_t end) noexcept {
  for_type(args.input_type, [&](auto type) { binarize_range<type.value>(args, begin, end); });
}

}  // namespace lowbit::scalar
