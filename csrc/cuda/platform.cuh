// The one header through which the .cu files see CUDA. Compiled by g++ with LOWBIT_HOST_CUDA they see tests/host_cuda
// instead, and run on the CPU.
#pragma once

#if defined(LOWBIT_HOST_CUDA)
#include "host_cuda.h"
#else
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <type_traits>

#include "core/float_type.h"
#include "cuda/launch.h"

namespace lowbit::cuda {

// Status::cuda_error, with the text kept for last_error_text(), for anything but success.
Status status_of(cudaError_t error) noexcept;

int multiprocessors(int device) noexcept;  // -1 where CUDA cannot say

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

struct Grid {
  dim3 blocks;
  dim3 threads;
  size_t shared_bytes = 0;  // all shared memory is dynamic: see shared_memory()
};

// Blocks along x for `items`. More than a grid may have is refused by the launch.
static inline dim3 blocks_for(int64_t items, int64_t items_per_block) {
  constexpr int64_t kTooMany = 0xffffffff;
  const int64_t blocks = ceil_div(items, items_per_block);
  return dim3(static_cast<unsigned>(blocks < kTooMany ? blocks : kTooMany));
}

// Makes `device` the current one and puts back what was there.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) noexcept : error_(cudaGetDevice(&before_)), device_(device) {
    if (error_ == cudaSuccess && before_ != device_) error_ = cudaSetDevice(device_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  ~DeviceGuard() {
    if (error_ == cudaSuccess && before_ != device_) cudaSetDevice(before_);
  }
  cudaError_t error() const { return error_; }

 private:
  int before_ = -1;
  cudaError_t error_;
  int device_;
};

template <class T>
struct Exactly {
  using type = T;
};

// Enqueues kernel(arguments...). A grid without blocks is nothing to do.
template <class... Parameters>
Status launch(void (*kernel)(Parameters...), const Grid& grid, Stream stream,
              const typename Exactly<Parameters>::type&... arguments) noexcept {
  if (grid.blocks.x == 0 || grid.blocks.y == 0 || grid.blocks.z == 0) return Status::ok;
  const DeviceGuard guard(stream.device);
  if (guard.error() != cudaSuccess) return status_of(guard.error());
  constexpr size_t kWithoutAsking = 48 * 1024;  // of shared memory a block
  if (grid.shared_bytes > kWithoutAsking) {
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(grid.shared_bytes));
    if (error != cudaSuccess) return status_of(error);
  }
#if defined(LOWBIT_HOST_CUDA)
  return status_of(host_cuda::run(grid.blocks, grid.threads, grid.shared_bytes, [&] { kernel(arguments...); }));
#else
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  return status_of(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid.blocks, grid.threads, pointers,
                                    grid.shared_bytes, static_cast<cudaStream_t>(stream.stream)));
#endif
}

#if defined(LOWBIT_HOST_CUDA)

template <class T>
T& shared_memory() {
  return *static_cast<T*>(host_cuda::shared_memory());
}

// The integer part, 0 of what is negative or NaN; what is too large gives a large number.
static inline uint32_t whole_part(float value) {
  return value > 0 ? value < 0x1p32f ? static_cast<uint32_t>(value) : ~0u : 0;
}
// A number in a register, which the compiler does not make a second time from what it came from.
static inline float keep(float value) { return value; }
// The number that is not NaN, if one is.
static inline float least_of(float a, float b) { return __builtin_fminf(a, b); }
static inline float greatest_of(float a, float b) { return __builtin_fmaxf(a, b); }

static inline float half_to_float(uint16_t bits) { return float16_to_float(bits); }
static inline uint16_t float_to_half(float value) { return float_to_float16(value); }

#else

// The block's shared memory, Grid::shared_bytes of it. The alignment is that of the 128-byte swizzle pattern.
template <class T>
__device__ T& shared_memory() {
  extern __shared__ __align__(1024) uint8_t lowbit_shared_memory[];
  return *reinterpret_cast<T*>(lowbit_shared_memory);
}

static __device__ inline uint32_t whole_part(float value) { return __float2uint_rz(value); }
static __device__ inline float keep(float value) {
  asm("" : "+f"(value));
  return value;
}
static __device__ inline float least_of(float a, float b) { return fminf(a, b); }
static __device__ inline float greatest_of(float a, float b) { return fmaxf(a, b); }

static __device__ inline float half_to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
static __device__ inline uint16_t float_to_half(float value) { return __half_as_ushort(__float2half_rn(value)); }

#endif

template <FloatType kType>
using BitsOf = std::conditional_t<kType == FloatType::float32, uint32_t, uint16_t>;

// Value of a bit pattern of kType; exact.
template <FloatType kType, class Bits>
__device__ float to_float(Bits bits) {
  if constexpr (kType == FloatType::float32) return bits_to_float(bits);
  if constexpr (kType == FloatType::bfloat16) return bfloat16_to_float(bits);
  if constexpr (kType == FloatType::float16) return half_to_float(bits);
}

// The nearest bit pattern of kType.
template <FloatType kType>
__device__ BitsOf<kType> from_float(float value) {
  if constexpr (kType == FloatType::float32) return float_to_bits(value);
  if constexpr (kType == FloatType::bfloat16) return float_to_bfloat16(value);
  if constexpr (kType == FloatType::float16) return float_to_half(value);
}

// Neighbours that a kernel reads or writes with one instruction.
constexpr int kPackBytes = 16;
template <class T, int kValues = kPackBytes / sizeof(T)>
struct alignas(kValues * sizeof(T)) Pack {
  static constexpr int kCount = kValues;
  T values[kValues];
};

// ORs the bits of kLanes neighbouring lanes of a warp.
template <int kLanes>
__device__ inline uint32_t join(uint32_t bits) {
#pragma unroll
  for (int lanes = 1; lanes < kLanes; lanes *= 2) bits |= __shfl_xor_sync(kAllLanes, bits, lanes);
  return bits;
}

// One store of 16 bytes. The compiler takes an assigned Pack apart where other stores of its values are near.
template <class T>
__device__ inline void store_pack(T* address, const Pack<T>& pack) {
  static_assert(sizeof pack == sizeof(uint4));
  uint4 bytes;
  memcpy(&bytes, &pack, sizeof bytes);
  __stwb(reinterpret_cast<uint4*>(address), bytes);
}

static inline bool is_aligned(const void* pointer, size_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

}  // namespace lowbit::cuda
