// Channels-last, VMOVMSKPS turns 8 comparisons into one byte of the packed word. Planar, a comparison gives all-ones
// lanes for one channel of 8 pixels: ANDed with the channel's bit and ORed into the pixels' 32-bit lanes.
#include <immintrin.h>

#include <cstring>

#include "cpu/binarize/binarize.h"

namespace lowbit::avx2 {
namespace {

constexpr int kLanes = 8;

template <FloatType kType>
__m256 to_float(__m128i half_u16x8) {
  if constexpr (kType == FloatType::float16) return _mm256_cvtph_ps(half_u16x8);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half_u16x8), 16));
}

__m256i first_lanes(int64_t count) {
  const __m256i index_u32x8 = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), index_u32x8);
}

// The first `count` < 4 of 16-bit values, then zeros.
uint64_t load_halves(const uint8_t* from, int64_t count) {
  uint32_t pair = 0;
  uint16_t last = 0;
  if (count & 2) memcpy(&pair, from, sizeof pair);
  if (count & 1) memcpy(&last, from + (count - 1) * int64_t{sizeof last}, sizeof last);
  return pair | uint64_t{last} << (count & 2 ? 32 : 0);
}

// The first `count` <= 8 values, then zeros.
template <FloatType kType>
__m256 load(const uint8_t* from, int64_t count) {
  if constexpr (kType == FloatType::float32) {
    const float* values = reinterpret_cast<const float*>(from);
    return count == kLanes ? _mm256_loadu_ps(values) : _mm256_maskload_ps(values, first_lanes(count));
  } else {
    if (count == kLanes) return to_float<kType>(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    if (count < 4) return to_float<kType>(_mm_cvtsi64_si128(static_cast<long long>(load_halves(from, count))));
    const __m128i first_u16x4 = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    return to_float<kType>(_mm_insert_epi64(first_u16x4, static_cast<long long>(load_halves(from + 8, count - 4)), 1));
  }
}

// x >= threshold, or x <= threshold where `sign` holds the sign bit: then both sides are negated.
struct Threshold {
  __m256 threshold_f32x8;
  __m256 sign_f32x8;
};

template <bool kUniform>
__m256 passes(__m256 x_f32x8, const Threshold& threshold) {
  if constexpr (!kUniform) x_f32x8 = _mm256_xor_ps(x_f32x8, threshold.sign_f32x8);
  return _mm256_cmp_ps(x_f32x8, threshold.threshold_f32x8, _CMP_GE_OQ);
}

__m256 is_inside(__m256 x_f32x8, MaskInterval interval) {
  return _mm256_and_ps(_mm256_cmp_ps(x_f32x8, _mm256_set1_ps(interval.lowest), _CMP_GE_OQ),
                       _mm256_cmp_ps(x_f32x8, _mm256_set1_ps(interval.highest), _CMP_LE_OQ));
}

Threshold channel_threshold(const BinarizeArgs& args, int64_t channel) {
  const __m256 sign_f32x8 = _mm256_set1_ps(args.flip && args.flip[channel] ? -0.0f : 0.0f);
  const __m256 threshold_f32x8 = _mm256_set1_ps(threshold_of(args, channel));
  return {_mm256_xor_ps(threshold_f32x8, sign_f32x8), sign_f32x8};
}

// The thresholds of `count` <= 8 channels from `channel` on, one a lane.
Threshold lane_thresholds(const BinarizeArgs& args, int64_t channel, int64_t count) {
  __m256 sign_f32x8 = _mm256_setzero_ps();
  if (args.flip) {
    uint64_t flip_u8x8 = 0;
    if (count == kLanes) {
      memcpy(&flip_u8x8, args.flip + channel, kLanes);
    } else {
      for (int64_t i = 0; i < count; ++i) flip_u8x8 |= uint64_t{args.flip[channel + i]} << (8 * i);
    }
    const __m256i flip_u32x8 = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(flip_u8x8)));
    sign_f32x8 = _mm256_castsi256_ps(_mm256_slli_epi32(flip_u32x8, 31));
  }
  const __m256 threshold_f32x8 = args.threshold ? _mm256_maskload_ps(args.threshold + channel, first_lanes(count))
                                                : _mm256_set1_ps(args.common_threshold);
  return {_mm256_xor_ps(threshold_f32x8, sign_f32x8), sign_f32x8};
}

// Bits 8 i .. 8 i + 7 of a packed row; only the first `count` are kept.
void store_bits(uint64_t* row, int64_t i, __m256 lanes, int64_t count) {
  const uint32_t bits = static_cast<uint32_t>(_mm256_movemask_ps(lanes)) & static_cast<uint32_t>(low_mask(count));
  reinterpret_cast<uint8_t*>(row)[i] = static_cast<uint8_t>(bits);
}

template <FloatType kType, bool kUniform, bool kMask, int kPixels>
void pack_channels_last_block(const BinarizeArgs& args, int64_t first_pixel) {
  const int64_t row_words = words_for(args.channels);
  const int64_t row_bytes = args.channels * float_bytes(kType);
  const uint8_t* input = static_cast<const uint8_t*>(args.input) + first_pixel * row_bytes;
  uint64_t* words = args.words + first_pixel * row_words;
  uint64_t* mask = kMask ? args.mask + first_pixel * row_words : nullptr;
  const int64_t full_vectors = args.channels / kLanes;
  const int64_t tail = args.channels % kLanes;
  if (args.channels % kWordBits != 0) {
    for (int p = 1; p <= kPixels; ++p) {
      words[p * row_words - 1] = 0;
      if constexpr (kMask) mask[p * row_words - 1] = 0;
    }
  }
  const MaskInterval interval = mask_interval(args.encoding);
  Threshold threshold = channel_threshold(args, 0);
  const auto pack_vector = [&](int64_t i, int64_t count) {
    if constexpr (!kUniform) threshold = lane_thresholds(args, i * kLanes, count);
    for (int p = 0; p < kPixels; ++p) {
      const __m256 x_f32x8 = load<kType>(input + p * row_bytes + i * kLanes * float_bytes(kType), count);
      store_bits(words + p * row_words, i, passes<kUniform>(x_f32x8, threshold), count);
      if constexpr (kMask) store_bits(mask + p * row_words, i, is_inside(x_f32x8, interval), count);
    }
  };
  for (int64_t i = 0; i < full_vectors; ++i) pack_vector(i, kLanes);
  if (tail) pack_vector(full_vectors, tail);
}

template <FloatType kType, bool kUniform, bool kMask>
void pack_channels_last(const BinarizeArgs& args, int64_t begin, int64_t end) {
  constexpr int kPixels = 4;  // share one load of the thresholds
  int64_t pixel = begin;
  for (; pixel + kPixels <= end; pixel += kPixels) {
    pack_channels_last_block<kType, kUniform, kMask, kPixels>(args, pixel);
  }
  for (; pixel < end; ++pixel) pack_channels_last_block<kType, kUniform, kMask, 1>(args, pixel);
}

// Puts the first `count` <= 8 bits to bit `at` and following of a packed row that is 0 there.
void or_bits(uint64_t* row, int64_t at, int64_t count, int lanes) {
  const uint64_t bits = static_cast<uint64_t>(lanes) & low_mask(count);
  const int64_t shift = at % kWordBits;
  row[at / kWordBits] |= bits << shift;
  if (shift + count > kWordBits) row[at / kWordBits + 1] |= bits >> (kWordBits - shift);
}

// Two thresholds a channel: every value is read once, and its two bits lie args.channels apart.
template <FloatType kType>
void pack_channels_last_twice(const BinarizeArgs& args, int64_t begin, int64_t end) {
  const int64_t row_words = words_for(bits_per_pixel(args)), row_bytes = args.channels * float_bytes(kType);
  constexpr int64_t kPixels = 4;  // share one load of the thresholds
  for (int64_t pixel = begin; pixel < end; pixel += kPixels) {
    const int64_t pixels = end - pixel < kPixels ? end - pixel : kPixels;
    const uint8_t* input = static_cast<const uint8_t*>(args.input) + pixel * row_bytes;
    uint64_t* words = args.words + pixel * row_words;
    memset(words, 0, static_cast<size_t>(pixels * row_words) * sizeof *words);
    for (int64_t channel = 0; channel < args.channels; channel += kLanes) {
      const int64_t count = args.channels - channel < kLanes ? args.channels - channel : int64_t{kLanes};
      const Threshold low = lane_thresholds(args, channel, count);
      const Threshold high = lane_thresholds(args, args.channels + channel, count);
      for (int64_t p = 0; p < pixels; ++p) {
        const __m256 x_f32x8 = load<kType>(input + p * row_bytes + channel * float_bytes(kType), count);
        or_bits(words + p * row_words, channel, count, _mm256_movemask_ps(passes<false>(x_f32x8, low)));
        or_bits(words + p * row_words, args.channels + channel, count,
                _mm256_movemask_ps(passes<false>(x_f32x8, high)));
      }
    }
  }
}

// Bits first .. last - 1 of a packed row, at most 32 of them, of kVectors * 8 pixels; the last vector has only
// `last_count`. Bit b of a half word is bit first + b.
template <FloatType kType, bool kUniform, bool kMask, int kVectors>
void pack_half_words(const BinarizeArgs& args, const uint8_t* input, int64_t first, int64_t last, int64_t last_count,
                     uint32_t* bits, uint32_t* mask) {
  __m256i bits_u32x8[kVectors] = {};
  __m256i mask_u32x8[kVectors] = {};
  const MaskInterval interval = mask_interval(args.encoding);
  const int64_t plane_bytes = args.spatial * float_bytes(kType);
  Threshold threshold = channel_threshold(args, 0);
  __m256i channel_bit_u32x8 = _mm256_set1_epi32(1);
  for (int64_t at = first; at < last; ++at) {
    const uint8_t* pixels = input + (at < args.channels ? at : at - args.channels) * plane_bytes;
    if constexpr (!kUniform) threshold = channel_threshold(args, at);
    for (int v = 0; v < kVectors; ++v) {
      const int64_t count = v + 1 == kVectors ? last_count : kLanes;
      const __m256 x_f32x8 = load<kType>(pixels + v * kLanes * float_bytes(kType), count);
      const __m256i passes_u32x8 = _mm256_castps_si256(passes<kUniform>(x_f32x8, threshold));
      bits_u32x8[v] = _mm256_or_si256(bits_u32x8[v], _mm256_and_si256(passes_u32x8, channel_bit_u32x8));
      if constexpr (kMask) {
        const __m256i inside_u32x8 = _mm256_castps_si256(is_inside(x_f32x8, interval));
        mask_u32x8[v] = _mm256_or_si256(mask_u32x8[v], _mm256_and_si256(inside_u32x8, channel_bit_u32x8));
      }
    }
    channel_bit_u32x8 = _mm256_add_epi32(channel_bit_u32x8, channel_bit_u32x8);
  }
  for (int v = 0; v < kVectors; ++v) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(bits + v * kLanes), bits_u32x8[v]);
    if constexpr (kMask) _mm256_store_si256(reinterpret_cast<__m256i*>(mask + v * kLanes), mask_u32x8[v]);
  }
}

// All channels of `pixels` neighbouring pixels, (kVectors - 1) * 8 < pixels <= kVectors * 8.
template <FloatType kType, bool kUniform, bool kMask, int kVectors>
void pack_planar_block(const BinarizeArgs& args, const uint8_t* input, int64_t first_pixel, int64_t pixels) {
  const int64_t row_bits = bits_per_pixel(args), row_words = words_for(row_bits);
  const int64_t last_count = pixels - (kVectors - 1) * kLanes;
  alignas(32) uint32_t bits[2][kVectors * kLanes];
  alignas(32) uint32_t mask[2][kVectors * kLanes];
  for (int64_t word = 0; word < row_words; ++word) {
    for (int half = 0; half < 2; ++half) {
      const int64_t first = word * kWordBits + half * kWordBits / 2;
      const int64_t last = row_bits - first < kWordBits / 2 ? row_bits : first + kWordBits / 2;
      pack_half_words<kType, kUniform, kMask, kVectors>(args, input, first, last, last_count, bits[half], mask[half]);
    }
    const int64_t at = first_pixel * row_words + word;
    for (int64_t pixel = 0; pixel < pixels; ++pixel) {
      args.words[at + pixel * row_words] = bits[0][pixel] | uint64_t{bits[1][pixel]} << 32;
      if constexpr (kMask) args.mask[at + pixel * row_words] = mask[0][pixel] | uint64_t{mask[1][pixel]} << 32;
    }
  }
}

// Pixels pixel .. end - 1 of an image, first in blocks of kVectors vectors, the rest in blocks of half as many.
template <FloatType kType, bool kUniform, bool kMask, int kVectors>
void pack_planar_pixels(const BinarizeArgs& args, int64_t image, int64_t pixel, int64_t end) {
  const uint8_t* input =
      static_cast<const uint8_t*>(args.input) + image * args.channels * args.spatial * float_bytes(kType);
  for (; end - pixel > (kVectors == 1 ? 0 : kVectors * kLanes - 1); pixel += kVectors * kLanes) {
    const int64_t pixels = end - pixel < kVectors * kLanes ? end - pixel : kVectors * kLanes;
    pack_planar_block<kType, kUniform, kMask, kVectors>(args, input + pixel * float_bytes(kType),
                                                        image * args.spatial + pixel, pixels);
  }
  if constexpr (kVectors > 1) pack_planar_pixels<kType, kUniform, kMask, kVectors / 2>(args, image, pixel, end);
}

template <FloatType kType, bool kUniform, bool kMask>
void pack_planar(const BinarizeArgs& args, int64_t begin, int64_t end) {
  constexpr int kVectors = kMask ? 4 : 8;  // 8 accumulators of the 16 registers
  const int64_t blocks = ceil_div(args.spatial, kBinarizePixels);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t pixel = item % blocks * kBinarizePixels;
    const int64_t block_end = args.spatial - pixel < kBinarizePixels ? args.spatial : pixel + kBinarizePixels;
    pack_planar_pixels<kType, kUniform, kMask, kVectors>(args, item / blocks, pixel, block_end);
  }
}

// Not inlined, so that no comparison moves out of the caller's floating-point control section.
template <FloatType kType, bool kUniform, bool kMask>
__attribute__((noinline)) void binarize_range(const BinarizeArgs& args, int64_t begin, int64_t end) {
  const bool rows = args.channels_last || args.spatial == 1;
  if (rows && args.thresholds == 2) {
    pack_channels_last_twice<kType>(args, begin, end);
  } else if (rows) {
    pack_channels_last<kType, kUniform, kMask>(args, begin, end);
  } else {
    pack_planar<kType, kUniform, kMask>(args, begin, end);
  }
}

template <FloatType kType>
void binarize_type(const BinarizeArgs& args, int64_t begin, int64_t end) {
  const bool uniform = !args.threshold && !args.flip;
  if (uniform && !args.mask) return binarize_range<kType, true, false>(args, begin, end);
  if (uniform) return binarize_range<kType, true, true>(args, begin, end);
  if (!args.mask) return binarize_range<kType, false, false>(args, begin, end);
  return binarize_range<kType, false, true>(args, begin, end);
}

}  // namespace

void binarize(const BinarizeArgs& args, int64_t begin, int64_t end) noexcept {
  if (begin >= end || args.channels == 0) return;
  const unsigned caller_control = _mm_getcsr();
  _mm_setcsr(0x1f80);  // the power-on value: subnormals are numbers (torch.set_flush_denormal changes that), no traps
  switch (args.input_type) {
    case FloatType::float32:
      binarize_type<FloatType::float32>(args, begin, end);
      break;
    case FloatType::bfloat16:
      binarize_type<FloatType::bfloat16>(args, begin, end);
      break;
    case FloatType::float16:
      binarize_type<FloatType::float16>(args, begin, end);
      break;
  }
  _mm_setcsr(caller_control);
}

}  // namespace lowbit::avx2
