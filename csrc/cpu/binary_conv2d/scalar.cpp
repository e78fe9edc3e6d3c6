// The portable level: 64-bit words and the compiler's popcount.

#include "cpu/binary_conv2d/driver.h"

namespace lowbit {
namespace {

struct ScalarKernel {
  static constexpr bool kMergesGroups = false;
  static constexpr int64_t kPixels = 4;
  static constexpr int64_t kChunkTiles = 8;
  static constexpr int64_t kLanes = 1;
  using Epilogue = ScalarEpilogue;
  using Tile = PixelTile<kPixels>;

  // The words as they come: [filters][taps][words_per_group].
  static int64_t block_bytes(const ConvShape& shape, int64_t filters) {
    return filters * taps(shape) * words_per_group(shape) * static_cast<int64_t>(sizeof(uint64_t));
  }
  static void block_weight(const ConvShape& shape, const uint64_t* words, int64_t, int64_t filters, uint8_t* block) {
    memcpy(block, words, static_cast<size_t>(block_bytes(shape, filters)));
  }

  // popc(a) of each pixel, int64.
  static int64_t prepared_bytes(const BinaryConv2dArgs& args) {
    return args.encoding == Encoding::step ? kAlignment : 0;
  }
  static void prepare(const BinaryConv2dArgs& args, const Tile& tile, int64_t group, void* prepared) {
    int64_t* active = static_cast<int64_t*>(prepared);
    for (int64_t pixel = 0; pixel < tile.count; ++pixel) {
      active[pixel] = count(args, tile, tile.input[pixel], group, nullptr, [](uint64_t a, uint64_t) { return a; });
    }
  }

  static void run(const BinaryConv2dArgs& args, const Tile& tile, int64_t group, const void* block, int64_t filters,
                  const void* prepared, int32_t* const* acc) {
    const int64_t* active = static_cast<const int64_t*>(prepared);
    const int64_t words_per_filter = taps(args.shape) * words_per_group(args.shape);
    const int64_t channels = tile.taps() * channels_per_group(args.shape);
    for (int64_t filter = 0; filter < filters; ++filter) {
      const uint64_t* weight = static_cast<const uint64_t*>(block) + filter * words_per_filter;
      for (int64_t pixel = 0; pixel < tile.count; ++pixel) {
        int64_t sum;
        if (args.encoding == Encoding::sign) {
          const int64_t differ =
              count(args, tile, tile.input[pixel], group, weight, [](uint64_t a, uint64_t w) { return a ^ w; });
          sum = channels - 2 * differ;
        } else {
          const int64_t positive =
              count(args, tile, tile.input[pixel], group, weight, [](uint64_t a, uint64_t w) { return a & w; });
          sum = 2 * positive - active[pixel];
        }
        acc[pixel][filter] = static_cast<int32_t>(sum);
      }
    }
  }

 private:
  // popc(combine(a, w)) over the taps of one pixel. Without weights, w is a.
  template <class Combine>
  static int64_t count(const BinaryConv2dArgs& args, const Tile& tile, const uint64_t* input, int64_t group,
                       const uint64_t* weight, const Combine& combine) {
    const ConvShape& shape = args.shape;
    const int64_t words = words_per_group(shape);
    const int64_t column_stride = shape.dilation_width * shape.groups * words;
    const int64_t row_stride = shape.dilation_height * shape.width * shape.groups * words;
    int64_t ones = 0;
    for (int64_t y = tile.rows.begin; y < tile.rows.end; ++y) {
      for (int64_t x = tile.columns.begin; x < tile.columns.end; ++x) {
        const uint64_t* a =
            input + (y - tile.rows.begin) * row_stride + (x - tile.columns.begin) * column_stride + group * words;
        const uint64_t* w = weight == nullptr ? a : weight + (y * shape.kernel_width + x) * words;
        for (int64_t i = 0; i < words; ++i) ones += __builtin_popcountll(combine(a[i], w[i]));
      }
    }
    return ones;
  }
};

// A group is at most two neighbouring words' bits.
struct ScalarNarrowKernel {
  static constexpr bool kMergesGroups = true;
  static constexpr int64_t kPixels = 4;
  static constexpr int64_t kChunkTiles = 8;
  static constexpr int64_t kLanes = 1;
  using Epilogue = ScalarEpilogue;
  using Tile = PixelTile<kPixels>;

  // First bit of each filter's group in the pixel, int64 [filters], then its words [filters][taps].
  static int64_t block_bytes(const ConvShape& shape, int64_t filters) {
    return filters * (1 + taps(shape)) * static_cast<int64_t>(sizeof(uint64_t));
  }
  static void block_weight(const ConvShape& shape, const uint64_t* words, int64_t first, int64_t filters,
                           uint8_t* block) {
    for (int64_t filter = 0; filter < filters; ++filter) {
      reinterpret_cast<int64_t*>(block)[filter] = first_bit(shape, first + filter);
    }
    memcpy(block + filters * 8, words, static_cast<size_t>(filters * taps(shape) * 8));
  }

  static int64_t prepared_bytes(const BinaryConv2dArgs&) { return 0; }
  static void prepare(const BinaryConv2dArgs&, const Tile&, int64_t, void*) {}

  static void run(const BinaryConv2dArgs& args, const Tile& tile, int64_t, const uint8_t* block, int64_t filters,
                  const void*, int32_t* const* acc) {
    const ConvShape& shape = args.shape;
    const int64_t channels = channels_per_group(shape), all_taps = taps(shape), words = input_words(shape);
    const int64_t column_stride = shape.dilation_width * words,
                  row_stride = shape.dilation_height * shape.width * words;
    const bool sign = args.encoding == Encoding::sign;
    for (int64_t filter = 0; filter < filters; ++filter) {
      const int64_t bit = reinterpret_cast<const int64_t*>(block)[filter];
      const int64_t word = bit / kWordBits, shift = bit % kWordBits;
      const bool one_word = shift + channels <= kWordBits;
      const uint64_t* weight = reinterpret_cast<const uint64_t*>(block) + filters + filter * all_taps;
      for (int64_t pixel = 0; pixel < tile.count; ++pixel) {
        int64_t differ = 0, positive = 0;  // popc(a ^ w), popc(w)
        for (int64_t y = tile.rows.begin; y < tile.rows.end; ++y) {
          for (int64_t x = tile.columns.begin; x < tile.columns.end; ++x) {
            const uint64_t* a = tile.input[pixel] + (y - tile.rows.begin) * row_stride +
                                (x - tile.columns.begin) * column_stride + word;
            const uint64_t bits = one_word ? a[0] >> shift : a[0] >> shift | a[1] << (kWordBits - shift);
            const uint64_t w = weight[y * shape.kernel_width + x];
            differ += __builtin_popcountll((bits ^ w) & low_mask(channels));
            positive += __builtin_popcountll(w);
          }
        }
        acc[pixel][filter] = static_cast<int32_t>(sign ? tile.taps() * channels - 2 * differ : positive - differ);
      }
    }
  }
};

}  // namespace
}  // namespace lowbit

LOWBIT_DEFINE_BINARY_CONV2D(scalar, ScalarKernel, ScalarNarrowKernel)
