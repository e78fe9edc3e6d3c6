// Contract and arguments: core/ops/binary_conv2d_weight_grad.h.
#pragma once

#include "core/ops/binary_conv2d_weight_grad.h"
#include "cpu/isa.h"

LOWBIT_DECLARE_FOR_EACH_ISA(
    int64_t binary_conv2d_weight_grad_workspace_bytes(const BinaryConv2dWeightGradArgs& args) noexcept)
LOWBIT_DECLARE_FOR_EACH_ISA(int64_t binary_conv2d_weight_grad_items(const BinaryConv2dWeightGradArgs& args) noexcept)
LOWBIT_DECLARE_FOR_EACH_ISA(void binary_conv2d_weight_grad(const BinaryConv2dWeightGradArgs& args, int64_t begin,
                                                           int64_t end, void* workspace) noexcept)
