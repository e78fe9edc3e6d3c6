// Writes 4 or 2 bytes a channel and reads 1/8: the stores are what counts. A thread writes 16 bytes at a time where
// they lie within a pixel, else one value; the threads of a block are neighbours in a flat view of the output.
#include "core/checks.h"
#include "core/divisor.h"
#include "cuda/platform.cuh"

namespace lowbit::cuda {
namespace {

constexpr int kThreads = 256;

template <class Value>
struct UnpackKernelArgs {
  const uint64_t* words;
  int64_t row_words;
  int64_t stores;  // of kValues each
  Divisor by_row;  // stores of a pixel
  Value low, high;
  Value* output;
};

// Stores a thread makes: 16 KiB of float32 a block, so that the blocks' start-up does not limit.
constexpr int stores_per_thread(int values) { return values == 1 ? 16 : 4; }

// kValues: elements of one store; 1 or a divisor of 64.
// SASS of unpack_kernel<.*, [48]>: STG.E.128
template <class Value, int kValues>
__global__ void __launch_bounds__(kThreads) unpack_kernel(UnpackKernelArgs<Value> args) {
  constexpr int kStores = stores_per_thread(kValues);
  const int64_t first = int64_t{blockIdx.x} * kThreads * kStores + threadIdx.x;
  uint64_t bits[kStores] = {};
#pragma unroll
  for (int i = 0; i < kStores; ++i) {
    const int64_t store = first + i * kThreads;
    if (store >= args.stores) break;
    const Division place = divide_with_remainder(store, args.by_row);
    const int64_t channel = place.remainder * kValues;
    bits[i] = args.words[place.quotient * args.row_words + channel / kWordBits] >> (channel % kWordBits);
  }
#pragma unroll
  for (int i = 0; i < kStores; ++i) {
    const int64_t store = first + i * kThreads;
    if (store >= args.stores) break;
    Pack<Value, kValues> pack;
#pragma unroll
    for (int j = 0; j < kValues; ++j) pack.values[j] = bits[i] >> j & 1 ? args.high : args.low;
    reinterpret_cast<Pack<Value, kValues>*>(args.output)[store] = pack;
  }
}

template <class Value, int kValues>
Status unpack_values(const UnpackArgs& args, Value low, Value high, Stream stream) {
  const int64_t stores = args.pixels * args.channels / kValues;
  const UnpackKernelArgs<Value> kernel_args{
      args.words, words_for(args.channels),        stores, make_divisor(args.channels / kValues), low,
      high,       static_cast<Value*>(args.output)};
  return launch(unpack_kernel<Value, kValues>,
                {blocks_for(stores, kThreads * stores_per_thread(kValues)), dim3(kThreads)}, stream, kernel_args);
}

template <class Value>
Status unpack_values(const UnpackArgs& args, Value low, Value high, Stream stream) {
  if (args.pixels == 0 || args.channels == 0) return Status::ok;
  constexpr int kMost = kPackBytes / sizeof(Value);
  const bool whole = args.channels % kMost == 0 && is_aligned(args.output, kPackBytes);
  return whole ? unpack_values<Value, kMost>(args, low, high, stream)
               : unpack_values<Value, 1>(args, low, high, stream);
}

}  // namespace

Status unpack(const UnpackArgs& args, Stream stream) noexcept {
  if (!valid(args.output_type)) return Status::bad_argument;
  if (!addressable(args.pixels, args.channels)) return Status::bad_shape;
  const uint32_t low = float_bits(args.low, args.output_type), high = float_bits(args.high, args.output_type);
  if (args.output_type == FloatType::float32) return unpack_values(args, low, high, stream);
  return unpack_values(args, static_cast<uint16_t>(low), static_cast<uint16_t>(high), stream);
}

}  // namespace lowbit::cuda
