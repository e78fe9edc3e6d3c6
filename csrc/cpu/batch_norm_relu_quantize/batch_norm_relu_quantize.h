// Contract and arguments: core/ops/batch_norm_relu_quantize.h.
#pragma once

#include "core/ops/batch_norm_relu_quantize.h"
#include "cpu/isa.h"

// One item is a row.
LOWBIT_DECLARE_FOR_EACH_ISA(void batch_norm_relu_quantize(const BatchNormReluQuantizeArgs& args, int64_t begin,
                                                          int64_t end) noexcept)
