// The PTX that the kernels use, one function an instruction. tests/host_cuda brings its own of the same names, which do
// what the PTX ISA documents, fragment by fragment.
#pragma once

#include "cuda/platform.cuh"

namespace lowbit::cuda {

// Architectures with one instruction for multiply_bits; newer ones emulate it with eight others.
static inline bool has_bit_matrices(int architecture) { return architecture >= 80 && architecture <= 90; }
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 800 || __CUDA_ARCH__ >= 1000)
constexpr bool kBitMatrices = false;  // of the architecture that is compiled for
#else
constexpr bool kBitMatrices = true;
#endif

// mma m16n8k256 on bits, the fragments of one lane; with row = lane / 4 and word = lane % 4:
//   A, 16 rows of 8 words of 32 bits   [0] row, word   [1] row + 8, word   [2] row, word + 4   [3] row + 8, word + 4
//   B, the same of 8 columns           [0] row, word   [1] row, word + 4
//   sums, 16 rows of 8 columns         [0] row, 2 word   [1] row, 2 word + 1   [2] row + 8, 2 word   [3] row + 8, 2
//   word + 1
using FragmentA = Pack<uint32_t, 4>;
using FragmentB = Pack<uint32_t, 2>;
using FragmentSums = Pack<uint32_t, 4>;

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

static inline FragmentA load_matrices(const void* row) {
  const void* const* rows = host_cuda::gather(kWarp, row, "load_matrices");
  const int lane = host_cuda::lane();
  FragmentA fragment;
  for (int i = 0; i < 4; ++i) fragment.values[i] = static_cast<const uint32_t*>(rows[8 * i + lane / 4])[lane % 4];
  return fragment;
}

static inline void multiply_bits(FragmentSums& sums, const FragmentA& a, const FragmentB& b) {
  struct Operands {
    FragmentA a;
    FragmentB b;
  };
  const Operands* lanes = host_cuda::gather(kWarp, Operands{a, b}, "multiply_bits");
  const int lane = host_cuda::lane();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4, lower = i / 2, column = lane % 4 * 2 + i % 2;
    for (int word = 0; word < 4; ++word) {
      const FragmentA& left = lanes[row * 4 + word].a;
      const FragmentB& right = lanes[column * 4 + word].b;
      for (int half = 0; half < 2; ++half) {
        sums.values[i] += static_cast<uint32_t>(__popc(left.values[lower + 2 * half] & right.values[half]));
      }
    }
  }
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

// Four matrices of 8 rows of 16 bytes from shared memory: lane i names row i % 8 of matrix i / 8, aligned to 16 bytes,
// and gets 32-bit word lane % 4 of row lane / 4 of each.
__device__ inline FragmentA load_matrices(const void* row) {
  FragmentA fragment{};
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 750
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment.values[0]), "=r"(fragment.values[1]), "=r"(fragment.values[2]), "=r"(fragment.values[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
#endif
  return fragment;
}

// sums += popc(a & b).
__device__ inline void multiply_bits(FragmentSums& sums, const FragmentA& a, const FragmentB& b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(sums.values[0]), "+r"(sums.values[1]), "+r"(sums.values[2]), "+r"(sums.values[3])
      : "r"(a.values[0]), "r"(a.values[1]), "r"(a.values[2]), "r"(a.values[3]), "r"(b.values[0]), "r"(b.values[1]));
#endif
}

#endif

}  // namespace lowbit::cuda
