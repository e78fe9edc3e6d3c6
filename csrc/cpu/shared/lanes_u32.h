// `LanesU32`: a vector of 32-bit lanes of the level that a file is compiled for. What the sampler (antithetic_sample)
// and the generator (core/philox.h) want of one:
//   kLanes, load, store, broadcast, operators ^ + -, min, max, multiply (low and high product with a scalar),
//   greater(a, b): a bit a lane, greater(a, b, bit): `bit` or 0 in each lane.
#pragma once

#if defined(__AVX512F__)
#include "cpu/shared/lanes_u32_avx512.h"
#elif defined(__AVX2__)
#include "cpu/shared/lanes_u32_avx2.h"
#else
#include "cpu/shared/lanes_u32_scalar.h"
#endif
