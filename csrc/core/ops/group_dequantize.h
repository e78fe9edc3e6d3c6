// output[i] = code i * scale + minimum of its group, rounded once to float and then to type.
#pragma once

#include "core/codes.h"
#include "core/status.h"

namespace lowbit {

struct GroupDequantizeArgs {
  const uint8_t* codes;
  const uint16_t* scale_minimum;
  int64_t count;
  int bits;
  void* output;  // [count] of type
  FloatType type;
};

}  // namespace lowbit
