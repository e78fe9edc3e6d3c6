// output[i] = bit i of mask ? gradient[i] : 0, elementwise in memory order: backward of a straight-through estimator.
#pragma once

#include "core/layout.h"
#include "core/status.h"

namespace lowbit {

struct MaskedGradientArgs {
  const void* gradient;  // [count] of type
  FloatType type;
  int64_t count;
  const uint64_t* mask;  // [words_for(count)]
  void* output;          // [count] of type
};

}  // namespace lowbit
