// Reads the gradient, 4 or 2 bytes an element, and the codes twice and writes the gradient once: 16 bytes at a time
// where rows and addresses allow it, several loads of a thread under way.
//
// The sums keep the order of core/ops/batch_norm_relu_backward.h and are made of pieces: what one float of a lane adds
// up, 128 terms. A thread makes the pieces of a pack of neighbouring lanes, a block some or all pieces of its chunks,
// which meet in shared memory, where the doubles are added. The chunks are added by a kernel of their own.
#include "core/ops/batch_norm_relu_backward.h"

#include "core/checks.h"
#include "cuda/channel_codes.cuh"

namespace lowbit::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPacks = 2;     // of a thread that makes the gradient
constexpr int kAhead = 4;     // packs of a thread that makes sums, under way together
constexpr int kSumKinds = 2;  // of g, of g xhat

// What a pack of codes says with its channels' parameters.
template <int kCount>
struct Decoder {
  Pack<float, kCount> step, origin, shift;

  __device__ float xhat(uint32_t code, int i) const {
    return static_cast<float>(code) * step.values[i] + origin.values[i];
  }
  __device__ float masked(uint32_t code, float grad, int i) const {
    return static_cast<float>(code) >= shift.values[i] ? grad : 0.0f;
  }
};

// The pieces of neighbouring lanes, which have a pack of elements a term.
template <FloatType kType>
struct Pieces {
  static constexpr int kCount = Values<kType>::kCount;
  Pack<float, kCount> sums{}, products{};

  struct Place {  // of a term
    int64_t element, byte;
    int count;  // elements from there on; not above 0: none
  };

  // To shared memory.
  __device__ void store(float* sums_to, float* products_to) const {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      const float *s = sums.values + i, *p = products.values + i;
      *reinterpret_cast<Pack<float>*>(sums_to + i) = {{s[0], s[1], s[2], s[3]}};
      *reinterpret_cast<Pack<float>*>(products_to + i) = {{p[0], p[1], p[2], p[3]}};
    }
  }

  template <class PlaceOf>
  __device__ void add(const BatchNormReluBackwardArgs& op, bool vector, const Decoder<kCount>& decoder, int terms,
                      const PlaceOf& place_of_term) {
    const auto* grad_output = static_cast<const BitsOf<kType>*>(op.grad_output);
    for (int first = 0; first < terms; first += kAhead) {
      Values<kType> grads[kAhead];
      PackCodes<kCount> codes[kAhead];
#pragma unroll
      for (int ahead = 0; ahead < kAhead; ++ahead) {
        Place place = place_of_term(first + ahead);
        if (first + ahead >= terms) place.count = 0;
        const bool whole = vector && place.count >= kCount;
        const int count = place.count < kCount ? place.count : kCount;
        grads[ahead] = load_values<kType>(grad_output + place.element, count, whole);
        codes[ahead] = load_codes<kCount>(op.codes + place.byte, op.bits, count, whole);
      }
      // An element that does not exist has gradient 0, and a sum that began with 0 stays what it is.
#pragma unroll
      for (int ahead = 0; ahead < kAhead; ++ahead) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          const uint32_t code = codes[ahead].get(i, op.bits);
          const float g = decoder.masked(code, to_float<kType>(grads[ahead].values[i]), i);
          sums.values[i] += g;
          products.values[i] += g * decoder.xhat(code, i);
        }
      }
    }
  }
};

// --- sums of rows

struct RowSumsKernelArgs {
  BatchNormReluBackwardArgs op;
  int64_t rows, row_bytes;
  int pieces;           // of a lane of a row, at least 1
  int pieces_together;  // that a block makes at a time: a power of two
  Divisor by_channels;
  bool vector;
};

// Threads that hold the lanes of a row: a team makes a piece of each.
template <FloatType kType>
struct Teams {
  static constexpr int kMembers = kSumLanes / Values<kType>::kCount;
  static constexpr int kTeams = kThreads / kMembers;
  struct Shared {
    float pieces[kSumKinds][kTeams][kSumLanes + 4];  // the padding keeps neighbours in different banks
  };
};

// SASS of sum_rows_kernel: LDG.E.128
template <FloatType kType>
__global__ void __launch_bounds__(kThreads) sum_rows_kernel(RowSumsKernelArgs args) {
  constexpr int kCount = Values<kType>::kCount;
  constexpr int kMembers = Teams<kType>::kMembers, kTeams = Teams<kType>::kTeams;
  constexpr int kPieceElements = kSumLanes * static_cast<int>(kLaneTerms);
  auto& shared = shared_memory<typename Teams<kType>::Shared>();
  const BatchNormReluBackwardArgs& op = args.op;
  const int team = static_cast<int>(threadIdx.x) / kMembers;
  const int first_lane = static_cast<int>(threadIdx.x) % kMembers * kCount;
  const int block_rows = kTeams / args.pieces_together;
  const int64_t block_row = int64_t{blockIdx.x} * block_rows;
  const int64_t row = block_row + team / args.pieces_together;
  const int64_t width = grid_width(op.shape), spatial = op.shape.spatial;
  Decoder<kCount> decoder{};
  if (row < args.rows) {
    const int64_t channel = divide_with_remainder(row, args.by_channels).remainder;
    const auto parameter = [&](int index) {
      return load_parameter<kCount>(op.grid + index * width, channel, false, kCount, false);
    };
    decoder = {parameter(kStep), parameter(kXhatOrigin), parameter(kBackwardShift)};
  }
  // The first threads add: each a kind of sum of a row, in the doubles of its lanes. A block has several rows only
  // where it makes all their pieces at a time.
  const int sum_row = static_cast<int>(threadIdx.x) % block_rows, kind = static_cast<int>(threadIdx.x) / block_rows;
  double sums[kSumLanes] = {};
  for (int begin = 0; begin < args.pieces; begin += args.pieces_together) {
    Pieces<kType> mine;
    const int64_t first = int64_t{begin + team % args.pieces_together} * kPieceElements;
    const int64_t left = row < args.rows ? spatial - first : 0;
    const int length = static_cast<int>(left < kPieceElements ? (left > 0 ? left : 0) : kPieceElements);
    mine.add(op, args.vector, decoder, static_cast<int>(ceil_div(length, kSumLanes)), [&](int term) {
      const int offset = term * kSumLanes + first_lane;
      return typename Pieces<kType>::Place{row * spatial + first + offset,
                                           row * args.row_bytes + (first + offset) * op.bits / 8, length - offset};
    });
    if (begin > 0) __syncthreads();  // until the pieces before have been read
    mine.store(&shared.pieces[0][team][first_lane], &shared.pieces[1][team][first_lane]);
    __syncthreads();
    if (kind >= kSumKinds) continue;
    for (int piece = 0; piece < args.pieces_together; ++piece) {
      const float* of_piece = shared.pieces[kind][sum_row * args.pieces_together + piece];
#pragma unroll
      for (int lane = 0; lane < kSumLanes; ++lane) sums[lane] += static_cast<double>(of_piece[lane]);
    }
  }
  if (kind >= kSumKinds || block_row + sum_row >= args.rows) return;
  double total = 0.0;
#pragma unroll
  for (int lane = 0; lane < kSumLanes; ++lane) total += sums[lane];
  const Division chunk = divide_with_remainder(block_row + sum_row, args.by_channels);
  op.sums[(kSumKinds * chunk.quotient + kind) * op.shape.channels + chunk.remainder] = total;
}

template <FloatType kType>
Status sum_rows(const BatchNormReluBackwardArgs& args, bool aligned, Stream stream) {
  const int64_t rows = row_count(args.shape), spatial = args.shape.spatial;
  const int64_t pieces = ceil_div(spatial, kSumLanes * kLaneTerms);
  int together = 1;
  while (together < Teams<kType>::kTeams && together < pieces) together *= 2;
  const RowSumsKernelArgs kernel_args{args,
                                      rows,
                                      code_bytes(spatial, args.bits),
                                      static_cast<int>(pieces),
                                      together,
                                      make_divisor(args.shape.channels),
                                      aligned && spatial % Values<kType>::kCount == 0};
  return launch(
      sum_rows_kernel<kType>,
      {blocks_for(rows, Teams<kType>::kTeams / together), dim3(kThreads), sizeof(typename Teams<kType>::Shared)},
      stream, kernel_args);
}

// --- sums of pixels

// A block makes the sums of a chunk for up to 256 lanes.
struct PixelSumsKernelArgs {
  BatchNormReluBackwardArgs op;
  int64_t pixels, pixel_bytes;
  int row_pixels;  // whose elements are lanes
  int64_t row_length;
  int pieces;        // of a lane
  int most_packs;    // of a block's lanes
  Divisor by_parts;  // blocks of a chunk
  bool vector;
};

// SASS of sum_pixels_kernel: LDG.E.128
template <FloatType kType>
__global__ void __launch_bounds__(kThreads) sum_pixels_kernel(PixelSumsKernelArgs args) {
  constexpr int kCount = Values<kType>::kCount;
  float* shared = &shared_memory<float>();  // [kind][piece][lane]
  const BatchNormReluBackwardArgs& op = args.op;
  const int64_t channels = op.shape.channels, width = grid_width(op.shape);
  const Division place = divide_with_remainder(blockIdx.x, args.by_parts);
  const int64_t first_column = place.remainder * kBlock;
  const int64_t columns_left = args.row_length - first_column;
  const int lanes = static_cast<int>(columns_left < kBlock ? columns_left : kBlock);
  const int most_lanes = args.most_packs * kCount;
  const int64_t first_pixel = place.quotient * kChunkPixels, pixels_left = args.pixels - first_pixel;
  const int chunk_pixels = static_cast<int>(pixels_left < kChunkPixels ? pixels_left : kChunkPixels);
  const int chunk_rows = (chunk_pixels + args.row_pixels - 1) / args.row_pixels;
  for (int unit = static_cast<int>(threadIdx.x); unit < args.pieces * args.most_packs;
       unit += static_cast<int>(blockDim.x)) {
    const int piece = unit / args.most_packs, first_lane = unit % args.most_packs * kCount;
    const int64_t column = first_column + first_lane;
    const int count = lanes - first_lane < kCount ? lanes - first_lane : kCount;
    const auto parameter = [&](int index) {
      return load_parameter<kCount>(op.grid + index * width, column, true, count, args.vector && count == kCount);
    };
    const Decoder<kCount> decoder{parameter(kStep), parameter(kXhatOrigin), parameter(kBackwardShift)};
    const int first_row = piece * static_cast<int>(kLaneTerms), rows_left = chunk_rows - first_row;
    Pieces<kType> mine;
    mine.add(
        op, args.vector, decoder, rows_left < kLaneTerms ? rows_left : static_cast<int>(kLaneTerms), [&](int term) {
          const int row_pixel = (first_row + term) * args.row_pixels;
          const int64_t pixel = first_pixel + row_pixel, left = (chunk_pixels - row_pixel) * channels - column;
          return
              typename Pieces<kType>::Place{pixel * channels + column, pixel * args.pixel_bytes + column * op.bits / 8,
                                            static_cast<int>(left < count ? left : count)};
        });
    float* to = shared + piece * most_lanes + first_lane;
    mine.store(to, to + args.pieces * most_lanes);
  }
  __syncthreads();
  const int sums = lanes / args.row_pixels;  // channels of this block
  for (int task = static_cast<int>(threadIdx.x); task < kSumKinds * sums; task += static_cast<int>(blockDim.x)) {
    const int kind = task / sums, channel = task % sums;
    double total = 0.0;
    for (int lane = channel; lane < lanes; lane += sums) {
      double sum = 0.0;
      for (int piece = 0; piece < args.pieces; ++piece) {
        sum += static_cast<double>(shared[(kind * args.pieces + piece) * most_lanes + lane]);
      }
      total += sum;
    }
    op.sums[(kSumKinds * place.quotient + kind) * channels + first_column + channel] = total;
  }
}

template <FloatType kType>
Status sum_pixels(const BatchNormReluBackwardArgs& args, bool aligned, Stream stream) {
  constexpr int kCount = Values<kType>::kCount;
  const int64_t row_pixels = block_pixels(args.shape, args.bits), length = row_pixels * args.shape.channels;
  const int pieces = static_cast<int>(ceil_div(ceil_div(kChunkPixels, row_pixels), kLaneTerms));
  const int packs = static_cast<int>(ceil_div(length < kBlock ? length : kBlock, kCount));
  const int64_t parts = ceil_div(length, kBlock);
  const PixelSumsKernelArgs kernel_args{args,
                                        args.shape.outer * args.shape.spatial,
                                        code_bytes(args.shape.channels, args.bits),
                                        static_cast<int>(row_pixels),
                                        length,
                                        pieces,
                                        packs,
                                        make_divisor(parts),
                                        aligned && length % kCount == 0};
  const int units = static_cast<int>(ceil_div(pieces * packs, kWarp)) * kWarp;
  return launch(
      sum_pixels_kernel<kType>,
      {blocks_for(chunks(args.shape) * parts, 1), dim3(static_cast<unsigned>(units < kThreads ? units : kThreads)),
       kSumKinds * sizeof(float) * static_cast<size_t>(pieces * packs * kCount)},
      stream, kernel_args);
}

// --- sums of chunks

constexpr int kFinishThreads = 64;
constexpr int kChunksAhead = 32;  // the additions wait for one another, the loads need not

__global__ void __launch_bounds__(kFinishThreads)
    finish_sums_kernel(BatchNormReluBackwardArgs op, int64_t chunk_count) {
  const int64_t channels = op.shape.channels, columns = kSumKinds * channels;
  const int64_t column = int64_t{blockIdx.x} * kFinishThreads + threadIdx.x;
  if (column >= columns) return;
  double sum = 0.0;
  for (int64_t first = 0; first < chunk_count; first += kChunksAhead) {
    double sums[kChunksAhead];
#pragma unroll
    for (int i = 0; i < kChunksAhead; ++i) {
      sums[i] = first + i < chunk_count ? op.sums[(first + i) * columns + column] : 0.0;
    }
#pragma unroll
    for (int i = 0; i < kChunksAhead; ++i) sum += sums[i];
  }
  const bool with_xhat = column >= channels;
  finish_sum(op, with_xhat, with_xhat ? column - channels : column, sum);
}

// --- gradient of the input

struct InputKernelArgs {
  BatchNormReluBackwardArgs op;
  ChannelPacks packs;
};

// SASS of batch_norm_relu_backward_kernel: LDG.E.128, STG.E.128
template <FloatType kType>
__global__ void __launch_bounds__(kThreads) batch_norm_relu_backward_kernel(InputKernelArgs args) {
  constexpr int kCount = Values<kType>::kCount;
  const BatchNormReluBackwardArgs& op = args.op;
  const auto* grad_output = static_cast<const BitsOf<kType>*>(op.grad_output);
  auto* grad_input = static_cast<BitsOf<kType>*>(op.grad_input);
  PackPlace places[kPacks];
  Values<kType> grads[kPacks];
  PackCodes<kCount> codes[kPacks];
#pragma unroll
  for (int pack = 0; pack < kPacks; ++pack) {
    const int64_t index = (int64_t{blockIdx.x} * kPacks + pack) * kThreads + threadIdx.x;
    const PackPlace place = place_of<kCount>(args.packs, op.bits, index);
    places[pack] = place;
    grads[pack] = load_values<kType>(grad_output + place.element, place.count, place.whole);
    codes[pack] = load_codes<kCount>(op.codes + place.byte, op.bits, place.count, place.whole);
  }
#pragma unroll
  for (int pack = 0; pack < kPacks; ++pack) {
    const PackPlace place = places[pack];
    if (place.count == 0) continue;
    const auto parameter = [&](int row) { return load_parameter<kCount>(op.grid, row, args.packs, place); };
    const Decoder<kCount> decoder{parameter(kStep), parameter(kXhatOrigin), parameter(kBackwardShift)};
    const auto gain = parameter(kGain), mean = parameter(kMean), slope = parameter(kSlope);
    Values<kType> values;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const uint32_t code = codes[pack].get(i, op.bits);
      const float g = decoder.masked(code, to_float<kType>(grads[pack].values[i]), i);
      const float removed = mean.values[i] + decoder.xhat(code, i) * slope.values[i];
      values.values[i] = from_float<kType>(gain.values[i] * (g - removed));
    }
    store_values<kType>(grad_input + place.element, values, place.count, place.whole);
  }
}

template <FloatType kType>
Status backward(const BatchNormReluBackwardArgs& args, Stream stream) {
  const bool empty = args.shape.outer == 0 || args.shape.spatial == 0;
  const bool aligned = are_aligned<kType>(args.grad_output, args.codes, args.bits) && is_aligned(args.grid, kPackBytes);
  if (!empty) {
    const Status status =
        args.shape.channels_last ? sum_pixels<kType>(args, aligned, stream) : sum_rows<kType>(args, aligned, stream);
    if (status != Status::ok) return status;
  }
  const Status status =
      launch(finish_sums_kernel, {blocks_for(kSumKinds * args.shape.channels, kFinishThreads), dim3(kFinishThreads)},
             stream, args, empty ? 0 : chunks(args.shape));
  if (status != Status::ok || empty) return status;
  const InputKernelArgs kernel_args{
      args, make_channel_packs<kType>(args.shape, args.bits, aligned && is_aligned(args.grad_input, kPackBytes))};
  return launch(batch_norm_relu_backward_kernel<kType>,
                {blocks_for(kernel_args.packs.count, kThreads * kPacks), dim3(kThreads)}, stream, kernel_args);
}

}  // namespace

int64_t batch_norm_relu_backward_workspace_bytes(const BatchNormReluBackwardArgs& args) noexcept {
  return workspace_bytes(args);
}

Status batch_norm_relu_backward(const BatchNormReluBackwardArgs& args, int64_t workspace_bytes,
                                Stream stream) noexcept {
  Status status = check_channel_codes(args, workspace_bytes);
  if (status != Status::ok) return status;
  if (args.shape.channels == 0) return Status::ok;
  status = launch_fill_grid(args, stream);
  if (status != Status::ok) return status;
  return for_type(args.type, [&](auto type) { return backward<type.value>(args, stream); });
}

}  // namespace lowbit::cuda
