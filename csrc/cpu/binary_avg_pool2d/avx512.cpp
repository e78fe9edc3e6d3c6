// A packed word is a mask register: one masked byte addition counts 64 channels of one tap. Bytes are widened to 32
// bits before they can overflow.
#include <immintrin.h>

#include "cpu/binary_avg_pool2d/binary_avg_pool2d.h"

namespace lowbit::avx512 {
namespace {

constexpr int64_t kByteTaps = 255;  // additions of 1 that a byte holds
constexpr int kLanes = 16;
constexpr int kVectorsPerWord = kWordBits / kLanes;
constexpr int64_t kTableTaps = 31;  // a two-register table has 32 entries

// Turns a count of ones into the average. Small windows look the quotient up, because a vector of VDIVPS takes 16
// cycles: 64 x 56 x 56 pooled 2 x 2 takes 7.0 us against 9.8 with the division (Sapphire Rapids; AVX2 gains nothing
// from a table).
class Averager {
 public:
  void set_window(const PoolWindow& window, Encoding encoding) {
    if (window.taps == taps_ && window.divisor == divisor_) return;
    taps_ = window.taps;
    divisor_ = window.divisor;
    scale_shift_ = encoding == Encoding::sign ? 1 : 0;
    offset_ = encoding == Encoding::sign ? static_cast<int>(-window.taps) : 0;
    const __m512i index_u32x16 = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    low_f32x16_ = divide(index_u32x16);
    high_f32x16_ = divide(_mm512_add_epi32(index_u32x16, _mm512_set1_epi32(kLanes)));
  }

  __m512 operator()(__m512i ones_u32x16) const {
    if (taps_ <= kTableTaps) return _mm512_permutex2var_ps(low_f32x16_, ones_u32x16, high_f32x16_);
    return divide(ones_u32x16);
  }

 private:
  __m512 divide(__m512i ones_u32x16) const {
    const __m512i sum_i32x16 =
        _mm512_add_epi32(_mm512_slli_epi32(ones_u32x16, scale_shift_), _mm512_set1_epi32(offset_));
    return _mm512_div_ps(_mm512_cvtepi32_ps(sum_i32x16), _mm512_set1_ps(divisor_));
  }

  int64_t taps_ = -1;
  float divisor_ = 0;
  unsigned scale_shift_ = 0;
  int offset_ = 0;
  __m512 low_f32x16_ = _mm512_setzero_ps(), high_f32x16_ = _mm512_setzero_ps();
};

void widen_and_add(__m512i count_u8x64, __m512i (&ones_u32x16)[kVectorsPerWord]) {
  const __m128i parts_u8x16[kVectorsPerWord] = {
      _mm512_castsi512_si128(count_u8x64), _mm512_extracti32x4_epi32(count_u8x64, 1),
      _mm512_extracti32x4_epi32(count_u8x64, 2), _mm512_extracti32x4_epi32(count_u8x64, 3)};
  for (int i = 0; i < kVectorsPerWord; ++i) {
    ones_u32x16[i] = _mm512_add_epi32(ones_u32x16[i], _mm512_cvtepu8_epi32(parts_u8x16[i]));
  }
}

// Averages of kWords neighbouring words of the window. `input` is the first of them in pixel 0 of the image, `channels`
// the number of channels from there on.
template <int kWords>
void average_words(const PoolShape& s, const uint64_t* input, const PoolWindow& window, const Averager& average,
                   int64_t channels, float* output) {
  const int64_t row_words = words_for(s.channels);
  const __m512i one_u8x64 = _mm512_set1_epi8(1);
  __m512i ones_u32x16[kWords][kVectorsPerWord] = {};
  __m512i count_u8x64[kWords] = {};
  int64_t room = kByteTaps;
  for (int64_t y = window.top; y < window.bottom; ++y) {
    for (int64_t x = window.left; x < window.right;) {
      const int64_t stop = window.right - x < room ? window.right : x + room;
      room -= stop - x;
      for (const uint64_t* pixel = input + (y * s.width + x) * row_words; x < stop; ++x, pixel += row_words) {
        for (int i = 0; i < kWords; ++i) {
          count_u8x64[i] = _mm512_mask_add_epi8(count_u8x64[i], pixel[i], count_u8x64[i], one_u8x64);
        }
      }
      if (room == 0) {
        for (int i = 0; i < kWords; ++i) {
          widen_and_add(count_u8x64[i], ones_u32x16[i]);
          count_u8x64[i] = _mm512_setzero_si512();
        }
        room = kByteTaps;
      }
    }
  }
  for (int i = 0; i < kWords; ++i) {
    widen_and_add(count_u8x64[i], ones_u32x16[i]);
    for (int j = 0; j < kVectorsPerWord; ++j) {
      const int64_t channel = i * kWordBits + j * kLanes;
      const __m512 average_f32x16 = average(ones_u32x16[i][j]);
      if (channels - channel >= kLanes) {
        _mm512_storeu_ps(output + channel, average_f32x16);
      } else if (channels > channel) {
        const __mmask16 lanes = static_cast<__mmask16>(low_mask(channels - channel));
        _mm512_mask_storeu_ps(output + channel, lanes, average_f32x16);
      }
    }
  }
}

}  // namespace

void binary_avg_pool2d(const BinaryAvgPool2dArgs& args, int64_t begin, int64_t end) noexcept {
  constexpr int kWords = 4;  // words counted together: half a cache line of each pixel
  const PoolShape& s = args.shape;
  const int64_t row_words = words_for(s.channels);
  Averager average;
  for (int64_t item = begin; item < end; ++item) {
    const uint64_t* image = args.input + item / s.out_height * s.height * s.width * row_words;
    const PoolSpan rows = row_span(s, item % s.out_height);
    for (int64_t x = 0; x < s.out_width; ++x) {
      const PoolWindow window = pool_window(args.count_include_pad, args.divisor_override, rows, column_span(s, x));
      average.set_window(window, args.encoding);
      float* output = args.output + (item * s.out_width + x) * s.channels;
      int64_t word = 0;
      for (; word + kWords <= row_words; word += kWords) {
        average_words<kWords>(s, image + word, window, average, s.channels - word * kWordBits,
                              output + word * kWordBits);
      }
      for (; word < row_words; ++word) {
        average_words<1>(s, image + word, window, average, s.channels - word * kWordBits, output + word * kWordBits);
      }
    }
  }
}

}  // namespace lowbit::avx512
