// The rate of binary multiply-adds that each level's instructions allow: a loop that lives in registers, with no
// memory, no address arithmetic and no epilogue. The benchmarks state kernels as percent of it.
#pragma once

#include "core/layout.h"
#include "cpu/isa.h"

// Runs `iterations` of the loop and returns the binary operations done, 2 for each multiply-add of two bits.
LOWBIT_DECLARE_FOR_EACH_ISA(int64_t popcount_peak(int64_t iterations) noexcept)
