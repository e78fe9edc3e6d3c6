// Groups of a few channels, depthwise convolutions among them, on the CPU. Their input stays packed as it is. A filter
// has a lane of 1, 2 or 4 bytes, a window of the packed pixel that holds its group wherever that begins: a vector of
// windows is one byte shuffle of the pixel, and meets 16 to 64 filters of as many groups.
#pragma once

#include <cstring>

#include "core/conv_shape.h"

namespace lowbit {
namespace {

constexpr int64_t kByteBits = 8;
constexpr int64_t kMostLaneBytes = 4;
// Of the filters of a group. Groups of more fill the vectors of the other kernel: 4 groups of 32 channels and 64
// filters, 256 bytes, take it 51 us in AVX2 where lanes take 79; 8 of 32 and 32 take it 42 in AVX-512, and lanes 39.
constexpr int64_t kMostGroupBytes = 128;

// Groups begin at multiples, within a byte, of the largest power of two that divides their channels.
inline int64_t lane_bytes(const ConvShape& shape) {
  const int64_t channels = channels_per_group(shape);
  const int64_t step = min(channels & -channels, kByteBits);
  const int64_t window = ceil_div(kByteBits - step + channels, kByteBits);
  return window <= 2 ? window : round_up(window, 4);
}

inline bool has_narrow_groups(const ConvShape& shape) {
  const int64_t bytes = lane_bytes(shape);
  return shape.groups > 1 && bytes <= kMostLaneBytes && bytes * filters_per_group(shape) <= kMostGroupBytes;
}

// First bit of the group of a filter in a packed pixel.
inline int64_t first_bit(const ConvShape& shape, int64_t filter) {
  return filter / filters_per_group(shape) * channels_per_group(shape);
}

// Whether the input is what align_groups makes of the packed pixels.
inline bool reads_aligned_groups(const ConvShape& shape) {
  return !groups_are_aligned(shape) && !has_narrow_groups(shape);
}

// Words of a pixel of the convolution's input.
inline int64_t input_words(const ConvShape& shape) {
  return has_narrow_groups(shape) ? words_for(shape.channels) : shape.groups * words_per_group(shape);
}

// The weights of a block of 64 filters for shuffles of kLoadBytes of the pixel. In bytes of lanes, which are in the
// order of the filters:
//   first    int64 [loads]     where each load begins in the pixel
//   index    [lanes]           byte of the load
//   mask     [lanes]           ones where the group is; of filters past the last none
//   weight   [taps][lanes]     the group's weights there, 0 beside them
// so that the mask of (index(load) ^ weight) has the differing bits.
template <int64_t kLoadBytes>
struct NarrowBlock {
  static constexpr int64_t kFilters = 64;

  int64_t lanes, loads;
  int64_t index_offset, mask_offset, weight_offset;
  int64_t bytes;

  explicit NarrowBlock(const ConvShape& shape)
      : lanes(kFilters * lane_bytes(shape)),
        loads(lanes / kLoadBytes),
        index_offset(round_up(loads * static_cast<int64_t>(sizeof(int64_t)), 64)),
        mask_offset(index_offset + lanes),
        weight_offset(mask_offset + lanes),
        bytes(weight_offset + taps(shape) * lanes) {}

  // `words` [filters][taps]: a group has one. `first_filter` is the block's.
  void write(const ConvShape& shape, const uint64_t* words, int64_t first_filter, int64_t filters,
             uint8_t* block) const {
    memset(block, 0, static_cast<size_t>(bytes));
    const int64_t width = lane_bytes(shape), filters_per_load = kLoadBytes / width;
    // A pixel of fewer bytes is loaded as far as it goes; of others no load passes the end.
    const int64_t last_load = max(words_for(shape.channels) * 8 - kLoadBytes, 0);
    for (int64_t filter = 0; filter < filters; ++filter) {
      const int64_t load = filter / filters_per_load;
      const int64_t first = min(first_bit(shape, first_filter + load * filters_per_load) / kByteBits, last_load);
      memcpy(block + load * static_cast<int64_t>(sizeof first), &first, sizeof first);
      const int64_t bit = first_bit(shape, first_filter + filter);
      const int64_t shift = bit % kByteBits;
      const uint64_t mask = low_mask(channels_per_group(shape)) << shift;
      for (int64_t i = 0; i < width; ++i) {
        const int64_t lane = filter * width + i;
        const auto byte_of = [&](uint64_t word) { return static_cast<uint8_t>(word >> (i * kByteBits)); };
        block[index_offset + lane] = static_cast<uint8_t>((bit / kByteBits + i - first) % kLoadBytes);
        block[mask_offset + lane] = byte_of(mask);
        for (int64_t tap = 0; tap < taps(shape); ++tap) {
          block[weight_offset + tap * lanes + lane] = byte_of(words[filter * taps(shape) + tap] << shift);
        }
      }
    }
  }
};

// A part of a tile's taps: few enough that their counts, of at most 8 each, fit a byte. Offsets and strides in bytes.
struct NarrowWindow {
  static constexpr int64_t kMostTaps = 255 / kByteBits;

  int64_t rows, columns;
  int64_t input, input_row, input_column;     // from the pixel's first tap in the image
  int64_t weight, weight_row, weight_column;  // from the first of all taps
  bool first;                                 // of the tile's

  int64_t taps() const { return rows * columns; }
};

// Calls body(window) for windows that make up the tile's taps, of which there may be none. The convolution is the sum
// of what they give.
template <class Tile, class Body>
[[gnu::always_inline]] inline void for_each_window(const ConvShape& shape, const Tile& tile, int64_t lanes,
                                                   const Body& body) {
  const int64_t pixel_bytes = input_words(shape) * 8;
  const int64_t rows = tile.rows.end - tile.rows.begin, columns = tile.columns.end - tile.columns.begin;
  const int64_t most_columns = min(columns, NarrowWindow::kMostTaps);
  const int64_t most_rows = columns == 0 ? rows : NarrowWindow::kMostTaps / most_columns;
  NarrowWindow window;
  window.input_row = shape.dilation_height * shape.width * pixel_bytes;
  window.input_column = shape.dilation_width * pixel_bytes;
  window.weight_row = shape.kernel_width * lanes;
  window.weight_column = lanes;
  window.first = true;
  int64_t y = 0, x = 0;
  do {
    window.rows = min(rows - y, most_rows);
    window.columns = min(columns - x, most_columns);
    window.input = y * window.input_row + x * window.input_column;
    window.weight = (tile.rows.begin + y) * window.weight_row + (tile.columns.begin + x) * window.weight_column;
    body(window);
    window.first = false;
    x += window.columns;
    if (x < columns) continue;
    x = 0;
    y += window.rows;
  } while (y < rows);
}

}  // namespace
}  // namespace lowbit
