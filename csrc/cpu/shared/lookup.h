// The arithmetic of both gradients of a binary convolution: sums of floats whose signs (or presence) are bits.
//
// Instead of one multiply-add per float and bit, kTerms floats t are first turned into a table of all their 2^kTerms
// combinations, sum of +-t[j] (sign) or of the t[j] kept (step). For every channel the kTerms bits form an index, and
// one vector permutation looks up kTerms products for a whole vector of channels: with 4 terms and 16 lanes a
// permutation and an addition do the work of 4 FMAs. They issue on different ports, so the limit is 64 multiply-adds a
// cycle against 32 by FMA (measured on a Sapphire Rapids core: 205 G/s against 98 G/s, both 97 % of it). The table's
// entries are plain sums, so rounding is that of a blocked summation; nothing cancels that would not cancel in the true
// sum.
//
// `Vector`, the Lookup of a level (lookup_avx2.h, lookup_avx512.h), supplies
//   kLanes, kTerms, kTableFloats      lanes of a vector, floats behind one table, floats of one table
//   kTileVectors, kTileRows           register tile: vectors of channels x rows; a row owns one table per step
//   make_table, make_indices, lookup
#pragma once

#include "core/layout.h"
#if defined(__AVX512F__)
#include "cpu/shared/lookup_avx512.h"
#else
#include "cpu/shared/lookup_avx2.h"
#endif

namespace lowbit {
namespace {

// Consecutive steps of a sum: step s adds, for each row r of the tile, the entries of tables[s * stride + r] picked by
// indices[s].
struct Run {
  const float* tables;
  const int32_t* indices;  // [steps, vectors of the tile, kLanes]
  int64_t steps;
};

template <class Vector>
constexpr int kTileChannels = Vector::kTileVectors * Vector::kLanes;

template <class Vector>
constexpr int kTileFloats = Vector::kTileRows * kTileChannels<Vector>;

template <class Vector>
constexpr int kTableBytes = Vector::kTableFloats * static_cast<int>(sizeof(float));

// Vectors in which the `channels` >= 1 channels that remain from a tile's first one are held.
template <class Vector>
int tile_vectors(int64_t channels) {
  return channels >= kTileChannels<Vector> ? Vector::kTileVectors
                                           : static_cast<int>(ceil_div(channels, int64_t{Vector::kLanes}));
}

template <class Vector, int kRows, int kVectors>
void accumulate_fixed(const Run* runs, int64_t run_count, int64_t offset, int64_t stride, float* tile) {
  typename Vector::Floats sums[kVectors][kRows];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v)
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) sums[v][r] = Vector::zero();
  for (const Run* run = runs; run != runs + run_count; ++run) {
    const float* tables = run->tables + offset;
    const int32_t* indices = run->indices;
    for (int64_t step = 0; step < run->steps; ++step) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const typename Vector::Indices picked = Vector::load_indices(indices + v * Vector::kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r)
          sums[v][r] = Vector::add(sums[v][r], Vector::lookup(tables + r * Vector::kTableFloats, picked));
      }
      tables += stride;
      indices += kVectors * Vector::kLanes;
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v)
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      float* to = tile + r * kTileChannels<Vector> + v * Vector::kLanes;
      Vector::store(to, Vector::add(Vector::load(to), sums[v][r]));
    }
}

// tile[r, channel] += sum over all steps of all runs, `rows` <= kTileRows, `vectors` <= kTileVectors. `offset` moves
// the tables of every run, `stride` lies between the tables of two steps, both in floats.
template <class Vector, int kRows = Vector::kTileRows, int kVectors = Vector::kTileVectors>
void accumulate(int rows, int vectors, const Run* runs, int64_t run_count, int64_t offset, int64_t stride,
                float* tile) {
  if constexpr (kVectors > 1) {
    if (vectors < kVectors) {
      return accumulate<Vector, kRows, kVectors - 1>(rows, vectors, runs, run_count, offset, stride, tile);
    }
  }
  if constexpr (kRows > 1) {
    if (rows < kRows) {
      return accumulate<Vector, kRows - 1, kVectors>(rows, vectors, runs, run_count, offset, stride, tile);
    }
  }
  accumulate_fixed<Vector, kRows, kVectors>(runs, run_count, offset, stride, tile);
}

// Hands out the parts of a 64-byte aligned workspace. Started at null it only counts, so that one function describes
// the layout both for *_workspace_bytes and for the kernel.
class WorkspaceCursor {
 public:
  explicit WorkspaceCursor(void* workspace) : base_(static_cast<char*>(workspace)) {}

  template <class T>
  T* take(int64_t count) {
    T* part = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + bytes_);
    bytes_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return part;
  }

  int64_t bytes() const { return bytes_; }

 private:
  char* base_;
  int64_t bytes_ = 0;
};

}  // namespace
}  // namespace lowbit
