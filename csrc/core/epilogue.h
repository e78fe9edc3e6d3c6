// An epilogue: the steps that one float32 value per output element runs through, in order, every operation rounded to
// float32 on its own. The op that runs it says what the value is at first (ops/binary_conv2d.h, ops/pointwise.h). c is
// the element's channel of C, pixel the index of its output pixel in [batch, height, width], image that of its image.
//
//   multiply        value = value * first[c]                       first float32 [C]
//   add             value = value + first[c]                       first float32 [C]
//   multiply_add    value = fma(value, first[c], second[c])        first, second float32 [C]; one rounding
//   multiply_image  value = value * first[image * C + c]           first float32 [batch, C]
//   add_tensor      value = value + first[pixel * stride + c]      first of type `option`
//   prelu           value = value > 0 ? value : value * first[c]   first float32 [C]
//   clamp           value = value < first[c] ? first[c] : value,   first, second float32 [C]
//                   then value > second[c] ? second[c] : value
//   store           target[pixel * stride + c] = value             target of type `option`, rounded once to it
//   bits            bit t * C + c of words target + pixel * stride = value >= first[t * C + c], or <= where
//                   second[t * C + c] is not 0; t < `option`, which is 1 or 2; first float32 [option, C], second uint8
//                   [option, C] or null; bits past the last of the words_for(option * C) are 0
//
// Strides are elements, of bits words, from a pixel to the next, at least what a pixel has. The running value stays as
// it is behind a store. A NaN stays a NaN, which one is not promised, and gives bits of 0. Targets may lie in a larger
// tensor, and that of a store may be the memory of an add_tensor before it of the same type and stride: an element is
// read before it is written, and by nothing else. Apart from that no target overlaps another or what is read.
//
// Addresses are integers, so that a step is six int64 and a program an int64 tensor [count, 6].
#pragma once

#include <cstdint>

#include "core/half.h"
#include "core/layout.h"

namespace lowbit {

enum class StepKind : int64_t {
  multiply = 0,
  add = 1,
  multiply_add = 2,
  multiply_image = 3,
  add_tensor = 4,
  prelu = 5,
  clamp = 6,
  store = 7,
  bits = 8,
};

struct EpilogueStep {
  int64_t kind;    // StepKind
  int64_t option;  // FloatType of add_tensor and store, thresholds of bits
  int64_t first, second, target;
  int64_t stride;
};

constexpr int64_t kMostSteps = 16;

// Steps in host memory, read during the call on every device.
struct EpilogueProgram {
  const EpilogueStep* steps;
  int64_t count;  // 0 .. kMostSteps
};

LOWBIT_INLINE StepKind kind_of(const EpilogueStep& step) { return static_cast<StepKind>(step.kind); }

// An address of a step as a pointer.
template <class T>
LOWBIT_INLINE T* operand(int64_t address) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

// The most thresholds of a bits step; 0 where there is none.
LOWBIT_INLINE int64_t most_thresholds(const EpilogueProgram& program) {
  int64_t most = 0;
  for (int64_t i = 0; i < program.count; ++i) {
    if (kind_of(program.steps[i]) == StepKind::bits) most = max(most, program.steps[i].option);
  }
  return most;
}

LOWBIT_INLINE float multiply_add(float value, float factor, float summand) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(value, factor, summand);
#else
  return __builtin_fmaf(value, factor, summand);
#endif
}

LOWBIT_INLINE float prelu(float value, float slope) { return value > 0 ? value : value * slope; }

// clamp is at_most(at_least(value, first[c]), second[c]).
LOWBIT_INLINE float at_least(float value, float lowest) { return value < lowest ? lowest : value; }
LOWBIT_INLINE float at_most(float value, float highest) { return value > highest ? highest : value; }

// A bit of a bits step.
LOWBIT_INLINE bool reached(float value, float threshold, bool flip) {
  return flip ? value <= threshold : value >= threshold;
}

}  // namespace lowbit
