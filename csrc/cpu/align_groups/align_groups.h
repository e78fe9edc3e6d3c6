// Contract and arguments: core/ops/align_groups.h.
#pragma once

#include "core/ops/align_groups.h"
#include "cpu/isa.h"

// One item is one pixel.
LOWBIT_DECLARE_FOR_EACH_ISA(void align_groups(const AlignGroupsArgs& args, int64_t begin, int64_t end) noexcept)
