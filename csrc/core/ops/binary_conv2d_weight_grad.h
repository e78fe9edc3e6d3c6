// grad_weight[o, tap, c] = sum over output pixels of grad_output[n, y, x, o] * a[n, h, w, c] in float32; the activation
// a in {-1, +1} (sign) or {0, 1} (step) is read from bits, padding_value where the tap falls into the padding.
// Deterministic: every element is summed in a fixed order.
#pragma once

#include "core/conv_shape.h"
#include "core/status.h"

namespace lowbit {

// The scalar and the CUDA kernel add the partial sums of so many pixels each: rounding errors grow slower.
constexpr int64_t kPixelsPerPartialSum = 1024;

struct BinaryConv2dWeightGradArgs {
  ConvShape shape;
  Encoding encoding;
  int padding_value;         // 0, +1 or -1
  const float* grad_output;  // [batch, out_height, out_width, filters]
  const uint64_t* input;     // [batch, height, width, groups, words_per_group] (align_groups.h)
  float* grad_weight;        // [filters, kernel_height, kernel_width, channels_per_group]
  void* workspace;           // threads * binary_conv2d_weight_grad_workspace_bytes, 64-byte aligned
};

}  // namespace lowbit
