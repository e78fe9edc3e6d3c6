// A matrix product whose left side is read in place: row = output pixel, its words those under the taps, in the order
// of the taps; no im2col. A block makes the products of kPixels pixels and kFilters filters of one group. Their words
// come into shared memory in stages, some under way while the engine (binary_conv2d_engines.cuh) works on one. Taps
// outside the image are read as zeros, like the channels past the last.
//
// With d = popc(a & w) and pa = popc(a) over all taps, and for each filter S = sum of (2 popc(w) - channels) over all
// taps and O over those outside the image, exactly, and modulo 2^32 in every step:
//   step   acc =  (2 d - pa)     + padding_value * O
//   sign   acc = 2 (2 d - pa) - S + (padding_value + 1) * O      [O is what a = -1 outside would have taken off]
// popc(a ^ w) = pa + popc(w) - 2 d serves as well. The taps inside are a rectangle, whose sum is four of the filter's
// prefix sums over the taps.
//
// The sums pass through shared memory to the epilogue, where a lane has one filter and goes through pixels: stores of
// neighbouring lanes are neighbours, and a ballot makes 32 output bits. Where output words are shared by groups, or by
// the two thresholds, the accumulators go to the workspace, and a second kernel makes the words or runs the program.
//
// Warp instructions of the epilogue, one pixel by 32 filters, counted on sm_90a: 8.4 for bits and 7.5 for int32, and 23
// more where the window leaves the image. With the output kind told apart for each pixel, and a loop over the taps
// outside, they were 86, 59 and 206. A block of 128 x 128 has 512 such rows: of int32 at 14 x 14 with 3 x 3 taps, where
// 27 % of the windows leave the image, 512 * (7.5 + 0.27 * 23) = 7.0k, 1.8k issue cycles on 4 schedulers.
#include "core/ops/binary_conv2d.h"

#include "core/checks.h"
#include "core/divisor.h"
#include "cuda/binary_conv2d_engines.cuh"
#include "cuda/binary_conv2d_epilogue.cuh"
#include "cuda/epilogue.cuh"

namespace lowbit::cuda {
namespace {

// Prefix sums of a filter.
LOWBIT_INLINE int64_t taps_and_edges(const ConvShape& shape) {
  return (shape.kernel_height + 1) * (shape.kernel_width + 1);
}

// The private weight copy: words [filters][row_words], those under the taps of a filter one after the other, zeros at
// the end; then for each group int32 [kernel_height + 1][kernel_width + 1][filters_per_group], the sum of each filter's
// weights under the taps of so many first rows and columns.
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
        sums(shape.filters * taps_and_edges(shape)),
        bytes(sums_offset + sums * static_cast<int64_t>(sizeof(int32_t))) {}
};

struct BlockWeightArgs {
  ConvShape shape;
  const uint64_t* words;  // [filters, taps, words_per_group]
  int64_t depth, row_words, count;
  Divisor by_row;    // words; or filters of a group
  Divisor by_lines;  // sums: tap rows, or columns of sums, of a group
  uint64_t* blocked;
  int32_t* sums;
};

__global__ void __launch_bounds__(kThreads) copy_weight_kernel(BlockWeightArgs args) {
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index >= args.count) return;
  const Division place = divide_with_remainder(index, args.by_row);
  args.blocked[index] = place.remainder < args.depth ? args.words[place.quotient * args.depth + place.remainder] : 0;
}

// The sums along each row of taps, and the zeros before them.
__global__ void __launch_bounds__(kThreads) prefix_rows_kernel(BlockWeightArgs args) {
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index >= args.count) return;
  const ConvShape& s = args.shape;
  const Division line = divide_with_remainder(index, args.by_row);
  const Division place = divide_with_remainder(line.quotient, args.by_lines);
  const int64_t group = place.quotient, row = place.remainder, filters = filters_per_group(s);
  const int64_t words = words_per_group(s), width = s.kernel_width;
  const uint64_t* from = args.words + (group * filters + line.remainder) * args.depth + row * width * words;
  int32_t* const first = args.sums + group * (s.kernel_height + 1) * (width + 1) * filters + line.remainder;
  int32_t* const to = first + (row + 1) * (width + 1) * filters;
  int64_t sum = 0;
  to[0] = 0;
  for (int64_t x = 0; x < width; ++x) {
    for (int64_t i = 0; i < words; ++i) sum += 2 * __popcll(from[x * words + i]);
    sum -= channels_per_group(s);
    to[(x + 1) * filters] = static_cast<int32_t>(sum);
  }
  if (row > 0) return;
  for (int64_t x = 0; x <= width; ++x) first[x * filters] = 0;
}

// Adds to each row of sums the one above.
__global__ void __launch_bounds__(kThreads) prefix_columns_kernel(BlockWeightArgs args) {
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index >= args.count) return;
  const ConvShape& s = args.shape;
  const Division line = divide_with_remainder(index, args.by_row);
  const Division place = divide_with_remainder(line.quotient, args.by_lines);
  const int64_t filters = filters_per_group(s), pitch = (s.kernel_width + 1) * filters;
  int32_t* sums =
      args.sums + (place.quotient * (s.kernel_height + 1)) * pitch + place.remainder * filters + line.remainder;
  int32_t sum = 0;
  for (int64_t y = 0; y < s.kernel_height; ++y) {
    sums += pitch;
    *sums = sum += *sums;
  }
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

// A pixel of a block: where tap (0, 0) of its window is in the input, if it were in the image, which taps are, and the
// prefix sums at the corners of their rectangle: top left, top right, bottom left, bottom right, as elements from the
// filter's first.
struct ConvPixel {
  const uint64_t* origin;
  int row_begin, row_end, column_begin, column_end;
  Pack<uint32_t> corners;

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
  const auto corner = [&](int64_t tap_row, int64_t tap_column) {
    return static_cast<uint32_t>((tap_row * (s.kernel_width + 1) + tap_column) * args.filters);
  };
  return {args.op.input + ((y * s.width + x) * s.groups + group) * args.words,
          static_cast<int>(rows.begin),
          static_cast<int>(rows.end),
          static_cast<int>(columns.begin),
          static_cast<int>(columns.end),
          {corner(rows.begin, columns.begin), corner(rows.begin, columns.end), corner(rows.end, columns.begin),
           corner(rows.end, columns.end)}};
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

// What a lane of the epilogue works on: one filter, of which a nonexistent one reads what the last does.
struct ConvLane {
  int column;       // of the sums
  int64_t channel;  // of the output
  bool exists;
  bool in_words;         // whether the warp's bits are in a word of the output
  uint32_t summand;      // acc = sum + summand + outside * O
  const uint32_t* taps;  // the filter's first prefix sum
  uint32_t all;          // its last
};

template <class Engine>
__device__ inline ConvLane conv_lane(const ConvKernelArgs& args, const ConvBlock& block) {
  const ConvShape& s = args.op.shape;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int column = warp % (Engine::kFilters / kWarp) * kWarp + lane;
  const int64_t filter = block.filter + column, readable = min(filter, args.filters - 1);
  const int64_t sums = taps_and_edges(s);
  ConvLane at{};
  at.column = column;
  at.channel = block.group * args.filters + filter;
  at.exists = filter < args.filters;
  at.in_words = filter - lane < words_for(args.filters) * kWordBits;  // both halves of the last, none beyond
  at.taps = keep_address(reinterpret_cast<const uint32_t*>(args.sums) + block.group * sums * args.filters + readable);
  at.all = at.taps[(sums - 1) * args.filters];
  if (args.op.encoding == Encoding::sign) at.summand -= at.all;
  if (Engine::kDisagreements) {  // 2 d - pa = popc(w) - popc(a ^ w)
    const uint32_t weights = static_cast<uint32_t>(channels_per_group(s) * taps(s));
    at.summand += static_cast<uint32_t>(args.multiple) * ((at.all + weights) / 2);
  }
  return at;
}

template <class Engine>
constexpr int kPitch = sizeof(ConvSums<Engine>) / sizeof(uint32_t) / Engine::kPixels;  // of the sums

// Adds outside * O to the sums of those of 32 pixels whose windows leave the image.
template <class Engine>
__device__ inline void add_outside(const ConvKernelArgs& args, const ConvLane& at, const ConvPixel* pixels,
                                   ConvSums<Engine>& sums, int first) {
  const ConvPixel& own = pixels[first + static_cast<int>(threadIdx.x) % kWarp];
  const int inside = (own.row_end - own.row_begin) * (own.column_end - own.column_begin);
  uint32_t leaving = __ballot_sync(kAllLanes, inside < static_cast<int>(taps(args.op.shape)));
  uint32_t* const to = &sums[first][at.column];
#pragma unroll 1
  for (; leaving != 0; leaving &= leaving - 1) {
    const int i = __ffs(static_cast<int>(leaving)) - 1;
    const Pack<uint32_t> corners = pixels[first + i].corners;
    const auto prefix = [&](int corner) { return at.taps[corners.values[corner]]; };
    to[i * kPitch<Engine>] +=
        static_cast<uint32_t>(args.outside) * (at.all - prefix(3) + prefix(2) + prefix(1) - prefix(0));
  }
}

// body(i, acc) of the first `count` of 32 pixels.
template <class Engine, class Body>
__device__ inline void for_each_sum(const ConvLane& at, const ConvSums<Engine>& sums, int first, int count,
                                    const Body& body) {
  const uint32_t* const from = &sums[first][at.column];
#pragma unroll 8
  for (int i = 0; i < count; ++i) body(i, static_cast<int32_t>(from[i * kPitch<Engine>] + at.summand));
}

// Elements of `pixel` and the following, of an output other than bits.
template <class Engine>
__device__ inline void store_elements(const ConvKernelArgs& args, const ConvLane& at, const FilterTerms& terms,
                                      const ConvSums<Engine>& sums, int first, int count, int64_t pixel) {
  const BinaryConv2dArgs& op = args.op;
  const int64_t filters = op.shape.filters;
  int64_t element = pixel * filters + at.channel;
  const auto store_floats = [&](auto type) {
    auto* to = static_cast<BitsOf<type.value>*>(op.output);
    for_each_sum<Engine>(at, sums, first, count, [&](int, int32_t acc) {
      to[element] = from_float<type.value>(value_of(op, terms, acc, element));
      element += filters;
    });
  };
  if (op.output_kind == ConvOutput::program) {
    for_each_sum<Engine>(at, sums, first, count, [&](int i, int32_t acc) {
      run_steps(args.program, static_cast<float>(acc), pixel + i, at.channel, at.exists, at.in_words);
    });
  } else if (!at.exists) {
    return;
  } else if (op.output_kind == ConvOutput::int32) {
    for_each_sum<Engine>(at, sums, first, count, [&](int, int32_t acc) {
      static_cast<int32_t*>(op.output)[element] = acc;
      element += filters;
    });
  } else if (op.output_kind == ConvOutput::float32) {
    store_floats(Stored<FloatType::float32>{});
  } else if (op.output_kind == ConvOutput::bfloat16) {
    store_floats(Stored<FloatType::bfloat16>{});
  } else {
    store_floats(Stored<FloatType::float16>{});
  }
}

// Halves of words, of `pixel` and the following: a lane writes those of one pixel.
template <class Engine>
__device__ inline void store_bits(const ConvKernelArgs& args, const ConvLane& at, const FilterTerms& terms,
                                  const ConvSums<Engine>& sums, int first, int count, int64_t pixel) {
  const BinaryConv2dArgs& op = args.op;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const uint32_t existing = __ballot_sync(kAllLanes, at.exists);
  const int64_t row_halves = words_for(op.thresholds * op.shape.filters) * 2;
  uint32_t* const output =
      static_cast<uint32_t*>(op.output) + (pixel + lane) * row_halves + (at.channel - lane) / kWarp;
#pragma unroll 1
  for (int t = 0; t < static_cast<int>(op.thresholds); ++t) {
    const FilterThreshold threshold = filter_threshold(op, t, at.channel, at.exists);
    uint32_t half = 0;  // of the pixel first + lane
    const auto put = [&](int i, bool bit) {
      const uint32_t together = __ballot_sync(kAllLanes, bit);
      if (lane == i) half = together;
    };
    if (op.output_kind == ConvOutput::bits_by_integer) {
      for_each_sum<Engine>(at, sums, first, count, [&](int i, int32_t acc) { put(i, reaches(threshold, acc)); });
    } else {
      int64_t element = pixel * op.shape.filters + (at.exists ? at.channel : 0);
      for_each_sum<Engine>(at, sums, first, count, [&](int i, int32_t acc) {
        put(i, reaches(threshold, value_of(op, terms, acc, element)));
        element += op.shape.filters;
      });
    }
    if (lane < count && at.in_words) output[t * op.shape.filters / kWarp] = half & existing;
  }
}

template <class Engine>
__device__ inline void store_block(const ConvKernelArgs& args, const ConvBlock& block, ConvShared<Engine>& shared) {
  constexpr int kColumns = Engine::kFilters / kWarp;
  const ConvLane at = conv_lane<Engine>(args, block);
  const FilterTerms terms = filter_terms(args.op, at.channel, at.exists);
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
#pragma unroll 1
  for (int first = warp / kColumns * kWarp; first < Engine::kPixels; first += kWarps / kColumns * kWarp) {
    const int64_t pixel = block.pixel + first;
    if (pixel >= args.pixels) break;
    const int count = static_cast<int>(min(args.pixels - pixel, kWarp));
    if (args.outside != 0) add_outside<Engine>(args, at, shared.pixels, shared.sums, first);
    if (is_bits(args.op.output_kind)) {
      store_bits<Engine>(args, at, terms, shared.sums, first, count, pixel);
    } else {
      store_elements<Engine>(args, at, terms, shared.sums, first, count, pixel);
    }
  }
}

// Count of binary_conv2d_kernel<MmaEngine>, bits: 32 LDS, 32 VOTE.ANY; each of 32
// Count of binary_conv2d_kernel<MmaEngine>, int32: 32 LDS, 32 STG.E; each of 32
// Count of binary_conv2d_kernel<MmaEngine>, more at borders: 32 LDS.128, 32 STS; each of 32
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
    engine.store(shared.sums, static_cast<uint32_t>(args.multiple));
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
    const FilterThreshold threshold = filter_threshold(args.op, t, filter, true);
    const int32_t acc = args.accumulators[element];
    bit = args.op.output_kind == ConvOutput::bits_by_integer
              ? reaches(threshold, acc)
              : reaches(threshold, value_of(args.op, filter_terms(args.op, filter, true), acc, element));
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
                       make_divisor(shape.kernel_height),
                       static_cast<uint64_t*>(blocked),
                       reinterpret_cast<int32_t*>(static_cast<uint8_t*>(blocked) + layout.sums_offset)};
  Status status = launch(copy_weight_kernel, {blocks_for(args.count, kThreads), dim3(kThreads)}, stream, args);
  if (status != Status::ok) return status;
  args.by_row = make_divisor(filters_per_group(shape));
  args.count = shape.filters * shape.kernel_height;
  status = launch(prefix_rows_kernel, {blocks_for(args.count, kThreads), dim3(kThreads)}, stream, args);
  if (status != Status::ok) return status;
  args.by_lines = make_divisor(shape.kernel_width + 1);
  args.count = shape.filters * (shape.kernel_width + 1);
  return launch(prefix_columns_kernel, {blocks_for(args.count, kThreads), dim3(kThreads)}, stream, args);
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
  if (taps_and_edges(s) * filters_per_group(s) > UINT32_MAX) return Status::bad_shape;  // corners; weights of 8 GiB
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
