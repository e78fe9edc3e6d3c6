// Contract and arguments: core/ops/binary_matmul.h. The products are those of binary_conv2d; launch.cpp puts them
// together.
#pragma once

#include "core/ops/binary_matmul.h"
#include "cpu/isa.h"

// Makes rows [begin, end) of batch * rows, with b of steps, of the int32 products with b's signs, which lie there.
LOWBIT_DECLARE_FOR_EACH_ISA(void binary_matmul_halve(const BinaryMatmulArgs& args, int64_t begin, int64_t end) noexcept)
