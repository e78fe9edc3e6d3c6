// The PTX that the kernels use, one function an instruction. tests/host_cuda brings its own of the same names, which do
// what the PTX ISA documents, fragment by fragment.
#pragma once

#if defined(LOWBIT_HOST_CUDA)
#include <array>
#endif
#include <string_view>

#include "cuda/platform.cuh"

namespace lowbit::cuda {

// Architectures with one instruction for multiply_bits; newer ones emulate it with eight others.
static inline bool has_bit_matrices(int architecture) { return architecture >= 80 && architecture <= 90; }
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 800 || __CUDA_ARCH__ >= 1000)
constexpr bool kBitMatrices = false;  // of the architecture that is compiled for
#else
constexpr bool kBitMatrices = true;
#endif

// The warpgroups' instruction is in machine code for 9.0a alone.
#if defined(LOWBIT_HOST_CUDA)
constexpr bool kBuiltFor90a = true;
#else
constexpr bool kBuiltFor90a = std::string_view(LOWBIT_CUDA_ARCHS).find("90a") != std::string_view::npos;
#endif
static inline bool has_warpgroup_bit_matrices(int architecture) { return architecture == 90 && kBuiltFor90a; }
#if defined(LOWBIT_HOST_CUDA) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kWarpgroupBitMatrices = true;  // of the architecture that is compiled for
#else
constexpr bool kWarpgroupBitMatrices = false;
#endif

// Two floats rounded to bfloat16 or float16, the first in the lower half. A NaN of bfloat16 is 0x7fff by the
// instruction and keeps its upper bits without; that of the hardware's arithmetic is 0x7fff either way.
template <bool kBfloat16>
__device__ inline uint32_t pair_of(float low, float high) {
#if !defined(LOWBIT_HOST_CUDA) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t pair;
  if constexpr (kBfloat16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
#else
  const auto round = [](float value) { return uint32_t{kBfloat16 ? float_to_bfloat16(value) : float_to_half(value)}; };
  return round(low) | round(high) << 16;
#endif
}

// mma m16n8k256 on bits, the fragments of one lane; with row = lane / 4 and word = lane % 4:
//   A, 16 rows of 8 words of 32 bits   [0] row, word   [1] row + 8, word   [2] row, word + 4   [3] row + 8, word + 4
//   B, the same of 8 columns           [0] row, word   [1] row, word + 4
//   sums, 16 rows of 8 columns         [0] row, 2 word   [1] row, 2 word + 1   [2] row + 8, 2 word   [3] row + 8, 2
//   word + 1
using FragmentA = Pack<uint32_t, 4>;
using FragmentB = Pack<uint32_t, 2>;
using FragmentSums = Pack<uint32_t, 4>;

// wgmma m64n144k256 on bits: a warpgroup of 128 threads, 64 rows by 144 columns. Of the sums, warp i of the group has
// rows 16 i to 16 i + 15, as fragments of 8 columns each. Both operands are in shared memory: core matrices of 8 rows
// (of B: columns) of 16 bytes, 128 bytes without a gap. A descriptor names the first one, how many bytes on the other
// half of the 256 bits is (`leading`), and how many bytes on the next 8 rows are (`stride`): K-major, not swizzled.
// (PTX ISA, "Asynchronous Warpgroup Level Matrix Shared Memory Layout")
constexpr int kWarpgroup = 128, kWarpgroupRows = 64, kWarpgroupColumns = 144;
constexpr int kCoreBytes = 128;
using WarpgroupSums = FragmentSums[kWarpgroupColumns / 8];

// Address and distances in units of 16 bytes.
LOWBIT_INLINE uint64_t matrix_descriptor(uint32_t shared_address, int leading, int stride) {
  return (shared_address & 0x3ffffu) >> 4 | uint64_t{static_cast<uint32_t>(leading) >> 4} << 16 |
         uint64_t{static_cast<uint32_t>(stride) >> 4} << 32;
}

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

template <class T>
T* keep_address(T* address) {
  return address;
}

static inline void fence_async_proxy() { host_cuda::proxy_fence(); }
static inline uint64_t describe_matrix(const void* shared, int leading, int stride) {
  return matrix_descriptor(host_cuda::shared_address(shared), leading, stride);
}
static inline void begin_products(WarpgroupSums&) { host_cuda::product_fence(); }

// The sums that one thread gets.
static inline void warpgroup_products(WarpgroupSums& sums, uint64_t a, uint64_t b) {
  const auto word = [](uint64_t descriptor, int row, int half) {
    const uint64_t address = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4,
                   stride = (descriptor >> 32 & 0x3fff) << 4;
    return static_cast<const uint64_t*>(host_cuda::shared_pointer(
        static_cast<uint32_t>(address + row / 8 * stride + row % 8 * 16 + half / 2 * leading)))[half % 2];
  };
  const int thread = host_cuda::thread_index() % kWarpgroup, lane = thread % kWarp;
  for (int j = 0; j < kWarpgroupColumns / 8; ++j) {
    for (int i = 0; i < 4; ++i) {
      const int row = thread / kWarp * 16 + lane / 4 + i / 2 * 8, column = 8 * j + lane % 4 * 2 + i % 2;
      uint32_t count = 0;
      for (int half = 0; half < 4; ++half) {
        count += static_cast<uint32_t>(__popcll(word(a, row, half) & word(b, column, half)));
      }
      sums[j].values[i] += count;
    }
  }
}

// The operands are read now and once more when the product is waited for, and must be the same: a stage that is written
// too early is found. The sums are there only then.
static inline void multiply_bits(WarpgroupSums& sums, uint64_t a, uint64_t b) {
  struct Operands {
    uint64_t a, b;
  };
  const Operands* operands = host_cuda::gather(kWarpgroup, Operands{a, b}, "warpgroup multiply_bits");
  for (int i = 0; i < kWarpgroup; ++i) {
    if (operands[i].a != a || operands[i].b != b) host_cuda::fail("a warpgroup's descriptors differ");
  }
  host_cuda::require_product_fences();
  std::array<FragmentSums, kWarpgroupColumns / 8> now{};
  warpgroup_products(*reinterpret_cast<WarpgroupSums*>(now.data()), a, b);
  host_cuda::product([&sums, now, a, b] {
    WarpgroupSums late{};
    warpgroup_products(late, a, b);
    for (size_t j = 0; j < now.size(); ++j) {
      for (int i = 0; i < 4; ++i) {
        if (late[j].values[i] != now[j].values[i]) host_cuda::fail("shared memory changed under a product");
        sums[j].values[i] += late[j].values[i];
      }
    }
  });
}
static inline void commit_products() { host_cuda::product_commit(); }
template <int kGroups>
void wait_products(WarpgroupSums&) {
  host_cuda::product_wait(kGroups);
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

// The same address, of which the compiler does not know how it came about: an element is then one multiplication and
// addition away, and not the sum that the address was made from (5 instructions an element in loops: binary_conv2d.cu).
template <class T>
__device__ inline T* keep_address(T* address) {
  asm("" : "+l"(address));
  return address;
}

// Makes this thread's writes to shared memory visible to the products that follow the next barrier.
__device__ inline void fence_async_proxy() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

__device__ inline uint64_t describe_matrix(const void* shared, int leading, int stride) {
  return matrix_descriptor(static_cast<uint32_t>(__cvta_generic_to_shared(shared)), leading, stride);
}

// The sums as operands of one asm statement.
#define LOWBIT_FRAGMENT(j) \
  "+r"(sums[j].values[0]), "+r"(sums[j].values[1]), "+r"(sums[j].values[2]), "+r"(sums[j].values[3])
#define LOWBIT_SUMS                                                                                            \
  LOWBIT_FRAGMENT(0), LOWBIT_FRAGMENT(1), LOWBIT_FRAGMENT(2), LOWBIT_FRAGMENT(3), LOWBIT_FRAGMENT(4),          \
      LOWBIT_FRAGMENT(5), LOWBIT_FRAGMENT(6), LOWBIT_FRAGMENT(7), LOWBIT_FRAGMENT(8), LOWBIT_FRAGMENT(9),      \
      LOWBIT_FRAGMENT(10), LOWBIT_FRAGMENT(11), LOWBIT_FRAGMENT(12), LOWBIT_FRAGMENT(13), LOWBIT_FRAGMENT(14), \
      LOWBIT_FRAGMENT(15), LOWBIT_FRAGMENT(16), LOWBIT_FRAGMENT(17)

// Before products, which own the sums until wait_products. The empty statement keeps the compiler from moving what is
// done with the sums past the fence, whose operands they are not.
__device__ inline void begin_products(WarpgroupSums& sums) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("" : LOWBIT_SUMS::"memory");
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

// sums += popc(a & b), by all threads of a warpgroup together. It reads its operands, and the sums are there, by
// wait_products.
__device__ inline void multiply_bits(WarpgroupSums& sums, uint64_t a, uint64_t b) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n144k256.s32.b1.b1.and.popc {"
      "%0, %1, %2, %3, %4, %5, %6, %7, "
      "%8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, "
      "%24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, "
      "%40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, "
      "%56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71}, %72, %73, 1;"
      : LOWBIT_SUMS
      : "l"(a), "l"(b));
#endif
}

// Closes the group of the products since the last one.
__device__ inline void commit_products() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Waits for all groups but the newest kGroups.
template <int kGroups>
__device__ inline void wait_products(WarpgroupSums& sums) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
  asm volatile("" : LOWBIT_SUMS::"memory");
#endif
}

#undef LOWBIT_SUMS
#undef LOWBIT_FRAGMENT

#endif

}  // namespace lowbit::cuda
