// Contract and arguments: core/ops/pointwise.h.
#pragma once

#include "core/ops/pointwise.h"
#include "cpu/isa.h"

// Items: pointwise_items.
LOWBIT_DECLARE_FOR_EACH_ISA(void pointwise(const PointwiseArgs& args, int64_t begin, int64_t end) noexcept)
