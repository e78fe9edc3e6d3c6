// A comparison writes 16 bits into a mask register. Channels-last, those are 16 neighbouring bits of the packed word
// and go to memory as they are. Planar, they belong to one channel of 16 pixels: the mask selects the pixels whose
// 32-bit lane receives the channel's bit, so that 64 channels leave two vectors of half words and nothing is transposed
// bitwise.
#include <immintrin.h>

#include <cstring>

#include "cpu/binarize/binarize.h"

namespace lowbit::avx512 {
namespace {

constexpr int kLanes = 16;

template <FloatType kType>
__m512 to_float(__m256i half_u16x16) {
  if constexpr (kType == FloatType::float16) return _mm512_cvtph_ps(half_u16x16);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half_u16x16), 16));
}

template <FloatType kType>
__m512 load(const uint8_t* from, __mmask16 lanes) {
  if constexpr (kType == FloatType::float32) return _mm512_maskz_loadu_ps(lanes, from);
  return to_float<kType>(_mm256_maskz_loadu_epi16(lanes, from));
}

// x >= threshold, or x <= threshold where `sign` holds the sign bit: then both sides are negated.
struct Threshold {
  __m512 threshold_f32x16;
  __m512 sign_f32x16;
};

template <bool kUniform>
__mmask16 passes(__m512 x_f32x16, const Threshold& threshold) {
  if constexpr (!kUniform) x_f32x16 = _mm512_xor_ps(x_f32x16, threshold.sign_f32x16);
  return _mm512_cmp_ps_mask(x_f32x16, threshold.threshold_f32x16, _CMP_GE_OQ);
}

__mmask16 is_inside(__m512 x_f32x16, MaskInterval interval) {
  const __mmask16 above = _mm512_cmp_ps_mask(x_f32x16, _mm512_set1_ps(interval.lowest), _CMP_GE_OQ);
  return _mm512_mask_cmp_ps_mask(above, x_f32x16, _mm512_set1_ps(interval.highest), _CMP_LE_OQ);
}

Threshold channel_threshold(const BinarizeArgs& args, int64_t channel) {
  const __m512 sign_f32x16 = _mm512_set1_ps(args.flip && args.flip[channel] ? -0.0f : 0.0f);
  const __m512 threshold_f32x16 = _mm512_set1_ps(threshold_of(args, channel));
  return {_mm512_xor_ps(threshold_f32x16, sign_f32x16), sign_f32x16};
}

// The thresholds of the channels from `channel` on, one a lane.
Threshold lane_thresholds(const BinarizeArgs& args, int64_t channel, __mmask16 lanes) {
  __m512 sign_f32x16 = _mm512_setzero_ps();
  if (args.flip) {
    const __m128i flip_u8x16 = _mm_maskz_loadu_epi8(lanes, args.flip + channel);
    sign_f32x16 = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu8_epi32(flip_u8x16), 31));
  }
  const __m512 threshold_f32x16 =
      args.threshold ? _mm512_maskz_loadu_ps(lanes, args.threshold + channel) : _mm512_set1_ps(args.common_threshold);
  return {_mm512_xor_ps(threshold_f32x16, sign_f32x16), sign_f32x16};
}

// Bits 16 i .. 16 i + 15 of a packed row.
void store_bits(uint64_t* row, int64_t i, __mmask16 bits) {
  memcpy(reinterpret_cast<uint8_t*>(row) + i * int64_t{sizeof bits}, &bits, sizeof bits);
}

template <FloatType kType, bool kUniform, bool kMask, int kPixels>
void pack_channels_last_block(const BinarizeArgs& args, int64_t first_pixel) {
  const int64_t row_words = words_for(args.channels);
  const int64_t row_bytes = args.channels * float_bytes(kType);
  const uint8_t* input = static_cast<const uint8_t*>(args.input) + first_pixel * row_bytes;
  uint64_t* words = args.words + first_pixel * row_words;
  uint64_t* mask = kMask ? args.mask + first_pixel * row_words : nullptr;
  const int64_t full_vectors = args.channels / kLanes;
  const __mmask16 tail_lanes = static_cast<__mmask16>(low_mask(args.channels % kLanes));
  if (args.channels % kWordBits != 0) {
    for (int p = 1; p <= kPixels; ++p) {
      words[p * row_words - 1] = 0;
      if constexpr (kMask) mask[p * row_words - 1] = 0;
    }
  }
  const MaskInterval interval = mask_interval(args.encoding);
  Threshold threshold = channel_threshold(args, 0);
  const auto pack_vector = [&](int64_t i, __mmask16 lanes) {
    if constexpr (!kUniform) threshold = lane_thresholds(args, i * kLanes, lanes);
    for (int p = 0; p < kPixels; ++p) {
      const __m512 x_f32x16 = load<kType>(input + p * row_bytes + i * kLanes * float_bytes(kType), lanes);
      store_bits(words + p * row_words, i, passes<kUniform>(x_f32x16, threshold) & lanes);
      if constexpr (kMask) store_bits(mask + p * row_words, i, is_inside(x_f32x16, interval) & lanes);
    }
  };
  for (int64_t i = 0; i < full_vectors; ++i) pack_vector(i, 0xffff);
  if (tail_lanes) pack_vector(full_vectors, tail_lanes);
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

// Puts the first `count` <= 16 bits to bit `at` and following of a packed row that is 0 there.
void or_bits(uint64_t* row, int64_t at, int64_t count, uint64_t bits) {
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
      const __mmask16 lanes = static_cast<__mmask16>(low_mask(count));
      const Threshold low = lane_thresholds(args, channel, lanes);
      const Threshold high = lane_thresholds(args, args.channels + channel, lanes);
      for (int64_t p = 0; p < pixels; ++p) {
        const __m512 x_f32x16 = load<kType>(input + p * row_bytes + channel * float_bytes(kType), lanes);
        or_bits(words + p * row_words, channel, count, passes<false>(x_f32x16, low) & lanes);
        or_bits(words + p * row_words, args.channels + channel, count, passes<false>(x_f32x16, high) & lanes);
      }
    }
  }
}

// One channel's bit in the lanes that `selected` names. VPTERNLOGD as A | B: with VPORD the accumulator is two
// operands, and g++ 12 copies it twice.
__m512i add_bit(__m512i word_u32x16, __mmask16 selected, __m512i bit_u32x16) {
  return _mm512_mask_ternarylogic_epi32(word_u32x16, selected, bit_u32x16, bit_u32x16, 0xfc);
}

// Bits first .. last - 1 of a packed row, at most 32 of them, of kVectors * 16 pixels; the last vector has only
// `last_lanes`. Bit b of a lane of `bits` and `mask` is bit first + b of its pixel.
template <FloatType kType, bool kUniform, bool kMask, int kVectors>
void pack_half_words(const BinarizeArgs& args, const uint8_t* input, int64_t first, int64_t last, __mmask16 last_lanes,
                     __m512i* bits, __m512i* mask) {
  __m512i bits_u32x16[kVectors] = {};
  __m512i mask_u32x16[kVectors] = {};
  const MaskInterval interval = mask_interval(args.encoding);
  const int64_t plane_bytes = args.spatial * float_bytes(kType);
  Threshold threshold = channel_threshold(args, 0);
  __m512i channel_bit_u32x16 = _mm512_set1_epi32(1);
  for (int64_t at = first; at < last; ++at) {
    const uint8_t* pixels = input + (at < args.channels ? at : at - args.channels) * plane_bytes;
    if constexpr (!kUniform) threshold = channel_threshold(args, at);
    for (int v = 0; v < kVectors; ++v) {
      const __mmask16 lanes = v + 1 == kVectors ? last_lanes : 0xffff;
      const __m512 x_f32x16 = load<kType>(pixels + v * kLanes * float_bytes(kType), lanes);
      bits_u32x16[v] = add_bit(bits_u32x16[v], passes<kUniform>(x_f32x16, threshold), channel_bit_u32x16);
      if constexpr (kMask) mask_u32x16[v] = add_bit(mask_u32x16[v], is_inside(x_f32x16, interval), channel_bit_u32x16);
    }
    channel_bit_u32x16 = _mm512_add_epi32(channel_bit_u32x16, channel_bit_u32x16);
  }
  for (int v = 0; v < kVectors; ++v) {
    bits[v] = bits_u32x16[v];
    if constexpr (kMask) mask[v] = mask_u32x16[v];
  }
}

// Joins the halves of one word of each pixel.
template <int kVectors>
void store_words(const __m512i (&half_u32x16)[2][kVectors], int64_t pixels, uint64_t* words, int64_t row_words) {
  const __m512i first_u32x16 = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i last_u32x16 = _mm512_add_epi32(first_u32x16, _mm512_set1_epi32(8));
  alignas(64) uint64_t block[kVectors * kLanes];
  for (int v = 0; v < kVectors; ++v) {
    const __m512i low_u32x16 = half_u32x16[0][v];
    const __m512i high_u32x16 = half_u32x16[1][v];
    _mm512_store_si512(block + v * kLanes, _mm512_permutex2var_epi32(low_u32x16, first_u32x16, high_u32x16));
    _mm512_store_si512(block + v * kLanes + 8, _mm512_permutex2var_epi32(low_u32x16, last_u32x16, high_u32x16));
  }
  if (row_words == 1) {  // 64 x 56 x 56: 6.3 us against 7.0
    memcpy(words, block, static_cast<size_t>(pixels) * sizeof block[0]);
    return;
  }
  for (int64_t pixel = 0; pixel < pixels; ++pixel) words[pixel * row_words] = block[pixel];
}

// All channels of `pixels` neighbouring pixels, (kVectors - 1) * 16 < pixels <= kVectors * 16.
template <FloatType kType, bool kUniform, bool kMask, int kVectors>
void pack_planar_block(const BinarizeArgs& args, const uint8_t* input, int64_t first_pixel, int64_t pixels) {
  const int64_t row_bits = bits_per_pixel(args), row_words = words_for(row_bits);
  const __mmask16 last_lanes = static_cast<__mmask16>(low_mask(pixels - (kVectors - 1) * kLanes));
  for (int64_t word = 0; word < row_words; ++word) {
    __m512i bits[2][kVectors];
    __m512i mask[2][kVectors];
    for (int half = 0; half < 2; ++half) {
      const int64_t first = word * kWordBits + half * kWordBits / 2;
      const int64_t last = row_bits - first < kWordBits / 2 ? row_bits : first + kWordBits / 2;
      pack_half_words<kType, kUniform, kMask, kVectors>(args, input, first, last, last_lanes, bits[half], mask[half]);
    }
    const int64_t at = first_pixel * row_words + word;
    store_words<kVectors>(bits, pixels, args.words + at, row_words);
    if constexpr (kMask) store_words<kVectors>(mask, pixels, args.mask + at, row_words);
  }
}

template <FloatType kType, bool kUniform, bool kMask>
void pack_planar(const BinarizeArgs& args, int64_t begin, int64_t end) {
  static_assert(kBinarizePixels == 4 * kLanes, "one case for each number of vectors");
  const uint8_t* input = static_cast<const uint8_t*>(args.input);
  const int64_t image_bytes = args.channels * args.spatial * float_bytes(kType);
  const int64_t blocks = ceil_div(args.spatial, kBinarizePixels);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t image = item / blocks;
    const int64_t pixel = item % blocks * kBinarizePixels;
    const int64_t left = args.spatial - pixel;
    const int64_t pixels = left < kBinarizePixels ? left : kBinarizePixels;
    const uint8_t* block = input + image * image_bytes + pixel * float_bytes(kType);
    const int64_t first_pixel = image * args.spatial + pixel;
    switch (ceil_div(pixels, kLanes)) {
      case 1:
        pack_planar_block<kType, kUniform, kMask, 1>(args, block, first_pixel, pixels);
        break;
      case 2:
        pack_planar_block<kType, kUniform, kMask, 2>(args, block, first_pixel, pixels);
        break;
      case 3:
        pack_planar_block<kType, kUniform, kMask, 3>(args, block, first_pixel, pixels);
        break;
      case 4:
        pack_planar_block<kType, kUniform, kMask, 4>(args, block, first_pixel, pixels);
        break;
    }
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

}  // namespace lowbit::avx512
