// Data contracts shared by every kernel, CPU and CUDA, and by lowbit_ext/packed.py.
//
// Packed bits. Channels are the fastest dimension. A tensor of logical shape (N, C, H, W) is stored as uint64 words
// [N, H, W, words_for(C)]; channel c is bit c % 64 of word c / 64. Bits past the last channel (tail bits) are 0.
// torch has no shift-friendly uint64, so Python sees the words as int64.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/inline.h"

namespace lowbit {

enum class Encoding : int {
  sign = 0,  // bit 1 = +1, bit 0 = -1
  step = 1,  // bit 1 = 1,  bit 0 = 0
};

enum class FloatType : int { float32 = 0, bfloat16 = 1, float16 = 2 };

constexpr int kWordBits = 64;

LOWBIT_INLINE constexpr int64_t words_for(int64_t channels) { return (channels + kWordBits - 1) / kWordBits; }

// Ones in the lowest `count` bits, 0 <= count <= 64.
LOWBIT_INLINE constexpr uint64_t low_mask(int64_t count) {
  return count >= kWordBits ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
}

LOWBIT_INLINE constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
LOWBIT_INLINE constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
LOWBIT_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
LOWBIT_INLINE constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return ceil_div(value, multiple) * multiple;
}

}  // namespace lowbit
