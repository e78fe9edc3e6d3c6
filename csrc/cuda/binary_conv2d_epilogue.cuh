// From accumulators to the destination: the output kinds of core/ops/binary_conv2d.h, one element or one bit at a time,
// for every engine. The kind is the same for a whole launch, so it is a branch and not a template; what is absent or
// turned round is a constant of the filter instead, which changes no value.
#pragma once

#include "core/ops/binary_conv2d.h"
#include "cuda/platform.cuh"

namespace lowbit::cuda {
namespace {

// What the epilogue reads for one filter. Absent, they are 1 and -0, which change no float.
struct FilterTerms {
  float scale, bias;
};

// A filter that does not exist has the terms of none.
__device__ inline FilterTerms filter_terms(const BinaryConv2dArgs& args, int64_t filter, bool exists) {
  FilterTerms terms{1.0f, -0.0f};
  if (args.scale && exists) terms.scale = args.scale[filter * args.scale_stride];
  if (args.bias && exists) terms.bias = args.bias[filter];
  return terms;
}

// ((scale * acc) + bias) + residual.
__device__ inline float value_of(const BinaryConv2dArgs& args, const FilterTerms& terms, int32_t acc, int64_t element) {
  float value = terms.scale * static_cast<float>(acc) + terms.bias;
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

// One threshold of a filter. With flip, what is at most the threshold passes: both are turned round, an integer by ~
// and a float by its sign, and the comparison stays.
struct FilterThreshold {
  uint32_t threshold;  // the bits of an int32 or a float32
  uint32_t turn;       // that a value's bits are XORed with
};

__device__ inline FilterThreshold filter_threshold(const BinaryConv2dArgs& args, int t, int64_t filter, bool exists) {
  if (!exists) return {};
  const int64_t channel = t * args.shape.filters + filter;
  const bool flip = args.flip && args.flip[channel];
  const uint32_t turn = !flip ? 0 : args.output_kind == ConvOutput::bits_by_integer ? ~0u : 0x80000000u;
  return {static_cast<const uint32_t*>(args.threshold)[channel] ^ turn, turn};
}

__device__ inline bool reaches(const FilterThreshold& of, int32_t acc) {
  return static_cast<int32_t>(static_cast<uint32_t>(acc) ^ of.turn) >= static_cast<int32_t>(of.threshold);
}

// A NaN does not.
__device__ inline bool reaches(const FilterThreshold& of, float value) {
  return bits_to_float(float_to_bits(value) ^ of.turn) >= bits_to_float(of.threshold);
}

}  // namespace
}  // namespace lowbit::cuda
