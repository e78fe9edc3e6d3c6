// How a function of csrc/core is declared: for the CPU and for CUDA devices, with internal linkage. Internal on
// purpose: instruction-set units include these headers, and a merged inline copy compiled for AVX-512 would crash an
// older CPU.
#pragma once

#if defined(__CUDACC__)
#define LOWBIT_INLINE static inline __host__ __device__
#else
#define LOWBIT_INLINE static inline
#endif
