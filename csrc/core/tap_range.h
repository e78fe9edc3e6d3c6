// Taps of a window, of a convolution or a pooling, that fall inside the image.
#pragma once

#include "core/layout.h"

namespace lowbit {

// Half-open range of kernel rows (or columns).
struct TapRange {
  int64_t begin, end;
};

// Those inside the image for one output row (or column).
LOWBIT_INLINE TapRange valid_taps(int64_t out_index, int64_t stride, int64_t pad, int64_t dilation, int64_t kernel,
                                  int64_t size) {
  const int64_t first = out_index * stride - pad;  // image index under tap 0
  int64_t begin = first >= 0 ? 0 : ceil_div(-first, dilation);
  int64_t end = first >= size ? 0 : ceil_div(size - first, dilation);
  if (end > kernel) end = kernel;
  if (begin > end) begin = end;
  return {begin, end};
}

}  // namespace lowbit
