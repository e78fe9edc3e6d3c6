// Contract and arguments: core/ops/batch_norm_relu_backward.h.
#pragma once

#include "core/ops/batch_norm_relu_backward.h"
#include "cpu/isa.h"

// Sums: one item is a chunk. Then one item is a row.
LOWBIT_DECLARE_FOR_EACH_ISA(void batch_norm_relu_sums(const BatchNormReluBackwardArgs& args, int64_t begin,
                                                      int64_t end) noexcept)
LOWBIT_DECLARE_FOR_EACH_ISA(void batch_norm_relu_backward(const BatchNormReluBackwardArgs& args, int64_t begin,
                                                          int64_t end) noexcept)
