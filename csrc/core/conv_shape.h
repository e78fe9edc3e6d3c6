// Geometry of a two-dimensional convolution, as torch.nn.functional.conv2d defines it. A linear layer is a convolution
// of 1 x 1 images by a 1 x 1 kernel; a one-dimensional convolution has height 1.
#pragma once

#include "core/layout.h"
#include "core/tap_range.h"

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

LOWBIT_INLINE int64_t channels_per_group(const ConvShape& shape) { return shape.channels / shape.groups; }
LOWBIT_INLINE int64_t filters_per_group(const ConvShape& shape) { return shape.filters / shape.groups; }
LOWBIT_INLINE int64_t taps(const ConvShape& shape) { return shape.kernel_height * shape.kernel_width; }
LOWBIT_INLINE int64_t words_per_group(const ConvShape& shape) { return words_for(channels_per_group(shape)); }
LOWBIT_INLINE int64_t out_pixels(const ConvShape& shape) { return shape.batch * shape.out_height * shape.out_width; }

// Whether packed pixels have the channels of a group at a word's boundary.
LOWBIT_INLINE bool groups_are_aligned(const ConvShape& shape) {
  return shape.groups == 1 || channels_per_group(shape) % kWordBits == 0;
}

// One dimension.
struct ConvAxis {
  int64_t out_size, stride, pad, dilation, kernel, size;
};

LOWBIT_INLINE ConvAxis vertical_axis(const ConvShape& s) {
  return {s.out_height, s.stride_height, s.pad_top, s.dilation_height, s.kernel_height, s.height};
}
LOWBIT_INLINE ConvAxis horizontal_axis(const ConvShape& s) {
  return {s.out_width, s.stride_width, s.pad_left, s.dilation_width, s.kernel_width, s.width};
}
LOWBIT_INLINE TapRange valid_taps(const ConvAxis& axis, int64_t out_index) {
  return valid_taps(out_index, axis.stride, axis.pad, axis.dilation, axis.kernel, axis.size);
}

}  // namespace lowbit
