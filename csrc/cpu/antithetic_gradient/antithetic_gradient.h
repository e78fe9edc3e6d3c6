// Contract and arguments: core/ops/antithetic_gradient.h.
#pragma once

#include "core/ops/antithetic_gradient.h"
#include "cpu/isa.h"

namespace lowbit {

// One item is this many dimensions of a row: enough to pay for the row's tables, and whole words.
constexpr int64_t kGradientDimensions = 1024;

static inline int64_t antithetic_gradient_items(const AntitheticGradientArgs& args) {
  return args.rows * ceil_div(args.dimensions, kGradientDimensions);
}

}  // namespace lowbit

LOWBIT_DECLARE_FOR_EACH_ISA(void antithetic_gradient(const AntitheticGradientArgs& args, int64_t begin,
                                                     int64_t end) noexcept)
