// 32 packed bits become 32 bytes of 0 or -1 (VPSHUFB copies each byte to its 8 lanes, which test their own bit) and are
// subtracted from byte counters. Bytes are widened to 32 bits before they can overflow.
#include <immintrin.h>

#include "cpu/binary_avg_pool2d/binary_avg_pool2d.h"

namespace lowbit::avx2 {
namespace {

constexpr int64_t kByteTaps = 255;  // subtractions of -1 that a byte holds
constexpr int kLanes = 8;

// Bytes of 0 or -1 from 32 of the bits that every 64-bit lane of `word` repeats; byte i takes its bit from byte
// source[i].
__m256i bits_to_bytes(__m256i word_u64x4, __m256i source_u8x32) {
  const __m256i own_bit_u8x32 = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201));
  const __m256i spread_u8x32 = _mm256_shuffle_epi8(word_u64x4, source_u8x32);
  return _mm256_cmpeq_epi8(_mm256_and_si256(spread_u8x32, own_bit_u8x32), own_bit_u8x32);
}

// Counts of the channels of one packed word: `bytes` since they were last added to `ones`.
struct Counts {
  alignas(32) uint8_t bytes[kWordBits];
  alignas(32) int32_t ones[kWordBits];

  __m256i sum(int channel) const {
    const __m128i bytes_u8x8 = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes + channel));
    const __m256i ones_u32x8 = _mm256_load_si256(reinterpret_cast<const __m256i*>(ones + channel));
    return _mm256_add_epi32(ones_u32x8, _mm256_cvtepu8_epi32(bytes_u8x8));
  }
};

// Averages of one packed word of the window. `input` is that word in pixel 0 of the image, `channels` the number of
// channels from its first bit on.
void average_word(const BinaryAvgPool2dArgs& args, const uint64_t* input, const PoolWindow& window, int64_t channels,
                  float* output) {
  const PoolShape& s = args.shape;
  const int64_t row_words = words_for(s.channels);
  const __m256i low_source_u8x32 = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i high_source_u8x32 = _mm256_add_epi8(low_source_u8x32, _mm256_set1_epi8(4));
  Counts counts = {};
  __m256i low_u8x32 = _mm256_setzero_si256();
  __m256i high_u8x32 = _mm256_setzero_si256();
  const auto store_bytes = [&] {
    _mm256_store_si256(reinterpret_cast<__m256i*>(counts.bytes), low_u8x32);
    _mm256_store_si256(reinterpret_cast<__m256i*>(counts.bytes + 32), high_u8x32);
  };
  int64_t room = kByteTaps;
  for (int64_t y = window.top; y < window.bottom; ++y) {
    for (int64_t x = window.left; x < window.right;) {
      const int64_t stop = window.right - x < room ? window.right : x + room;
      room -= stop - x;
      for (const uint64_t* pixel = input + (y * s.width + x) * row_words; x < stop; ++x, pixel += row_words) {
        const __m256i word_u64x4 = _mm256_set1_epi64x(static_cast<long long>(*pixel));
        low_u8x32 = _mm256_sub_epi8(low_u8x32, bits_to_bytes(word_u64x4, low_source_u8x32));
        high_u8x32 = _mm256_sub_epi8(high_u8x32, bits_to_bytes(word_u64x4, high_source_u8x32));
      }
      if (room == 0) {
        store_bytes();
        for (int channel = 0; channel < kWordBits; channel += kLanes) {
          _mm256_store_si256(reinterpret_cast<__m256i*>(counts.ones + channel), counts.sum(channel));
        }
        low_u8x32 = high_u8x32 = _mm256_setzero_si256();
        room = kByteTaps;
      }
    }
  }
  store_bytes();
  const int scale_shift = args.encoding == Encoding::sign ? 1 : 0;
  const __m256i offset_i32x8 = _mm256_set1_epi32(args.encoding == Encoding::sign ? static_cast<int>(window.taps) : 0);
  const __m256 divisor_f32x8 = _mm256_set1_ps(window.divisor);
  for (int channel = 0; channel < kWordBits && channel < channels; channel += kLanes) {
    const __m256i sum_i32x8 = _mm256_sub_epi32(_mm256_slli_epi32(counts.sum(channel), scale_shift), offset_i32x8);
    const __m256 average_f32x8 = _mm256_div_ps(_mm256_cvtepi32_ps(sum_i32x8), divisor_f32x8);
    if (channels - channel >= kLanes) {
      _mm256_storeu_ps(output + channel, average_f32x8);
    } else {
      const __m256i index_u32x8 = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
      const __m256i left_u32x8 = _mm256_set1_epi32(static_cast<int>(channels - channel));
      _mm256_maskstore_ps(output + channel, _mm256_cmpgt_epi32(left_u32x8, index_u32x8), average_f32x8);
    }
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
      for (int64_t word = 0; word < row_words; ++word) {
        average_word(args, image + word, window, s.channels - word * kWordBits, output + word * kWordBits);
      }
    }
  }
}

}  // namespace lowbit::avx2
