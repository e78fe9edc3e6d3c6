// The rate of binary multiply-adds that a GPU's instruction for bit matrices allows: a loop that lives in registers,
// with no memory and no address arithmetic. The benchmarks state kernels as percent of it.
#pragma once

#include "core/layout.h"
#include "core/status.h"

namespace lowbit {

struct PopcountPeakArgs {
  int64_t iterations;
  uint32_t* counts;  // of each thread, modulo 2^32: a quarter of its bit pairs; or the tensor core is mistaken
};

}  // namespace lowbit
