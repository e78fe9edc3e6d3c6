// Contract and arguments: core/ops/channel_dequantize.h.
#pragma once

#include "core/ops/channel_dequantize.h"
#include "cpu/isa.h"

// One item is a row.
LOWBIT_DECLARE_FOR_EACH_ISA(void channel_dequantize(const ChannelDequantizeArgs& args, int64_t begin,
                                                    int64_t end) noexcept)
