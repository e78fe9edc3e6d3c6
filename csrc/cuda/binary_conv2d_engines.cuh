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

// The tensor cores of architectures 8.0 to 9.0: 256 bits of 16 pixels by 8 filters an instruction. A warp has 32 pixels
// and 64 filters, so that 3 KiB from shared memory serve 16 instructions. popc(a) comes out of the same instruction,
// against a column of ones: 2 more for those 16, and the count is in the lanes that need it.
struct MmaEngine {
  static constexpr int kPixels = 128, kFilters = 128, kStages = 4;
  static constexpr bool kDisagreements = false;
  static constexpr bool kCompiled = kBitMatrices;
  static constexpr int kRows = 16, kColumns = 8, kWords = 4;  // of one instruction; words of 64 bits
  static constexpr int kDown = 2, kAcross = 8;                // instructions of a warp
  static constexpr int kWarpsAcross = kFilters / (kAcross * kColumns);
  static_assert(kWarps / kWarpsAcross * kDown * kRows == kPixels);

  FragmentSums both[kDown][kAcross] = {};  // popc(a & w)
  FragmentSums active[kDown] = {};         // popc(a), the same in every column

  static __device__ int first_pixel() { return static_cast<int>(threadIdx.x) / kWarp / kWarpsAcross * kDown * kRows; }
  static __device__ int first_filter() {
    return static_cast<int>(threadIdx.x) / kWarp % kWarpsAcross * kAcross * kColumns;
  }

  // Stages are filled with zeros past the last word.
  __device__ void accumulate(const ConvStage<MmaEngine>& stage, int words) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    // load_matrices for A: rows 0-7, 8-15, and both again 128 bits on; for B: 8 filters, those 128 bits on, 8 more.
    const int a_row = first_pixel() + lane % 16, a_word = lane / 16 * 2;
    const int b_row = first_filter() + lane / 16 * 8 + lane % 8, b_word = lane / 8 % 2 * 2;
    const FragmentB ones{{0xffffffffu, 0xffffffffu}};
#pragma unroll
    for (int k = 0; k < kStageWords; k += kWords) {
      if (k >= words) break;
      FragmentA a[kDown];
#pragma unroll
      for (int i = 0; i < kDown; ++i) {
        a[i] = load_matrices(&stage.pixels[a_row + i * kRows][k + a_word]);
        multiply_bits(active[i], a[i], ones);
      }
#pragma unroll
      for (int j = 0; j < kAcross; j += 2) {
        const FragmentA pair = load_matrices(&stage.filters[b_row + j * kColumns][k + b_word]);
        const FragmentB b[2] = {{{pair.values[0], pair.values[1]}}, {{pair.values[2], pair.values[3]}}};
#pragma unroll
        for (int i = 0; i < kDown; ++i) {
          multiply_bits(both[i][j], a[i], b[0]);
          multiply_bits(both[i][j + 1], a[i], b[1]);
        }
      }
    }
  }

  __device__ void store(ConvSums<MmaEngine>& sums) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
    for (int i = 0; i < kDown; ++i) {
#pragma unroll
      for (int j = 0; j < kAcross; ++j) {
#pragma unroll
        for (int lower = 0; lower < 2; ++lower) {
          Pack<uint32_t, 2> pair;
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            pair.values[c] = 2 * both[i][j].values[2 * lower + c] - active[i].values[2 * lower + c];
          }
          const int pixel = first_pixel() + i * kRows + lower * 8 + lane / 4;
          const int filter = first_filter() + j * kColumns + lane % 4 * 2;
          *reinterpret_cast<Pack<uint32_t, 2>*>(&sums[pixel][filter]) = pair;
        }
      }
    }
  }
};

}  // namespace
}  // namespace lowbit::cuda
