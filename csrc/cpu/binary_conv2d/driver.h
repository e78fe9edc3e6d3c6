// The walk that every level of binary_conv2d shares: a direct convolution, without im2col.
//
// Output pixels with the same rectangle of taps inside the image form a class (interior, four edges, four corners; more
// with a large dilation). A class is cut into tiles of up to Kernel::kPixels pixels, in raster order over the whole
// batch, and a tile is one call of the micro-kernel per block of 64 filters: border pixels cost exactly their taps, and
// a linear layer or 1 x 1 convolution is a single class. Consecutive tiles form a chunk. The order of the work is
//   chunk, group, filter block, tile
// so that a block of weights meets all pixels of the chunk while it is in L1, and what a kernel derives from the
// activations (Kernel::prepare) is made once per chunk and group and serves all filter blocks.
//
// Groups of a few channels (has_narrow_groups) would leave most of a block and of a word empty, so they have a kernel
// of their own, to which all filters are those of one group: a block's 64 filters may be of 64 groups, each of which it
// finds in the packed pixel.
//
// A Kernel has, all static:
//   kMergesGroups               whether it is the one for narrow groups
//   kPixels, kChunkTiles        most pixels of a tile, tiles of a chunk
//   kLanes                      run() writes whole vectors of so many filters
//   Epilogue                    its epilogue (epilogue.h)
//   int64_t block_bytes(shape, filters)                      of the weights of a block of `filters` <= 64 filters
//   void block_weight(shape, words, first, filters, block)   words [filters, taps, words_per_group] of the block, whose
//                               first filter is `first` of the group
//   int64_t prepared_bytes(args)                             per tile, a multiple of 64; may be 0
//   void prepare(args, tile, group, prepared)
//   void run(args, tile, group, block, filters, prepared, acc)   writes acc[pixel][0, filters rounded up to kLanes),
//                               the convolution over the tile's taps; the driver adds what padding contributes.
#pragma once

#include "cpu/binary_conv2d/binary_conv2d.h"
#include "cpu/binary_conv2d/epilogue.h"

namespace lowbit {
namespace {

constexpr int64_t kFilterBlock = 64;
constexpr int64_t kAlignment = 64;  // bytes of a cache line

// What the walk takes for groups.
template <class Kernel>
inline int64_t walk_groups(const ConvShape& shape) {
  return Kernel::kMergesGroups ? 1 : shape.groups;
}

// Pixels of one class, to be worked together.
template <int64_t kPixels>
struct PixelTile {
  int64_t count;                   // 1 .. kPixels
  TapRange rows, columns;          // taps inside the image; both empty if either is
  const uint64_t* input[kPixels];  // word 0 under tap (rows.begin, columns.begin)
  int64_t output[kPixels];         // index of the output pixel

  int64_t taps() const { return (rows.end - rows.begin) * (columns.end - columns.begin); }
};

// Output rows (or columns) [begin, end) with the same taps.
struct OutputRun {
  int64_t begin, end;
  TapRange taps;
};

inline OutputRun output_run(const ConvAxis& axis, int64_t begin) {
  const TapRange taps = valid_taps(axis, begin);
  int64_t end = begin + 1;
  if (taps.begin == 0 && taps.end == axis.kernel) {  // the interior ends where the last tap leaves the image
    end = (axis.size - 1 - (axis.kernel - 1) * axis.dilation + axis.pad) / axis.stride + 1;
    if (end > axis.out_size) end = axis.out_size;
  } else {
    for (; end < axis.out_size; ++end) {
      const TapRange next = valid_taps(axis, end);
      if (next.begin != taps.begin || next.end != taps.end) break;
    }
  }
  return {begin, end, taps};
}

// Steps through the tiles: class by class, and raster order within.
template <int64_t kPixels>
class TileWalk {
 public:
  explicit TileWalk(const BinaryConv2dArgs& args)
      : args_(args),
        vertical_(vertical_axis(args.shape)),
        horizontal_(horizontal_axis(args.shape)),
        words_per_pixel_(input_words(args.shape)) {
    if (out_pixels(args.shape) > 0) enter_class(output_run(vertical_, 0), output_run(horizontal_, 0));
  }

  // Tiles of the whole output; leaves the walk at the end.
  int64_t skip_all() {
    if (out_pixels(args_.shape) == 0) return 0;
    int64_t total = tiles_;
    while (next_class()) total += tiles_;
    return total;
  }

  // Goes `tiles` tiles on from the start.
  void seek(int64_t tiles) {
    while (tiles >= tiles_) {
      tiles -= tiles_;
      next_class();
    }
    tile_ = tiles;
    const int64_t larger = min(tiles, larger_tiles_);
    const int64_t pixel = tiles * smaller_size_ + larger;
    const int64_t width = columns_.end - columns_.begin, height = rows_.end - rows_.begin;
    x_ = columns_.begin + pixel % width;
    y_ = rows_.begin + pixel / width % height;
    image_ = pixel / width / height;
  }

  // Describes the next tile and steps over it.
  void take(PixelTile<kPixels>* tile) {
    if (tile_ == tiles_) next_class();
    const ConvShape& shape = args_.shape;
    tile->count = smaller_size_ + (tile_ < larger_tiles_ ? 1 : 0);
    tile->rows = rows_.taps;
    tile->columns = columns_.taps;
    const bool empty = tile->taps() == 0;
    if (empty) tile->rows = tile->columns = {0, 0};
    const int64_t top = rows_.taps.begin * shape.dilation_height - shape.pad_top;
    const int64_t left = columns_.taps.begin * shape.dilation_width - shape.pad_left;
    for (int64_t i = 0; i < tile->count; ++i) {
      const int64_t row = image_ * shape.height + y_ * shape.stride_height + top;
      const int64_t column = x_ * shape.stride_width + left;
      tile->input[i] = empty ? args_.input : args_.input + (row * shape.width + column) * words_per_pixel_;
      tile->output[i] = (image_ * shape.out_height + y_) * shape.out_width + x_;
      if (++x_ < columns_.end) continue;
      x_ = columns_.begin;
      if (++y_ < rows_.end) continue;
      y_ = rows_.begin;
      ++image_;
    }
    ++tile_;
  }

 private:
  // The pixels are spread evenly: 25 pixels in tiles of at most 6 are 5 tiles of 5, not 4 of 6 and 1 of 1.
  void enter_class(const OutputRun& rows, const OutputRun& columns) {
    rows_ = rows;
    columns_ = columns;
    const int64_t pixels = args_.shape.batch * (rows.end - rows.begin) * (columns.end - columns.begin);
    tiles_ = ceil_div(pixels, kPixels);
    smaller_size_ = pixels / tiles_;
    larger_tiles_ = pixels % tiles_;
    tile_ = 0;
    image_ = 0;
    y_ = rows.begin;
    x_ = columns.begin;
  }

  bool next_class() {
    if (columns_.end < horizontal_.out_size) {
      enter_class(rows_, output_run(horizontal_, columns_.end));
    } else if (rows_.end < vertical_.out_size) {
      enter_class(output_run(vertical_, rows_.end), output_run(horizontal_, 0));
    } else {
      return false;
    }
    return true;
  }

  const BinaryConv2dArgs& args_;
  const ConvAxis vertical_, horizontal_;
  const int64_t words_per_pixel_;
  OutputRun rows_{}, columns_{};  // the class
  int64_t tiles_ = 0, smaller_size_ = 0, larger_tiles_ = 0;
  int64_t tile_ = 0, image_ = 0, y_ = 0, x_ = 0;  // the next tile, and its first pixel
};

// The private weight copy: for each group of the walk the blocks of the kernel, then for each group the sums
// int32 [taps][filters] of each filter's weights under each tap, which padding with +1 or -1 needs.
template <class Kernel>
struct WeightLayout {
  int64_t groups;
  int64_t filters, blocks;  // of a group
  int64_t block_bytes;      // of a full block
  int64_t group_bytes;
  int64_t sums_offset;
  int64_t sums_per_group;
  int64_t bytes;

  explicit WeightLayout(const ConvShape& shape)
      : groups(walk_groups<Kernel>(shape)),
        filters(shape.filters / groups),
        blocks(ceil_div(filters, kFilterBlock)),
        block_bytes(Kernel::block_bytes(shape, kFilterBlock)) {
    const int64_t last = filters % kFilterBlock;
    group_bytes = filters / kFilterBlock * block_bytes + (last == 0 ? 0 : Kernel::block_bytes(shape, last));
    sums_offset = round_up(groups * group_bytes, kAlignment);
    sums_per_group = taps(shape) * filters;
    bytes = sums_offset + groups * sums_per_group * static_cast<int64_t>(sizeof(int32_t));
  }

  int64_t block_filters(int64_t block) const { return min(filters - block * kFilterBlock, kFilterBlock); }
  int64_t block_offset(int64_t group, int64_t block) const { return group * group_bytes + block * block_bytes; }
};

template <class Kernel>
inline void block_all_weight(const ConvShape& shape, const uint64_t* words, void* blocked) {
  const WeightLayout<Kernel> layout(shape);
  const int64_t words_per_tap = words_per_group(shape), words_per_filter = taps(shape) * words_per_tap;
  uint8_t* bytes = static_cast<uint8_t*>(blocked);
  int32_t* sums = reinterpret_cast<int32_t*>(bytes + layout.sums_offset);
  for (int64_t group = 0; group < layout.groups; ++group) {
    const uint64_t* group_words = words + group * layout.filters * words_per_filter;
    for (int64_t block = 0; block < layout.blocks; ++block) {
      Kernel::block_weight(shape, group_words + block * kFilterBlock * words_per_filter, block * kFilterBlock,
                           layout.block_filters(block), bytes + layout.block_offset(group, block));
    }
    for (int64_t tap = 0; tap < taps(shape); ++tap) {
      for (int64_t filter = 0; filter < layout.filters; ++filter) {
        const uint64_t* tap_words = group_words + filter * words_per_filter + tap * words_per_tap;
        int64_t ones = 0;
        for (int64_t i = 0; i < words_per_tap; ++i) ones += __builtin_popcountll(tap_words[i]);
        *sums++ = static_cast<int32_t>(2 * ones - channels_per_group(shape));
      }
    }
  }
}

// acc[pixel][filter] += padding_value * sum of the filter's weights under the taps outside the image.
// `sums` is that of the block's first filter: [taps][row].
template <class Tile>
inline void add_padding(const BinaryConv2dArgs& args, const Tile& tile, const int32_t* sums, int64_t row,
                        int64_t filters, int32_t* const* acc) {
  const ConvShape& shape = args.shape;
  int32_t padding[kFilterBlock] = {};
  for (int64_t y = 0; y < shape.kernel_height; ++y) {
    const bool inside = y >= tile.rows.begin && y < tile.rows.end;
    for (int64_t x = 0; x < shape.kernel_width; ++x) {
      if (inside && x >= tile.columns.begin && x < tile.columns.end) continue;
      const int32_t* tap_sums = sums + (y * shape.kernel_width + x) * row;
      for (int64_t i = 0; i < filters; ++i) padding[i] += tap_sums[i];
    }
  }
  for (int64_t pixel = 0; pixel < tile.count; ++pixel) {
    for (int64_t i = 0; i < filters; ++i) acc[pixel][i] += args.padding_value * padding[i];
  }
}

// Where blocks share output words an item is a tile with all its blocks, which makes a chunk of one tile; else an item
// is a tile and a block. Either way the walk below counts steps, one per tile and block.
template <class Kernel>
inline int64_t chunk_tiles(const BinaryConv2dArgs& args) {
  return conv_blocks_share_words(args) ? 1 : Kernel::kChunkTiles;
}

template <class Kernel>
inline int64_t workspace_bytes(const BinaryConv2dArgs& args) {
  return chunk_tiles<Kernel>(args) * Kernel::prepared_bytes(args);
}

template <class Kernel>
inline int64_t count_items(const BinaryConv2dArgs& args) {
  if (args.shape.filters == 0) return 0;
  const int64_t tiles = TileWalk<Kernel::kPixels>(args).skip_all();
  if (conv_blocks_share_words(args)) return tiles;
  const WeightLayout<Kernel> layout(args.shape);
  return tiles * layout.groups * layout.blocks;
}

template <class Kernel>
inline void run_items(const BinaryConv2dArgs& args, const BinaryConv2dPlan& plan, int64_t begin, int64_t end,
                      void* workspace) {
  if (begin >= end) return;
  constexpr int64_t kPixels = Kernel::kPixels;
  const WeightLayout<Kernel> layout(args.shape);
  const uint8_t* weight = static_cast<const uint8_t*>(args.weight);
  const int32_t* sums = reinterpret_cast<const int32_t*>(weight + layout.sums_offset);
  uint8_t* prepared = static_cast<uint8_t*>(workspace);
  const int64_t prepared_bytes = Kernel::prepared_bytes(args);
  const int64_t all_taps = taps(args.shape);
  const bool shared = conv_blocks_share_words(args);
  const int64_t blocks = layout.groups * layout.blocks;
  const int64_t tiles = shared ? plan.items : plan.items / blocks;
  const int64_t most_tiles = chunk_tiles<Kernel>(args);
  if (shared) {
    begin *= blocks;
    end *= blocks;
  }

  alignas(64) int32_t buffer[kPixels][kFilterBlock];
  PixelTile<kPixels> tile[Kernel::kChunkTiles];
  TileWalk<kPixels> walk(args);
  int64_t chunk = begin / (most_tiles * blocks);
  walk.seek(chunk * most_tiles);
  for (int64_t first_step = chunk * most_tiles * blocks; first_step < end; first_step += most_tiles * blocks, ++chunk) {
    const int64_t count = min(tiles - chunk * most_tiles, most_tiles);
    for (int64_t i = 0; i < count; ++i) walk.take(&tile[i]);
    int64_t step = max(begin - first_step, 0);
    const int64_t last_step = min(end - first_step, count * blocks);
    int64_t block = step / count, prepared_group = -1;
    for (int64_t i = step % count; step < last_step; ++block, i = 0) {
      const int64_t group = block / layout.blocks, group_block = block % layout.blocks;
      const int64_t filter = group_block * kFilterBlock, filters = layout.block_filters(group_block);
      if (group != prepared_group && prepared_bytes > 0) {
        for (int64_t j = 0; j < count; ++j) Kernel::prepare(args, tile[j], group, prepared + j * prepared_bytes);
      }
      prepared_group = group;
      const bool direct = args.output_kind == ConvOutput::int32 && filters % Kernel::kLanes == 0;
      const int64_t first_filter = group * layout.filters + filter;
      for (; i < count && step < last_step; ++i, ++step) {
        int32_t* acc[kPixels];
        for (int64_t pixel = 0; pixel < tile[i].count; ++pixel) {
          acc[pixel] =
              direct ? static_cast<int32_t*>(args.output) + tile[i].output[pixel] * args.shape.filters + first_filter
                     : buffer[pixel];
        }
        Kernel::run(args, tile[i], group, weight + layout.block_offset(group, group_block), filters,
                    prepared + i * prepared_bytes, acc);
        if (args.padding_value != 0 && tile[i].taps() < all_taps) {
          add_padding(args, tile[i], sums + group * layout.sums_per_group + filter, layout.filters, filters, acc);
        }
        if (shared && block == 0) clear_words(args, tile[i].output, tile[i].count);
        store_tile<typename Kernel::Epilogue>(args, acc, tile[i].output, tile[i].count, first_filter, filters);
      }
    }
  }
}

}  // namespace
}  // namespace lowbit

// The four entries of a level: `body` with the kernel of the shape's groups as `Kernel`.
#define LOWBIT_WITH_KERNEL(shape, Wide, Narrow, body) \
  if (has_narrow_groups(shape)) {                     \
    using Kernel = Narrow;                            \
    body;                                             \
  } else {                                            \
    using Kernel = Wide;                              \
    body;                                             \
  }
#define LOWBIT_DEFINE_BINARY_CONV2D(isa, Wide, Narrow)                                                           \
  namespace lowbit::isa {                                                                                        \
  int64_t binary_conv2d_weight_bytes(const ConvShape& shape) noexcept {                                          \
    LOWBIT_WITH_KERNEL(shape, Wide, Narrow, return WeightLayout<Kernel>(shape).bytes)                            \
  }                                                                                                              \
  void binary_conv2d_block_weight(const ConvShape& shape, const uint64_t* words, void* blocked) noexcept {       \
      LOWBIT_WITH_KERNEL(shape, Wide, Narrow, block_all_weight<Kernel>(shape, words, blocked))} BinaryConv2dPlan \
      binary_conv2d_plan(const BinaryConv2dArgs& args) noexcept {                                                \
    LOWBIT_WITH_KERNEL(args.shape, Wide, Narrow,                                                                 \
                       return (BinaryConv2dPlan{count_items<Kernel>(args), workspace_bytes<Kernel>(args)}))      \
  }                                                                                                              \
  void binary_conv2d(const BinaryConv2dArgs& args, const BinaryConv2dPlan& plan, int64_t begin, int64_t end,     \
                     void* workspace) noexcept {                                                                 \
    LOWBIT_WITH_KERNEL(args.shape, Wide, Narrow, run_items<Kernel>(args, plan, begin, end, workspace))           \
  }                                                                                                              \
  }
