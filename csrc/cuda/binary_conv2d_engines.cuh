// The inner products of binary_conv2d.cu: what a block of threads makes of the words of some pixels and some filters
// that lie in shared memory. An Engine has
//   kPixels, kFilters     of a block; multiples of 32
//   Stage                 the words of so many pixels and filters in shared memory: kStageWords of each
//   kStages               of shared memory: so many parts of the words are under way at a time
//   kPending              stages before the one that accumulate() was given last that it may still be reading
//   kDisagreements        whether it counts -popc(a ^ w), else 2 popc(a & w) - popc(a)
//   kCompiled             false for an architecture that never runs it
//   prepare(stages)                   writes what stages hold besides words, before the first is loaded
//   publish()                         makes this thread's part of a stage readable after the next barrier
//   accumulate(stage, words)          adds the first `words` of a stage's words
//   finish()                          waits for all that was added
//   store(sums, multiple)             writes sums[pixel][filter], so many times what it counts, modulo 2^32
// and lives in the registers of its thread.
#pragma once

#include "cuda/ptx.cuh"

namespace lowbit::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

constexpr int kStageWords = 8;

// Rows one after the other. A pitch of 80 bytes takes the 16-byte pieces of 8 neighbouring rows to different banks.
template <int kRows>
struct RowTile {
  uint64_t words[kRows][kStageWords + 2];

  __device__ uint64_t* at(int row, int word) { return &words[row][word]; }
  __device__ const uint64_t* at(int row, int word) const { return &words[row][word]; }
};

// The same words as wgmma reads them (ptx.cuh): the 16 bytes of 8 rows without a gap. 32 bytes between the columns of
// such pieces take what the copies of 2 rows write at a time to different banks.
template <int kRows>
struct CoreTile {
  using Piece = Pack<uint64_t>;
  Piece pieces[kStageWords / Piece::kCount][kRows + 2];

  __device__ uint64_t* at(int row, int word) { return &pieces[word / Piece::kCount][row].values[word % Piece::kCount]; }
  // 256 bits from `word` on, of the rows from `row` on.
  __device__ uint64_t describe(int row, int word) const {
    return describe_matrix(&pieces[word / Piece::kCount][row], sizeof pieces[0], kCoreBytes);
  }
};

template <class Pixels, class Filters>
struct ConvStage {
  Pixels pixels;
  Filters filters;
};

// The 4 words of padding keep the rows that a warp writes at a time in different banks.
template <class Engine>
using ConvSums = uint32_t[Engine::kPixels][Engine::kFilters + 4];

// An engine whose work is done when a call returns.
struct ImmediateEngine {
  static constexpr int kPending = 0;
  template <class Stages>
  static __device__ void prepare(Stages&) {}
  static __device__ void publish() {}
  __device__ void finish() {}
};

// Of 16 pixels and 8 filters: multiple * (2 popc(a & w) - popc(a)). `active` is the same in every column.
template <class Engine>
__device__ inline void store_fragment(ConvSums<Engine>& sums, int first_pixel, int first_filter,
                                      const FragmentSums& both, const FragmentSums& active, uint32_t multiple) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int lower = 0; lower < 2; ++lower) {
    Pack<uint32_t, 2> pair;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      pair.values[c] = 2 * multiple * both.values[2 * lower + c] - multiple * active.values[2 * lower + c];
    }
    const int pixel = first_pixel + lower * 8 + lane / 4, filter = first_filter + lane % 4 * 2;
    *reinterpret_cast<Pack<uint32_t, 2>*>(&sums[pixel][filter]) = pair;
  }
}

// XOR and POPC, for the architectures whose tensor cores know no bits. A thread has 4 pixels and 4 filters: each pair
// of words that it reads serves four times. popc(a ^ w) takes no count of a beside it.
struct PopcountEngine : ImmediateEngine {
  static constexpr int kPixels = 64, kFilters = 64, kStages = 3;
  using Stage = ConvStage<RowTile<kPixels>, RowTile<kFilters>>;
  static constexpr bool kDisagreements = true, kCompiled = true;
  static constexpr int kEdge = 4;                   // pixels, and filters, of a thread
  static constexpr int kAcross = kFilters / kEdge;  // threads along the filters
  static constexpr int kDown = kPixels / kEdge;     // along the pixels
  static_assert(kAcross * kDown == kThreads);

  uint32_t counts[kEdge][kEdge] = {};

  __device__ void accumulate(const Stage& stage, int words) {
    using Words = Pack<uint64_t>;
    const int across = static_cast<int>(threadIdx.x) % kAcross, down = static_cast<int>(threadIdx.x) / kAcross;
#pragma unroll
    for (int k = 0; k < kStageWords; k += Words::kCount) {
      if (k >= words) break;
      Words a[kEdge], w[kEdge];
#pragma unroll
      for (int i = 0; i < kEdge; ++i) {
        a[i] = *reinterpret_cast<const Words*>(stage.pixels.at(down + i * kDown, k));
        w[i] = *reinterpret_cast<const Words*>(stage.filters.at(across + i * kAcross, k));
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

  __device__ void store(ConvSums<PopcountEngine>& sums, uint32_t multiple) const {
    const int across = static_cast<int>(threadIdx.x) % kAcross, down = static_cast<int>(threadIdx.x) / kAcross;
#pragma unroll
    for (int i = 0; i < kEdge; ++i) {
#pragma unroll
      for (int j = 0; j < kEdge; ++j) sums[down + i * kDown][across + j * kAcross] = -multiple * counts[i][j];
    }
  }
};

// The tensor cores of architectures 8.0 to 9.0: 256 bits of 16 pixels by 8 filters an instruction. A warp has 32 pixels
// and 64 filters, so that 3 KiB from shared memory serve 16 instructions. popc(a) comes out of the same instruction,
// against a column of ones: 2 more for those 16, and the count is in the lanes that need it.
struct MmaEngine : ImmediateEngine {
  static constexpr int kPixels = 128, kFilters = 128, kStages = 4;
  using Stage = ConvStage<RowTile<kPixels>, RowTile<kFilters>>;
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
  __device__ void accumulate(const Stage& stage, int words) {
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
        a[i] = load_matrices(stage.pixels.at(a_row + i * kRows, k + a_word));
        multiply_bits(active[i], a[i], ones);
      }
#pragma unroll
      for (int j = 0; j < kAcross; j += 2) {
        const FragmentA pair = load_matrices(stage.filters.at(b_row + j * kColumns, k + b_word));
        const FragmentB b[2] = {{{pair.values[0], pair.values[1]}}, {{pair.values[2], pair.values[3]}}};
#pragma unroll
        for (int i = 0; i < kDown; ++i) {
          multiply_bits(both[i][j], a[i], b[0]);
          multiply_bits(both[i][j + 1], a[i], b[1]);
        }
      }
    }
  }

  __device__ void store(ConvSums<MmaEngine>& sums, uint32_t multiple) const {
#pragma unroll
    for (int i = 0; i < kDown; ++i) {
#pragma unroll
      for (int j = 0; j < kAcross; ++j) {
        store_fragment<MmaEngine>(sums, first_pixel() + i * kRows, first_filter() + j * kColumns, both[i][j], active[i],
                                  multiple);
      }
    }
  }
};

// The same by architecture 9.0's products of a whole warpgroup, which read shared memory themselves: 256 bits of 64
// pixels by 128 filters and 16 more of ones, which give popc(a). The products of a stage are under way while the words
// of the next are waited for.
struct WgmmaEngine {
  static constexpr int kPixels = 128, kFilters = 128, kStages = 5, kPending = 1;
  static constexpr bool kDisagreements = false;
  static constexpr bool kCompiled = kWarpgroupBitMatrices;
  static constexpr int kWords = 4;    // of one instruction
  static constexpr int kColumns = 8;  // of a fragment
  static_assert(kThreads / kWarpgroup * kWarpgroupRows == kPixels && kFilters < kWarpgroupColumns);
  using Stage = ConvStage<CoreTile<kPixels>, CoreTile<kWarpgroupColumns>>;

  WarpgroupSums sums = {};

  static __device__ void prepare(Stage (&stages)[kStages]) {
    constexpr int kOnes = (kWarpgroupColumns - kFilters) * kStageWords;
    for (int i = static_cast<int>(threadIdx.x); i < kStages * kOnes; i += kThreads) {
      *stages[i / kOnes].filters.at(kFilters + i % kOnes / kStageWords, i % kStageWords) = ~uint64_t{0};
    }
  }

  static __device__ void publish() { fence_async_proxy(); }

  // All of a stage, zeros past the last word: round a product that may be left out the compiler fences the sums.
  __device__ void accumulate(const Stage& stage, int /*words*/) {
    const int first_pixel = static_cast<int>(threadIdx.x) / kWarpgroup * kWarpgroupRows;
    begin_products(sums);
#pragma unroll
    for (int k = 0; k < kStageWords; k += kWords) {
      multiply_bits(sums, stage.pixels.describe(first_pixel, k), stage.filters.describe(0, k));
    }
    commit_products();
    wait_products<kPending>(sums);
  }

  __device__ void finish() { wait_products<0>(sums); }

  __device__ void store(ConvSums<WgmmaEngine>& target, uint32_t multiple) const {
    const int first_pixel = static_cast<int>(threadIdx.x) / kWarp * 16;
#pragma unroll
    for (int j = 0; j < kFilters / kColumns; ++j) {
      store_fragment<WgmmaEngine>(target, first_pixel, j * kColumns, sums[j], sums[kFilters / kColumns], multiple);
    }
  }
};

}  // namespace
}  // namespace lowbit::cuda
