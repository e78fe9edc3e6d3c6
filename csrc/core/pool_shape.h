// Geometry of two-dimensional pooling over packed bits, as torch.nn.functional defines it.
#pragma once

#include "core/layout.h"

namespace lowbit {

struct PoolShape {
  int64_t batch, height, width, channels;
  int64_t kernel_height, kernel_width;
  int64_t out_height, out_width;
  int64_t stride_height, stride_width;
  int64_t pad_top, pad_left;
  int64_t dilation_height, dilation_width;
};

}  // namespace lowbit
