// A pass over float pixels: two programs (core/epilogue.h) and, between them, a window.
//   value = input[n, y, x, c], converted to float32
//   before   its steps on every input pixel; none of add_tensor, store and bits
//   window   none: the pixel itself. maximum: as torch.nn.functional.max_pool2d, of the pixels inside the image, in
//            row-major order, a later one where it is greater or NaN. average: their sum in row-major order from 0 on,
//            then one division by the divisor of core/pool_window.h; 0 where the window is empty
//   after    its steps on every output pixel
#pragma once

#include "core/epilogue.h"
#include "core/pool_window.h"
#include "core/status.h"

namespace lowbit {

enum class Reduction : int { none = 0, maximum = 1, average = 2 };

struct PointwiseArgs {
  PoolShape shape;  // none: kernel and stride are 1, no padding, out sizes are the image's; average: dilation is 1
  Reduction reduction;
  bool count_include_pad;    // of average
  int64_t divisor_override;  // of average; 0: none
  const void* input;         // channels_last: [batch, height, width] pixels, `stride` elements from one to the next;
  FloatType input_type;      // else [batch, channels, height, width], dense
  bool channels_last;
  int64_t stride;  // at least channels
  EpilogueProgram before, after;
};

// What a maximum is after a later pixel.
LOWBIT_INLINE float later_maximum(float largest, float pixel) {
  return pixel > largest || pixel != pixel ? pixel : largest;
}

// Pixels without a window that are worked together.
constexpr int64_t kPointwisePixels = 32;

// Whether an item is a row of output pixels of an image, as with a window; else kPointwisePixels of an image or, of
// channels_last input, of the batch.
LOWBIT_INLINE bool works_rows(const PointwiseArgs& args) { return args.reduction != Reduction::none; }

LOWBIT_INLINE int64_t pointwise_items(const PointwiseArgs& args) {
  const PoolShape& s = args.shape;
  if (works_rows(args)) return s.batch * s.out_height;
  const int64_t pixels = s.height * s.width;
  return args.channels_last ? ceil_div(s.batch * pixels, kPointwisePixels)
                            : s.batch * ceil_div(pixels, kPointwisePixels);
}

}  // namespace lowbit
