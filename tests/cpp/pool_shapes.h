// Random pooling geometry for the pooling tests.
#pragma once

#include "common.h"
#include "core/pool_shape.h"

namespace lowbit::test {

// A size that torch's pooling may give to one output dimension: without ceil_mode, or with it.
inline int64_t pool_out_size(int64_t size, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation,
                             bool ceil_mode) {
  const int64_t span = size + 2 * pad - dilation * (kernel - 1) - 1;
  if (!ceil_mode) return span / stride + 1;
  const int64_t out = (span + stride - 1) / stride + 1;
  return (out - 1) * stride >= size + pad ? out - 1
                                          : out;  // the last window starts inside the image or its left padding
}

inline PoolShape random_pool_shape(Random& random, int64_t most_dilation) {
  PoolShape shape{};
  shape.batch = random.between(0, 2);
  shape.channels = random.size(640);
  shape.kernel_height = random.between(1, 4);
  shape.kernel_width = random.between(1, 4);
  shape.stride_height = random.between(1, 3);
  shape.stride_width = random.between(1, 3);
  shape.dilation_height = random.between(1, most_dilation);
  shape.dilation_width = random.between(1, most_dilation);
  shape.pad_top = random.between(0, shape.kernel_height / 2);
  shape.pad_left = random.between(0, shape.kernel_width / 2);
  shape.height = shape.dilation_height * (shape.kernel_height - 1) + random.between(1, 6);
  shape.width = shape.dilation_width * (shape.kernel_width - 1) + random.between(1, 20);
  const bool ceil_mode = random.coin();
  shape.out_height = pool_out_size(shape.height, shape.kernel_height, shape.stride_height, shape.pad_top,
                                   shape.dilation_height, ceil_mode);
  shape.out_width = pool_out_size(shape.width, shape.kernel_width, shape.stride_width, shape.pad_left,
                                  shape.dilation_width, ceil_mode);
  return shape;
}

inline std::string describe(const PoolShape& s) {
  char text[200];
  snprintf(text, sizeof text, "N%d C%d %dx%d kernel %dx%d stride %dx%d pad %dx%d dilation %dx%d",
           static_cast<int>(s.batch), static_cast<int>(s.channels), static_cast<int>(s.height),
           static_cast<int>(s.width), static_cast<int>(s.kernel_height), static_cast<int>(s.kernel_width),
           static_cast<int>(s.stride_height), static_cast<int>(s.stride_width), static_cast<int>(s.pad_top),
           static_cast<int>(s.pad_left), static_cast<int>(s.dilation_height), static_cast<int>(s.dilation_width));
  return text;
}

}  // namespace lowbit::test
