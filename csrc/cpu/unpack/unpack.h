// Contract and arguments: core/ops/unpack.h.
#pragma once

#include "core/ops/unpack.h"
#include "cpu/isa.h"

// One item is one pixel.
LOWBIT_DECLARE_FOR_EACH_ISA(void unpack(const UnpackArgs& args, int64_t begin, int64_t end) noexcept)
