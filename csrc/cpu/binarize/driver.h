// What the vector levels share: the walks over memory. `Vector`, a level's, has
//   kLanes                           floats of a vector
//   Floats, Words                    a vector, and as many 32-bit words
//   Lanes, kAllLanes, first_lanes    the first so many lanes of a vector, below as `lanes`
//   Passed, Bits, bits               what a comparison gives, and its bits, 0 past `lanes`
//   load<kType>, load_thresholds     of `lanes`, reading no others
//   load_signs                       the sign bit where a byte is 1
//   broadcast, exclusive_or, at_least, is_inside
//   first_bits, next_bits, or_where  bit 0 in each word, the bit above, and ORed in where a comparison passed
//   HalfWords<kVectors>              32 packed bits of each pixel of so many vectors: put(vector, words)
//   store_words                      two of them, joined
//   pack_pixels                      cuts neighbouring pixels into pack_planar_block
#pragma once

#include <immintrin.h>

#include <cstring>

#include "cpu/binarize/binarize.h"

namespace lowbit {
namespace {

// x >= value, or x <= value where `sign` holds the sign bit: then both sides are negated.
template <class Vector>
struct Threshold {
  typename Vector::Floats value, sign;
};

template <bool kUniform, class Vector>
typename Vector::Passed passes(typename Vector::Floats x, const Threshold<Vector>& threshold) {
  if constexpr (!kUniform) x = Vector::exclusive_or(x, threshold.sign);
  return Vector::at_least(x, threshold.value);
}

template <class Vector>
Threshold<Vector> channel_threshold(const BinarizeArgs& args, int64_t channel) {
  const auto sign = Vector::broadcast(args.flip && args.flip[channel] ? -0.0f : 0.0f);
  return {Vector::exclusive_or(Vector::broadcast(threshold_of(args, channel)), sign), sign};
}

// The thresholds of the channels from `channel` on, one a lane.
template <class Vector>
Threshold<Vector> lane_thresholds(const BinarizeArgs& args, int64_t channel, typename Vector::Lanes lanes) {
  auto sign = Vector::broadcast(0.0f);
  if (args.flip) sign = Vector::load_signs(args.flip + channel, lanes);
  const auto value = args.threshold ? Vector::load_thresholds(args.threshold + channel, lanes)
                                    : Vector::broadcast(args.common_threshold);
  return {Vector::exclusive_or(value, sign), sign};
}

// The bits of vector i of a packed row.
template <class Bits>
void store_bits(uint64_t* row, int64_t i, Bits bits) {
  memcpy(reinterpret_cast<uint8_t*>(row) + i * int64_t{sizeof bits}, &bits, sizeof bits);
}

template <class Vector, FloatType kType, bool kUniform, bool kMask, int kPixels>
void pack_channels_last_block(const BinarizeArgs& args, int64_t first_pixel) {
  constexpr int64_t kLanes = Vector::kLanes;
  const int64_t row_words = words_for(args.channels);
  const int64_t row_bytes = args.channels * float_bytes(kType);
  const uint8_t* input = static_cast<const uint8_t*>(args.input) + first_pixel * row_bytes;
  uint64_t* words = args.words + first_pixel * row_words;
  uint64_t* mask = kMask ? args.mask + first_pixel * row_words : nullptr;
  const int64_t full_vectors = args.channels / kLanes;
  const auto tail_lanes = Vector::first_lanes(args.channels % kLanes);
  if (args.channels % kWordBits != 0) {
    for (int p = 1; p <= kPixels; ++p) {
      words[p * row_words - 1] = 0;
      if constexpr (kMask) mask[p * row_words - 1] = 0;
    }
  }
  const MaskInterval interval = mask_interval(args.encoding);
  auto threshold = channel_threshold<Vector>(args, 0);
  const auto pack_vector = [&](int64_t i, typename Vector::Lanes lanes) {
    if constexpr (!kUniform) threshold = lane_thresholds<Vector>(args, i * kLanes, lanes);
    for (int p = 0; p < kPixels; ++p) {
      const auto x = Vector::template load<kType>(input + p * row_bytes + i * kLanes * float_bytes(kType), lanes);
      store_bits(words + p * row_words, i, Vector::bits(passes<kUniform>(x, threshold), lanes));
      if constexpr (kMask) store_bits(mask + p * row_words, i, Vector::bits(Vector::is_inside(x, interval), lanes));
    }
  };
  for (int64_t i = 0; i < full_vectors; ++i) pack_vector(i, Vector::kAllLanes);
  if (tail_lanes) pack_vector(full_vectors, tail_lanes);
}

template <class Vector, FloatType kType, bool kUniform, bool kMask>
void pack_channels_last(const BinarizeArgs& args, int64_t begin, int64_t end) {
  constexpr int kPixels = 4;  // share one load of the thresholds
  int64_t pixel = begin;
  for (; pixel + kPixels <= end; pixel += kPixels) {
    pack_channels_last_block<Vector, kType, kUniform, kMask, kPixels>(args, pixel);
  }
  for (; pixel < end; ++pixel) pack_channels_last_block<Vector, kType, kUniform, kMask, 1>(args, pixel);
}

// Puts `count` bits to bit `at` and following of a packed row that is 0 there.
void or_bits(uint64_t* row, int64_t at, int64_t count, uint64_t bits) {
  const int64_t shift = at % kWordBits;
  row[at / kWordBits] |= bits << shift;
  if (shift + count > kWordBits) row[at / kWordBits + 1] |= bits >> (kWordBits - shift);
}

// Two thresholds a channel: every value is read once, and its two bits lie args.channels apart.
template <class Vector, FloatType kType>
void pack_channels_last_twice(const BinarizeArgs& args, int64_t begin, int64_t end) {
  const int64_t row_words = words_for(bits_per_pixel(args)), row_bytes = args.channels * float_bytes(kType);
  constexpr int64_t kPixels = 4;  // share one load of the thresholds
  for (int64_t pixel = begin; pixel < end; pixel += kPixels) {
    const int64_t pixels = min(end - pixel, kPixels);
    const uint8_t* input = static_cast<const uint8_t*>(args.input) + pixel * row_bytes;
    uint64_t* words = args.words + pixel * row_words;
    memset(words, 0, static_cast<size_t>(pixels * row_words) * sizeof *words);
    for (int64_t channel = 0; channel < args.channels; channel += Vector::kLanes) {
      const int64_t count = min(args.channels - channel, Vector::kLanes);
      const auto lanes = Vector::first_lanes(count);
      const auto low = lane_thresholds<Vector>(args, channel, lanes);
      const auto high = lane_thresholds<Vector>(args, args.channels + channel, lanes);
      for (int64_t p = 0; p < pixels; ++p) {
        const auto x = Vector::template load<kType>(input + p * row_bytes + channel * float_bytes(kType), lanes);
        uint64_t* row = words + p * row_words;
        or_bits(row, channel, count, Vector::bits(passes<false>(x, low), lanes));
        or_bits(row, args.channels + channel, count, Vector::bits(passes<false>(x, high), lanes));
      }
    }
  }
}

// Bits first .. last - 1 of a packed row, at most 32 of them, of kVectors vectors of pixels, the last of which has
// only `last_lanes`. Bit b of a half word is bit first + b.
template <class Vector, FloatType kType, bool kUniform, bool kMask, int kVectors>
void pack_half_words(const BinarizeArgs& args, const uint8_t* input, int64_t first, int64_t last,
                     typename Vector::Lanes last_lanes, typename Vector::template HalfWords<kVectors>& bits,
                     typename Vector::template HalfWords<kVectors>& mask) {
  typename Vector::Words bits_u32[kVectors] = {};
  typename Vector::Words mask_u32[kVectors] = {};
  const MaskInterval interval = mask_interval(args.encoding);
  const int64_t plane_bytes = args.spatial * float_bytes(kType);
  auto threshold = channel_threshold<Vector>(args, 0);
  auto channel_bit_u32 = Vector::first_bits();
  for (int64_t at = first; at < last; ++at) {
    const uint8_t* pixels = input + (at < args.channels ? at : at - args.channels) * plane_bytes;
    if constexpr (!kUniform) threshold = channel_threshold<Vector>(args, at);
    for (int v = 0; v < kVectors; ++v) {
      const auto lanes = v + 1 == kVectors ? last_lanes : Vector::kAllLanes;
      const auto x = Vector::template load<kType>(pixels + v * Vector::kLanes * float_bytes(kType), lanes);
      bits_u32[v] = Vector::or_where(bits_u32[v], passes<kUniform>(x, threshold), channel_bit_u32);
      if constexpr (kMask) {
        mask_u32[v] = Vector::or_where(mask_u32[v], Vector::is_inside(x, interval), channel_bit_u32);
      }
    }
    channel_bit_u32 = Vector::next_bits(channel_bit_u32);
  }
  for (int v = 0; v < kVectors; ++v) {
    bits.put(v, bits_u32[v]);
    if constexpr (kMask) mask.put(v, mask_u32[v]);
  }
}

// All channels of `pixels` neighbouring pixels, which fill kVectors vectors, the last perhaps in part.
template <class Vector, FloatType kType, bool kUniform, bool kMask, int kVectors>
void pack_planar_block(const BinarizeArgs& args, const uint8_t* input, int64_t first_pixel, int64_t pixels) {
  const int64_t row_bits = bits_per_pixel(args), row_words = words_for(row_bits);
  const auto last_lanes = Vector::first_lanes(pixels - (kVectors - 1) * Vector::kLanes);
  typename Vector::template HalfWords<kVectors> bits[2], mask[2];
  for (int64_t word = 0; word < row_words; ++word) {
    for (int half = 0; half < 2; ++half) {
      const int64_t first = word * kWordBits + half * kWordBits / 2;
      const int64_t last = min(row_bits, first + kWordBits / 2);
      pack_half_words<Vector, kType, kUniform, kMask, kVectors>(args, input, first, last, last_lanes, bits[half],
                                                                mask[half]);
    }
    const int64_t at = first_pixel * row_words + word;
    Vector::store_words(bits, pixels, args.words + at, row_words);
    if constexpr (kMask) Vector::store_words(mask, pixels, args.mask + at, row_words);
  }
}

template <class Vector, FloatType kType, bool kUniform, bool kMask>
void pack_planar(const BinarizeArgs& args, int64_t begin, int64_t end) {
  const uint8_t* input = static_cast<const uint8_t*>(args.input);
  const int64_t image_bytes = args.channels * args.spatial * float_bytes(kType);
  const int64_t blocks = ceil_div(args.spatial, kBinarizePixels);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t image = item / blocks, pixel = item % blocks * kBinarizePixels;
    Vector::template pack_pixels<kType, kUniform, kMask>(args, input + image * image_bytes + pixel * float_bytes(kType),
                                                         image * args.spatial + pixel,
                                                         min(args.spatial - pixel, kBinarizePixels));
  }
}

// Not inlined, so that no comparison moves out of the caller's floating-point control section.
template <class Vector, FloatType kType, bool kUniform, bool kMask>
__attribute__((noinline)) void binarize_range(const BinarizeArgs& args, int64_t begin, int64_t end) {
  const bool rows = args.channels_last || args.spatial == 1;
  if (rows && args.thresholds == 2) {
    pack_channels_last_twice<Vector, kType>(args, begin, end);
  } else if (rows) {
    pack_channels_last<Vector, kType, kUniform, kMask>(args, begin, end);
  } else {
    pack_planar<Vector, kType, kUniform, kMask>(args, begin, end);
  }
}

template <class Vector, FloatType kType>
void binarize_type(const BinarizeArgs& args, int64_t begin, int64_t end) {
  const bool uniform = !args.threshold && !args.flip;
  if (uniform && !args.mask) return binarize_range<Vector, kType, true, false>(args, begin, end);
  if (uniform) return binarize_range<Vector, kType, true, true>(args, begin, end);
  if (!args.mask) return binarize_range<Vector, kType, false, false>(args, begin, end);
  return binarize_range<Vector, kType, false, true>(args, begin, end);
}

template <class Vector>
void run_binarize(const BinarizeArgs& args, int64_t begin, int64_t end) {
  if (begin >= end || args.channels == 0) return;
  const unsigned caller_control = _mm_getcsr();
  _mm_setcsr(0x1f80);  // the power-on value: subnormals are numbers (torch.set_flush_denormal changes that), no traps
  for_type(args.input_type, [&](auto type) { binarize_type<Vector, type.value>(args, begin, end); });
  _mm_setcsr(caller_control);
}

}  // namespace
}  // namespace lowbit
