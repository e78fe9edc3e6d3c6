// Narrow groups (narrow_groups.h) in AVX2: half vectors are loads of 16 bytes, shuffled on their own, and bits of a
// byte are counted by looking up its nibbles.
#pragma once

#include <immintrin.h>

#include "cpu/binary_conv2d/driver.h"
#include "cpu/binary_conv2d/epilogue_avx2.h"

namespace lowbit {
namespace {

struct Avx2NarrowKernel {
  static constexpr bool kMergesGroups = true;
  static constexpr int64_t kPixels = 8;
  static constexpr int64_t kChunkTiles = 8;
  static constexpr int64_t kLanes = kFilterBlock;
  using Epilogue = Avx2Epilogue;
  using Tile = PixelTile<kPixels>;
  using Block = NarrowBlock<16>;

  static int64_t block_bytes(const ConvShape& shape, int64_t) { return Block(shape).bytes; }
  static void block_weight(const ConvShape& shape, const uint64_t* words, int64_t first, int64_t filters,
                           uint8_t* block) {
    Block(shape).write(shape, words, first, filters, block);
  }

  static int64_t prepared_bytes(const BinaryConv2dArgs&) { return 0; }
  static void prepare(const BinaryConv2dArgs&, const Tile&, int64_t, void*) {}

  static void run(const BinaryConv2dArgs& args, const Tile& tile, int64_t, const uint8_t* block, int64_t, const void*,
                  int32_t* const* acc) {
    const bool one_word = input_words(args.shape) == 1;
    switch (lane_bytes(args.shape)) {
      case 1:
        return one_word ? run_lanes<1, true>(args, tile, block, acc) : run_lanes<1, false>(args, tile, block, acc);
      case 2:
        return one_word ? run_lanes<2, true>(args, tile, block, acc) : run_lanes<2, false>(args, tile, block, acc);
      default:
        return one_word ? run_lanes<4, true>(args, tile, block, acc) : run_lanes<4, false>(args, tile, block, acc);
    }
  }

 private:
  // What meets two loads of each pixel: 8 * kVectors filters.
  template <int kLaneBytes, bool kOneWord>
  struct Loads {
    static constexpr int kVectors = 4 / kLaneBytes;

    int64_t first[2];  // bytes of the pixel
    __m256i index_u8x32, mask_u8x32;
    const uint8_t* weight;
    __m256i base_i32x8[kVectors];  // convolution = base - (popc(a ^ w) << shift)
    int shift;
  };

  static inline __m256i load_vector(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

  template <int kLaneBytes, bool kOneWord>
  static void run_lanes(const BinaryConv2dArgs& args, const Tile& tile, const uint8_t* block, int32_t* const* acc) {
    const ConvShape& shape = args.shape;
    const Block layout(shape);
    const int64_t channels = channels_per_group(shape);
    for_each_window(shape, tile, layout.lanes, [&](const NarrowWindow& window) {
      for (int64_t i = 0; i < layout.loads / 2; ++i) {
        Loads<kLaneBytes, kOneWord> loads;
        memcpy(loads.first, block + i * static_cast<int64_t>(sizeof loads.first), sizeof loads.first);
        loads.index_u8x32 = load_vector(block + layout.index_offset + i * 32);
        loads.mask_u8x32 = load_vector(block + layout.mask_offset + i * 32);
        loads.weight = block + layout.weight_offset + window.weight + i * 32;
        if (args.encoding == Encoding::sign) {
          const __m256i channels_i32x8 = _mm256_set1_epi32(static_cast<int32_t>(window.taps() * channels));
          for (__m256i& base_i32x8 : loads.base_i32x8) base_i32x8 = channels_i32x8;
          loads.shift = 1;
        } else {
          set_base_to_weight(window, &loads);
          loads.shift = 0;
        }
        const int64_t filter = i * Loads<kLaneBytes, kOneWord>::kVectors * 8;
        int64_t pixel = 0;
        for (; pixel + 2 <= tile.count; pixel += 2) run_strip<2>(window, tile, pixel, loads, acc, filter);
        if (pixel < tile.count) run_strip<1>(window, tile, pixel, loads, acc, filter);
      }
    });
  }

  // base = popc(w): what a pixel without ones differs by.
  template <int kLaneBytes, bool kOneWord>
  static void set_base_to_weight(const NarrowWindow& window, Loads<kLaneBytes, kOneWord>* loads) {
    alignas(16) static constexpr uint8_t kZeros[16] = {};
    NarrowWindow still = window;
    still.input = still.input_row = still.input_column = 0;
    Loads<kLaneBytes, kOneWord> zeros = *loads;
    zeros.first[0] = zeros.first[1] = 0;
    const uint8_t* const input[1] = {kZeros};
    __m256i bytes_u8x32[1];
    count_bytes(still, input, zeros, bytes_u8x32);
    repeat<Loads<kLaneBytes, kOneWord>::kVectors>(
        [&](auto v) { loads->base_i32x8[v] = count_lanes<kLaneBytes, v>(bytes_u8x32[0]); });
  }

  // acc = convolution, or += behind the first window, of kPixels pixels from `pixel` on.
  template <int kPixels, int kLaneBytes, bool kOneWord>
  [[gnu::always_inline]] static inline void run_strip(const NarrowWindow& window, const Tile& tile, int64_t pixel,
                                                      const Loads<kLaneBytes, kOneWord>& loads, int32_t* const* acc,
                                                      int64_t filter) {
    const uint8_t* input[kPixels];
    repeat<kPixels>([&](auto p) { input[p] = reinterpret_cast<const uint8_t*>(tile.input[pixel + p]); });
    __m256i bytes_u8x32[kPixels];
    count_bytes(window, input, loads, bytes_u8x32);
    repeat<kPixels>([&](auto p) {
      int32_t* to = acc[pixel + p] + filter;
      repeat<Loads<kLaneBytes, kOneWord>::kVectors>([&](auto v) {
        const __m256i differing_i32x8 =
            _mm256_sll_epi32(count_lanes<kLaneBytes, v>(bytes_u8x32[p]), _mm_cvtsi32_si128(loads.shift));
        __m256i sum_i32x8 = _mm256_sub_epi32(loads.base_i32x8[v], differing_i32x8);
        if (!window.first) sum_i32x8 = _mm256_add_epi32(sum_i32x8, load_vector(to + v * 8));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + v * 8), sum_i32x8);
      });
    });
  }

  // popc(a ^ w) of each byte of the lanes, over the window.
  template <int kPixels, int kLaneBytes, bool kOneWord>
  [[gnu::always_inline]] static inline void count_bytes(const NarrowWindow& window, const uint8_t* const* input,
                                                        const Loads<kLaneBytes, kOneWord>& loads,
                                                        __m256i (&bytes_u8x32)[kPixels]) {
    repeat<kPixels>([&](auto p) { bytes_u8x32[p] = _mm256_setzero_si256(); });
    for (int64_t y = 0; y < window.rows; ++y) {
      for (int64_t x = 0; x < window.columns; ++x) {
        const int64_t offset = window.input + y * window.input_row + x * window.input_column;
        const __m256i weight_u8x32 = load_vector(loads.weight + y * window.weight_row + x * window.weight_column);
        repeat<kPixels>([&](auto p) {
          const uint8_t* from = input[p] + offset;
          const __m256i pixel_u8x32 = _mm256_inserti128_si256(
              _mm256_castsi128_si256(load<kOneWord>(from + loads.first[0])), load<kOneWord>(from + loads.first[1]), 1);
          const __m256i differing_u8x32 = _mm256_and_si256(
              _mm256_xor_si256(_mm256_shuffle_epi8(pixel_u8x32, loads.index_u8x32), weight_u8x32), loads.mask_u8x32);
          bytes_u8x32[p] = _mm256_add_epi8(bytes_u8x32[p], popcount(differing_u8x32));
        });
      }
    }
  }

  // A pixel of one word has no 16 bytes.
  template <bool kOneWord>
  static inline __m128i load(const uint8_t* from) {
    return kOneWord ? _mm_loadu_si64(from) : _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  }

  static inline __m256i popcount(__m256i bytes_u8x32) {
    const __m256i counts_u8x32 =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
    const __m256i low_nibbles_u8x32 = _mm256_set1_epi8(15);
    const __m256i low_u8x32 = _mm256_and_si256(bytes_u8x32, low_nibbles_u8x32);
    const __m256i high_u8x32 = _mm256_and_si256(_mm256_srli_epi16(bytes_u8x32, 4), low_nibbles_u8x32);
    return _mm256_add_epi8(_mm256_shuffle_epi8(counts_u8x32, low_u8x32), _mm256_shuffle_epi8(counts_u8x32, high_u8x32));
  }

  // Vector kVector of the sums of each lane's bytes.
  template <int kLaneBytes, int kVector>
  static inline __m256i count_lanes(__m256i bytes_u8x32) {
    if constexpr (kLaneBytes == 1) {
      const __m128i half_u8x16 = _mm256_extracti128_si256(bytes_u8x32, kVector / 2);
      return _mm256_cvtepu8_epi32(kVector % 2 == 0 ? half_u8x16 : _mm_srli_si128(half_u8x16, 8));
    }
    const __m256i pairs_u16x16 = _mm256_maddubs_epi16(bytes_u8x32, _mm256_set1_epi8(1));
    if constexpr (kLaneBytes == 2) return _mm256_cvtepu16_epi32(_mm256_extracti128_si256(pairs_u16x16, kVector));
    return _mm256_madd_epi16(pairs_u16x16, _mm256_set1_epi16(1));
  }
};

}  // namespace
}  // namespace lowbit
