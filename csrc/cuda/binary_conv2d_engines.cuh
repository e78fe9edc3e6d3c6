// The inner products of binary_conv2d.cu: what a block of threads makes of the words of some pixels and some filters
// that lie in shared memory. An Engine has
//   kPixels, kFilters     of a block; multiples of 32
//   kStages               of shared memory: so many parts of the words are under way at a time
//   kDisagreements        whether it counts popc(a ^ w), else 2 popc(a & w) - popc(a)
//   kCompiled             false for an architecture that never runs it
//   accumulate(stage, words)          adds the first `words` of a stage's words
//   store(sums)                       writes sums[pixel][filter], modulo 2^32
// and lives in the registers of its thread.
#pragma once

#include "cuda/ptx.cuh"

namespace lowbit::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// Words of one stage. A pitch of 80 bytes takes the 16-byte pieces of 8 neighbouring rows to different banks.
constexpr int kStageWords = 8;
constexpr int kStagePitch = kStageWords + 2;

template <class Engine>
struct ConvStage {
  uint64_t pixels[Engine::kPixels][kStagePitch];
  uint64_t filters[Engine::kFilters][kStagePitch];
};

// The 4 words of padding keep the rows that a warp writes at a time in different banks.
template <class Engine>
using ConvSums = uint32_t[Engine::kPixels][Engine::kFilters + 4];

// XOR and POPC, for the architectures whose tensor cores know no bits. A thread has 4 pixels and 4 filters: each pair
// of words that it reads serves four times. popc(a ^ w) takes no count of a beside it.
struct PopcountEngine {
  static constexpr int kPixels = 64, kFilters = 64, kStages = 3;
  static constexpr bool kDisagreements = true, kCompiled = true;
  static constexpr int kEdge = 4;                   // pixels, and filters, of a thread
  static constexpr int kAcross = kFilters / kEdge;  // threads along the filters
  static constexpr int kDown = kPixels / kEdge;     // along the pixels
  static_assert(kAcross * kDown == kThreads);

  uint32_t counts[kEdge][kEdge] = {};

  __device__ void accumulate(const ConvStage<PopcountEngine>& stage, int words) {
    using Words = Pack<uint64_t>;
    const int across = static_cast<int>(threadIdx.x) % kAcross, down = static_cast<int>(threadIdx.x) / kAcross;
#pragma unroll
    for (int k = 0; k < kStageWords; k += Words::kCount) {
      if (k >= words) break;
      Words a[kEdge], w[kEdge];
#pragma unroll
      for (int i = 0; i < kEdge; ++i) {
        a[i] = *reinterpret_cast<const Words*>(&stage.pixels[down + i * kDown][k]);
        w[i] = *reinterpret_cast<const Words*>(&stage.filters[across + i * kAcross][k]);
      }
#pragma unroll
      for (int i = 0; i < kEdge; ++i) {
#pragma unroll
        for (int j = 0; j < kEdge; ++j) {
#pragma unroll
          for (int word = 0; word < Words::kCount; ++word) {
            counts[i][j] += static_cast<uint32_t>(__popcll(a[i].values[word] ^ w[j].values[word]));
          }
        }
      }
    }
  }

  __device__ void store(ConvSums<PopcountEngine>& sums) const {
    const int across = static_cast<int>(threadIdx.x) % kAcross, down = static_cast<int>(threadIdx.x) / kAcross;
#pragma unroll
    for (int i = 0; i < kEdge; ++i) {
#pragma unroll
      for (int j = 0; j < kEdge; ++j) sums[down + i * kDown][across + j * kAcross] = counts[i][j];
    }
  }
};

}  // namespace
}  // namespace lowbit::cuda
