// The PTX that the kernels use, one function an instruction. tests/host_cuda brings its own of the same names, which do
// what the PTX ISA documents, fragment by fragment.
#pragma once

#include "cuda/platform.cuh"

namespace lowbit::cuda {

#if defined(LOWBIT_HOST_CUDA)

template <int kBytes>
void copy_async(void* shared, const void* global, bool valid) {
  host_cuda::async_copy(shared, global, kBytes, valid ? kBytes : 0);
}
static inline void commit_copies() { host_cuda::async_commit(); }
template <int kGroups>
void wait_copies() {
  host_cuda::async_wait(kGroups);
}

#else

// Copies 8 or 16 bytes from global to shared memory, or zeros where not `valid`. It may be late until wait_copies.
// Both addresses are aligned to the size. Architectures before 8.0 copy at once.
template <int kBytes>
__device__ inline void copy_async(void* shared, const void* global, bool valid) {
  static_assert(kBytes == 8 || kBytes == 16);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  const uint32_t target = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const uint32_t bytes = valid ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(global), "r"(bytes) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(target), "l"(global), "r"(bytes) : "memory");
  }
#else
  using Bytes = Pack<uint64_t, kBytes / 8>;
  *static_cast<Bytes*>(shared) = valid ? *static_cast<const Bytes*>(global) : Bytes{};
#endif
}

// Closes the group of this thread's copies since the last one.
__device__ inline void commit_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for all of this thread's groups but the newest kGroups.
template <int kGroups>
__device__ inline void wait_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
#endif
}

#endif

}  // namespace lowbit::cuda
