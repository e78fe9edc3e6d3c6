// Tile registers multiply int8, so the bits are expanded in cache: activations to -1/+1 (sign) or 0/1 (step), weights
// to -1/+1. TDPBSSD does 16 x 16 x 64 multiply-adds in 16 cycles, 2048 operations a cycle against 682 of xor + popcount
// + add in AVX-512; with its operands from L1 19 to 20 cycles, from L2 up to 28, and fewer rows make it no faster.
//   - A band of padded activations is expanded once for all taps and filters. Channels past the last are 0 in it, so
//     that the weights need no mask, and padding is a value like any other.
//   - Strides are taken out by splitting the band into phases, input index mod stride, so that neighbouring outputs are
//     neighbours under every tap. Images lie innermost: the 16 rows of a tile are consecutive cells (y, x, image), and
//     small images fill whole tiles as soon as there are several of them.
//   - 32 filters by 12 steps of 64 channels stay in L1 while all pixels of the range pass them. Weights are kept as
//     bits: in int8 they would be eight times the traffic from L3.
// 256 -> 256 filters, 3 x 3, 14 x 14, one core: bits out 1.5 times as fast as the AVX-512 level at 8 images and 1.24
// times at one; int32 out 1.3 and 1.09 times. 18 or 9 steps were 6 to 16 % slower there. Where AMX cannot win (use_amx)
// the work goes to the AVX-512 level, whose weight copy comes first in ours.

#include <immintrin.h>

#include "cpu/binary_conv2d/binary_conv2d.h"
#include "cpu/binary_conv2d/epilogue_avx512.h"

namespace lowbit {
namespace {

constexpr int64_t kLine = 64;      // bytes of a cache line, channels of a step, and bytes of a tile row
constexpr int64_t kTileRows = 16;  // pixels of an activation tile, filters of a weight tile
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kFilterBlock = 64;  // filters of an item
constexpr int64_t kAccRow = kFilterBlock * static_cast<int64_t>(sizeof(int32_t));
constexpr int64_t kStripFilters = 32;   // of a micro-kernel
constexpr int64_t kGroupTiles = 2;      // pixel tiles of a micro-kernel
constexpr int64_t kMaxSteps = 12;       // of a micro-kernel: 24 KiB of weights, half of L1
constexpr int64_t kMaxBlockTiles = 96;  // pixel tiles of a block: 384 KiB of accumulators
constexpr int64_t kMaxBandBytes = 1 << 20;
constexpr int64_t kMaxWorkspaceBytes = 4 << 20;  // beyond L2: very wide images or dilations, very many channels

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
const TileConfig kTileConfig;

// Part `index` of `total` cut into `parts` of nearly equal size.
inline int64_t part_begin(int64_t total, int64_t parts, int64_t index) { return total * index / parts; }

// --- geometry

// One dimension. Padded input coordinate = out * stride + tap * dilation = (out + shift(tap)) * stride + residue, so
// that the inputs of one residue, a phase, form a plane in which a tap is a constant shift.
struct Axis {
  int64_t out_size, stride, pad, dilation, kernel, size;
  int64_t period;  // taps t and t + period share a phase
  int64_t phases;  // that taps use
  int64_t reach;   // largest shift

  Axis(int64_t out_size_, int64_t stride_, int64_t pad_, int64_t dilation_, int64_t kernel_, int64_t size_)
      : out_size(out_size_), stride(stride_), pad(pad_), dilation(dilation_), kernel(kernel_), size(size_) {
    int64_t a = stride, b = dilation % stride;
    while (b != 0) {  // greatest common divisor
      const int64_t rest = a % b;
      a = b;
      b = rest;
    }
    period = stride / a;
    phases = min(kernel, period);
    reach = (kernel - 1) * dilation / stride;
  }

  int64_t phase(int64_t tap) const { return tap % period; }
  int64_t shift(int64_t tap) const { return tap * dilation / stride; }
  // Image index of a position of a phase; outside [0, size) is padding.
  int64_t input_index(int64_t position, int64_t phase) const {
    return position * stride + phase * dilation % stride - pad;
  }
  TapRange taps(int64_t out_index) const { return valid_taps(out_index, stride, pad, dilation, kernel, size); }
  // Taps inside the image, summed over the outputs: for each tap the outputs o with 0 <= o * stride + first < size.
  int64_t all_taps() const {
    int64_t total = 0;
    for (int64_t tap = 0; tap < kernel; ++tap) {
      const int64_t first = tap * dilation - pad;
      const int64_t begin = first >= 0 ? 0 : ceil_div(-first, stride);
      const int64_t end = first >= size ? 0 : min(ceil_div(size - first, stride), out_size);
      total += max(end - begin, 0);
    }
    return total;
  }
};

// A pointwise convolution is one of 1 x 1 images.
inline ConvShape merge_pixels(ConvShape shape) {
  if (taps(shape) == 1 && shape.stride_height == 1 && shape.stride_width == 1 && shape.pad_top == 0 &&
      shape.pad_left == 0 && shape.out_height == shape.height && shape.out_width == shape.width) {
    shape.batch *= shape.height * shape.width;
    shape.height = shape.width = shape.out_height = shape.out_width = 1;
  }
  return shape;
}

// Cells (y, x, image), image fastest, of a block of `images` images and `rows` output rows, cut into tiles of 16 cells:
// each output row on its own, or all rows in one run, cells past a row's last output included, whichever takes fewer.
struct BlockGeometry {
  int64_t images, rows;
  int64_t band_rows, pitch;  // of a plane
  int64_t cells;             // of all planes of one word
  int64_t rows_per_run, run_cells, tiles_per_run;
  int64_t tiles;
  int64_t section_tiles, section_groups;  // groups of tiles, one micro-kernel call each, do not leave their section
  int64_t groups;

  BlockGeometry(const Axis& vertical, const Axis& horizontal, int64_t images_, int64_t rows_)
      : images(images_), rows(rows_) {
    band_rows = rows + vertical.reach;
    pitch = horizontal.out_size + horizontal.reach;
    cells = vertical.phases * horizontal.phases * band_rows * pitch * images;
    const int64_t row_cells = horizontal.out_size * images;
    const int64_t all_cells = (rows - 1) * pitch * images + row_cells;
    const bool by_row = rows * ceil_div(row_cells, kTileRows) <= ceil_div(all_cells, kTileRows);
    rows_per_run = by_row ? 1 : rows;
    run_cells = by_row ? row_cells : all_cells;
    tiles_per_run = ceil_div(run_cells, kTileRows);
    tiles = rows / rows_per_run * tiles_per_run;
    section_tiles = tiles_per_run > 2 ? tiles_per_run : tiles;
    section_groups = ceil_div(section_tiles, kGroupTiles);
    groups = tiles / section_tiles * section_groups;
  }

  int64_t group_begin(int64_t group) const {
    return group / section_groups * section_tiles + part_begin(section_tiles, section_groups, group % section_groups);
  }
  int64_t first_cell(int64_t tile) const {
    return tile / tiles_per_run * rows_per_run * pitch * images + tile % tiles_per_run * kTileRows;
  }
  // Of the cells of tiles [begin, end), as far as they are outputs.
  int64_t first_row(int64_t begin) const { return first_cell(begin) / (pitch * images); }
  int64_t end_row(int64_t end) const {
    return min((first_cell(end - 1) + kTileRows - 1) / (pitch * images),
               ((end - 1) / tiles_per_run + 1) * rows_per_run - 1) +
           1;
  }
  int64_t plane_bytes() const { return (cells + kTileRows) * kLine; }  // a run's last tile reads up to 15 cells on
};

// How the output is cut: blocks of images and rows, whose activations and accumulators fit the workspace; in a block
// the filter blocks; in these the groups of tiles, which are the items.
struct Plan {
  ConvShape shape;
  Axis vertical, horizontal;
  int64_t words;          // of a pixel and convolution group
  int64_t steps;          // of 64 channels under one tap
  int64_t filters;        // of a convolution group
  int64_t filter_blocks;  // of a convolution group
  int64_t image_blocks, row_blocks;
  int64_t groups_per_block;  // most of any block
  double pixel_cost;         // estimated cycles per output pixel

  explicit Plan(const ConvShape& original)
      : shape(merge_pixels(original)),
        vertical(shape.out_height, shape.stride_height, shape.pad_top, shape.dilation_height, shape.kernel_height,
                 shape.height),
        horizontal(shape.out_width, shape.stride_width, shape.pad_left, shape.dilation_width, shape.kernel_width,
                   shape.width),
        words(words_per_group(shape)),
        steps(words * taps(shape)),
        filters(filters_per_group(shape)),
        filter_blocks(ceil_div(filters, kFilterBlock)) {
    choose_blocks();
    groups_per_block = 0;
    for (int64_t i = 0; i < 2; ++i) {
      for (int64_t j = 0; j < 2; ++j) {
        const int64_t images = i == 0 ? shape.batch / image_blocks : ceil_div(shape.batch, image_blocks);
        const int64_t rows = j == 0 ? shape.out_height / row_blocks : ceil_div(shape.out_height, row_blocks);
        groups_per_block = max(groups_per_block, geometry(images, rows).groups);
      }
    }
  }

  int64_t blocks() const { return image_blocks * row_blocks; }
  int64_t all_filter_blocks() const { return shape.groups * filter_blocks; }
  int64_t largest_images() const { return ceil_div(shape.batch, image_blocks); }
  int64_t largest_rows() const { return ceil_div(shape.out_height, row_blocks); }
  BlockGeometry geometry(int64_t images, int64_t rows) const {
    return BlockGeometry(vertical, horizontal, images, rows);
  }

 private:
  // Images are merged in powers of two; rows fill what space is left. The cost counts cycles per output pixel.
  void choose_blocks() {
    double best = 0;
    for (int64_t images = 1;; images = min(2 * images, shape.batch)) {
      const int64_t image_parts = ceil_div(shape.batch, images);
      const int64_t block_images = ceil_div(shape.batch, image_parts);
      const int64_t row_cells = (horizontal.out_size + horizontal.reach) * block_images;
      int64_t rows = kMaxBlockTiles * kTileRows / row_cells;
      rows =
          min(rows, kMaxBandBytes / (row_cells * words * kLine * vertical.phases * horizontal.phases) - vertical.reach);
      if (images > 1 && rows < 1) break;
      const int64_t row_parts = ceil_div(shape.out_height, min(max(rows, 1), shape.out_height));
      const int64_t block_rows = ceil_div(shape.out_height, row_parts);
      const BlockGeometry block = geometry(block_images, block_rows);
      const double cost = estimate(block) / static_cast<double>(block_images * block_rows * shape.out_width);
      if (images == 1 || cost < best) {
        best = cost;
        image_blocks = image_parts;
        row_blocks = row_parts;
        pixel_cost = cost;
      }
      if (images == shape.batch) break;
    }
  }

  // Measured cycles: 23 for a tile product with its loads and its share of accumulator traffic, 34 where no other tap
  // finds the activations in L1; 40 to expand a weight tile, 5 to expand an activation word; 4 for the detour of a
  // pixel's 16 accumulators through the workspace.
  double estimate(const BlockGeometry& block) const {
    const double filter_tiles = static_cast<double>(shape.groups * ceil_div(filters, kTileRows));
    const int64_t product = taps(shape) == 1 ? 34 : 23;
    return filter_tiles * static_cast<double>(steps * (product * block.tiles + 40) + 4 * block.tiles * kTileRows) +
           5.0 * static_cast<double>(block.cells * words * shape.groups);
  }
};

// --- use of AMX

// Channels and filters that fill at least half of a tile; the rest goes to AVX-512 alone, and has no weight copy here.
inline bool weight_suits_amx(const ConvShape& shape) {
  return taps(shape) > 0 && channels_per_group(shape) > 32 && filters_per_group(shape) >= kTileRows;
}

// --- weights

constexpr int64_t kMaskBytes = kTileRows * static_cast<int64_t>(sizeof(uint64_t));  // of a weight tile

// For each group and strip of 32 filters, for each word and tap, for each 16 filters (one tile if the group has no
// more): 16 masks, the rows of the weight tile. A row holds 4 channels of 16 filters, filter by filter. This is the
// order in which they are used.
struct WeightLayout {
  int64_t avx512_bytes;  // the copy of the AVX-512 level comes first
  int64_t tile_bytes;    // 16 filters, all steps
  int64_t group_bytes;
  int64_t bytes;

  explicit WeightLayout(const ConvShape& shape)
      : avx512_bytes(round_up(avx512::binary_conv2d_weight_bytes(shape), kLine)),
        tile_bytes(words_per_group(shape) * taps(shape) * kMaskBytes),
        group_bytes(ceil_div(filters_per_group(shape), kTileRows) * tile_bytes),
        bytes(avx512_bytes + (weight_suits_amx(shape) ? shape.groups * group_bytes : 0)) {}
};

// 1 KiB of int8 for each 16 masks.
inline void expand_weight(const uint8_t* masks, int64_t tiles, int8_t* out) {
  const __m512i plus = _mm512_set1_epi8(1), minus = _mm512_set1_epi8(-1);
  for (int64_t tile = 0; tile < tiles; ++tile) {
#pragma GCC unroll 16
    for (int row = 0; row < 16; ++row) {
      uint64_t mask;
      memcpy(&mask, masks + row * sizeof mask, sizeof mask);
      _mm512_store_si512(out + row * kLine, _mm512_mask_blend_epi8(_cvtu64_mask64(mask), minus, plus));
    }
    masks += kMaskBytes;
    out += kTileBytes;
  }
}

// --- micro-kernels

// Steps of one micro-kernel call: bytes from a cell to its activations, and from the strip's first weight tile.
struct StepList {
  int64_t count;
  int64_t activation[kMaxSteps];
  int64_t weight[kMaxSteps];
};

// The tile intrinsics do not tell the compiler which memory they read.
inline void memory_barrier() { __asm__ volatile("" ::: "memory"); }

// acc[pixel tile][filter tile] (+)= sum over the steps. Accumulators are tiles 0 to 3, activations 4 and 5, weights 6
// and 7.
template <int kPixelTiles, int kFilterTiles>
inline void multiply_tiles(const StepList& steps, const int8_t* const* pixels, const int8_t* weight, bool accumulate,
                           uint8_t* acc) {
  uint8_t* const lower = acc + kTileRows * kAccRow;
  if (accumulate) {
    _tile_loadd(0, acc, kAccRow);
    if constexpr (kFilterTiles > 1) _tile_loadd(1, acc + kLine, kAccRow);
    if constexpr (kPixelTiles > 1) _tile_loadd(2, lower, kAccRow);
    if constexpr (kPixelTiles > 1 && kFilterTiles > 1) _tile_loadd(3, lower + kLine, kAccRow);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  const int8_t* const pixel_0 = pixels[0];
  const int8_t* const pixel_1 = pixels[kPixelTiles - 1];
  for (int64_t i = 0; i < steps.count; ++i) {
    const int64_t offset = steps.activation[i];
    const int8_t* const step_weight = weight + steps.weight[i];
    _tile_loadd(4, pixel_0 + offset, kLine);
    _tile_loadd(6, step_weight, kLine);
    _tile_dpbssd(0, 4, 6);
    if constexpr (kPixelTiles > 1) {
      _tile_loadd(5, pixel_1 + offset, kLine);
      _tile_dpbssd(2, 5, 6);
    }
    if constexpr (kFilterTiles > 1) {
      _tile_loadd(7, step_weight + kTileBytes, kLine);
      _tile_dpbssd(1, 4, 7);
    }
    if constexpr (kPixelTiles > 1 && kFilterTiles > 1) _tile_dpbssd(3, 5, 7);
  }
  _tile_stored(0, acc, kAccRow);
  if constexpr (kFilterTiles > 1) _tile_stored(1, acc + kLine, kAccRow);
  if constexpr (kPixelTiles > 1) _tile_stored(2, lower, kAccRow);
  if constexpr (kPixelTiles > 1 && kFilterTiles > 1) _tile_stored(3, lower + kLine, kAccRow);
}

// --- work

// The workspace of a thread.
struct WorkspaceLayout {
  int64_t accumulators;  // int32 [tiles * 16][64]
  int64_t weights;       // int8 [12][2][1024]
  int64_t offsets;       // int64 [steps]: from a cell to its activations under a tap
  int64_t bytes;         // at 0: int8 [words][cells + 16][64], the band

  explicit WorkspaceLayout(const Plan& plan) {
    const int64_t images = plan.largest_images(), rows = plan.largest_rows();
    const int64_t most_tiles = rows * ceil_div(plan.horizontal.out_size * images, kTileRows);  // rows joined: fewer
    accumulators = plan.words * plan.geometry(images, rows).plane_bytes();
    weights = accumulators + most_tiles * kTileRows * kAccRow;
    offsets = weights + 2 * kMaxSteps * kTileBytes;
    bytes = offsets + round_up(plan.steps * static_cast<int64_t>(sizeof(int64_t)), kLine);
  }
};

class Worker {
 public:
  Worker(const BinaryConv2dArgs& args, const Plan& plan, void* workspace)
      : args_(args),
        plan_(plan),
        layout_(args.shape),
        weight_(static_cast<const uint8_t*>(args.weight) + layout_.avx512_bytes),
        block_(plan.geometry(plan.largest_images(), plan.largest_rows())) {
    const WorkspaceLayout parts(plan);
    uint8_t* base = static_cast<uint8_t*>(workspace);
    band_ = reinterpret_cast<int8_t*>(base);
    acc_ = base + parts.accumulators;
    expanded_ = reinterpret_cast<int8_t*>(base + parts.weights);
    offsets_ = reinterpret_cast<int64_t*>(base + parts.offsets);
  }

  void enter_block(int64_t index) {
    const int64_t image_block = index / plan_.row_blocks, row_block = index % plan_.row_blocks;
    const ConvShape& shape = plan_.shape;
    image_ = part_begin(shape.batch, plan_.image_blocks, image_block);
    row_ = part_begin(shape.out_height, plan_.row_blocks, row_block);
    block_ = plan_.geometry(part_begin(shape.batch, plan_.image_blocks, image_block + 1) - image_,
                            part_begin(shape.out_height, plan_.row_blocks, row_block + 1) - row_);
    band_group_ = -1;
    int64_t* offset = offsets_;
    for (int64_t word = 0; word < plan_.words; ++word) {
      for (int64_t y = 0; y < shape.kernel_height; ++y) {
        for (int64_t x = 0; x < shape.kernel_width; ++x) {
          *offset++ = word * block_.plane_bytes() +
                      row_cell(plan_.vertical.phase(y), plan_.horizontal.phase(x), plan_.vertical.shift(y)) * kLine +
                      plan_.horizontal.shift(x) * block_.images * kLine;
        }
      }
    }
  }

  int64_t groups() const { return block_.groups; }

  // Zeroes the output words of groups [begin, end).
  void clear(int64_t begin, int64_t end) const {
    const BitOutput output(args_);
    int64_t pixels[kTileRows];
    const int32_t* acc[kTileRows];
    for (int64_t tile = block_.group_begin(begin); tile < block_.group_begin(end); ++tile) {
      const int64_t count = tile_pixels(tile, nullptr, pixels, acc);
      for (int64_t i = 0; i < count; ++i) output.clear(pixels[i]);
    }
  }

  // All of one filter block for groups of tiles [begin, end).
  void run(int64_t filter_block, int64_t begin, int64_t end) {
    const int64_t group = filter_block / plan_.filter_blocks;
    const int64_t filter = filter_block % plan_.filter_blocks * kFilterBlock;  // in its convolution group
    const int64_t filters = min(kFilterBlock, plan_.filters - filter);
    const int64_t first_tile = block_.group_begin(begin), last_tile = block_.group_begin(end);
    fill_band(group, block_.first_row(first_tile), block_.end_row(last_tile) + plan_.vertical.reach);

    for (int64_t i = 0; i < filters; i += kStripFilters) {
      const int64_t filter_tiles = filters - i > kTileRows ? 2 : 1;
      const uint8_t* masks = weight_ + group * layout_.group_bytes + (filter + i) / kTileRows * layout_.tile_bytes;
      const int64_t chunks = ceil_div(plan_.steps, kMaxSteps);
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t first = part_begin(plan_.steps, chunks, chunk);
        const int64_t count = part_begin(plan_.steps, chunks, chunk + 1) - first;
        expand_weight(masks, count * filter_tiles, expanded_);
        masks += count * filter_tiles * kMaskBytes;
        memory_barrier();
        StepList steps;
        steps.count = 0;
        TapWindow listed = {-1, -1, -1, -1};
        for (int64_t j = begin; j < end; ++j) {
          const int64_t tile = block_.group_begin(j), tiles = block_.group_begin(j + 1) - tile;
          const TapWindow window = needed_taps(tile, tiles);
          if (!(window == listed)) list_steps(first, count, window, filter_tiles, &steps);
          listed = window;
          multiply(steps, tile, tiles, filter_tiles, chunk > 0,
                   acc_ + (tile - first_tile) * kTileRows * kAccRow + i * static_cast<int64_t>(sizeof(int32_t)));
        }
      }
    }
    store(first_tile, last_tile, group * plan_.filters + filter, filters);
  }

 private:
  struct TapWindow {
    int64_t top, bottom, left, right;
    bool operator==(const TapWindow& other) const {
      return top == other.top && bottom == other.bottom && left == other.left && right == other.right;
    }
  };

  int64_t row_cell(int64_t phase_y, int64_t phase_x, int64_t row) const {
    return ((phase_y * plan_.horizontal.phases + phase_x) * block_.band_rows + row) * block_.pitch * block_.images;
  }

  // Under padding of 0, the taps that are inside the image for some output of the tiles; else all.
  TapWindow needed_taps(int64_t tile, int64_t tiles) const {
    const ConvShape& shape = plan_.shape;
    TapWindow window = {0, shape.kernel_height, 0, shape.kernel_width};
    if (args_.padding_value != 0) return window;
    const int64_t first_row = block_.first_row(tile), last_row = block_.end_row(tile + tiles) - 1;
    // The first and the last valid tap both go down as the output goes on.
    window.top = plan_.vertical.taps(row_ + last_row).begin;
    window.bottom = plan_.vertical.taps(row_ + first_row).end;
    if (first_row == last_row) {
      const int64_t row_start = first_row * block_.pitch * block_.images;
      const int64_t first = (block_.first_cell(tile) - row_start) / block_.images;
      const int64_t last = (block_.first_cell(tile + tiles - 1) + kTileRows - 1 - row_start) / block_.images;
      window.left = plan_.horizontal.taps(min(last, shape.out_width - 1)).begin;
      window.right = plan_.horizontal.taps(first).end;
    }
    return window;
  }

  // Of steps [first, first + count), those under the window's taps.
  void list_steps(int64_t first, int64_t count, const TapWindow& window, int64_t filter_tiles, StepList* list) const {
    const int64_t width = plan_.shape.kernel_width, height = plan_.shape.kernel_height;
    int64_t x = first % width, y = first / width % height;
    list->count = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (y >= window.top && y < window.bottom && x >= window.left && x < window.right) {
        list->activation[list->count] = offsets_[first + i];
        list->weight[list->count] = i * filter_tiles * kTileBytes;
        ++list->count;
      }
      if (++x < width) continue;
      x = 0;
      if (++y == height) y = 0;
    }
  }

  void multiply(const StepList& steps, int64_t tile, int64_t tiles, int64_t filter_tiles, bool accumulate,
                uint8_t* acc) const {
    const int8_t* const pixels[2] = {band_ + block_.first_cell(tile) * kLine,
                                     band_ + block_.first_cell(tile + tiles - 1) * kLine};
    if (tiles == 1) {
      if (filter_tiles == 1) return multiply_tiles<1, 1>(steps, pixels, expanded_, accumulate, acc);
      return multiply_tiles<1, 2>(steps, pixels, expanded_, accumulate, acc);
    }
    if (filter_tiles == 1) return multiply_tiles<2, 1>(steps, pixels, expanded_, accumulate, acc);
    return multiply_tiles<2, 2>(steps, pixels, expanded_, accumulate, acc);
  }

  // The epilogue of tiles [begin, end). Interleaved with the products, int32 output took 4 to 6 % less time at one
  // image and 6 % more at 8.
  void store(int64_t begin, int64_t end, int64_t filter, int64_t filters) const {
    memory_barrier();
    for (int64_t tile = begin; tile < end; ++tile) {
      int64_t pixels[kTileRows];
      const int32_t* acc[kTileRows];
      const int64_t count = tile_pixels(tile, acc_ + (tile - begin) * kTileRows * kAccRow, pixels, acc);
      store_tile<Avx512Epilogue>(args_, acc, pixels, count, filter, filters);
    }
  }

  // Output pixels of a tile's cells and where their accumulators are; cells between rows are left out.
  int64_t tile_pixels(int64_t tile, const uint8_t* tile_acc, int64_t* pixels, const int32_t** acc) const {
    const ConvShape& shape = plan_.shape;
    const int64_t cell = block_.first_cell(tile);
    const int64_t cells = min(kTileRows, block_.run_cells - tile % block_.tiles_per_run * kTileRows);
    int64_t image = cell % block_.images;
    int64_t x = cell / block_.images % block_.pitch;
    int64_t y = cell / block_.images / block_.pitch;
    int64_t count = 0;
    for (int64_t i = 0; i < cells; ++i) {
      if (x < shape.out_width) {
        pixels[count] = ((image_ + image) * shape.out_height + row_ + y) * shape.out_width + x;
        acc[count++] = reinterpret_cast<const int32_t*>(tile_acc + i * kAccRow);
      }
      if (++image < block_.images) continue;
      image = 0;
      if (++x < block_.pitch) continue;
      x = 0;
      ++y;
    }
    return count;
  }

  // Makes band rows [begin, end) of a convolution group valid. The valid rows stay one interval.
  void fill_band(int64_t group, int64_t begin, int64_t end) {
    if (band_group_ != group) {
      band_group_ = group;
      band_begin_ = band_end_ = begin;
    }
    for (; band_begin_ > begin; --band_begin_) fill_row(band_begin_ - 1);
    for (; band_end_ < end; ++band_end_) fill_row(band_end_);
  }

  void fill_row(int64_t row) const {
    const ConvShape& shape = plan_.shape;
    const Axis &vertical = plan_.vertical, &horizontal = plan_.horizontal;
    const int64_t pixel_words = shape.groups * plan_.words;
    const int64_t image_words = shape.height * shape.width * pixel_words;
    const int64_t last_channels = channels_per_group(shape) - (plan_.words - 1) * kWordBits;
    for (int64_t word = 0; word < plan_.words; ++word) {
      const __mmask64 valid = _cvtu64_mask64(word + 1 < plan_.words ? ~uint64_t{0} : low_mask(last_channels));
      const __m512i set = _mm512_maskz_set1_epi8(valid, 1);
      const __m512i clear = _mm512_maskz_set1_epi8(valid, args_.encoding == Encoding::sign ? -1 : 0);
      const __m512i padding = _mm512_maskz_set1_epi8(valid, static_cast<char>(args_.padding_value));
      for (int64_t phase_y = 0; phase_y < vertical.phases; ++phase_y) {
        const int64_t y = vertical.input_index(row_ + row, phase_y);
        const bool inside = y >= 0 && y < shape.height;
        for (int64_t phase_x = 0; phase_x < horizontal.phases; ++phase_x) {
          int8_t* out = band_ + word * block_.plane_bytes() + row_cell(phase_y, phase_x, row) * kLine;
          for (int64_t column = 0; column < block_.pitch; ++column) {
            const int64_t x = horizontal.input_index(column, phase_x);
            if (!inside || x < 0 || x >= shape.width) {
              for (int64_t i = 0; i < block_.images; ++i, out += kLine) _mm512_store_si512(out, padding);
              continue;
            }
            const uint64_t* input = args_.input + image_ * image_words + (y * shape.width + x) * pixel_words +
                                    band_group_ * plan_.words + word;
            for (int64_t i = 0; i < block_.images; ++i, out += kLine, input += image_words) {
              uint64_t bits;
              memcpy(&bits, input, sizeof bits);
              _mm512_store_si512(out, _mm512_mask_blend_epi8(_cvtu64_mask64(bits), clear, set));
            }
          }
        }
      }
    }
  }

  const BinaryConv2dArgs& args_;
  const Plan& plan_;
  const WeightLayout layout_;
  const uint8_t* weight_;
  int8_t* band_;
  uint8_t* acc_;
  int8_t* expanded_;
  int64_t* offsets_;
  BlockGeometry block_;
  int64_t image_ = 0, row_ = 0;  // first of the block
  int64_t band_group_ = -1, band_begin_ = 0, band_end_ = 0;
};

// The one place that decides, by shape alone: compares the estimate with the AVX-512 kernel's, which takes 2.5 cycles
// for a pixel, 16 filters and 64 channels, and only for taps inside the image.
inline bool use_amx(const ConvShape& shape) {
  if (!weight_suits_amx(shape) || out_pixels(shape) == 0 || shape.height == 0 || shape.width == 0) return false;
  const Plan plan(shape);
  if (WorkspaceLayout(plan).bytes > kMaxWorkspaceBytes) return false;
  const double tap_pixels =
      static_cast<double>(plan.shape.batch * plan.vertical.all_taps() * plan.horizontal.all_taps());
  const double avx512 = 2.5 * tap_pixels * static_cast<double>(plan.words * shape.groups) *
                        static_cast<double>(ceil_div(plan.filters, kTileRows));
  return plan.pixel_cost * static_cast<double>(out_pixels(shape)) < avx512;
}

}  // namespace

namespace amx {

int64_t binary_conv2d_weight_bytes(const ConvShape& shape) noexcept { return WeightLayout(shape).bytes; }

void binary_conv2d_block_weight(const ConvShape& shape, const uint64_t* words, void* blocked) noexcept {
  avx512::binary_conv2d_block_weight(shape, words, blocked);
  if (!weight_suits_amx(shape)) return;
  const WeightLayout layout(shape);
  const int64_t all_taps = taps(shape), words_per_tap = words_per_group(shape), filters = filters_per_group(shape);
  uint8_t* out = static_cast<uint8_t*>(blocked) + layout.avx512_bytes;
  for (int64_t group = 0; group < shape.groups; ++group) {
    for (int64_t strip = 0; strip < filters; strip += kStripFilters) {
      const int64_t strip_end = min(strip + kStripFilters, filters);
      for (int64_t word = 0; word < words_per_tap; ++word) {
        for (int64_t tap = 0; tap < all_taps; ++tap) {
          for (int64_t first = strip; first < strip_end; first += kTileRows) {
            const int64_t count = min(kTileRows, strip_end - first);
            uint64_t masks[kTileRows] = {};
            for (int64_t i = 0; i < count; ++i) {
              const int64_t filter = group * filters + first + i;
              const uint64_t bits = words[(filter * all_taps + tap) * words_per_tap + word];
              for (int64_t row = 0; row < kTileRows; ++row) masks[row] |= ((bits >> (4 * row)) & 15) << (4 * i);
            }
            memcpy(out, masks, sizeof masks);
            out += sizeof masks;
          }
        }
      }
    }
  }
}

int64_t binary_conv2d_workspace_bytes(const BinaryConv2dArgs& args) noexcept {
  if (!use_amx(args.shape)) return avx512::binary_conv2d_workspace_bytes(args);
  return WorkspaceLayout(Plan(args.shape)).bytes;
}

int64_t binary_conv2d_items(const BinaryConv2dArgs& args) noexcept {
  if (!use_amx(args.shape)) return avx512::binary_conv2d_items(args);
  const Plan plan(args.shape);
  const int64_t groups = plan.blocks() * plan.groups_per_block;
  return conv_blocks_share_words(args) ? groups : groups * plan.all_filter_blocks();
}

// Items: block, filter block, group of tiles; where filter blocks share words: block, group of tiles.
void binary_conv2d(const BinaryConv2dArgs& args, int64_t begin, int64_t end, void* workspace) noexcept {
  if (!use_amx(args.shape)) return avx512::binary_conv2d(args, begin, end, workspace);
  const Plan plan(args.shape);
  const bool shared = conv_blocks_share_words(args);
  const int64_t groups = plan.groups_per_block;
  const int64_t block_items = shared ? groups : groups * plan.all_filter_blocks();
  Worker worker(args, plan, workspace);
  _tile_loadconfig(&kTileConfig);
  while (begin < end) {
    const int64_t block = begin / block_items;
    worker.enter_block(block);
    const int64_t block_end = min(end, (block + 1) * block_items);
    while (begin < block_end) {
      const int64_t item = begin - block * block_items;
      const int64_t first = item % groups;
      const int64_t last = min(groups, first + block_end - begin);
      begin += last - first;
      const int64_t real_last = min(last, worker.groups());  // a smaller block has fewer groups
      if (first >= real_last) continue;
      if (shared) {
        worker.clear(first, real_last);
        for (int64_t i = 0; i < plan.all_filter_blocks(); ++i) worker.run(i, first, real_last);
      } else {
        worker.run(item / groups, first, real_last);
      }
    }
  }
  _tile_release();
}

}  // namespace amx
}  // namespace lowbit
