// grad_input[n, h, w, c] = mask bit ? sum over taps and filters of scale[o] * grad_output[n, y, x, o] * w[o, tap, c] :
// 0 in float32; w in {-1, +1} is read from bits. Deterministic: every element is summed by one thread in a fixed order.
#pragma once

#include "core/conv_shape.h"
#include "core/status.h"

namespace lowbit {

struct BinaryConv2dInputGradArgs {
  ConvShape shape;
  const float* grad_output;  // [batch, out_height, out_width, filters]
  const uint64_t* weight;    // words [filters, kernel_height, kernel_width, words_per_group], bit 1 = +1
  const float* scale;        // scale_stride = 1: [filters]; 0: one value for all; or null
  int64_t scale_stride;
  const uint64_t* mask;  // [batch, height, width, words_for(channels)] (groups not aligned), or null
  float* grad_input;     // [batch, height, width, channels]
  void* workspace;       // threads * binary_conv2d_input_grad_workspace_bytes, 64-byte aligned
};

}  // namespace lowbit
