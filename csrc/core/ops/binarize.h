// words[n, s, b/64] bit b%64 = input[n, c, s] >= threshold[t, c], or <= where flip[t, c], with b = t * channels + c; a
// NaN on either side gives 0. Tail bits are 0. -0 equals +0 and subnormal numbers keep their value, whatever the
// caller's floating-point control says. Optionally the clipped straight-through mask in the same layout: |x| <= 1
// (sign) or 0 < x < 1 (step); NaN gives 0.
#pragma once

#include "core/float_type.h"
#include "core/status.h"

namespace lowbit {

struct BinarizeArgs {
  const void* input;  // channels_last ? [outer, spatial, channels] : [outer, channels, spatial], dense
  FloatType input_type;
  bool channels_last;
  int64_t outer;
  int64_t channels;
  int64_t spatial;
  const float* threshold;  // [thresholds, channels], or null: common_threshold for all
  float common_threshold;
  const uint8_t* flip;     // [thresholds, channels] of 0 or 1, or null
  Encoding encoding;       // chooses the mask's interval only
  uint64_t* words;         // [outer, spatial, words_for(thresholds * channels)]
  uint64_t* mask;          // same layout, or null; null where thresholds = 2
  int64_t thresholds = 1;  // 1, or 2 with `threshold` given
};

LOWBIT_INLINE int64_t bits_per_pixel(const BinarizeArgs& args) { return args.thresholds * args.channels; }

LOWBIT_INLINE float threshold_of(const BinarizeArgs& args, int64_t bit) {
  return args.threshold ? args.threshold[bit] : args.common_threshold;
}

// The mask's interval with its ends included: the open (0, 1) of step is [2^-149, 1 - 2^-24].
struct MaskInterval {
  float lowest, highest;
};

LOWBIT_INLINE MaskInterval mask_interval(Encoding encoding) {
  if (encoding == Encoding::sign) return {-1.0f, 1.0f};
  return {0x1p-149f, 0x1.fffffep-1f};
}

}  // namespace lowbit
