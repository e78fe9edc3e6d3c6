// Contract and arguments: core/ops/binary_max_pool2d.h.
#pragma once

#include "core/ops/binary_max_pool2d.h"
#include "cpu/isa.h"

// One item is one output row: batch * out_height of them.
LOWBIT_DECLARE_FOR_EACH_ISA(void binary_max_pool2d(const BinaryMaxPool2dArgs& args, int64_t begin,
                                                   int64_t end) noexcept)
