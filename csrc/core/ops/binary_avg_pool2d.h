// output[n, y, x, c] = (sum of the window's activations) / divisor in float32, one correctly rounded division.
// sum = popc (step) or 2 popc - taps inside the image (sign); zero padding adds nothing.
// divisor as torch.nn.functional.avg_pool2d: `divisor_override` if > 0, else the window clipped to the padded image
// (count_include_pad) or to the image.
#pragma once

#include "core/pool_window.h"
#include "core/status.h"

namespace lowbit {

struct BinaryAvgPool2dArgs {
  PoolShape shape;  // dilation is 1
  Encoding encoding;
  bool count_include_pad;
  int64_t divisor_override;
  const uint64_t* input;  // [batch, height, width, words_for(channels)]
  float* output;          // [batch, out_height, out_width, channels]
};

}  // namespace lowbit
