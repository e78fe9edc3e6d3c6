// A matrix product whose left side is read in place: row = output pixel, its words those under the taps, in the order
// of the taps; no im2col. A block makes the products of kPixels pixels and kFilters filters of one group. Their words
// come into shared memory in stages, some under way while the engine (binary_conv2d_engines.cuh) works on one. Taps
// outside the image are read as zeros, like the channels past the last.
//
// With d = popc(a & w) and pa = popc(a) over all taps, and for each filter S = sum of (2 popc(w) - channels) over all
// taps and O over those outside the image, exactly, and modulo 2^32 in every step:
//   step   acc =  (2 d - pa)     + padding_value * O
//   sign   acc = 2 (2 d - pa) - S + (padding_value + 1) * O      [O is what a = -1 outside would have taken off]
// popc(a ^ w) = pa + popc(w) - 2 d serves as well.
//
// The sums pass through shared memory to the epilogue, where a lane has one filter and goes through pixels: stores of
// neighbouring lanes are neighbours, and a ballot makes 32 output bits. Where output words are shared by groups, or by
// the two thresholds, the accumulators go to the workspace, and a second kernel makes the words or runs the program.
#include "core/ops/binary_conv2d.h"

#include "core/checks.h"
#include "core/divisor.h"
#include "cuda/binary_conv2d_engines.cuh"
#include "cuda/binary_conv2d_epilogue.cuh"
#include "cuda/epilogue.cuh"

namespace lowbit::cuda {
namespace {

// The private weight copy: words [filters][row_words], those under the taps of a filter one after the other, zeros at
// the end; then for each group int32 [taps + 1][filters_per_group], the sum of each filter's weights under each tap and
// under all.
struct WeightLayout {
  int64_t depth;      // words of a filter
  int64_t row_words;  // the same, so that rows keep an alignment of 16 bytes
  int64_t sums_offset;
  int64_t sums;
  int64_t bytes;

  explicit WeightLayout(const ConvShape& shape)
      : depth(taps(shape) * words_per_group(shape)),
        row_words(ceil_div(depth, 2) * 2),
        sums_offset(shape.filters * row_words * static_cast<int64_t>(sizeof(uint64_t))),
        sums(shape.filters * (taps(shape) + 1)),
        bytes(sums_offset + sums * static_cast<int64_t>(sizeof(int32_t))) {}
};

struct BlockWeightArgs {
  ConvShape shape;
  const uint64_t* words;  // [filters, taps, words_per_group]
  int64_t depth, row_words, count;
  Divisor by_row;       // words; or filters of a group
  Divisor by_all_taps;  // sums: taps + 1
  uint64_t* blocked;
  int32_t* sums;
};

__global__ void __launch_bounds__(kThreads) copy_weight_kernel(BlockWeightArgs args) {
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index >= args.count) return;
  const Division place = divide_with_remainder(index, args.by_row);
  args.blocked[index] = place.remainder < args.depth ? args.words[place.quotient * args.depth + place.remainder] : 0;
}

__global__ void __launch_bounds__(kThreads) sum_weight_kernel(BlockWeightArgs args) {
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index >= args.count) return;
  const Division row = divide_with_remainder(index, args.by_row);
  const Division place = divide_with_remainder(row.quotient, args.by_all_taps);
  const int64_t tap = place.remainder, all = taps(args.shape);
  const int64_t filter = place.quotient * filters_per_group(args.shape) + row.remainder;
  const int64_t words = words_per_group(args.shape);
  const uint64_t* from = args.words + filter * args.depth;
  const int64_t begin = tap < all ? tap * words : 0, end = tap < all ? begin + words : args.depth;
  int64_t ones = 0;
  for (int64_t i = begin; i < end; ++i) ones += __popcll(from[i]);
  args.sums[index] = static_cast<int32_t>(2 * ones - channels_per_group(args.shape) * (tap < all ? 1 : all));
}

struct ConvKernelArgs {
  BinaryConv2dArgs op;
  const int32_t* sums;  // of the weight copy
  int64_t pixels;
  int64_t words;    // of an input pixel's group
  int64_t filters;  // of a group
  int64_t depth, row_words;
  bool whole;    // pairs of words lie within a tap, at addresses for 16-byte loads
  int multiple;  // acc = multiple * (2 d - pa) + of the filter + outside * O
  int outside;
  Divisor by_filter_blocks, by_groups, by_out_width, by_out_height, by_words, by_kernel_width;
  Steps program;  // of output_kind program
};

// A pixel of a block: where tap (0, 0) of its window is in the input, if it were in the image, and which taps are.
struct ConvPixel {
  const uint64_t* origin;
  int row_begin, row_end, column_begin, column_end;

  __device__ bool contains(int row, int column) const {
    return row >= row_begin && row < row_end && column >= column_begin && column < column_end;
  }
};

template <class Engine>
struct ConvShared {
  union {
    typename Engine::Stage stages[Engine::kStages];
    ConvSums<Engine> sums;
  };
  ConvPixel pixels[Engine::kPixels];
};

// What a block works on.
struct ConvBlock {
  int64_t pixel, group, filter;  // the first; the filter is one of the group
};

template <class Engine>
__device__ inline ConvBlock conv_block(const ConvKernelArgs& args) {
  const Division columns = divide_with_remainder(blockIdx.x, args.by_filter_blocks);
  const Division groups = divide_with_remainder(columns.quotient, args.by_groups);
  return {groups.quotient * Engine::kPixels, groups.remainder, columns.remainder * Engine::kFilters};
}

__device__ inline ConvPixel conv_pixel(const ConvKernelArgs& args, int64_t pixel, int64_t group) {
  if (pixel >= args.pixels) return {};
  const ConvShape& s = args.op.shape;
  const Division row = divide_with_remainder(pixel, args.by_out_width);
  const Division image = divide_with_remainder(row.quotient, args.by_out_height);
  const TapRange rows =
      valid_taps(image.remainder, s.stride_height, s.pad_top, s.dilation_height, s.kernel_height, s.height);
  const TapRange columns =
      valid_taps(row.remainder, s.stride_width, s.pad_left, s.dilation_width, s.kernel_width, s.width);
  const int64_t y = image.quotient * s.height + image.remainder * s.stride_height - s.pad_top;
  const int64_t x = row.remainder * s.stride_width - s.pad_left;
  return {args.op.input + ((y * s.width + x) * s.groups + group) * args.words, static_cast<int>(rows.begin),
          static_cast<int>(rows.end), static_cast<int>(columns.begin), static_cast<int>(columns.end)};
}

// Copies `kWords` words of each pixel and filter of the block, from word `k` of the window on, to their places.
template <class Engine, int kWords>
__device__ inline void load_words(const ConvKernelArgs& args, const ConvBlock& block, const ConvPixel* pixels,
                                  typename Engine::Stage& stage, int64_t k, int column) {
  constexpr int kRowThreads = kStageWords / 2;
  constexpr int kRows = kThreads / kRowThreads;  // that are copied at a time
  static_assert(Engine::kPixels % kRows == 0 && Engine::kFilters % kRows == 0);
  const ConvShape& s = args.op.shape;
  const Division tap = divide_with_remainder(k, args.by_words);
  const Division window = divide_with_remainder(tap.quotient, args.by_kernel_width);
  const int64_t offset =
      (window.quotient * s.dilation_height * s.width + window.remainder * s.dilation_width) * s.groups * args.words +
      tap.remainder;
  const int tap_row = static_cast<int>(window.quotient), tap_column = static_cast<int>(window.remainder);
  const int first = static_cast<int>(threadIdx.x) / kRowThreads;
#pragma unroll
  for (int row = 0; row < Engine::kPixels; row += kRows) {
    const int i = row + first;
    const bool valid = k < args.depth && pixels[i].contains(tap_row, tap_column);
    copy_async<kWords * 8>(stage.pixels.at(i, column), valid ? pixels[i].origin + offset : args.op.input, valid);
  }
  const uint64_t* weight = static_cast<const uint64_t*>(args.op.weight);
#pragma unroll
  for (int row = 0; row < Engine::kFilters; row += kRows) {
    const int i = row + first;
    const bool valid = k < args.row_words && block.filter + i < args.filters;
    const int64_t filter = block.group * args.filters + block.filter + i;
    copy_async<kWords * 8>(stage.filters.at(i, column), valid ? weight + filter * args.row_words + k : weight, valid);
  }
}

template <class Engine>
__device__ inline void load_stage(const ConvKernelArgs& args, const ConvBlock& block, const ConvPixel* pixels,
                                  typename Engine::Stage& stage, int64_t first) {
  const int column = static_cast<int>(threadIdx.x) % (kStageWords / 2) * 2;
  if (args.whole) {
    load_words<Engine, 2>(args, block, pixels, stage, first + column, column);
  } else {
    load_words<Engine, 1>(args, block, pixels, stage, first + column, column);
    load_words<Engine, 1>(args, block, pixels, stage, first + column + 1, column + 1);
  }
}

// O of one pixel and filter; `sums` is that of the filter under tap 0.
__device__ inline uint32_t sum_outside(const ConvKernelArgs& args, const ConvPixel& pixel, const int32_t* sums) {
  const int height = static_cast<int>(args.op.shape.kernel_height),
            width = static_cast<int>(args.op.shape.kernel_width);
  uint32_t sum = 0;
  for (int y = 0; y < height; ++y) {
    for (int x = 0; x < width; ++x) {
      if (!pixel.contains(y, x)) sum += static_cast<uint32_t>(sums[(int64_t{y} * width + x) * args.filters]);
    }
  }
  return sum;
}

template <class Engine>
__device__ inline void store_block(const ConvKernelArgs& args, const ConvBlock& block,
                                   const ConvShared<Engine>& shared) {
  constexpr int kColumns = Engine::kFilters / kWarp;
  constexpr int kStep = kWarps / kColumns * kWarp;
  const BinaryConv2dArgs& op = args.op;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int column = warp % kColumns * kWarp + lane;
  const int64_t filter = block.filter + column;
  const bool exists = filter < args.filters;
  const int64_t channel = block.group * args.filters + filter;
  const int all_taps = static_cast<int>(taps(op.shape));
  FilterTerms terms{};
  const int32_t* sums = args.sums;
  uint32_t of_filter = 0;
  if (exists) {
    terms = filter_terms(op, channel);
    sums += block.group * (all_taps + 1) * args.filters + filter;
    const uint32_t all = static_cast<uint32_t>(sums[all_taps * args.filters]);
    if (op.encoding == Encoding::sign) of_filter -= all;
    if (Engine::kDisagreements) {  // 2 d - pa = popc(w) - popc(a ^ w)
      const uint32_t weights = static_cast<uint32_t>(channels_per_group(op.shape) * all_taps);
      const uint32_t ones = (all + weights) / 2;
      of_filter += static_cast<uint32_t>(args.multiple) * ones;
    }
  }
  const uint32_t multiple = static_cast<uint32_t>(Engine::kDisagreements ? -args.multiple : args.multiple);
  const bool bits = is_bits(op.output_kind), program = op.output_kind == ConvOutput::program;
  const bool in_words = filter - lane < words_for(args.filters) * kWordBits;  // both halves of the last, none beyond
  for (int first = warp / kColumns * kWarp; first < Engine::kPixels; first += kStep) {
    uint32_t halves[kMostThresholds] = {};  // of the pixel first + lane
    for (int i = 0; i < kWarp; ++i) {
      const int64_t pixel = block.pixel + first + i;
      if (pixel >= args.pixels) break;
      const ConvPixel& window = shared.pixels[first + i];
      uint32_t sum = multiple * shared.sums[first + i][column] + of_filter;
      if (args.outside != 0 && exists) {
        const int inside = (window.row_end - window.row_begin) * (window.column_end - window.column_begin);
        if (inside < all_taps) sum += static_cast<uint32_t>(args.outside) * sum_outside(args, window, sums);
      }
      const int32_t acc = static_cast<int32_t>(sum);
      const int64_t element = pixel * op.shape.filters + channel;
      if (program) {
        run_steps(args.program, static_cast<float>(acc), pixel, channel, exists, in_words);
        continue;
      }
      if (!bits) {
        if (exists) store_value(op, terms, acc, element);
        continue;
      }
#pragma unroll
      for (int t = 0; t < kMostThresholds; ++t) {
        if (t >= op.thresholds) continue;
        const uint32_t half = __ballot_sync(kAllLanes, exists && passes(op, terms, t, acc, element));
        if (lane == i) halves[t] = half;
      }
    }
    const int64_t pixel = block.pixel + first + lane;
    if (!bits || pixel >= args.pixels || !in_words) continue;
    const int64_t row_halves = words_for(op.thresholds * op.shape.filters) * 2;
    uint32_t* output = static_cast<uint32_t*>(op.output) + pixel * row_halves + (channel - lane) / kWarp;
#pragma unroll
    for (int t = 0; t < kMostThresholds; ++t) {
      if (t < op.thresholds) output[t * op.shape.filters / kWarp] = halves[t];
    }
  }
}

// SASS of binary_conv2d_kernel<MmaEngine>: LDGSTS.E.BYPASS.128, BMMA.168256.AND.POPC
// SASS on sm_90a of binary_conv2d_kernel<WgmmaEngine>: LDGSTS.E.BYPASS.128, BGMMA.64x144x256.AND.POPC
template <class Engine>
__global__ void __launch_bounds__(kThreads, 2) binary_conv2d_kernel(ConvKernelArgs args) {
  if constexpr (Engine::kCompiled) {
    auto& shared = shared_memory<ConvShared<Engine>>();
    const ConvBlock block = conv_block<Engine>(args);
    for (int i = static_cast<int>(threadIdx.x); i < Engine::kPixels; i += kThreads) {
      shared.pixels[i] = conv_pixel(args, block.pixel + i, block.group);
    }
    Engine::prepare(shared.stages);
    __syncthreads();
    constexpr int kAhead = Engine::kStages - 1 - Engine::kPending;
#pragma unroll 1
    for (int i = 0; i < kAhead; ++i) {
      if (i * kStageWords < args.depth)
        load_stage<Engine>(args, block, shared.pixels, shared.stages[i], i * kStageWords);
      commit_copies();
    }
    Engine engine;
    int stage = 0, next = kAhead;
    for (int64_t k = 0; k < args.depth; k += kStageWords) {
      wait_copies<kAhead - 1>();
      Engine::publish();
      __syncthreads();  // the copies of all, and the stage that is no longer read may be written
      if (k + kAhead * kStageWords < args.depth) {
        load_stage<Engine>(args, block, shared.pixels, shared.stages[next], k + kAhead * kStageWords);
      }
      commit_copies();
      const int64_t left = args.depth - k;
      engine.accumulate(shared.stages[stage], left < kStageWords ? static_cast<int>(left) : kStageWords);
      stage = stage + 1 == Engine::kStages ? 0 : stage + 1;
      next = next + 1 == Engine::kStages ? 0 : next + 1;
    }
    wait_copies<0>();
    engine.finish();
    __syncthreads();
    engine.store(shared.sums);
    __syncthreads();
    store_block(args, block, shared);
  }
}

// --- words shared by groups or thresholds

struct PackKernelArgs {
  BinaryConv2dArgs op;
  const int32_t* accumulators;  // [pixels, filters]
  int64_t count;                // halves of words
  Divisor by_row;               // halves of a pixel
};

// A warp makes half a word, a lane one bit.
__global__ void __launch_bounds__(kThreads) pack_accumulators_kernel(PackKernelArgs args) {
  const int64_t half = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  if (half >= args.count) return;
  const Division place = divide_with_remainder(half, args.by_row);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t channel = place.remainder * kWarp + lane, filters = args.op.shape.filters;
  bool bit = false;
  if (channel < args.op.thresholds * filters) {
    const int t = channel < filters ? 0 : 1;
    const int64_t filter = channel - t * filters, element = place.quotient * filters + filter;
    bit = passes(args.op, filter_terms(args.op, filter), t, args.accumulators[element], element);
  }
  const uint32_t bits = __ballot_sync(kAllLanes, bit);
  if (lane == 0) static_cast<uint32_t*>(args.op.output)[half] = bits;
}

template <class Engine>
Status launch_blocks(ConvKernelArgs& args, Stream stream) {
  const int64_t filter_blocks = ceil_div(args.filters, Engine::kFilters);
  args.by_filter_blocks = make_divisor(filter_blocks);
  const int64_t blocks = ceil_div(args.pixels, Engine::kPixels) * args.op.shape.groups * filter_blocks;
  return launch(binary_conv2d_kernel<Engine>, {blocks_for(blocks, 1), dim3(kThreads), sizeof(ConvShared<Engine>)},
                stream, args);
}

bool has_engine(ConvEngine engine, int architecture) {
  switch (engine) {
    case ConvEngine::popcount:
      return true;
    case ConvEngine::mma:
      return has_bit_matrices(architecture);
    case ConvEngine::wgmma:
      return has_warpgroup_bit_matrices(architecture);
  }
  return false;
}

Status launch_engine(ConvKernelArgs& args, ConvEngine engine, Stream stream) {
  switch (engine) {
    case ConvEngine::popcount:
      return launch_blocks<PopcountEngine>(args, stream);
    case ConvEngine::mma:
      return launch_blocks<MmaEngine>(args, stream);
    case ConvEngine::wgmma:
      return launch_blocks<WgmmaEngine>(args, stream);
  }
  return Status::bad_argument;
}

}  // namespace

// wgmma is for those who ask for it, until a GPU has shown it to be right and faster.
ConvEngine binary_conv2d_default_engine(int device) noexcept {
  return has_bit_matrices(architecture(device)) ? ConvEngine::mma : ConvEngine::popcount;
}

bool binary_conv2d_has_engine(ConvEngine engine, int device) noexcept {
  return has_engine(engine, architecture(device));
}

int64_t binary_conv2d_weight_bytes(const ConvShape& shape) noexcept { return WeightLayout(shape).bytes; }

Status binary_conv2d_block_weight(const ConvShape& shape, const uint64_t* words, void* blocked,
                                  Stream stream) noexcept {
  if (!valid(shape)) return Status::bad_shape;
  if (shape.filters == 0) return Status::ok;
  const WeightLayout layout(shape);
  BlockWeightArgs args{shape,
                       words,
                       layout.depth,
                       layout.row_words,
                       shape.filters * layout.row_words,
                       make_divisor(layout.row_words),
                       make_divisor(taps(shape) + 1),
                       static_cast<uint64_t*>(blocked),
                       reinterpret_cast<int32_t*>(static_cast<uint8_t*>(blocked) + layout.sums_offset)};
  const Status status = launch(copy_weight_kernel, {blocks_for(args.count, kThreads), dim3(kThreads)}, stream, args);
  if (status != Status::ok) return status;
  args.count = layout.sums;
  args.by_row = make_divisor(filters_per_group(shape));
  return launch(sum_weight_kernel, {blocks_for(args.count, kThreads), dim3(kThreads)}, stream, args);
}

int64_t binary_conv2d_workspace_bytes(const BinaryConv2dArgs& args) noexcept {
  return conv_blocks_share_words(args)
             ? out_pixels(args.shape) * args.shape.filters * static_cast<int64_t>(sizeof(int32_t))
             : 0;
}

Status binary_conv2d(const BinaryConv2dArgs& args, int64_t workspace_bytes, ConvEngine engine, Stream stream) noexcept {
  const ConvShape& s = args.shape;
  if (!valid(s)) return Status::bad_shape;
  Status status = check_program(args.program, out_pixels(s), s.filters);
  if (status != Status::ok) return status;
  const int device_architecture = architecture(stream.device);
  if (device_architecture < 0) return Status::cuda_error;
  if (!has_engine(engine, device_architecture)) return Status::unsupported_isa;
  if (workspace_bytes < binary_conv2d_workspace_bytes(args)) return Status::small_workspace;
  if (out_pixels(s) == 0 || s.filters == 0) return Status::ok;
  const WeightLayout layout(s);
  const bool sign = args.encoding == Encoding::sign;
  ConvKernelArgs kernel_args{};
  kernel_args.op = args;
  kernel_args.sums = reinterpret_cast<const int32_t*>(static_cast<const uint8_t*>(args.weight) + layout.sums_offset);
  kernel_args.pixels = out_pixels(s);
  kernel_args.words = words_per_group(s);
  kernel_args.filters = filters_per_group(s);
  kernel_args.depth = layout.depth;
  kernel_args.row_words = layout.row_words;
  kernel_args.whole =
      kernel_args.words % 2 == 0 && is_aligned(args.input, kPackBytes) && is_aligned(args.weight, kPackBytes);
  kernel_args.multiple = sign ? 2 : 1;
  kernel_args.outside = args.padding_value + (sign ? 1 : 0);
  kernel_args.by_groups = make_divisor(s.groups);
  kernel_args.by_out_width = make_divisor(s.out_width);
  kernel_args.by_out_height = make_divisor(s.out_height);
  kernel_args.by_words = make_divisor(kernel_args.words);
  kernel_args.by_kernel_width = make_divisor(s.kernel_width);
  kernel_args.program = make_steps(args.program, s.filters, s.out_height * s.out_width);
  if (!conv_blocks_share_words(args)) return launch_engine(kernel_args, engine, stream);
  kernel_args.op.output_kind = ConvOutput::int32;
  kernel_args.op.output = args.workspace;
  status = launch_engine(kernel_args, engine, stream);
  if (status != Status::ok) return status;
  if (args.output_kind == ConvOutput::program) {
    return run_on_accumulators(static_cast<const int32_t*>(args.workspace), args.program, out_pixels(s), s.filters,
                               s.out_height * s.out_width, stream);
  }
  const int64_t row_halves = words_for(args.thresholds * s.filters) * 2;
  const PackKernelArgs pack_args{args, static_cast<const int32_t*>(args.workspace), out_pixels(s) * row_halves,
                                 make_divisor(row_halves)};
  return launch(pack_accumulators_kernel, {blocks_for(pack_args.count, kWarps), dim3(kThreads)}, stream, pack_args);
}

}  // namespace lowbit::cuda
