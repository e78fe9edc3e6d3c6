// What the kernels of channel codes share: the packs of a tensor, one or several a thread, and the parameters of their
// channels, which stay in the first-level cache.
#pragma once

#include "core/divisor.h"
#include "cuda/codes.cuh"

namespace lowbit::cuda {

// Packs go along rows, of which the last may be short. Channels last, a row here is as many pixels as have codes
// without padding between them, its elements those of the workspace's columns.
struct ChannelPacks {
  int64_t elements, row_length, row_bytes;
  int64_t width;  // of the workspace
  int64_t count;
  Divisor by_row;       // packs of a row
  Divisor by_channels;  // rows of an image
  bool channels_last;
  bool vector;  // whether rows and addresses allow whole packs
};

struct PackPlace {
  int64_t element, byte;  // the first
  int64_t column;         // of the first element, or of all: see load_parameter
  int count;              // elements, 0 past the end
  bool whole;
};

// The shape has elements.
template <FloatType kType>
ChannelPacks make_channel_packs(const ChannelShape& shape, int bits, bool aligned) {
  constexpr int kCount = Values<kType>::kCount;
  const int64_t length = shape.channels_last ? block_pixels(shape, bits) * shape.channels : shape.spatial;
  const int64_t elements = shape.outer * shape.channels * shape.spatial, row_packs = ceil_div(length, kCount);
  return {elements,
          length,
          code_bytes(length, bits),
          grid_width(shape),
          ceil_div(elements, length) * row_packs,
          make_divisor(row_packs),
          make_divisor(shape.channels),
          shape.channels_last,
          aligned && length % kCount == 0};
}

// The pack `offset` elements into a row.
template <int kCount>
__device__ inline PackPlace place_of(const ChannelPacks& packs, int bits, int64_t row, int64_t offset) {
  PackPlace place;
  place.element = row * packs.row_length + offset;
  place.byte = row * packs.row_bytes + offset * bits / 8;
  place.column = packs.channels_last ? offset : divide_with_remainder(row, packs.by_channels).remainder;
  const int64_t of_row = packs.row_length - offset, of_all = packs.elements - place.element;
  const int64_t left = of_row < of_all ? of_row : of_all;
  place.count = static_cast<int>(left < kCount ? (left > 0 ? left : 0) : kCount);
  place.whole = packs.vector && place.count == kCount;
  return place;
}

template <int kCount>
__device__ inline PackPlace place_of(const ChannelPacks& packs, int bits, int64_t index) {
  const Division row = divide_with_remainder(index, packs.by_row);
  return place_of<kCount>(packs, bits, row.quotient, row.remainder * kCount);
}

// A row of the workspace for the elements of a pack: its columns from `column` on, or that one for all.
template <int kCount>
__device__ inline Pack<float, kCount> load_parameter(const float* row, int64_t column, bool each, int count,
                                                     bool whole) {
  Pack<float, kCount> parameter;
  if (!each) {
    const float value = row[column];
#pragma unroll
    for (int i = 0; i < kCount; ++i) parameter.values[i] = value;
  } else if (whole) {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      const auto four = *reinterpret_cast<const Pack<float>*>(row + column + i);
#pragma unroll
      for (int j = 0; j < 4; ++j) parameter.values[i + j] = four.values[j];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) parameter.values[i] = i < count ? row[column + i] : 0.0f;
  }
  return parameter;
}

template <int kCount>
__device__ inline Pack<float, kCount> load_parameter(const float* grid, int row, const ChannelPacks& packs,
                                                     const PackPlace& place) {
  return load_parameter<kCount>(grid + row * packs.width, place.column, packs.channels_last, place.count, place.whole);
}

constexpr int kGridThreads = 128;

template <class Args>
__global__ void __launch_bounds__(kGridThreads) fill_grid_kernel(Args args) {
  const int64_t column = int64_t{blockIdx.x} * kGridThreads + threadIdx.x;
  if (column < grid_width(args.shape)) fill_grid(args, column);
}

template <class Args>
Status launch_fill_grid(const Args& args, Stream stream) {
  return launch(fill_grid_kernel<Args>, {blocks_for(grid_width(args.shape), kGridThreads), dim3(kGridThreads)}, stream,
                args);
}

}  // namespace lowbit::cuda
