// out = OR over the window's taps that lie inside the image: the maximum for both encodings. Where a bit of `invert` is
// set the channel is complemented before and after (AND, the minimum): the bit of a channel with negative batch-norm
// scale falls as its accumulator grows, and pooling must follow the accumulator.
#pragma once

#include "core/pool_shape.h"
#include "core/status.h"

namespace lowbit {

struct BinaryMaxPool2dArgs {
  PoolShape shape;
  const uint64_t* input;   // [batch, height, width, words_for(channels)]
  const uint64_t* invert;  // [words_for(channels)], tail bits 0; or null
  uint64_t* output;        // [batch, out_height, out_width, words_for(channels)]
};

}  // namespace lowbit
