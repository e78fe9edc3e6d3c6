// Contract and arguments: core/ops/group_quantize.h.
#pragma once

#include "core/ops/group_quantize.h"
#include "cpu/isa.h"

// One item is a group.
LOWBIT_DECLARE_FOR_EACH_ISA(void group_quantize(const GroupQuantizeArgs& args, int64_t begin, int64_t end) noexcept)
