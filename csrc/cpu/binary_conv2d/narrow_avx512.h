// Narrow groups (narrow_groups.h) in AVX-512: a masked load of the pixel, VPERMB, one VPTERNLOG for xor and mask,
// VPOPCNTB and an addition for 64, 32 or 16 filters and a tap. Counts stay in bytes, whatever a lane is, and are
// widened at the end.
#pragma once

#include <immintrin.h>

#include "cpu/binary_conv2d/driver.h"
#include "cpu/binary_conv2d/epilogue_avx512.h"

namespace lowbit {
namespace {

struct Avx512NarrowKernel {
  static constexpr bool kMergesGroups = true;
  static constexpr int64_t kPixels = 8;
  static constexpr int64_t kChunkTiles = 8;
  static constexpr int64_t kLanes = kFilterBlock;
  using Epilogue = Avx512Epilogue;
  using Tile = PixelTile<kPixels>;
  using Block = NarrowBlock<64>;

  static int64_t block_bytes(const ConvShape& shape, int64_t) { return Block(shape).bytes; }
  static void block_weight(const ConvShape& shape, const uint64_t* words, int64_t first, int64_t filters,
                           uint8_t* block) {
    Block(shape).write(shape, words, first, filters, block);
  }

  static int64_t prepared_bytes(const BinaryConv2dArgs&) { return 0; }
  static void prepare(const BinaryConv2dArgs&, const Tile&, int64_t, void*) {}

  static void run(const BinaryConv2dArgs& args, const Tile& tile, int64_t, const uint8_t* block, int64_t, const void*,
                  int32_t* const* acc) {
    switch (lane_bytes(args.shape)) {
      case 1:
        return run_lanes<1>(args, tile, block, acc);
      case 2:
        return run_lanes<2>(args, tile, block, acc);
      default:
        return run_lanes<4>(args, tile, block, acc);
    }
  }

 private:
  // What meets a load of each pixel: 16 * kVectors filters.
  template <int kLaneBytes>
  struct Load {
    static constexpr int kVectors = 4 / kLaneBytes;

    int64_t first;    // byte of the pixel
    __mmask64 bytes;  // that the pixel has
    __m512i index_u8x64, mask_u8x64;
    const uint8_t* weight;
    __m512i base_i32x16[kVectors];  // convolution = base - (popc(a ^ w) << shift)
    int shift;
  };

  template <int kLaneBytes>
  static void run_lanes(const BinaryConv2dArgs& args, const Tile& tile, const uint8_t* block, int32_t* const* acc) {
    const ConvShape& shape = args.shape;
    const Block layout(shape);
    const int64_t pixel_bytes = input_words(shape) * 8, channels = channels_per_group(shape);
    for_each_window(shape, tile, layout.lanes, [&](const NarrowWindow& window) {
      for (int64_t i = 0; i < layout.loads; ++i) {
        Load<kLaneBytes> load;
        memcpy(&load.first, block + i * static_cast<int64_t>(sizeof load.first), sizeof load.first);
        load.bytes = low_mask(pixel_bytes - load.first);
        load.index_u8x64 = _mm512_loadu_si512(block + layout.index_offset + i * 64);
        load.mask_u8x64 = _mm512_loadu_si512(block + layout.mask_offset + i * 64);
        load.weight = block + layout.weight_offset + window.weight + i * 64;
        if (args.encoding == Encoding::sign) {
          const __m512i channels_i32x16 = _mm512_set1_epi32(static_cast<int32_t>(window.taps() * channels));
          for (__m512i& base_i32x16 : load.base_i32x16) base_i32x16 = channels_i32x16;
          load.shift = 1;
        } else {
          set_base_to_weight(window, tile, &load);
          load.shift = 0;
        }
        const int64_t filter = i * Load<kLaneBytes>::kVectors * 16;
        int64_t pixel = 0;
        for (; pixel + 4 <= tile.count; pixel += 4) run_strip<4>(window, tile, pixel, load, acc, filter);
        for (; pixel < tile.count; ++pixel) run_strip<1>(window, tile, pixel, load, acc, filter);
      }
    });
  }

  // base = popc(w): what a pixel without ones differs by.
  template <int kLaneBytes>
  static void set_base_to_weight(const NarrowWindow& window, const Tile& tile, Load<kLaneBytes>* load) {
    Load<kLaneBytes> zeros = *load;
    zeros.bytes = 0;
    __m512i bytes_u8x64[1];
    count_bytes(window, tile, 0, zeros, bytes_u8x64);
    repeat<Load<kLaneBytes>::kVectors>(
        [&](auto v) { load->base_i32x16[v] = count_lanes<kLaneBytes, v>(bytes_u8x64[0]); });
  }

  // acc = convolution, or += behind the first window, of kPixels pixels from `pixel` on.
  template <int kPixels, int kLaneBytes>
  [[gnu::always_inline]] static inline void run_strip(const NarrowWindow& window, const Tile& tile, int64_t pixel,
                                                      const Load<kLaneBytes>& load, int32_t* const* acc,
                                                      int64_t filter) {
    __m512i bytes_u8x64[kPixels];
    count_bytes(window, tile, pixel, load, bytes_u8x64);
    repeat<kPixels>([&](auto p) {
      int32_t* to = acc[pixel + p] + filter;
      repeat<Load<kLaneBytes>::kVectors>([&](auto v) {
        const __m512i differing_i32x16 =
            _mm512_sll_epi32(count_lanes<kLaneBytes, v>(bytes_u8x64[p]), _mm_cvtsi32_si128(load.shift));
        __m512i sum_i32x16 = _mm512_sub_epi32(load.base_i32x16[v], differing_i32x16);
        if (!window.first) sum_i32x16 = _mm512_add_epi32(sum_i32x16, _mm512_loadu_si512(to + v * 16));
        _mm512_storeu_si512(to + v * 16, sum_i32x16);
      });
    });
  }

  // popc(a ^ w) of each byte of the lanes, over the window.
  template <int kPixels, int kLaneBytes>
  [[gnu::always_inline]] static inline void count_bytes(const NarrowWindow& window, const Tile& tile, int64_t pixel,
                                                        const Load<kLaneBytes>& load, __m512i (&bytes_u8x64)[kPixels]) {
    const uint8_t* input[kPixels];
    repeat<kPixels>([&](auto p) {
      input[p] = reinterpret_cast<const uint8_t*>(tile.input[pixel + p]) + load.first + window.input;
      bytes_u8x64[p] = _mm512_setzero_si512();
    });
    for (int64_t y = 0; y < window.rows; ++y) {
      for (int64_t x = 0; x < window.columns; ++x) {
        const int64_t offset = y * window.input_row + x * window.input_column;
        const __m512i weight_u8x64 = _mm512_loadu_si512(load.weight + y * window.weight_row + x * window.weight_column);
        repeat<kPixels>([&](auto p) {
          const __m512i pixel_u8x64 = _mm512_maskz_loadu_epi8(load.bytes, input[p] + offset);
          const __m512i differing_u8x64 =
              _mm512_ternarylogic_epi32(_mm512_permutexvar_epi8(load.index_u8x64, pixel_u8x64), weight_u8x64,
                                        load.mask_u8x64, 0x28);  // (a ^ w) & mask
          bytes_u8x64[p] = _mm512_add_epi8(bytes_u8x64[p], _mm512_popcnt_epi8(differing_u8x64));
        });
      }
    }
  }

  // Vector kVector of the sums of each lane's bytes.
  template <int kLaneBytes, int kVector>
  static inline __m512i count_lanes(__m512i bytes_u8x64) {
    if constexpr (kLaneBytes == 1) return _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(bytes_u8x64, kVector));
    const __m512i pairs_u16x32 = _mm512_maddubs_epi16(bytes_u8x64, _mm512_set1_epi8(1));
    if constexpr (kLaneBytes == 2) return _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(pairs_u16x32, kVector));
    return _mm512_madd_epi16(pairs_u16x32, _mm512_set1_epi16(1));
  }
};

}  // namespace
}  // namespace lowbit
