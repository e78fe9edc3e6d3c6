// How the amx level cuts a convolution, on every CPU: each number against what it stands for.
#include <set>

#include "conv_shapes.h"
#include "cpu/binary_conv2d/amx_plan.h"

namespace lowbit::test {
namespace {

// With output pixels, and now and then more of them than one block has.
ConvShape random_shape(Random& random) {
  ConvShape s = random_conv_shape(random, 1500000);
  s.batch = random.pick<int64_t>({1, random.between(1, 40), random.between(1, 40)});
  s.height = random.size(70);
  s.width = random.size(70);
  const auto out_size = [](int64_t size, int64_t pad, int64_t dilation, int64_t kernel, int64_t stride) {
    return max(size + 2 * pad - dilation * (kernel - 1) - 1, 0) / stride + 1;
  };
  s.out_height = out_size(s.height, s.pad_top, s.dilation_height, s.kernel_height, s.stride_height);
  s.out_width = out_size(s.width, s.pad_left, s.dilation_width, s.kernel_width, s.stride_width);
  return s;
}

// Every input that an output meets is at the output's position, shifted by the tap, in the plane of the tap's phase.
void check_axis(const std::string& what, const ConvAxis& plain) {
  const amx::PhasedAxis axis = amx::make_axis(plain);
  int64_t inside = 0;
  std::set<int64_t> residues;
  for (int64_t tap = 0; tap < plain.kernel; ++tap) {
    const int64_t phase = amx::tap_phase(axis, tap), shift = amx::tap_shift(axis, tap);
    residues.insert(tap * plain.dilation % plain.stride);
    if (phase >= axis.phases || shift > axis.reach) fail(what + ": a tap beyond the planes");
    for (int64_t out = 0; out < plain.out_size; ++out) {
      const int64_t input = out * plain.stride + tap * plain.dilation - plain.pad;
      if (amx::input_index(axis, out + shift, phase) != input) fail(what + ": a tap meets another input");
      inside += input >= 0 && input < plain.size;
    }
  }
  if (axis.phases != static_cast<int64_t>(residues.size())) fail(what + ": planes that no tap uses");
  if (amx::all_taps(axis) != inside) fail(what + ": taps inside the image are miscounted");
}

// The tiles of a block hold each of its outputs once, and read inside its planes.
void check_block(const std::string& what, const amx::Plan& plan, int64_t images, int64_t rows) {
  const amx::BlockGeometry block(plan, images, rows);
  const int64_t width = plan.shape.out_width, row_cells = block.pitch * images;
  const int64_t last_plane = plan.vertical.phases * plan.horizontal.phases - 1;
  const int64_t last_tap =
      (last_plane * block.band_rows + plan.vertical.reach) * row_cells + plan.horizontal.reach * images;
  std::vector<int> seen(static_cast<size_t>(rows * width * images));
  for (int64_t group = 0; group < block.groups; ++group) {
    const int64_t begin = block.group_begin(group), end = block.group_begin(group + 1);
    if (end - begin < 1 || end - begin > amx::kGroupTiles) fail(what + ": a group of " + std::to_string(end - begin));
    const bool split = begin / block.tiles_per_run != (end - 1) / block.tiles_per_run;
    if (split && block.tiles_per_run > 2) fail(what + ": a group in two sections");
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = block.first_cell(tile);
      if (last_tap + first + amx::kTileRows > block.plane_bytes() / amx::kLine) fail(what + ": a tile reads on");
      for (int64_t cell = first; cell < first + block.tile_cells(tile); ++cell) {
        const int64_t y = cell / row_cells, x = cell % row_cells / images;
        if (y < block.first_row(begin) || y >= block.end_row(end)) fail(what + ": a group has other rows");
        if (x < width && y < rows) ++seen[static_cast<size_t>((y * width + x) * images + cell % images)];
      }
    }
  }
  if (block.group_begin(block.groups) != block.tiles) fail(what + ": tiles without a group");
  for (const int count : seen) {
    if (count != 1) return fail(what + ": an output is in " + std::to_string(count) + " tiles");
  }
  const amx::WorkspaceLayout layout(plan);
  if (block.groups > plan.groups_per_block || plan.words * block.plane_bytes() > layout.accumulators ||
      block.tiles * amx::kTileRows * amx::kAccRow > layout.weights - layout.accumulators) {
    fail(what + ": a block is larger than the largest");
  }
}

void check(Random& random) {
  const ConvShape shape = random_shape(random);
  const std::string what = describe(shape);
  check_axis(what, vertical_axis(shape));
  check_axis(what, horizontal_axis(shape));
  const amx::Plan plan = amx::make_plan(shape);
  if (out_pixels(plan.shape) != out_pixels(shape)) fail(what + ": pixels are lost");
  for (int64_t i = 0; i < plan.image_blocks; ++i) {
    const int64_t images = amx::part_begin(plan.shape.batch, plan.image_blocks, i + 1) -
                           amx::part_begin(plan.shape.batch, plan.image_blocks, i);
    for (int64_t j = 0; j < plan.row_blocks; ++j) {
      check_block(what, plan, images,
                  amx::part_begin(plan.shape.out_height, plan.row_blocks, j + 1) -
                      amx::part_begin(plan.shape.out_height, plan.row_blocks, j));
    }
  }
}

// Measured on Sapphire Rapids.
void check_choice(const char* what, const ConvShape& shape, bool faster) {
  if (!amx::weight_suits_tiles(shape) || amx::is_faster(amx::make_plan(shape)) != faster) {
    fail(std::string(what) + (faster ? " is not left to AMX" : " is left to AMX"));
  }
}

}  // namespace

LOWBIT_TEST(amx_plan) {
  check_choice("a 3 x 3 convolution", {1, 14, 14, 256, 256, 3, 3, 14, 14, 1, 1, 1, 1, 1, 1, 1}, true);
  check_choice("a linear layer of one row", {1, 1, 1, 4096, 4096, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1}, false);
  for (int i = 0; i < cases; ++i) check(random);
}

}  // namespace lowbit::test
