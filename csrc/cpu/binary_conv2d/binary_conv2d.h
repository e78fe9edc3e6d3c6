// Contract and arguments: core/ops/binary_conv2d.h.
#pragma once

#include "core/ops/binary_conv2d.h"
#include "cpu/binary_conv2d/amx_plan.h"
#include "cpu/binary_conv2d/narrow_groups.h"
#include "cpu/isa.h"

namespace lowbit {

// What a level derives from the sizes of a call, once for all its threads.
struct BinaryConv2dPlan {
  int64_t items;            // any cut of [0, items) into ranges is free of races and gives the same result
  int64_t workspace_bytes;  // of a thread, a multiple of 64; 0 where none is needed
  bool tiled = false;       // made by the tiles of the amx level
  amx::Plan tiles = {};     // if so
};

namespace amx {

// By tiles: of a shape that suits_tiles. Items are block, filter block, group of tiles; where filter blocks share
// words: block, group of tiles.
static inline BinaryConv2dPlan plan_of_tiles(const BinaryConv2dArgs& args) {
  const Plan tiles = make_plan(args.shape);
  const int64_t groups = block_count(tiles) * tiles.groups_per_block;
  const int64_t items = conv_blocks_share_words(args) ? groups : groups * all_filter_blocks(tiles);
  return {items, WorkspaceLayout(tiles).bytes, true, tiles};
}

}  // namespace amx
}  // namespace lowbit

// Bytes of the private weight copy.
LOWBIT_DECLARE_FOR_EACH_ISA(int64_t binary_conv2d_weight_bytes(const ConvShape& shape) noexcept)
// Writes it from words [filters, kernel_height, kernel_width, words_per_group], bit 1 = +1, tail bits 0.
LOWBIT_DECLARE_FOR_EACH_ISA(void binary_conv2d_block_weight(const ConvShape& shape, const uint64_t* words,
                                                            void* blocked) noexcept)
LOWBIT_DECLARE_FOR_EACH_ISA(BinaryConv2dPlan binary_conv2d_plan(const BinaryConv2dArgs& args) noexcept)
// `workspace` is this thread's own part.
LOWBIT_DECLARE_FOR_EACH_ISA(void binary_conv2d(const BinaryConv2dArgs& args, const BinaryConv2dPlan& plan,
                                               int64_t begin, int64_t end, void* workspace) noexcept)
