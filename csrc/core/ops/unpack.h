// output[p, c] = bit c of row p ? high : low. Rows are pixels of a packed tensor; the output is dense and
// channels-last.
#pragma once

#include "core/layout.h"
#include "core/status.h"

namespace lowbit {

struct UnpackArgs {
  const uint64_t* words;  // [pixels, words_for(channels)]
  int64_t pixels;
  int64_t channels;
  float low;
  float high;
  void* output;  // [pixels, channels]
  FloatType output_type;
};

}  // namespace lowbit
