// Contract and arguments: core/ops/group_dequantize.h.
#pragma once

#include "core/ops/group_dequantize.h"
#include "cpu/isa.h"

// One item is a group.
LOWBIT_DECLARE_FOR_EACH_ISA(void group_dequantize(const GroupDequantizeArgs& args, int64_t begin, int64_t end) noexcept)
