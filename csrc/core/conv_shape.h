// Geometry of a two-dimensional convolution, as torch.nn.functional.conv2d defines it. A linear layer is a convolution
// of 1 x 1 images by a 1 x 1 kernel; a one-dimensional convolution has height 1. Internal linkage: see layout.h.
#pragma once

#include "core/layout.h"

namespace lowbit {

struct ConvShape {
  int64_t batch, height, width, channels;        // input
  int64_t filters, kernel_height, kernel_width;  // weight
  int64_t out_height, out_width;
  int64_t stride_height, stride_width;
  int64_t pad_top, pad_left;  // bottom and right follow from out_height and out_width
  int64_t dilation_height, dilation_width;
  int64_t groups;
};

static inline int64_t channels_per_group(const ConvShape& shape) { return shape.channels / shape.groups; }
static inline int64_t filters_per_group(const ConvShape& shape) { return shape.filters / shape.groups; }
static inline int64_t taps(const ConvShape& shape) { return shape.kernel_height * shape.kernel_width; }
static inline int64_t words_per_group(const ConvShape& shape) { return words_for(channels_per_group(shape)); }
static inline int64_t out_pixels(const ConvShape& shape) { return shape.batch * shape.out_height * shape.out_width; }

// Half-open range of kernel rows (or columns) that fall inside the image for one output row (or column).
struct TapRange {
  int64_t begin, end;
};

static inline TapRange valid_taps(int64_t out_index, int64_t stride, int64_t pad, int64_t dilation, int64_t kernel,
                                  int64_t size) {
  const int64_t first = out_index * stride - pad;  // image index under tap 0
  int64_t begin = first >= 0 ? 0 : ceil_div(-first, dilation);
  int64_t end = first >= size ? 0 : ceil_div(size - first, dilation);
  if (end > kernel) end = kernel;
  if (begin > end) begin = end;
  return {begin, end};
}

}  // namespace lowbit
