// Contract and arguments: core/ops/masked_gradient.h.
#pragma once

#include "core/ops/masked_gradient.h"
#include "cpu/isa.h"

// One item is 64 elements, one word of the mask.
LOWBIT_DECLARE_FOR_EACH_ISA(void masked_gradient(const MaskedGradientArgs& args, int64_t begin, int64_t end) noexcept)
