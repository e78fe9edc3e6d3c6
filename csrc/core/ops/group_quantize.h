// codes, scale_minimum = the group codes of input (core/codes.h), elementwise in memory order. Stochastic rounding is a
// function of (seed, offset, element).
#pragma once

#include "core/codes.h"
#include "core/philox.h"
#include "core/status.h"

namespace lowbit {

struct GroupQuantizeArgs {
  const void* input;  // [count] of type
  FloatType type;
  int64_t count;
  int bits;
  bool positive;  // minimum 0, and code 0 for x <= 0 alone
  bool stochastic;
  uint64_t seed, offset;
  uint8_t* codes;           // [code_bytes(count, bits)]
  uint16_t* scale_minimum;  // bfloat16 [ceil(count / 256), 2]
};

}  // namespace lowbit
