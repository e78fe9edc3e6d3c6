// Contract and arguments: core/ops/binary_conv2d.h.
#pragma once

#include "core/ops/binary_conv2d.h"
#include "cpu/isa.h"

// Bytes of the private weight copy.
LOWBIT_DECLARE_FOR_EACH_ISA(int64_t binary_conv2d_weight_bytes(const ConvShape& shape) noexcept)
// Writes it from words [filters, kernel_height, kernel_width, words_per_group], bit 1 = +1, tail bits 0.
LOWBIT_DECLARE_FOR_EACH_ISA(void binary_conv2d_block_weight(const ConvShape& shape, const uint64_t* words,
                                                            void* blocked) noexcept)
// Scratch bytes that one thread needs; 0 where none. A multiple of 64.
LOWBIT_DECLARE_FOR_EACH_ISA(int64_t binary_conv2d_workspace_bytes(const BinaryConv2dArgs& args) noexcept)
// Number of work items; any cut of [0, items) into ranges is free of races and gives the same result.
LOWBIT_DECLARE_FOR_EACH_ISA(int64_t binary_conv2d_items(const BinaryConv2dArgs& args) noexcept)
// `workspace` is this thread's own part.
LOWBIT_DECLARE_FOR_EACH_ISA(void binary_conv2d(const BinaryConv2dArgs& args, int64_t begin, int64_t end,
                                               void* workspace) noexcept)
