#include "core/ops/popcount_peak.h"

#include "cuda/ptx.cuh"

namespace lowbit::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerMultiprocessor = 2;  // 4 warps a scheduler
// Sums that do not wait for one another: as many as a warp of the convolution has, for 2 x 8 pairs of fragments.
constexpr int kRows = 2, kColumns = 8;
constexpr int64_t kOperations = 2 * 16 * 8 * 256;  // of one instruction

// SASS of popcount_peak_kernel: BMMA.168256.AND.POPC
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor) popcount_peak_kernel(PopcountPeakArgs args) {
  if constexpr (kBitMatrices) {
    // A quarter of the bits meets: 64 of 256.
    const FragmentA a{{0xaaaaaaaau, 0xaaaaaaaau, 0xaaaaaaaau, 0xaaaaaaaau}};
    const FragmentB b{{0xccccccccu, 0xccccccccu}};
    FragmentSums sums[kRows][kColumns] = {};
    for (int64_t k = 0; k < args.iterations; ++k) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) multiply_bits(sums[i][j], a, b);
      }
    }
    uint32_t count = 0;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
#pragma unroll
        for (const uint32_t sum : sums[i][j].values) count += sum;
      }
    }
    args.counts[int64_t{blockIdx.x} * kThreads + threadIdx.x] = count;
  }
}

// The same by warpgroups, whose operands are in shared memory.
constexpr int kProducts = 4;                                                                     // of a group
constexpr int64_t kWarpgroupOperations = int64_t{2} * kWarpgroupRows * kWarpgroupColumns * 256;  // of one instruction

struct WarpgroupOperands {
  uint64_t a[kWarpgroupRows * 4];
  uint64_t b[kWarpgroupColumns * 4];
};

// SASS on sm_90a of warpgroup_popcount_peak_kernel: BGMMA.64x144x256.AND.POPC
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    warpgroup_popcount_peak_kernel(PopcountPeakArgs args) {
  if constexpr (kWarpgroupBitMatrices) {
    auto& shared = shared_memory<WarpgroupOperands>();
    for (int i = static_cast<int>(threadIdx.x); i < kWarpgroupRows * 4; i += kThreads) {
      shared.a[i] = 0xaaaaaaaaaaaaaaaau;
    }
    for (int i = static_cast<int>(threadIdx.x); i < kWarpgroupColumns * 4; i += kThreads) {
      shared.b[i] = 0xccccccccccccccccu;
    }
    fence_async_proxy();
    __syncthreads();
    const uint64_t a = describe_matrix(shared.a, kWarpgroupRows * 16, kCoreBytes);
    const uint64_t b = describe_matrix(shared.b, kWarpgroupColumns * 16, kCoreBytes);
    WarpgroupSums sums = {};
    for (int64_t k = 0; k < args.iterations; ++k) {
      begin_products(sums);
#pragma unroll
      for (int i = 0; i < kProducts; ++i) multiply_bits(sums, a, b);
      commit_products();
      wait_products<1>(sums);
    }
    wait_products<0>(sums);
    uint32_t count = 0;
#pragma unroll
    for (const FragmentSums& fragment : sums) {
#pragma unroll
      for (const uint32_t sum : fragment.values) count += sum;
    }
    args.counts[int64_t{blockIdx.x} * kThreads + threadIdx.x] = count;
  }
}

int64_t threads_of(int device) { return int64_t{kBlocksPerMultiprocessor} * kThreads * multiprocessors(device); }

}  // namespace

int64_t popcount_peak_bytes(int device) noexcept { return threads_of(device) * static_cast<int64_t>(sizeof(uint32_t)); }

int64_t popcount_peak_operations(int64_t iterations, ConvEngine engine, int device) noexcept {
  switch (engine) {
    case ConvEngine::popcount:
      return 0;
    case ConvEngine::mma:
      return iterations * threads_of(device) / kWarp * kRows * kColumns * kOperations;
    case ConvEngine::wgmma:
      return iterations * threads_of(device) / kWarpgroup * kProducts * kWarpgroupOperations;
  }
  return 0;
}

Status popcount_peak(const PopcountPeakArgs& args, ConvEngine engine, Stream stream) noexcept {
  const int device_architecture = architecture(stream.device);
  if (device_architecture < 0) return Status::cuda_error;
  if (engine == ConvEngine::popcount || !binary_conv2d_has_engine(engine, stream.device)) {
    return Status::unsupported_isa;
  }
  const dim3 blocks = blocks_for(threads_of(stream.device), kThreads);
  return engine == ConvEngine::mma ? launch(popcount_peak_kernel, {blocks, dim3(kThreads)}, stream, args)
                                   : launch(warpgroup_popcount_peak_kernel,
                                            {blocks, dim3(kThreads), sizeof(WarpgroupOperands)}, stream, args);
}

}  // namespace lowbit::cuda
