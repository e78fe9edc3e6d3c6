// How the amx level cuts a convolution: integers and an estimate of cycles, the same on every CPU.
#pragma once

#include "core/conv_shape.h"

namespace lowbit::amx {

constexpr int64_t kLine = 64;      // bytes of a cache line, channels of a step, and bytes of a tile row
constexpr int64_t kTileRows = 16;  // pixels of an activation tile, filters of a weight tile
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kFilterBlock = 64;  // filters of an item
constexpr int64_t kAccRow = kFilterBlock * static_cast<int64_t>(sizeof(int32_t));
constexpr int64_t kGroupTiles = 2;      // pixel tiles of a micro-kernel
constexpr int64_t kMaxSteps = 12;       // of a micro-kernel: 24 KiB of weights, half of L1
constexpr int64_t kMaxBlockTiles = 96;  // pixel tiles of a block: 384 KiB of accumulators
constexpr int64_t kMaxBandBytes = 1 << 20;
constexpr int64_t kMaxWorkspaceBytes = 4 << 20;  // beyond L2: very wide images or dilations, very many channels

// One dimension. Padded input coordinate = out * stride + tap * dilation = (out + shift(tap)) * stride + residue, so
// that the inputs of one residue, a phase, form a plane in which a tap is a constant shift.
struct PhasedAxis : ConvAxis {
  int64_t period;  // taps t and t + period share a phase
  int64_t phases;  // that taps use
  int64_t reach;   // largest shift
};

// How the output is cut: blocks of images and rows, whose activations and accumulators fit the workspace; in a block
// the filter blocks; in these the groups of tiles, which are the items.
struct Plan {
  ConvShape shape;  // as merge_pixels makes it
  PhasedAxis vertical, horizontal;
  int64_t words;          // of a pixel and convolution group
  int64_t steps;          // of 64 channels under one tap
  int64_t filters;        // of a convolution group
  int64_t filter_blocks;  // of a convolution group
  int64_t image_blocks, row_blocks;
  int64_t groups_per_block;  // most of any block
  double pixel_cost;         // estimated cycles per output pixel
};

namespace {

// Part `index` of `total` cut into `parts` of nearly equal size.
inline int64_t part_begin(int64_t total, int64_t parts, int64_t index) { return total * index / parts; }

inline PhasedAxis make_axis(const ConvAxis& axis) {
  int64_t a = axis.stride, b = axis.dilation % axis.stride;
  while (b != 0) {  // greatest common divisor
    const int64_t rest = a % b;
    a = b;
    b = rest;
  }
  const int64_t period = axis.stride / a;
  return {axis, period, min(axis.kernel, period), (axis.kernel - 1) * axis.dilation / axis.stride};
}

inline int64_t tap_phase(const PhasedAxis& axis, int64_t tap) { return tap % axis.period; }
inline int64_t tap_shift(const PhasedAxis& axis, int64_t tap) { return tap * axis.dilation / axis.stride; }

// Image index of a position of a phase; outside [0, size) is padding.
inline int64_t input_index(const PhasedAxis& axis, int64_t position, int64_t phase) {
  return position * axis.stride + phase * axis.dilation % axis.stride - axis.pad;
}

// Taps inside the image, summed over the outputs: for each tap the outputs o with 0 <= o * stride + first < size.
inline int64_t all_taps(const ConvAxis& axis) {
  int64_t total = 0;
  for (int64_t tap = 0; tap < axis.kernel; ++tap) {
    const int64_t first = tap * axis.dilation - axis.pad;
    const int64_t begin = first >= 0 ? 0 : ceil_div(-first, axis.stride);
    const int64_t end = first >= axis.size ? 0 : min(ceil_div(axis.size - first, axis.stride), axis.out_size);
    total += max(end - begin, 0);
  }
  return total;
}

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

  BlockGeometry(const Plan& plan, int64_t images_, int64_t rows_) : images(images_), rows(rows_) {
    const PhasedAxis &vertical = plan.vertical, &horizontal = plan.horizontal;
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
  int64_t tile_cells(int64_t tile) const { return min(kTileRows, run_cells - tile % tiles_per_run * kTileRows); }
  // Of the cells of tiles [begin, end), as far as they are outputs.
  int64_t first_row(int64_t begin) const { return first_cell(begin) / (pitch * images); }
  int64_t end_row(int64_t end) const {
    return min((first_cell(end - 1) + kTileRows - 1) / (pitch * images),
               ((end - 1) / tiles_per_run + 1) * rows_per_run - 1) +
           1;
  }
  int64_t plane_bytes() const { return (cells + kTileRows) * kLine; }  // a run's last tile reads up to 15 cells on
};

inline int64_t block_count(const Plan& plan) { return plan.image_blocks * plan.row_blocks; }
inline int64_t all_filter_blocks(const Plan& plan) { return plan.shape.groups * plan.filter_blocks; }
inline BlockGeometry largest_block(const Plan& plan) {
  return BlockGeometry(plan, ceil_div(plan.shape.batch, plan.image_blocks),
                       ceil_div(plan.shape.out_height, plan.row_blocks));
}

// Cycles of a block. Measured: 23 for a tile product with its loads and its share of accumulator traffic, 34 where no
// other tap finds the activations in L1; 40 to expand a weight tile, 5 to expand an activation word; 4 for the detour
// of a pixel's 16 accumulators through the workspace.
inline double estimate(const Plan& plan, const BlockGeometry& block) {
  const double filter_tiles = static_cast<double>(plan.shape.groups * ceil_div(plan.filters, kTileRows));
  const int64_t product = taps(plan.shape) == 1 ? 34 : 23;
  return filter_tiles * static_cast<double>(plan.steps * (product * block.tiles + 40) + 4 * block.tiles * kTileRows) +
         5.0 * static_cast<double>(block.cells * plan.words * plan.shape.groups);
}

// Images are merged in powers of two; rows fill what space is left. The cost counts cycles per output pixel.
inline void choose_blocks(Plan& plan) {
  const ConvShape& shape = plan.shape;
  for (int64_t images = 1;; images = min(2 * images, shape.batch)) {
    const int64_t image_parts = ceil_div(shape.batch, images);
    const int64_t block_images = ceil_div(shape.batch, image_parts);
    const int64_t row_cells = (plan.horizontal.out_size + plan.horizontal.reach) * block_images;
    const int64_t plane_row_bytes = row_cells * plan.words * kLine * plan.vertical.phases * plan.horizontal.phases;
    const int64_t rows =
        min(kMaxBlockTiles * kTileRows / row_cells, kMaxBandBytes / plane_row_bytes - plan.vertical.reach);
    if (images > 1 && rows < 1) break;
    const int64_t row_parts = ceil_div(shape.out_height, min(max(rows, 1), shape.out_height));
    const int64_t block_rows = ceil_div(shape.out_height, row_parts);
    const double cost = estimate(plan, BlockGeometry(plan, block_images, block_rows)) /
                        static_cast<double>(block_images * block_rows * shape.out_width);
    if (images == 1 || cost < plan.pixel_cost) {
      plan.image_blocks = image_parts;
      plan.row_blocks = row_parts;
      plan.pixel_cost = cost;
    }
    if (images == shape.batch) break;
  }
}

// Of a shape with output pixels.
inline Plan make_plan(const ConvShape& original) {
  Plan plan{};
  const ConvShape& shape = plan.shape = merge_pixels(original);
  plan.vertical = make_axis(vertical_axis(shape));
  plan.horizontal = make_axis(horizontal_axis(shape));
  plan.words = words_per_group(shape);
  plan.steps = plan.words * taps(shape);
  plan.filters = filters_per_group(shape);
  plan.filter_blocks = ceil_div(plan.filters, kFilterBlock);
  choose_blocks(plan);
  const int64_t images[] = {shape.batch / plan.image_blocks, ceil_div(shape.batch, plan.image_blocks)};
  const int64_t rows[] = {shape.out_height / plan.row_blocks, ceil_div(shape.out_height, plan.row_blocks)};
  for (int i = 0; i < 4; ++i) {
    plan.groups_per_block = max(plan.groups_per_block, BlockGeometry(plan, images[i / 2], rows[i % 2]).groups);
  }
  return plan;
}

// The workspace of a thread.
struct WorkspaceLayout {
  int64_t accumulators;  // int32 [tiles * 16][64]
  int64_t weights;       // int8 [12][2][1024]
  int64_t offsets;       // int64 [steps]: from a cell to its activations under a tap
  int64_t bytes;         // at 0: int8 [words][cells + 16][64], the band

  explicit WorkspaceLayout(const Plan& plan) {
    const BlockGeometry block = largest_block(plan);
    const int64_t most_tiles =
        block.rows * ceil_div(plan.horizontal.out_size * block.images, kTileRows);  // rows joined: fewer
    accumulators = plan.words * block.plane_bytes();
    weights = accumulators + most_tiles * kTileRows * kAccRow;
    offsets = weights + 2 * kMaxSteps * kTileBytes;
    bytes = offsets + round_up(plan.steps * static_cast<int64_t>(sizeof(int64_t)), kLine);
  }
};

// Channels and filters that fill at least half of a tile; the rest goes to AVX-512 alone, and has no weight copy here.
inline bool weight_suits_tiles(const ConvShape& shape) {
  return taps(shape) > 0 && channels_per_group(shape) > 32 && filters_per_group(shape) >= kTileRows;
}
inline bool suits_tiles(const ConvShape& shape) {
  return weight_suits_tiles(shape) && out_pixels(shape) > 0 && shape.height > 0 && shape.width > 0;
}

// Whether the plan's estimate is below the AVX-512 kernel's, which takes 2.5 cycles for a pixel, 16 filters and 64
// channels, and only for taps inside the image.
inline bool is_faster(const Plan& plan) {
  if (WorkspaceLayout(plan).bytes > kMaxWorkspaceBytes) return false;
  const double tap_pixels = static_cast<double>(plan.shape.batch * all_taps(plan.vertical) * all_taps(plan.horizontal));
  const double avx512 = 2.5 * tap_pixels * static_cast<double>(plan.words * plan.shape.groups) *
                        static_cast<double>(ceil_div(plan.filters, kTileRows));
  return plan.pixel_cost * static_cast<double>(out_pixels(plan.shape)) < avx512;
}

}  // namespace
}  // namespace lowbit::amx
