// The steps of core/epilogue.h for one value a lane: the lanes of a warp have neighbouring channels of one pixel, so
// that what they read and write are neighbours, and a ballot makes 32 bits. Steps are the same for a whole launch:
// branches, not templates.
#pragma once

#include "core/divisor.h"
#include "core/epilogue.h"
#include "cuda/platform.cuh"

namespace lowbit::cuda {

// A program as a kernel's parameter.
struct Steps {
  EpilogueStep steps[kMostSteps];
  int count;
  bool shared_words;  // the second bits of a channel begin within a word
  int64_t channels;   // C
  Divisor by_image;   // pixels
};

static inline Steps make_steps(const EpilogueProgram& program, int64_t channels, int64_t pixels_per_image) {
  Steps steps{};
  for (int64_t i = 0; i < program.count; ++i) steps.steps[i] = program.steps[i];
  steps.count = static_cast<int>(program.count);
  steps.shared_words = most_thresholds(program) == 2 && channels % kWordBits != 0;
  steps.channels = channels;
  steps.by_image = make_divisor(max(pixels_per_image, 1));
  return steps;
}

// int32 values [pixels, channels] run through a program; for words that no block of the convolution has to itself.
Status run_on_accumulators(const int32_t* accumulators, const EpilogueProgram& program, int64_t pixels,
                           int64_t channels, int64_t pixels_per_image, Stream stream) noexcept;

namespace {

__device__ inline float load_float(const void* from, FloatType type, int64_t element) {
  if (type == FloatType::float32) return static_cast<const float*>(from)[element];
  const uint16_t bits = static_cast<const uint16_t*>(from)[element];
  return type == FloatType::bfloat16 ? bfloat16_to_float(bits) : half_to_float(bits);
}

__device__ inline void store_float(void* to, FloatType type, int64_t element, float value) {
  if (type == FloatType::float32) {
    static_cast<float*>(to)[element] = value;
  } else {
    static_cast<uint16_t*>(to)[element] = type == FloatType::bfloat16 ? float_to_bfloat16(value) : float_to_half(value);
  }
}

// Bits [bit, bit + 32) of a pixel's words; `bit` is a multiple of 32 but where words are shared, which are 0 at first
// and all written by this lane.
__device__ inline void put_bits(const Steps& steps, uint32_t* words, int64_t bit, uint32_t bits) {
  if (!steps.shared_words) {
    words[bit / kWarp] = bits;
    return;
  }
  if (bits == 0) return;
  const int shift = static_cast<int>(bit % kWarp);
  words[bit / kWarp] |= bits << shift;
  if (shift != 0 && bits >> (kWarp - shift) != 0) words[bit / kWarp + 1] |= bits >> (kWarp - shift);
}

// The value of `channel` behind all steps. All lanes of a warp call it; where `exists` is false there is no such
// channel, and bits are 0. `words`: whether the warp's bits are to be written; those past the last channel are.
__device__ inline float run_steps(const Steps& steps, float value, int64_t pixel, int64_t channel, bool exists,
                                  bool words) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll 1
  for (int i = 0; i < steps.count; ++i) {
    const EpilogueStep& step = steps.steps[i];
    const StepKind kind = kind_of(step);
    if (kind == StepKind::bits) {
      uint32_t* const target = operand<uint32_t>(step.target) + pixel * step.stride * 2;
#pragma unroll 1
      for (int64_t t = 0; t < step.option; ++t) {
        const int64_t bit = t * steps.channels + channel;
        bool is_reached = false;
        if (exists) {
          const bool flip = step.second != 0 && operand<const uint8_t>(step.second)[bit] != 0;
          is_reached = reached(value, operand<const float>(step.first)[bit], flip);
        }
        const uint32_t ballot = __ballot_sync(kAllLanes, is_reached);
        if (lane == 0 && words) put_bits(steps, target, bit, ballot);
      }
      continue;
    }
    if (!exists) continue;
    const float* const first = operand<const float>(step.first);
    const FloatType type = static_cast<FloatType>(step.option);
    switch (kind) {
      case StepKind::multiply:
        value = value * first[channel];
        break;
      case StepKind::add:
        value = value + first[channel];
        break;
      case StepKind::multiply_add:
        value = multiply_add(value, first[channel], operand<const float>(step.second)[channel]);
        break;
      case StepKind::multiply_image:
        value = value * first[divide(pixel, steps.by_image) * steps.channels + channel];
        break;
      case StepKind::add_tensor:
        value = value + load_float(operand<const void>(step.first), type, pixel * step.stride + channel);
        break;
      case StepKind::prelu:
        value = prelu(value, first[channel]);
        break;
      case StepKind::clamp:
        value = at_most(at_least(value, first[channel]), operand<const float>(step.second)[channel]);
        break;
      default:
        store_float(operand<void>(step.target), type, pixel * step.stride + channel, value);
        break;
    }
  }
  return value;
}

}  // namespace
}  // namespace lowbit::cuda
