// Reads and writes 4 or 2 bytes an element and writes an eighth of a byte of mask. A warp works 1024 neighbours in
// rounds of 16 bytes a lane, all loads under way before the first is needed; the lanes that hold the elements of one
// 32-bit half of a mask word put their bits together by shuffles, and every lane stores one half.
#include "core/ops/quantized_activation.h"

#include "core/checks.h"
#include "cuda/platform.cuh"

namespace lowbit::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kHalfBits = 32;
constexpr int64_t kWarpElements = kWarp * kHalfBits;
constexpr int64_t kBlockElements = kThreads / kWarp * kWarpElements;

template <class Key, class Bits>
struct ActivationKernelArgs {
  const Bits* input;
  int64_t count;
  ActivationConstants<Key, Bits> constants;
  Bits* output;
  uint32_t* mask;  // halves of its words, or null
  bool vector;     // whether the addresses allow packs
};

// SASS of quantized_activation_kernel: LDG.E.128, STG.E.128
template <class Key, class Bits>
__global__ void __launch_bounds__(kThreads) quantized_activation_kernel(ActivationKernelArgs<Key, Bits> args) {
  using Values = Pack<Bits>;
  constexpr int kLanes = kHalfBits / Values::kCount;  // that hold one half
  constexpr int kRounds = kLanes;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t warp_first = int64_t{blockIdx.x} * kBlockElements + threadIdx.x / kWarp * kWarpElements;
  const int64_t left = args.count - warp_first;
  const int count = static_cast<int>(left < kWarpElements ? (left > 0 ? left : 0) : kWarpElements);  // of this warp
  const Bits* input = args.input + warp_first;
  Bits* output = args.output + warp_first;
  Values values[kRounds];
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int first = (round * kWarp + lane) * Values::kCount;
    if (args.vector && first + Values::kCount <= count) {
      values[round] = *reinterpret_cast<const Values*>(input + first);
    } else {
#pragma unroll
      for (int i = 0; i < Values::kCount; ++i) values[round].values[i] = first + i < count ? input[first + i] : 0;
    }
  }
  uint32_t mask = 0;
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int first = (round * kWarp + lane) * Values::kCount;
    uint32_t inside = 0;
#pragma unroll
    for (int i = 0; i < Values::kCount; ++i) {
      const Key key = ordered_key(values[round].values[i]);
      values[round].values[i] = level_of(key, args.constants);
      if (in_interval(key, args.constants) && first + i < count) inside |= 1u << i;
    }
    if (args.vector && first + Values::kCount <= count) {
      store_pack(output + first, values[round]);
    } else {
#pragma unroll
      for (int i = 0; i < Values::kCount; ++i) {
        if (first + i < count) output[first + i] = values[round].values[i];
      }
    }
    if (args.mask) {
      inside = join<kLanes>(inside << (lane % kLanes * Values::kCount));
      if (round == lane % kLanes) mask = inside;  // the half that this lane stores
    }
  }
  // Halves of a round are kWarp / kLanes neighbours. A mask has whole words, the last one's upper half too.
  const int64_t half = warp_first / kHalfBits + lane % kLanes * (kWarp / kLanes) + lane / kLanes;
  if (args.mask && half < 2 * words_for(args.count)) args.mask[half] = mask;
}

template <class Key, class Bits>
Status activate(const QuantizedActivationArgs& args, Stream stream) {
  const ActivationKernelArgs<Key, Bits> kernel_args{
      static_cast<const Bits*>(args.input),
      args.count,
      activation_constants<Key, Bits>(args),
      static_cast<Bits*>(args.output),
      reinterpret_cast<uint32_t*>(args.mask),
      is_aligned(args.input, kPackBytes) && is_aligned(args.output, kPackBytes)};
  return launch(quantized_activation_kernel<Key, Bits>, {blocks_for(args.count, kBlockElements), dim3(kThreads)},
                stream, kernel_args);
}

}  // namespace

Status quantized_activation(const QuantizedActivationArgs& args, Stream stream) noexcept {
  if (!valid(args.type)) return Status::bad_argument;
  if (!addressable(args.count)) return Status::bad_shape;
  return args.type == FloatType::float32 ? activate<int32_t, uint32_t>(args, stream)
                                         : activate<int16_t, uint16_t>(args, stream);
}

}  // namespace lowbit::cuda
