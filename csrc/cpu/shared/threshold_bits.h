// Numbers that meet a threshold per channel, as packed bits: for tiles of pixels, 64 channels at a time. Integers and
// floats of 4 bytes. Internal linkage: each level compiles its own.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/layout.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace lowbit {
namespace {

constexpr int64_t kTilePixels = 32;  // the most pixels of a tile
constexpr int64_t kTileChannels = 64;

// The packed output of pixels. Where blocks of 64 channels share words, whoever works a pixel works all its blocks:
// `clear` comes before the first, and each block ORs its bits in.
struct BitOutput {
  uint64_t* words;
  int64_t stride;           // words from a pixel to the next
  int64_t words_per_pixel;  // at most stride
  bool shared;

  inline void clear(int64_t pixel) const {
    for (int64_t i = 0; i < words_per_pixel; ++i) words[pixel * stride + i] = 0;
  }

  // `bits` become channels [channel, channel + count) of `pixel`; bits past `count` are 0.
  inline void put(int64_t pixel, int64_t channel, int64_t count, uint64_t bits) const {
    uint64_t* word = words + pixel * stride + channel / kWordBits;
    if (!shared) {
      *word = bits;
      return;
    }
    const int64_t shift = channel % kWordBits;
    word[0] |= bits << shift;
    if (shift + count > kWordBits) word[1] |= bits >> (kWordBits - shift);
  }
};

// One or two thresholds a channel.
template <class Number>
struct Thresholds {
  const Number* value;  // [count, channels]
  const uint8_t* flip;  // [count, channels] of 0 or 1, or null
  int64_t count, channels;
};

#if defined(__AVX512BW__)

// All bits of an integer, the sign of a float, where flip: (value ^ f) >= (threshold ^ f) is value <= threshold.
inline __m512i order(__mmask16 mask, const uint8_t* flip, int32_t) {
  const __m128i bytes_u8x16 = _mm_maskz_loadu_epi8(mask, flip);
  return _mm512_maskz_set1_epi32(_mm_test_epi8_mask(bytes_u8x16, bytes_u8x16), -1);
}
inline __m512i order(__mmask16 mask, const uint8_t* flip, float) {
  return _mm512_slli_epi32(order(mask, flip, int32_t{}), 31);
}
inline __mmask16 reached(__mmask16 mask, __m512i value_i32x16, __m512i limit_i32x16, int32_t) {
  return _mm512_mask_cmpge_epi32_mask(mask, value_i32x16, limit_i32x16);
}
inline __mmask16 reached(__mmask16 mask, __m512i value_i32x16, __m512i limit_i32x16, float) {
  return _mm512_mask_cmp_ps_mask(mask, _mm512_castsi512_ps(value_i32x16), _mm512_castsi512_ps(limit_i32x16),
                                 _CMP_GE_OQ);
}

// Bit i of bits[pixel] = value[pixel][i] >= threshold[i], or <= where flip; count <= 64. A NaN gives 0. Vector by
// vector, and for each all pixels, so that thresholds are loaded once a tile.
template <class Number>
inline void threshold_bits(const Number* const* value, int64_t pixels, int64_t count, const Number* threshold,
                           const uint8_t* flip, uint64_t* bits) {
  for (int64_t pixel = 0; pixel < pixels; ++pixel) bits[pixel] = 0;
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 mask = static_cast<__mmask16>(low_mask(count - i));
    const __m512i flip_i32x16 = flip == nullptr ? _mm512_setzero_si512() : order(mask, flip + i, Number());
    const __m512i limit_i32x16 = _mm512_xor_si512(_mm512_maskz_loadu_epi32(mask, threshold + i), flip_i32x16);
    for (int64_t pixel = 0; pixel < pixels; ++pixel) {
      const __m512i flipped_i32x16 = _mm512_xor_si512(_mm512_maskz_loadu_epi32(mask, value[pixel] + i), flip_i32x16);
      bits[pixel] |= uint64_t{reached(mask, flipped_i32x16, limit_i32x16, Number())} << i;
    }
  }
}

#elif defined(__AVX2__)

inline __m256i load_i32x8(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

// Bit i = value[i] >= limit[i], of 8.
inline uint64_t reached(__m256i value_i32x8, __m256i limit_i32x8, int32_t) {
  const __m256i below_i32x8 = _mm256_cmpgt_epi32(limit_i32x8, value_i32x8);
  return static_cast<uint64_t>(_mm256_movemask_ps(_mm256_castsi256_ps(below_i32x8)) ^ 0xff);
}
inline uint64_t reached(__m256i value_i32x8, __m256i limit_i32x8, float) {
  const __m256 reached_f32x8 =
      _mm256_cmp_ps(_mm256_castsi256_ps(value_i32x8), _mm256_castsi256_ps(limit_i32x8), _CMP_GE_OQ);
  return static_cast<uint64_t>(_mm256_movemask_ps(reached_f32x8));
}

// All bits of an integer, the sign of a float, where flip: (value ^ f) >= (threshold ^ f) is value <= threshold.
inline int32_t order(uint8_t flip, int32_t) { return flip == 0 ? 0 : -1; }
inline int32_t order(uint8_t flip, float) { return flip == 0 ? 0 : INT32_MIN; }

// Bit i of bits[pixel] = value[pixel][i] >= threshold[i], or <= where flip; count <= 64. A NaN gives 0. Thresholds are
// first completed to whole vectors; values may be read up to a whole vector of 8.
template <class Number>
inline void threshold_bits(const Number* const* value, int64_t pixels, int64_t count, const Number* threshold,
                           const uint8_t* flip, uint64_t* bits) {
  alignas(32) int32_t flips[kTileChannels] = {}, limit[kTileChannels] = {};
  memcpy(limit, threshold, static_cast<size_t>(count) * sizeof *limit);
  if (flip != nullptr) {
    for (int64_t i = 0; i < count; ++i) {
      flips[i] = order(flip[i], Number());
      limit[i] ^= flips[i];
    }
  }
  for (int64_t pixel = 0; pixel < pixels; ++pixel) {
    uint64_t reached_bits = 0;
    for (int64_t i = 0; i < count; i += 8) {
      const __m256i flipped_i32x8 = _mm256_xor_si256(load_i32x8(value[pixel] + i), load_i32x8(flips + i));
      reached_bits |= reached(flipped_i32x8, load_i32x8(limit + i), Number()) << i;
    }
    bits[pixel] = reached_bits & low_mask(count);
  }
}

#else

// Bit i of bits[pixel] = value[pixel][i] >= threshold[i], or <= where flip; count <= 64. A NaN gives 0.
template <class Number>
inline void threshold_bits(const Number* const* value, int64_t pixels, int64_t count, const Number* threshold,
                           const uint8_t* flip, uint64_t* bits) {
  for (int64_t pixel = 0; pixel < pixels; ++pixel) {
    bits[pixel] = 0;
    for (int64_t i = 0; i < count; ++i) {
      const Number number = value[pixel][i];
      const bool bit = flip != nullptr && flip[i] != 0 ? number <= threshold[i] : number >= threshold[i];
      bits[pixel] |= uint64_t{bit} << i;
    }
  }
}

#endif

// Bits of channels [channel, channel + count) of pixels[0, pixel_count); value[i] points at the numbers of pixels[i].
template <class Number>
inline void store_bits(const BitOutput& output, const Thresholds<Number>& thresholds, const Number* const* value,
                       const int64_t* pixels, int64_t pixel_count, int64_t channel, int64_t count) {
  for (int64_t t = 0; t < thresholds.count; ++t) {
    const int64_t bit = t * thresholds.channels + channel;
    uint64_t bits[kTilePixels];
    threshold_bits(value, pixel_count, count, thresholds.value + bit,
                   thresholds.flip == nullptr ? nullptr : thresholds.flip + bit, bits);
    for (int64_t i = 0; i < pixel_count; ++i) output.put(pixels[i], bit, count, bits[i]);
  }
}

}  // namespace
}  // namespace lowbit
