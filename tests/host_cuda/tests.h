// What the tests of the CUDA kernels share beside tests/cpp. Each draws random cases and compares a
// CUDA launcher, run on the host, with the scalar CPU kernel.
#pragma once

#include "../cpp/common.h"
#include "cuda/launch.h"

namespace lowbit::test {

constexpr cuda::Stream kStream{1, nullptr};  // not the current device, which a launch must leave as it is

// Operands come from torch's allocator, or are slices that begin anywhere.
inline Alignment random_alignment(Random& random) {
  return random.between(0, 3) == 0 ? Alignment::value : Alignment::allocator;
}

}  // namespace lowbit::test
