// Contract and arguments: core/ops/binarize.h.
#pragma once

#include "core/ops/binarize.h"
#include "cpu/isa.h"

namespace lowbit {

// Planar input is worked in blocks of this many neighbouring pixels; one block or one channels-last pixel is one item.
constexpr int64_t kBinarizePixels = 64;

static inline int64_t binarize_items(const BinarizeArgs& args) {
  return args.outer * (args.channels_last ? args.spatial : ceil_div(args.spatial, kBinarizePixels));
}

}  // namespace lowbit

LOWBIT_DECLARE_FOR_EACH_ISA(void binarize(const BinarizeArgs& args, int64_t begin, int64_t end) noexcept)
