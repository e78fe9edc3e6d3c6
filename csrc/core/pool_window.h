// Windows of average pooling without dilation, with the divisors of torch.nn.functional.avg_pool2d: `divisor_override`
// if it is above 0, else the window clipped to the padded image (count_include_pad) or to the image.
#pragma once

#include "core/pool_shape.h"

namespace lowbit {

// The window of one output pixel, as ATen's AvgPool2d computes it: half-open ranges inside the image. taps = sum of a
// window of ones.
struct PoolWindow {
  int64_t top, bottom, left, right;
  int64_t taps;
  float divisor;
};

// One axis: the kernel clipped to the padded image (its length is `padded`), then to the image.
struct PoolSpan {
  int64_t begin, end, padded;
};

LOWBIT_INLINE PoolSpan pool_span(int64_t out_index, int64_t stride, int64_t pad, int64_t kernel, int64_t size) {
  int64_t begin = out_index * stride - pad;
  int64_t end = begin + kernel < size + pad ? begin + kernel : size + pad;
  const int64_t padded = end - begin;
  if (begin < 0) begin = 0;
  if (end > size) end = size;
  return {begin, begin < end ? end : begin, padded};
}

LOWBIT_INLINE PoolSpan row_span(const PoolShape& s, int64_t out_row) {
  return pool_span(out_row, s.stride_height, s.pad_top, s.kernel_height, s.height);
}

LOWBIT_INLINE PoolSpan column_span(const PoolShape& s, int64_t out_column) {
  return pool_span(out_column, s.stride_width, s.pad_left, s.kernel_width, s.width);
}

LOWBIT_INLINE PoolWindow pool_window(bool count_include_pad, int64_t divisor_override, PoolSpan rows,
                                     PoolSpan columns) {
  const int64_t taps = (rows.end - rows.begin) * (columns.end - columns.begin);
  int64_t divisor = count_include_pad ? rows.padded * columns.padded : taps;
  if (divisor_override > 0) divisor = divisor_override;
  if (taps == 0) divisor = 1;  // an empty window averages to 0
  return {rows.begin, rows.end, columns.begin, columns.end, taps, static_cast<float>(divisor)};
}

}  // namespace lowbit
