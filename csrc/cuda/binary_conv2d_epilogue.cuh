// From accumulators to the destination: the output kinds of core/ops/binary_conv2d.h, one element or one bit at a time,
// for every engine. The kind is the same for a whole launch, so it is a branch and not a template.
#pragma once

#include "core/ops/binary_conv2d.h"
#include "cuda/platform.cuh"

namespace lowbit::cuda {
namespace {

constexpr int kMostThresholds = 2;

// What the epilogue reads for one filter.
struct FilterTerms {
  float scale, bias;
  uint32_t threshold[kMostThresholds];  // the bits of an int32 or a float32
  bool flip[kMostThresholds];
};

__device__ inline FilterTerms filter_terms(const BinaryConv2dArgs& args, int64_t filter) {
  FilterTerms terms{};
  if (args.scale) terms.scale = args.scale[filter * args.scale_stride];
  if (args.bias) terms.bias = args.bias[filter];
#pragma unroll
  for (int t = 0; t < kMostThresholds; ++t) {
    if (!is_bits(args.output_kind) || t >= args.thresholds) continue;
    const int64_t channel = t * args.shape.filters + filter;
    terms.threshold[t] = static_cast<const uint32_t*>(args.threshold)[channel];
    terms.flip[t] = args.flip && args.flip[channel];
  }
  return terms;
}

// ((scale * acc) + bias) + residual.
__device__ inline float value_of(const BinaryConv2dArgs& args, const FilterTerms& terms, int32_t acc, int64_t element) {
  float value = static_cast<float>(acc);
  if (args.scale) value = terms.scale * value;
  if (args.bias) value = value + terms.bias;
  if (args.residual) {
    if (args.residual_type == FloatType::float32) {
      value = value + static_cast<const float*>(args.residual)[element];
    } else {
      const uint16_t bits = static_cast<const uint16_t*>(args.residual)[element];
      value = value + (args.residual_type == FloatType::bfloat16 ? bfloat16_to_float(bits) : half_to_float(bits));
    }
  }
  return value;
}

// One element of every kind but bits.
__device__ inline void store_value(const BinaryConv2dArgs& args, const FilterTerms& terms, int32_t acc,
                                   int64_t element) {
  if (args.output_kind == ConvOutput::int32) {
    static_cast<int32_t*>(args.output)[element] = acc;
    return;
  }
  const float value = value_of(args, terms, acc, element);
  if (args.output_kind == ConvOutput::float32) {
    static_cast<float*>(args.output)[element] = value;
  } else {
    static_cast<uint16_t*>(args.output)[element] =
        args.output_kind == ConvOutput::bfloat16 ? float_to_bfloat16(value) : float_to_float16(value);
  }
}

// Threshold t of the filter. A NaN gives 0.
__device__ inline bool passes(const BinaryConv2dArgs& args, const FilterTerms& terms, int t, int32_t acc,
                              int64_t element) {
  const uint32_t bits = t == 0 ? terms.threshold[0] : terms.threshold[1];
  const bool flip = t == 0 ? terms.flip[0] : terms.flip[1];
  if (args.output_kind == ConvOutput::bits_by_integer) {
    const int32_t threshold = static_cast<int32_t>(bits);
    return flip ? acc <= threshold : acc >= threshold;
  }
  const float value = value_of(args, terms, acc, element), threshold = bits_to_float(bits);
  return flip ? value <= threshold : value >= threshold;
}

}  // namespace
}  // namespace lowbit::cuda
