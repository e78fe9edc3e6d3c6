// Contract and arguments: core/ops/antithetic_sample.h.
#pragma once

#include "core/ops/antithetic_sample.h"
#include "cpu/isa.h"

namespace lowbit {

// The elements of a row are worked in blocks of one word's dimensions; one block is one item.
static inline int64_t antithetic_sample_items(const AntitheticSampleArgs& args) {
  return args.rows * words_for(args.dimensions);
}

}  // namespace lowbit

// False where a logit of the range is not finite.
LOWBIT_DECLARE_FOR_EACH_ISA(bool antithetic_sample(const AntitheticSampleArgs& args, int64_t begin,
                                                   int64_t end) noexcept)
