// Lets g++ compile csrc/cuda/*.cu and run their kernels on the CPU: a test tool, slow and simple.
//
// The threads of a block are fibers of one thread of the system; a fiber runs until it waits for others. So nothing
// happens at the same time, and a missing barrier shows as a wrong result in one order of the fibers: run() takes
// them, and the blocks, in the order that set_order() chose. Shared memory is a fresh heap block of the size that the
// launch asked for, filled with a pattern: the address sanitizer sees what lies beyond, a test what was never written.
// What hardware leaves undefined (lanes of a warp that never meet, barriers that some threads miss, copies never
// waited for) ends the test with a message.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

// --- the language

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct uint3 {
  unsigned x, y, z;
};

#define HOST_CUDA_VECTORS(type, name, bytes2, bytes4)                     \
  struct alignas(bytes2) name##2 { type x, y; };                          \
  struct alignas(bytes4) name##4 { type x, y, z, w; };                    \
  static inline name##2 make_##name##2(type x, type y) { return {x, y}; } \
  static inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
HOST_CUDA_VECTORS(int, int, 8, 16)
HOST_CUDA_VECTORS(unsigned, uint, 8, 16)
HOST_CUDA_VECTORS(float, float, 8, 16)
HOST_CUDA_VECTORS(unsigned long long, ulonglong, 16, 16)
#undef HOST_CUDA_VECTORS

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

// --- the runtime

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorInvalidDevice = 101
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
using cudaStream_t = struct CUstream_st*;

cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetLastError();
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaRuntimeGetVersion(int* version);
const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);

// --- execution

namespace host_cuda {

enum class Order { forward, reverse, shuffled };

void set_order(Order order, uint64_t seed = 0);
void set_architecture(int architecture);  // of every device, 90 for 9.0
void set_driver(int version);             // 12040 for CUDA 12.4, 0 for none

// Runs body() for every thread of every block.
cudaError_t run(dim3 blocks, dim3 threads, size_t shared_bytes, const std::function<void()>& body);

// For the thread that runs now.
void* shared_memory();
int thread_index();  // in the block
static inline int lane() { return thread_index() % 32; }
static inline int warp() { return thread_index() / 32; }

[[noreturn]] void fail(const char* message);

void wait(bool (*ready)(const void*), const void* argument);

// Lets the other threads of the block run until condition().
template <class Condition>
void wait_until(const Condition& condition) {
  wait([](const void* argument) { return (*static_cast<const Condition*>(argument))(); }, &condition);
}

// A meeting of the threads first + i of the set bits i of `members`; `what` must be the same for all. Returns the bytes
// that each brought, in order of the threads of the run (0 for those that are no members), readable until this
// thread's next meeting of the same threads.
constexpr int kMostGathered = 128;
struct Members {
  int first;
  uint64_t bits[kMostGathered / 64];
};
const void* meet(const Members& members, const char* what, const void* bytes, size_t size);

// Of the aligned run of `threads` neighbouring threads, 32 a warp and 128 a warpgroup: what each of them brought.
template <class T>
const T* gather(int threads, const T& value, const char* what = "gather") {
  static_assert(std::is_trivially_copyable_v<T>);
  Members members{thread_index() / threads * threads, {}};
  for (int i = 0; i < threads; ++i) members.bits[i / 64] |= uint64_t{1} << (i % 64);
  return static_cast<const T*>(meet(members, what, &value, sizeof value));
}

template <class T>
const T* gather_warp(unsigned mask, const T& value, const char* what) {
  static_assert(std::is_trivially_copyable_v<T>);
  return static_cast<const T*>(meet({thread_index() / 32 * 32, {mask, 0}}, what, &value, sizeof value));
}

// Copies that arrive when they are waited for. Until then the target holds the pattern of fresh shared memory. Bytes
// past valid_bytes become 0.
void async_copy(void* shared, const void* global, size_t bytes, size_t valid_bytes);
void async_commit();
void async_wait(int groups_left);

// Products of a warpgroup that are done when they are waited for: `finish` runs then. They see what copies wrote after
// proxy_fence() alone, and ask for product_fence() since the last wait.
void product_fence();
void proxy_fence();
void require_product_fences();
void product(std::function<void()> finish);
void product_commit();
void product_wait(int groups_left);

// Shared memory as a 32-bit address space of its own.
uint32_t shared_address(const void* pointer);
const void* shared_pointer(uint32_t address);

}  // namespace host_cuda

// --- barriers and warps

void __syncthreads();

static inline void __syncwarp(unsigned mask = 0xffffffffu) { host_cuda::gather_warp(mask, char{}, "__syncwarp"); }

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  const T* values = host_cuda::gather_warp(mask, value, "__shfl_sync");
  return values[(host_cuda::lane() & ~(width - 1)) | (lane & (width - 1))];
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  const int self = host_cuda::lane(), other = self ^ lanes;
  const T* values = host_cuda::gather_warp(mask, value, "__shfl_xor_sync");
  return values[(other & ~(width - 1)) > (self & ~(width - 1)) ? self : other];
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, int lanes, int width = 32) {
  const int self = host_cuda::lane();
  const T* values = host_cuda::gather_warp(mask, value, "__shfl_down_sync");
  return values[(self & (width - 1)) + lanes < width ? self + lanes : self];
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, int lanes, int width = 32) {
  const int self = host_cuda::lane();
  const T* values = host_cuda::gather_warp(mask, value, "__shfl_up_sync");
  return values[(self & (width - 1)) >= lanes ? self - lanes : self];
}

static inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const int* values = host_cuda::gather_warp(mask, int{predicate != 0}, "__ballot_sync");
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i) bits |= static_cast<unsigned>(values[i]) << i;
  return bits & mask;
}

static inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
static inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }
static inline unsigned __activemask() { host_cuda::fail("__activemask says nothing that a kernel may rely on"); }

// --- arithmetic

static inline int __popc(unsigned value) { return __builtin_popcount(value); }
static inline int __popcll(unsigned long long value) { return __builtin_popcountll(value); }
static inline int __clz(int value) { return value == 0 ? 32 : __builtin_clz(static_cast<unsigned>(value)); }
static inline int __ffs(int value) { return __builtin_ffs(value); }
static inline int __ffsll(long long value) { return __builtin_ffsll(value); }

static inline unsigned __brev(unsigned value) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (value >> i & 1) << (31 - i);
  return reversed;
}

// Byte i of the result is the byte of (y, x) that nibble i of the selector names; bit 3 spreads its sign.
static inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = uint64_t{y} << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned nibble = selector >> (4 * i) & 0xf;
    unsigned byte = static_cast<unsigned>(bytes >> (8 * (nibble & 7)) & 0xff);
    if (nibble & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= byte << (8 * i);
  }
  return result;
}

static inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>(((uint64_t{high} << 32 | low) << (shift & 31)) >> 32);
}
static inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) >> (shift & 31));
}

static inline int __dp4a(int a, int b, int sum) {
  for (int i = 0; i < 4; ++i) sum += static_cast<int8_t>(a >> (8 * i)) * static_cast<int8_t>(b >> (8 * i));
  return sum;
}

static inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
static inline float __fdiv_rn(float a, float b) { return a / b; }

template <class To, class From>
To host_cuda_reinterpret(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
static inline unsigned __float_as_uint(float value) { return host_cuda_reinterpret<unsigned>(value); }
static inline int __float_as_int(float value) { return host_cuda_reinterpret<int>(value); }
static inline float __uint_as_float(unsigned value) { return host_cuda_reinterpret<float>(value); }
static inline float __int_as_float(int value) { return host_cuda_reinterpret<float>(value); }

// --- memory

template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldcs(const T* address) {
  return *address;
}
template <class T>
void __stcs(T* address, T value) {
  *address = value;
}
template <class T>
void __stwb(T* address, T value) {
  *address = value;
}

static inline void __threadfence() {}
static inline void __threadfence_block() {}

#define HOST_CUDA_ATOMIC(name, expression) \
  template <class T>                       \
  T name(T* address, T value) {            \
    const T before = *address;             \
    *address = static_cast<T>(expression); \
    return before;                         \
  }
HOST_CUDA_ATOMIC(atomicAdd, before + value)
HOST_CUDA_ATOMIC(atomicOr, before | value)
HOST_CUDA_ATOMIC(atomicAnd, before& value)
HOST_CUDA_ATOMIC(atomicXor, before ^ value)
HOST_CUDA_ATOMIC(atomicMax, before > value ? before : value)
HOST_CUDA_ATOMIC(atomicMin, before < value ? before : value)
HOST_CUDA_ATOMIC(atomicExch, value)
#undef HOST_CUDA_ATOMIC
