// One activation word, broadcast, meets a vector of 16 filters in 32-bit lanes: no horizontal sums.
//
// xor + popcount + add is 3 operations per 512 bits on the 2 vector ports, at most 683 operations (2 * MAC) a cycle.
// Here two words at a time go through a carry-save adder, 5 operations for both, at most 819: with the product bits p0
// and p1 of the words, u = ones ^ p0 and s = u ^ p1 are one VPTERNLOG each, the xor of activation and weight included,
// and only the carry, u ? ~s : ones, worth 2, is counted. Measured on Sapphire Rapids, 6 pixels x 32 filters of 2304
// bits, start and end included: 737 operations a cycle.
//
// Both encodings count a ^ w: 2 popc(a & w) - popc(a) = popc(w) - popc(a ^ w), and popc(w) is known beforehand.

#include <immintrin.h>

#include "cpu/binary_conv2d/driver.h"
#include "cpu/binary_conv2d/epilogue_avx512.h"
#include "cpu/binary_conv2d/narrow_avx512.h"

namespace lowbit {
namespace {

constexpr int64_t kVectorFilters = 16;
constexpr int64_t kVectorBytes = 64;

inline int64_t vectors_for(int64_t filters) { return ceil_div(filters, kVectorFilters); }

// 32-bit words of a group's channels: an upper half word without channels is skipped.
inline int64_t half_words(const ConvShape& shape) { return ceil_div(channels_per_group(shape), 32); }

inline __m512i broadcast(const uint8_t* input) {
  int32_t word;
  memcpy(&word, input, sizeof word);
  return _mm512_set1_epi32(word);
}

// 6 x 2 vectors x 2 counters + 4 weights + 2 activations + 2 temporaries = 32 registers. 7 pixels spill.
constexpr int64_t kMaxPixels = 6;

// A tile and a filter block as the micro-kernel sees them; strides in bytes. Taps of a row that follow each other in
// the input without a gap have become one tap of more words.
struct Work {
  int64_t rows, columns, words;  // words of 32 bits
  int64_t input_row, input_column;
  int64_t weight_row, weight_column, weight_word;
  const uint8_t* input[kMaxPixels];
  const uint8_t* weight;
  const int32_t* base;  // acc[pixel][filter] = base[filter] - (popc(a ^ w) << shift)
  int32_t shift;
  int32_t* const* acc;
};

// Carry-save counters of kPixels x (16 * kVectors) dot products: popc so far = 2 * total + popc(ones).
template <int kPixels, int kVectors>
struct Counters {
  __m512i ones_u32x16[kPixels][kVectors];
  __m512i total_u32x16[kPixels][kVectors];

  [[gnu::always_inline]] inline void clear() {
#pragma GCC unroll 8
    for (int pixel = 0; pixel < kPixels; ++pixel) {
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) ones_u32x16[pixel][i] = total_u32x16[pixel][i] = _mm512_setzero_si512();
    }
  }

  // Two words, at offsets a0 and a1 from each pixel's input.
  [[gnu::always_inline]] inline void add_pair(const uint8_t* const* input, int64_t a0, int64_t a1, const uint8_t* w0,
                                              const uint8_t* w1) {
    __m512i weight0_u32x16[kVectors], weight1_u32x16[kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) {
      weight0_u32x16[i] = _mm512_loadu_si512(w0 + kVectorBytes * i);
      weight1_u32x16[i] = _mm512_loadu_si512(w1 + kVectorBytes * i);
    }
#pragma GCC unroll 8
    for (int pixel = 0; pixel < kPixels; ++pixel) {
      const __m512i word0_u32x16 = broadcast(input[pixel] + a0), word1_u32x16 = broadcast(input[pixel] + a1);
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) {
        carry_save(&ones_u32x16[pixel][i], &total_u32x16[pixel][i], word0_u32x16, word1_u32x16, weight0_u32x16[i],
                   weight1_u32x16[i]);
      }
    }
  }

  [[gnu::always_inline]] inline void add_single(const uint8_t* const* input, int64_t a, const uint8_t* w) {
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) {
      const __m512i weight_u32x16 = _mm512_loadu_si512(w + kVectorBytes * i);
#pragma GCC unroll 8
      for (int pixel = 0; pixel < kPixels; ++pixel) {
        const __m512i sum_u32x16 =
            _mm512_ternarylogic_epi32(broadcast(input[pixel] + a), ones_u32x16[pixel][i], weight_u32x16, 0x96);
        const __m512i carry_u32x16 = _mm512_andnot_si512(sum_u32x16, ones_u32x16[pixel][i]);
        total_u32x16[pixel][i] = _mm512_add_epi32(total_u32x16[pixel][i], _mm512_popcnt_epi32(carry_u32x16));
        ones_u32x16[pixel][i] = sum_u32x16;
      }
    }
  }

  [[gnu::always_inline]] inline __m512i count(int pixel, int i) const {
    return _mm512_add_epi32(_mm512_slli_epi32(total_u32x16[pixel][i], 1), _mm512_popcnt_epi32(ones_u32x16[pixel][i]));
  }

 private:
  // Assembly, because from intrinsics g++ 12 gives each new `ones` a register of its own and spills (670 operations a
  // cycle against 737). Moves cost no port: they are renamed away.
  [[gnu::always_inline]] static inline void carry_save(__m512i* one_u32x16, __m512i* sum_u32x16, __m512i a0_u32x16,
                                                       __m512i a1_u32x16, __m512i w0_u32x16, __m512i w1_u32x16) {
    __m512i carry_u32x16, u_u32x16;
    asm("vmovdqa64 %[one], %[carry]\n\t"
        "vpternlogd $0x96, %[w0], %[a0], %[one]\n\t"
        "vmovdqa64 %[one], %[u]\n\t"                    // u = ones ^ p0
        "vpternlogd $0x96, %[w1], %[a1], %[one]\n\t"    // one = s = u ^ p1
        "vpternlogd $0x74, %[one], %[u], %[carry]\n\t"  // carry = u ? ~s : ones
        "vpopcntd %[carry], %[carry]\n\t"
        "vpaddd %[carry], %[sum], %[sum]"
        : [one] "+v"(*one_u32x16), [sum] "+v"(*sum_u32x16), [carry] "=&v"(carry_u32x16), [u] "=&v"(u_u32x16)
        : [a0] "v"(a0_u32x16), [a1] "v"(a1_u32x16), [w0] "v"(w0_u32x16), [w1] "v"(w1_u32x16));
  }
};

// kPixels x (16 * kVectors) filters, from vector `first` of the block on.
template <int kPixels, int kVectors, bool kOdd>
[[gnu::noinline]] void micro_kernel(const Work& work, int64_t first) {
  const uint8_t* input[kPixels];
#pragma GCC unroll 8
  for (int pixel = 0; pixel < kPixels; ++pixel) input[pixel] = work.input[pixel];
  const uint8_t* weight = work.weight + first * kVectorBytes;
  const int64_t weight_word = work.weight_word;
  Counters<kPixels, kVectors> counters;
  counters.clear();
  // With kOdd, the last word of a tap waits for that of the next tap. Only there, because a second expansion of
  // add_pair makes the register allocator spill counters between rows.
  [[maybe_unused]] int64_t waiting_input = 0;
  [[maybe_unused]] const uint8_t* waiting_weight = nullptr;
  for (int64_t y = 0; y < work.rows; ++y) {
    for (int64_t x = 0; x < work.columns; ++x) {
      int64_t a = y * work.input_row + x * work.input_column;
      const uint8_t* w = weight + y * work.weight_row + x * work.weight_column;
      const int64_t pairs_end = a + work.words / 2 * 8;
      for (; a < pairs_end; a += 8) {
        counters.add_pair(input, a, a + 4, w, w + weight_word);
        w += 2 * weight_word;
      }
      if constexpr (kOdd) {
        if (waiting_weight == nullptr) {
          waiting_input = a;
          waiting_weight = w;
        } else {
          counters.add_pair(input, waiting_input, a, waiting_weight, w);
          waiting_weight = nullptr;
        }
      }
    }
  }
  if constexpr (kOdd) {
    if (waiting_weight != nullptr) counters.add_single(input, waiting_input, waiting_weight);
  }
  const __m512i shift_u32x16 = _mm512_set1_epi32(work.shift);
#pragma GCC unroll 8
  for (int i = 0; i < kVectors; ++i) {
    const int64_t filter = (first + i) * kVectorFilters;
    const __m512i base_i32x16 = _mm512_loadu_si512(work.base + filter);
#pragma GCC unroll 8
    for (int pixel = 0; pixel < kPixels; ++pixel) {
      const __m512i differing_i32x16 = _mm512_sllv_epi32(counters.count(pixel, i), shift_u32x16);
      _mm512_storeu_si512(work.acc[pixel] + filter, _mm512_sub_epi32(base_i32x16, differing_i32x16));
    }
  }
}

// Few pixels meet 4 vectors of filters at a time, so that enough independent counters hide the latencies.
template <int kPixels, bool kOdd>
inline void run_pixels(const Work& work, int64_t vectors) {
  constexpr int kMost = kPixels <= 2 ? 4 : 2;
  int64_t done = 0;
  for (; vectors - done >= kMost; done += kMost) micro_kernel<kPixels, kMost, kOdd>(work, done);
  if (kMost > 2 && vectors - done >= 2) {
    micro_kernel<kPixels, 2, kOdd>(work, done);
    done += 2;
  }
  if (done < vectors) micro_kernel<kPixels, 1, kOdd>(work, done);
}

template <bool kOdd>
inline void run_work(const Work& work, int64_t pixels, int64_t vectors) {
  switch (pixels) {
    case 1:
      return run_pixels<1, kOdd>(work, vectors);
    case 2:
      return run_pixels<2, kOdd>(work, vectors);
    case 3:
      return run_pixels<3, kOdd>(work, vectors);
    case 4:
      return run_pixels<4, kOdd>(work, vectors);
    case 5:
      return run_pixels<5, kOdd>(work, vectors);
    default:
      return run_pixels<6, kOdd>(work, vectors);
  }
}

struct Avx512Kernel {
  static constexpr bool kMergesGroups = false;
  static constexpr int64_t kPixels = kMaxPixels;
  static constexpr int64_t kChunkTiles = 8;
  static constexpr int64_t kLanes = kVectorFilters;
  using Epilogue = Avx512Epilogue;
  using Tile = PixelTile<kPixels>;

  // popc(w) int32 [1 + taps][row], first of all taps, then of each; words uint32 [taps][half_words][row].
  // row = filters rounded up to 16.
  static int64_t block_bytes(const ConvShape& shape, int64_t filters) {
    return (1 + taps(shape) * (1 + half_words(shape))) * row_bytes(filters);
  }
  static void block_weight(const ConvShape& shape, const uint64_t* words, int64_t, int64_t filters, uint8_t* block) {
    const int64_t all_taps = taps(shape), tap_words = words_per_group(shape), tap_halves = half_words(shape);
    const int64_t row = row_bytes(filters);
    memset(block, 0, static_cast<size_t>(block_bytes(shape, filters)));
    for (int64_t filter = 0; filter < filters; ++filter) {
      uint8_t* column = block + filter * 4;
      int32_t total = 0;
      for (int64_t tap = 0; tap < all_taps; ++tap) {
        int32_t count = 0;
        for (int64_t i = 0; i < tap_halves; ++i) {
          const uint64_t word = words[(filter * all_taps + tap) * tap_words + i / 2];
          const uint32_t half = static_cast<uint32_t>(word >> (i % 2 * 32));
          memcpy(column + (1 + all_taps + tap * tap_halves + i) * row, &half, sizeof half);
          count += __builtin_popcount(half);
        }
        memcpy(column + (1 + tap) * row, &count, sizeof count);
        total += count;
      }
      memcpy(column, &total, sizeof total);
    }
  }

  static int64_t prepared_bytes(const BinaryConv2dArgs&) { return 0; }
  static void prepare(const BinaryConv2dArgs&, const Tile&, int64_t, void*) {}

  static void run(const BinaryConv2dArgs& args, const Tile& tile, int64_t group, const uint8_t* block, int64_t filters,
                  const void*, int32_t* const* acc) {
    const ConvShape& shape = args.shape;
    const int64_t words = words_per_group(shape), pixel_bytes = shape.groups * words * 8;
    Work work;
    work.rows = tile.rows.end - tile.rows.begin;
    work.columns = tile.columns.end - tile.columns.begin;
    work.words = half_words(shape);
    work.input_row = shape.dilation_height * shape.width * pixel_bytes;
    work.input_column = shape.dilation_width * pixel_bytes;
    work.weight_word = row_bytes(filters);
    work.weight_column = work.words * work.weight_word;
    work.weight_row = shape.kernel_width * work.weight_column;
    work.weight = block + (1 + taps(shape)) * work.weight_word + tile.rows.begin * work.weight_row +
                  tile.columns.begin * work.weight_column;
    if (work.input_column == work.words * 4 && work.columns > 1) {
      work.words *= work.columns;
      work.columns = 1;
    }
    for (int64_t pixel = 0; pixel < tile.count; ++pixel) {
      work.input[pixel] = reinterpret_cast<const uint8_t*>(tile.input[pixel] + group * words);
    }
    work.acc = acc;
    alignas(64) int32_t base[kFilterBlock];
    work.base = base;
    if (args.encoding == Encoding::sign) {
      work.shift = 1;
      const __m512i channels_i32x16 = _mm512_set1_epi32(static_cast<int32_t>(tile.taps() * channels_per_group(shape)));
      for (int64_t i = 0; i < kFilterBlock; i += kVectorFilters) _mm512_store_si512(base + i, channels_i32x16);
    } else {
      work.shift = 0;
      if (tile.taps() == taps(shape)) {
        work.base = reinterpret_cast<const int32_t*>(block);
      } else {
        count_weight(shape, tile, block, filters, base);
      }
    }
    if (work.words % 2 == 0) {
      run_work<false>(work, tile.count, vectors_for(filters));
    } else {
      run_work<true>(work, tile.count, vectors_for(filters));
    }
  }

 private:
  static int64_t row_bytes(int64_t filters) { return vectors_for(filters) * kVectorBytes; }

  // popc(w) under the tile's taps.
  static void count_weight(const ConvShape& shape, const Tile& tile, const uint8_t* block, int64_t filters,
                           int32_t* counts) {
    const int64_t row = row_bytes(filters);
    for (int64_t i = 0; i < row; i += kVectorBytes) {
      __m512i sum_i32x16 = _mm512_setzero_si512();
      for (int64_t y = tile.rows.begin; y < tile.rows.end; ++y) {
        for (int64_t x = tile.columns.begin; x < tile.columns.end; ++x) {
          const uint8_t* tap = block + (1 + y * shape.kernel_width + x) * row;
          sum_i32x16 = _mm512_add_epi32(sum_i32x16, _mm512_loadu_si512(tap + i));
        }
      }
      _mm512_store_si512(counts + i / 4, sum_i32x16);
    }
  }
};

}  // namespace
}  // namespace lowbit

LOWBIT_DEFINE_BINARY_CONV2D(avx512, Avx512Kernel, Avx512NarrowKernel)
