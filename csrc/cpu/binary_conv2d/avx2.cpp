// AVX2 has no vector popcount. A nibble of the activation (4 channels) picks a table of 16 bytes, popc(a ^ n) or
// popc(a & n) for every weight nibble n, and VPSHUFB looks up 32 filters at once. Two pixels share a lookup: their
// counts, at most 4, are the two nibbles of a table's byte, so that there are 256 tables, 4 KiB. Three lookups fit a
// nibble before the two pixels must be separated. One pixel per lookup takes 2 operations for 32 filters x 4 channels,
// this form 1.5, and half of the shuffles, of which CPUs before Ice Lake run only one a cycle.
//
// Weights are stored one bit each; a chunk of them is split into nibbles, one a byte, once per tile of pixels. Measured
// on Sapphire Rapids, 256 filters, 3 x 3 x 256: 450 operations (2 * MAC) a cycle in add_chunk, of at most 512 on 3
// vector ports, where one pixel per lookup reaches 280; 350 with all that is round it at 14 x 14.

#include <immintrin.h>

#include "cpu/binary_conv2d/driver.h"
#include "cpu/binary_conv2d/epilogue_avx2.h"
#include "cpu/binary_conv2d/narrow_avx2.h"

namespace lowbit {
namespace {

constexpr int64_t kVectorFilters = 32;
constexpr int64_t kUnitBytes = 3;    // 24 channels: two times three nibbles
constexpr int64_t kChunkUnits = 10;  // 10 * 24 channels: counts of at most 240 fit a byte
constexpr int64_t kChunkBytes = kChunkUnits * kUnitBytes;
constexpr int64_t kSpanUnits = 128 * kChunkUnits;  // counts of at most 30720 fit 16 bits with a sign

// popc(a ^ n) or popc(a & n) of the nibble a of two pixels: table[a0 + 16 * a1][n] = count(a0) + 16 * count(a1).
struct PairTables {
  alignas(kAlignment) uint8_t table[256][16];

  explicit constexpr PairTables(Encoding encoding) : table{} {
    for (int pair = 0; pair < 256; ++pair) {
      for (int n = 0; n < 16; ++n) {
        const int repeated = n | n << 4;
        const int bits = encoding == Encoding::sign ? pair ^ repeated : pair & repeated;
        table[pair][n] = static_cast<uint8_t>(count(bits & 15) | count(bits >> 4) << 4);
      }
    }
  }
  static constexpr int count(int nibble) {
    return (nibble & 1) + (nibble >> 1 & 1) + (nibble >> 2 & 1) + (nibble >> 3);
  }
};
constexpr PairTables kSignTables(Encoding::sign), kStepTables(Encoding::step);

// Bytes of a tap that hold channels.
inline int64_t tap_bytes(const ConvShape& shape) { return ceil_div(channels_per_group(shape), 8); }
inline int64_t vectors_for(int64_t filters) { return ceil_div(filters, kVectorFilters); }

// Filter of a byte of a weight vector: 16-bit lane i holds filters i and 16 + i, whose counts then widen into two
// vectors of 16 filters in order.
inline int64_t filter_of_byte(int64_t i) { return i / 2 + i % 2 * 16; }

inline __m256i load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
inline void store(void* to, __m256i vector_u8x32) { _mm256_storeu_si256(static_cast<__m256i*>(to), vector_u8x32); }

// Counts of two pixels x 32 filters over a whole tile, 16-bit lane i: `low` is the sum of both bytes' counts with
// the upper weighted 256, modulo 2^16; `high` is the upper byte's count.
struct PairSums {
  uint16_t low[2][16], high[2][16];
};

// The row of weights that lies one chunk ahead comes from L2 or memory while this chunk is worked on: 8 % (64 pixels)
// to 20 % (1 pixel) of a linear layer of 4096 x 4096.
inline void prefetch_next_chunk(const uint8_t* row, int64_t row_bytes) {
  _mm_prefetch(reinterpret_cast<const char*>(row + kChunkBytes * row_bytes), _MM_HINT_T0);
}

// Nibble `index` of each of 32 filters, from rows of whole bytes or from rows already split into nibbles.
template <bool kSplit>
inline __m256i weight_nibbles(const uint8_t* rows, int index, int row_bytes) {
  if (kSplit) return load(rows + index * row_bytes);
  const __m256i bytes_u8x32 = load(rows + index / 2 * row_bytes);
  if (index % 2 == 0) prefetch_next_chunk(rows + index / 2 * row_bytes, row_bytes);
  return _mm256_and_si256(index % 2 == 0 ? bytes_u8x32 : _mm256_srli_epi16(bytes_u8x32, 4), _mm256_set1_epi8(15));
}

// Adds the counts of two pixels x kVectors * 32 filters over `units` <= kChunkUnits of the stream. `weight` are bytes
// [units][3][kVectors][32], or kSplit into nibbles [units][6][kVectors][32]; `table_offset` [units][6] bytes.
template <int kVectors, bool kSplit>
inline void add_chunk(const uint8_t* tables, const uint8_t* weight, const uint16_t* table_offset, int64_t units,
                      PairSums* sums) {
  constexpr int kRowBytes = kVectors * 32, kUnitNibbles = 6;
  const __m256i low_nibbles_u8x32 = _mm256_set1_epi8(15);
  __m256i first_u8x32[kVectors];    // pixel 0: counts in bytes
  __m256i second_u16x16[kVectors];  // pixel 1: count of the even byte + 256 * odd byte's + 16 * odd byte's of pixel 0
  for (int i = 0; i < kVectors; ++i) first_u8x32[i] = second_u16x16[i] = _mm256_setzero_si256();
  for (; units > 0; --units) {
#pragma GCC unroll 2
    for (int triple = 0; triple < kUnitNibbles; triple += 3) {
      __m256i counts_u8x32[kVectors];
#pragma GCC unroll 3
      for (int nibble = triple; nibble < triple + 3; ++nibble) {
        const __m128i* entry = reinterpret_cast<const __m128i*>(tables + table_offset[nibble]);
        const __m256i table_u8x32 = _mm256_broadcastsi128_si256(_mm_load_si128(entry));
        for (int i = 0; i < kVectors; ++i) {
          const __m256i looked_up_u8x32 =
              _mm256_shuffle_epi8(table_u8x32, weight_nibbles<kSplit>(weight + 32 * i, nibble, kRowBytes));
          counts_u8x32[i] = nibble == triple ? looked_up_u8x32 : _mm256_add_epi8(counts_u8x32[i], looked_up_u8x32);
        }
      }
      // A shift by 4 in 16-bit lanes brings pixel 1's nibbles down without a mask: what comes with them from the odd
      // byte is pixel 0's count there, known and subtracted below.
      for (int i = 0; i < kVectors; ++i) {
        first_u8x32[i] = _mm256_add_epi8(first_u8x32[i], _mm256_and_si256(counts_u8x32[i], low_nibbles_u8x32));
        second_u16x16[i] = _mm256_add_epi16(second_u16x16[i], _mm256_srli_epi16(counts_u8x32[i], 4));
      }
    }
    weight += kUnitNibbles * kRowBytes / (kSplit ? 1 : 2);
    table_offset += kUnitNibbles;
  }
  for (int i = 0; i < kVectors; ++i) {
    const __m256i first_high_u16x16 = _mm256_srli_epi16(first_u8x32[i], 8);
    const __m256i second_counts_u16x16 = _mm256_sub_epi16(second_u16x16[i], _mm256_slli_epi16(first_high_u16x16, 4));
    const __m256i second_high_u16x16 = _mm256_srli_epi16(second_counts_u16x16, 8);
    PairSums& sum = sums[i];
    store(sum.low[0], _mm256_add_epi16(load(sum.low[0]), first_u8x32[i]));
    store(sum.high[0], _mm256_add_epi16(load(sum.high[0]), first_high_u16x16));
    store(sum.low[1], _mm256_add_epi16(load(sum.low[1]), second_counts_u16x16));
    store(sum.high[1], _mm256_add_epi16(load(sum.high[1]), second_high_u16x16));
  }
}

// Hands out the weights of a tile's taps, one after the other, as nibbles; zeros after the end.
template <int kVectors>
class WeightStream {
 public:
  template <class Tile>
  WeightStream(const ConvShape& shape, const Tile& tile, const uint8_t* block) {
    const int64_t tap = tap_bytes(shape);
    const int64_t columns = tile.columns.end - tile.columns.begin;
    next_ = block + (tile.rows.begin * shape.kernel_width + tile.columns.begin) * tap * kRowBytes;
    left_ = tile.taps() * tap;
    run_ = rest_ = columns == shape.kernel_width ? left_ : columns * tap;
    skip_ = (shape.kernel_width - columns) * tap * kRowBytes;
  }

  // The next `count` bytes of each filter as they lie, [count][kVectors][32]; null where they are not contiguous.
  const uint8_t* take_bytes(int64_t count) {
    if (rest_ < count) return nullptr;
    const uint8_t* bytes = next_;
    next_ += count * kRowBytes;
    rest_ -= count;
    left_ -= count;
    return bytes;
  }

  // Writes the next `count` bytes of each filter: nibbles [count][low, high][kVectors][32].
  void take(int64_t count, uint8_t* nibbles) {
    while (count > 0 && left_ > 0) {
      if (rest_ == 0) {
        next_ += skip_;
        rest_ = run_;
      }
      const int64_t part = min(count, rest_);
      split(part, nibbles);
      nibbles += part * 2 * kRowBytes;
      rest_ -= part;
      left_ -= part;
      count -= part;
    }
    memset(nibbles, 0, static_cast<size_t>(count * 2 * kRowBytes));
  }

 private:
  static constexpr int64_t kRowBytes = kVectors * kVectorFilters;

  void split(int64_t count, uint8_t* nibbles) {
    const __m256i low_nibbles_u8x32 = _mm256_set1_epi8(15);
    for (; count > 0; --count, nibbles += 2 * kRowBytes, next_ += kRowBytes) {
      prefetch_next_chunk(next_, kRowBytes);
      for (int i = 0; i < kVectors; ++i) {
        const __m256i bytes_u8x32 = load(next_ + 32 * i);
        store(nibbles + 32 * i, _mm256_and_si256(bytes_u8x32, low_nibbles_u8x32));
        store(nibbles + kRowBytes + 32 * i, _mm256_and_si256(_mm256_srli_epi16(bytes_u8x32, 4), low_nibbles_u8x32));
      }
    }
  }

  const uint8_t* next_;
  int64_t run_, rest_;  // bytes of each filter in a contiguous run of taps, and left in this one
  int64_t skip_;        // from one run to the next
  int64_t left_;        // bytes of each filter left in the tile
};

// Writes the byte offsets 16 * (first + 16 * second) of the tables of the nibbles of kWords words of two pixels.
template <int kWords>
inline void store_offsets(__m128i first_u8x16, __m128i second_u8x16, uint16_t* offsets) {
  const __m128i low_nibbles_u8x16 = _mm_set1_epi8(0x0f), high_nibbles_u8x16 = _mm_set1_epi8(static_cast<char>(0xf0));
  const __m128i first_even_u8x16 = _mm_and_si128(_mm_slli_epi16(first_u8x16, 4), high_nibbles_u8x16);
  const __m128i first_odd_u8x16 = _mm_and_si128(first_u8x16, high_nibbles_u8x16);
  const __m128i second_even_u8x16 = _mm_and_si128(second_u8x16, low_nibbles_u8x16);
  const __m128i second_odd_u8x16 = _mm_and_si128(_mm_srli_epi16(second_u8x16, 4), low_nibbles_u8x16);
  const __m128i even_u16x8[2] = {_mm_unpacklo_epi8(first_even_u8x16, second_even_u8x16),
                                 _mm_unpackhi_epi8(first_even_u8x16, second_even_u8x16)};
  const __m128i odd_u16x8[2] = {_mm_unpacklo_epi8(first_odd_u8x16, second_odd_u8x16),
                                _mm_unpackhi_epi8(first_odd_u8x16, second_odd_u8x16)};
  __m128i* to = reinterpret_cast<__m128i*>(offsets);
  for (int i = 0; i < kWords; ++i) {
    _mm_storeu_si128(to + 2 * i, _mm_unpacklo_epi16(even_u16x8[i], odd_u16x8[i]));
    _mm_storeu_si128(to + 2 * i + 1, _mm_unpackhi_epi16(even_u16x8[i], odd_u16x8[i]));
  }
}

inline void store_offsets(const uint64_t* first, const uint64_t* second, int64_t words, uint16_t* offsets) {
  for (; words >= 2; words -= 2, first += 2, second += 2, offsets += 32) {
    store_offsets<2>(_mm_loadu_si128(reinterpret_cast<const __m128i*>(first)),
                     _mm_loadu_si128(reinterpret_cast<const __m128i*>(second)), offsets);
  }
  if (words == 1) store_offsets<1>(_mm_loadu_si64(first), _mm_loadu_si64(second), offsets);
}

// acc[0, 32) = scale * count + offset, or += where `add`.
inline void store_counts(const PairSums& sums, int pixel, int32_t scale, int32_t offset, bool add, int32_t* acc) {
  const __m256i scale_i32x8 = _mm256_set1_epi32(scale), offset_i32x8 = _mm256_set1_epi32(offset);
  const __m256i high_u16x16 = load(sums.high[pixel]);
  const __m256i low_u16x16 = _mm256_sub_epi16(load(sums.low[pixel]), _mm256_slli_epi16(high_u16x16, 8));
  const __m128i counts_u16x8[4] = {_mm256_castsi256_si128(low_u16x16), _mm256_extracti128_si256(low_u16x16, 1),
                                   _mm256_castsi256_si128(high_u16x16), _mm256_extracti128_si256(high_u16x16, 1)};
  for (int i = 0; i < 4; ++i) {
    const __m256i before_i32x8 = add ? load(acc + 8 * i) : offset_i32x8;
    // Both 16-bit halves of a lane: count * scale + 0 * sign of scale. Cheaper than VPMULLD.
    const __m256i scaled_i32x8 = _mm256_madd_epi16(_mm256_cvtepu16_epi32(counts_u16x8[i]), scale_i32x8);
    store(acc + 8 * i, _mm256_add_epi32(before_i32x8, scaled_i32x8));
  }
}

struct Avx2Kernel {
  static constexpr bool kMergesGroups = false;
  static constexpr int64_t kPixels = 32;     // share the splitting of the weights: with 16, 3 to 7 % slower
  static constexpr int64_t kChunkTiles = 1;  // weights come from L2 at 1 byte a cycle: no need to keep them in L1
  static constexpr int64_t kLanes = kVectorFilters;
  static constexpr int64_t kPairs = kPixels / 2;
  using Epilogue = Avx2Epilogue;
  using Tile = PixelTile<kPixels>;

  // Bytes [taps][tap_bytes][filters in vectors of 32].
  static int64_t block_bytes(const ConvShape& shape, int64_t filters) {
    return taps(shape) * tap_bytes(shape) * vectors_for(filters) * kVectorFilters;
  }
  static void block_weight(const ConvShape& shape, const uint64_t* words, int64_t, int64_t filters, uint8_t* block) {
    const int64_t words_per_filter = taps(shape) * words_per_group(shape);
    for (int64_t tap = 0; tap < taps(shape); ++tap) {
      for (int64_t byte = 0; byte < tap_bytes(shape); ++byte) {
        const uint64_t* word = words + tap * words_per_group(shape) + byte / 8;
        for (int64_t i = 0; i < vectors_for(filters) * kVectorFilters; ++i) {
          const int64_t filter = i / kVectorFilters * kVectorFilters + filter_of_byte(i % kVectorFilters);
          *block++ = filter < filters ? static_cast<uint8_t>(word[filter * words_per_filter] >> (byte % 8 * 8)) : 0;
        }
      }
    }
  }

  // popc(a) of each pixel (step), then for each pair of pixels the table offsets of its nibbles.
  static int64_t prepared_bytes(const BinaryConv2dArgs& args) {
    const int64_t offsets = kPairs * stream_offsets(args.shape, taps(args.shape));
    return round_up(kActiveBytes + offsets * static_cast<int64_t>(sizeof(uint16_t)), kAlignment);
  }
  static void prepare(const BinaryConv2dArgs& args, const Tile& tile, int64_t group, void* prepared) {
    const ConvShape& shape = args.shape;
    const int64_t group_words = words_per_group(shape);
    const int64_t row_stride = shape.dilation_height * shape.width * shape.groups * group_words;
    const int64_t column_stride = shape.dilation_width * shape.groups * group_words;
    const int64_t rows = tile.rows.end - tile.rows.begin;
    int64_t columns = tile.columns.end - tile.columns.begin, words = group_words, bytes = tap_bytes(shape);
    if (column_stride == words && bytes == words * 8 && columns > 1) {  // contiguous taps are one of more words
      words *= columns;
      bytes *= columns;
      columns = 1;
    }
    int32_t* active = static_cast<int32_t*>(prepared);
    uint16_t* pair_offsets = reinterpret_cast<uint16_t*>(static_cast<uint8_t*>(prepared) + kActiveBytes);
    for (int64_t pixel = 0; pixel < tile.count; pixel += 2) {
      // The last pixel of an odd tile is its own partner.
      const uint64_t* input[2] = {tile.input[pixel], tile.input[pixel + 1 < tile.count ? pixel + 1 : pixel]};
      uint16_t* offsets = pair_offsets;
      int64_t ones[2] = {0, 0};
      for (int64_t y = 0; y < rows; ++y) {
        for (int64_t x = 0; x < columns; ++x) {
          const int64_t tap = group * group_words + y * row_stride + x * column_stride;
          store_offsets(input[0] + tap, input[1] + tap, words, offsets);
          offsets += 2 * bytes;
          if (args.encoding == Encoding::sign) continue;
          for (int64_t i = tap; i < tap + words; ++i) {
            ones[0] += _mm_popcnt_u64(input[0][i]);
            ones[1] += _mm_popcnt_u64(input[1][i]);
          }
        }
      }
      memset(offsets, 0, kUnitBytes * 2 * sizeof *offsets);  // fills the last unit up
      active[pixel] = static_cast<int32_t>(ones[0]);
      active[pixel + 1] = static_cast<int32_t>(ones[1]);
      pair_offsets += stream_offsets(shape, tile.taps());
    }
  }

  static void run(const BinaryConv2dArgs& args, const Tile& tile, int64_t, const uint8_t* block, int64_t filters,
                  const void* prepared, int32_t* const* acc) {
    if (vectors_for(filters) == 1) {
      run_vectors<1>(args, tile, block, prepared, acc);
    } else {
      run_vectors<2>(args, tile, block, prepared, acc);
    }
  }

 private:
  static constexpr int64_t kActiveBytes = kPixels * static_cast<int64_t>(sizeof(int32_t));

  static int64_t stream_units(const ConvShape& shape, int64_t tap_count) {
    return ceil_div(tap_count * tap_bytes(shape), kUnitBytes);
  }
  // With room behind the last tap for the end of its words and for the end of the last unit.
  static int64_t stream_offsets(const ConvShape& shape, int64_t tap_count) {
    return tap_count * tap_bytes(shape) * 2 + 16;
  }

  template <int kVectors>
  static void run_vectors(const BinaryConv2dArgs& args, const Tile& tile, const uint8_t* block, const void* prepared,
                          int32_t* const* acc) {
    const ConvShape& shape = args.shape;
    const bool step = args.encoding == Encoding::step;
    const uint8_t* tables = step ? kStepTables.table[0] : kSignTables.table[0];
    const int32_t* active = static_cast<const int32_t*>(prepared);
    const uint16_t* offsets = reinterpret_cast<const uint16_t*>(static_cast<const uint8_t*>(prepared) + kActiveBytes);
    const int64_t offsets_per_pair = stream_offsets(shape, tile.taps());
    const int64_t units = stream_units(shape, tile.taps());
    const int32_t channels = static_cast<int32_t>(tile.taps() * channels_per_group(shape));
    const int64_t pairs = ceil_div(tile.count, 2);

    alignas(32) uint8_t nibbles[kChunkBytes * 2 * kVectors * kVectorFilters];
    alignas(32) PairSums sums[kPairs][kVectors];
    WeightStream<kVectors> weights(shape, tile, block);
    int64_t unit = 0;
    do {
      memset(sums, 0, static_cast<size_t>(pairs) * sizeof sums[0]);
      const bool add = unit > 0;
      const int64_t span_end = min(units, unit + kSpanUnits);
      while (unit < span_end) {
        const int64_t count = min(span_end - unit, kChunkUnits);
        const uint16_t* chunk_offsets = offsets + unit * kUnitBytes * 2;
        unit += count;
        const uint8_t* bytes = pairs == 1 ? weights.take_bytes(count * kUnitBytes) : nullptr;
        if (bytes != nullptr) {
          add_chunk<kVectors, false>(tables, bytes, chunk_offsets, count, sums[0]);
          continue;
        }
        weights.take(count * kUnitBytes, nibbles);
        for (int64_t pair = 0; pair < pairs; ++pair) {
          add_chunk<kVectors, true>(tables, nibbles, chunk_offsets + pair * offsets_per_pair, count, sums[pair]);
        }
      }
      for (int64_t pixel = 0; pixel < tile.count; ++pixel) {
        for (int i = 0; i < kVectors; ++i) {
          store_counts(sums[pixel / 2][i], static_cast<int>(pixel % 2), step ? 2 : -2, step ? -active[pixel] : channels,
                       add, acc[pixel] + i * kVectorFilters);
        }
      }
    } while (unit < units);
  }
};

}  // namespace
}  // namespace lowbit

LOWBIT_DEFINE_BINARY_CONV2D(avx2, Avx2Kernel, Avx2NarrowKernel)
