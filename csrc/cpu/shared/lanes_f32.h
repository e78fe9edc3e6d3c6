// `LanesF32`: a vector of floats of the level that a file is compiled for. What epilogues (shared/epilogue.h) want of
// one:
//   kLanes, broadcast, operators + * /, multiply_add (one rounding), prelu, at_least, at_most (core/epilogue.h),
//   later_maximum(a, b): b where it is greater or NaN, else a;
//   load and store of float32, bfloat16 and float16 (a Stored), and load of int32 (Integers), of kLanes elements or of
//   fewer, which read and write no others; lanes past them are 0;
//   flips(bytes): what turns the order of the lanes whose byte is not 0, in reached(value, limit, flips): bit i =
//   value >= limit, or <= where flipped, of lane i; 0 of a NaN.
#pragma once

#include "core/float_type.h"

namespace lowbit {
namespace {

// Loads int32 as float32, as Stored<float32> does floats.
struct Integers {
  using type = int32_t;
};

}  // namespace
}  // namespace lowbit

#if defined(__AVX512BW__)
#include "cpu/shared/lanes_f32_avx512.h"
#elif defined(__AVX2__)
#include "cpu/shared/lanes_f32_avx2.h"
#else
#include "cpu/shared/lanes_f32_scalar.h"
#endif
