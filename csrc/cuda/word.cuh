// A lane's word for the generator of core/philox.h.
#pragma once

#include "core/philox.h"
#include "cuda/platform.cuh"

namespace lowbit::cuda {

struct Word {
  uint32_t value;
  static __device__ Word broadcast(uint32_t value) { return {value}; }
  static __device__ Word multiply(uint32_t a, Word b, Word& high) {
    const uint64_t product = uint64_t{a} * b.value;
    high = {static_cast<uint32_t>(product >> 32)};
    return {static_cast<uint32_t>(product)};
  }
  friend __device__ Word operator^(Word a, Word b) { return {a.value ^ b.value}; }
};

}  // namespace lowbit::cuda
