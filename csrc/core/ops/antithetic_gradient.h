// gradient[r, d] = ratio[r, d] * sum over samples i of weight[r, i] * b_i[r, d], in float32. The products of four
// neighbouring samples are summed first, in order, then the sums of four, in order: every device, layout and
// instruction set gives the same bits. With weight_i = (f_i - mean f) / (n - 1) this is the ARMS estimate of the
// gradient of E f(b) with respect to the logits (Dimitriev and Zhou, ICML 2021).
#pragma once

#include "core/ops/antithetic_sample.h"

namespace lowbit {

struct AntitheticGradientArgs {
  const void* bits;  // see SampleLayout
  SampleLayout layout;
  int64_t rows;
  int64_t dimensions;
  int64_t samples;      // 1 to kMostSamples
  const float* weight;  // [rows, samples]
  const float* ratio;   // [rows, dimensions], or null for 1
  float* gradient;      // [rows, dimensions]
};

}  // namespace lowbit
