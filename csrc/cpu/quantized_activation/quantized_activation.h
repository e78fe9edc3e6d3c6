// Contract and arguments: core/ops/quantized_activation.h.
#pragma once

#include "core/ops/quantized_activation.h"
#include "cpu/isa.h"

// One item is 64 elements, one word of the mask.
LOWBIT_DECLARE_FOR_EACH_ISA(void quantized_activation(const QuantizedActivationArgs& args, int64_t begin,
                                                      int64_t end) noexcept)
