// Reads 4 or 2 bytes an element and writes an eighth of a byte: the loads are what counts, so each is of 16 bytes where
// the addresses allow it, and a thread has several under way at a time.
//
// Channels-last: the lanes of a warp that hold the channels of one 32-bit half of a word put their bits together by
// shuffles. Planar: a thread keeps whole words of the pixels that it loads side by side and goes through 64 channels,
// so that no bit changes the thread; the words then pass through shared memory to be stored side by side.
#include "core/ops/binarize.h"

#include "core/checks.h"
#include "core/divisor.h"
#include "cuda/platform.cuh"

namespace lowbit::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

struct BinarizeKernelArgs {
  BinarizeArgs op;
  MaskInterval mask_interval;
  int64_t bits;  // of a pixel: two thresholds give two a channel
  int64_t row_words;
  int64_t count;        // channels-last: halves of words; planar: pixels
  Divisor by_row;       // channels-last: halves of a row
  Divisor by_spatial;   // planar
  int words_per_block;  // planar: 1, 2, 4 or 8
  int64_t word_blocks;  // planar: blocks that a row takes
};

// x >= threshold, or x <= threshold with the sign of both sides changed.
struct Threshold {
  float value;
  uint32_t sign;
};

__device__ inline Threshold make_threshold(float value, bool flip) {
  const uint32_t sign = flip ? 0x80000000u : 0u;
  return {bits_to_float(float_to_bits(value) ^ sign), sign};
}

__device__ inline Threshold bit_threshold(const BinarizeArgs& args, int64_t bit) {
  return make_threshold(threshold_of(args, bit), args.flip && args.flip[bit]);
}

__device__ inline int64_t channel_of(const BinarizeArgs& args, int64_t bit) {
  return bit < args.channels ? bit : bit - args.channels;
}

// Those of kCount neighbouring bits, of which `valid` exist; kVector: all do, at addresses for 16-byte loads.
template <int kCount, bool kVector>
__device__ inline void bit_thresholds(const BinarizeArgs& args, int64_t bit, int64_t valid,
                                      Threshold (&thresholds)[kCount]) {
  if constexpr (kVector) {
    Pack<float> values[kCount / 4];
    Pack<uint8_t, kCount> flips{};
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i) {
      if (args.threshold) values[i] = reinterpret_cast<const Pack<float>*>(args.threshold + bit)[i];
    }
    if (args.flip) flips = *reinterpret_cast<const Pack<uint8_t, kCount>*>(args.flip + bit);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float value = args.threshold ? values[i / 4].values[i % 4] : args.common_threshold;
      thresholds[i] = make_threshold(value, flips.values[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i < valid) thresholds[i] = bit_threshold(args, bit + i);
    }
  }
}

__device__ inline uint32_t passes(float x, Threshold threshold) {
  return bits_to_float(float_to_bits(x) ^ threshold.sign) >= threshold.value ? 1 : 0;
}

__device__ inline uint32_t is_inside(float x, MaskInterval interval) {
  return x >= interval.lowest && x <= interval.highest ? 1 : 0;
}

// --- channels-last

constexpr int kHalves = 2;  // 32-bit halves of a word
constexpr int kHalfBits = 32;

// A warp makes 32 neighbouring halves, one a lane, in kRounds rounds: in each, kLanes lanes load what one half takes.
// kVector: rows and addresses allow loads of 16 bytes.
// SASS of binarize_channels_last_kernel<.*, true>: LDG.E.128
template <FloatType kType, bool kVector>
__global__ void __launch_bounds__(kThreads) binarize_channels_last_kernel(BinarizeKernelArgs args) {
  using Bits = BitsOf<kType>;
  using Loaded = Pack<Bits>;
  constexpr int kLanes = kHalfBits / Loaded::kCount;
  constexpr int kRounds = kLanes;
  constexpr int kHalvesPerRound = kWarp / kLanes;
  const Bits* input = static_cast<const Bits*>(args.op.input);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t warp_first = (int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp) * kWarp;
  Loaded values[kRounds];
  int64_t first_bits[kRounds];  // of each round; past the end where there is none
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int64_t half = warp_first + round * kHalvesPerRound + lane / kLanes;
    const Division place = divide_with_remainder(half, args.by_row);
    const int64_t bit = place.remainder * kHalfBits + lane % kLanes * Loaded::kCount;
    first_bits[round] = half < args.count ? bit : args.bits;
    const Bits* from = input + place.quotient * args.op.channels;
    if constexpr (kVector) {
      if (first_bits[round] < args.bits) {
        values[round] = *reinterpret_cast<const Loaded*>(from + channel_of(args.op, bit));
      }
    } else {
#pragma unroll
      for (int i = 0; i < Loaded::kCount; ++i) {
        if (first_bits[round] + i < args.bits) values[round].values[i] = from[channel_of(args.op, bit + i)];
      }
    }
  }
  uint32_t words = 0, mask = 0;
  const bool common = !args.op.threshold && !args.op.flip;
  Threshold thresholds[Loaded::kCount];
#pragma unroll
  for (int i = 0; i < Loaded::kCount; ++i) thresholds[i] = {args.op.common_threshold, 0};
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    uint32_t bits = 0, inside = 0;
    const int64_t valid = args.bits - first_bits[round];
    if (valid > 0) {
      if (!common) bit_thresholds<Loaded::kCount, kVector>(args.op, first_bits[round], valid, thresholds);
#pragma unroll
      for (int i = 0; i < Loaded::kCount; ++i) {
        if (!kVector && i >= valid) continue;
        const float x = to_float<kType>(values[round].values[i]);
        bits |= passes(x, thresholds[i]) << i;
        inside |= is_inside(x, args.mask_interval) << i;
      }
    }
    const int shift = lane % kLanes * Loaded::kCount;
    bits = join<kLanes>(bits << shift);
    if (round == lane % kLanes) words = bits;  // the half that this lane stores
    if (args.op.mask) {
      inside = join<kLanes>(inside << shift);
      if (round == lane % kLanes) mask = inside;
    }
  }
  const int64_t half = warp_first + lane % kLanes * kHalvesPerRound + lane / kLanes;
  if (half >= args.count) return;
  reinterpret_cast<uint32_t*>(args.op.words)[half] = words;
  if (args.op.mask) reinterpret_cast<uint32_t*>(args.op.mask)[half] = mask;
}

// --- planar

// A warp makes one word of kTile pixels, a block up to 8 words of as many tiles as its warps suffice for. kVector: 16
// bytes hold neighbouring pixels of one image; else a thread has two pixels, a warp apart. The pitch keeps the words of
// a pixel in different banks.
template <class Bits, bool kVector>
struct Planar {
  static constexpr int kPixels = kVector ? Pack<Bits>::kCount : 2;  // of a thread
  static constexpr int kTile = kWarp * kPixels;
  static constexpr int kPitch = kTile + 2;
  // Bits whose loads are under way at the same time.
  static constexpr int kBatch = kVector ? 8 : 16;
  struct Shared {
    uint64_t words[kWarps][kPitch];  // [tile, word][pixel]
  };
};

// SASS of binarize_planar_kernel<.*, true>: LDG.E.128
template <FloatType kType, bool kVector>
__global__ void __launch_bounds__(kThreads) binarize_planar_kernel(BinarizeKernelArgs args) {
  using Bits = BitsOf<kType>;
  using Tile = Planar<Bits, kVector>;
  using Loaded = Pack<Bits, kVector ? Tile::kPixels : 1>;
  constexpr int kPixels = Tile::kPixels;
  constexpr int kLoads = kVector ? 1 : kPixels;  // of a channel
  constexpr int kBatch = Tile::kBatch;
  auto& shared = shared_memory<typename Tile::Shared>();
  const Bits* input = static_cast<const Bits*>(args.op.input);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int block_pixels = kWarps / args.words_per_block * Tile::kTile;
  const int64_t block_pixel = int64_t{blockIdx.x} / args.word_blocks * block_pixels;
  const int64_t block_word = int64_t{blockIdx.x} % args.word_blocks * args.words_per_block;
  const int64_t warp_pixel = block_pixel + warp / args.words_per_block * Tile::kTile;
  const int64_t first_bit = (block_word + warp % args.words_per_block) * kWordBits;
  const int64_t bits_left = args.bits - first_bit;
  const int count = static_cast<int>(bits_left < kWordBits ? bits_left : kWordBits);  // may be negative

  const auto tile_pixel = [&](int i) { return kVector ? lane * kPixels + i : i * kWarp + lane; };
  const Bits* from[kLoads];  // channel 0 of a load's pixels; null past the last pixel
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int64_t pixel = warp_pixel + tile_pixel(i);
    const Division place = divide_with_remainder(pixel, args.by_spatial);
    from[i] =
        pixel < args.count ? input + place.quotient * args.op.channels * args.op.spatial + place.remainder : nullptr;
  }
  uint64_t bits[kPixels] = {}, inside[kPixels] = {};
  const bool common = !args.op.threshold && !args.op.flip;
  for (int begin = 0; begin < count; begin += kBatch) {
    Loaded values[kBatch][kLoads];
#pragma unroll
    for (int c = 0; c < kBatch; ++c) {
      const int64_t channel = channel_of(args.op, first_bit + begin + c);
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        if (begin + c < count && from[i]) {
          values[c][i] = *reinterpret_cast<const Loaded*>(from[i] + channel * args.op.spatial);
        }
      }
    }
#pragma unroll
    for (int c = 0; c < kBatch; ++c) {
      if (begin + c >= count) break;
      const Threshold threshold =
          common ? Threshold{args.op.common_threshold, 0} : bit_threshold(args.op, first_bit + begin + c);
#pragma unroll
      for (int i = 0; i < kPixels; ++i) {
        if (!from[i / Loaded::kCount]) continue;
        const float x = to_float<kType>(values[c][i / Loaded::kCount].values[i % Loaded::kCount]);
        bits[i] |= static_cast<uint64_t>(passes(x, threshold)) << (begin + c);
        if (args.op.mask) inside[i] |= static_cast<uint64_t>(is_inside(x, args.mask_interval)) << (begin + c);
      }
    }
  }

  const int64_t words_left = args.row_words - block_word;
  const int words = static_cast<int>(words_left < args.words_per_block ? words_left : args.words_per_block);
  const auto store = [&](const uint64_t (&mine)[kPixels], uint64_t* output) {
#pragma unroll
    for (int i = 0; i < kPixels; ++i) shared.words[warp][tile_pixel(i)] = mine[i];
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < block_pixels * words; i += kThreads) {
      const int pixel = i / words, word = i % words;
      if (block_pixel + pixel >= args.count) break;
      output[(block_pixel + pixel) * args.row_words + block_word + word] =
          shared.words[pixel / Tile::kTile * args.words_per_block + word][pixel % Tile::kTile];
    }
  };
  store(bits, args.op.words);
  if (!args.op.mask) return;
  __syncthreads();
  store(inside, args.op.mask);
}

// --- launch

template <FloatType kType>
Status binarize_type(const BinarizeArgs& args, Stream stream) {
  using Bits = BitsOf<kType>;
  const int64_t row_words = words_for(bits_per_pixel(args));
  BinarizeKernelArgs kernel_args{};
  kernel_args.op = args;
  kernel_args.mask_interval = mask_interval(args.encoding);
  kernel_args.bits = bits_per_pixel(args);
  kernel_args.row_words = row_words;
  const bool aligned = is_aligned(args.input, kPackBytes);
  if (args.channels_last) {
    kernel_args.count = args.outer * args.spatial * row_words * kHalves;
    kernel_args.by_row = make_divisor(row_words * kHalves);
    const bool vector = aligned && args.channels % Pack<Bits>::kCount == 0 && is_aligned(args.threshold, kPackBytes) &&
                        is_aligned(args.flip, Pack<Bits>::kCount);
    return launch(vector ? binarize_channels_last_kernel<kType, true> : binarize_channels_last_kernel<kType, false>,
                  {blocks_for(kernel_args.count, kThreads), dim3(kThreads)}, stream, kernel_args);
  }
  kernel_args.count = args.outer * args.spatial;
  kernel_args.by_spatial = make_divisor(args.spatial);
  kernel_args.words_per_block = 1;
  while (kernel_args.words_per_block < kWarps && kernel_args.words_per_block < row_words) {
    kernel_args.words_per_block *= 2;
  }
  kernel_args.word_blocks = ceil_div(row_words, kernel_args.words_per_block);
  const bool vector = aligned && args.spatial % Pack<Bits>::kCount == 0;
  const int64_t tile = vector ? Planar<Bits, true>::kTile : Planar<Bits, false>::kTile;
  const size_t shared_bytes =
      vector ? sizeof(typename Planar<Bits, true>::Shared) : sizeof(typename Planar<Bits, false>::Shared);
  const int64_t pixel_blocks = ceil_div(kernel_args.count, kWarps / kernel_args.words_per_block * tile);
  return launch(vector ? binarize_planar_kernel<kType, true> : binarize_planar_kernel<kType, false>,
                {blocks_for(pixel_blocks * kernel_args.word_blocks, 1), dim3(kThreads), shared_bytes}, stream,
                kernel_args);
}

}  // namespace

Status binarize(const BinarizeArgs& args, Stream stream) noexcept {
  if (!valid(args.input_type) || (args.thresholds != 1 && args.thresholds != 2)) return Status::bad_argument;
  if (args.thresholds == 2 && (!args.threshold || args.mask)) return Status::bad_argument;
  if (!addressable(args.outer, args.thresholds, args.channels, args.spatial)) return Status::bad_shape;
  if (args.outer == 0 || args.channels == 0 || args.spatial == 0) return Status::ok;
  return for_type(args.input_type, [&](auto type) { return binarize_type<type.value>(args, stream); });
}

}  // namespace lowbit::cuda
