// Reads and writes 4 or 2 bytes an element and reads an eighth of a byte: 16 bytes at a time where the addresses allow
// it, the loads of a thread's packs under way together.
#include "core/ops/masked_gradient.h"

#include "core/checks.h"
#include "cuda/platform.cuh"

namespace lowbit::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPacks = 4;  // of a thread

template <class Bits>
struct MaskedGradientKernelArgs {
  const Bits* gradient;
  int64_t count;
  const uint8_t* mask;  // bytes of its words
  Bits* output;
  bool vector;  // whether the addresses allow packs
};

// SASS of masked_gradient_kernel: LDG.E.128, STG.E.128
template <class Bits>
__global__ void __launch_bounds__(kThreads) masked_gradient_kernel(MaskedGradientKernelArgs<Bits> args) {
  using Values = Pack<Bits>;
  const int64_t block_first = int64_t{blockIdx.x} * kThreads * kPacks * Values::kCount;
  const auto first_of = [&](int pack) { return block_first + (pack * kThreads + threadIdx.x) * Values::kCount; };
  Values values[kPacks];
  uint32_t kept[kPacks];
#pragma unroll
  for (int pack = 0; pack < kPacks; ++pack) {
    const int64_t first = first_of(pack);
    if (first >= args.count) continue;
    kept[pack] = args.mask[first / 8] >> (first % 8);
    if (args.vector && first + Values::kCount <= args.count) {
      values[pack] = *reinterpret_cast<const Values*>(args.gradient + first);
    } else {
#pragma unroll
      for (int i = 0; i < Values::kCount; ++i) {
        if (first + i < args.count) values[pack].values[i] = args.gradient[first + i];
      }
    }
  }
#pragma unroll
  for (int pack = 0; pack < kPacks; ++pack) {
    const int64_t first = first_of(pack);
    if (first >= args.count) continue;
#pragma unroll
    for (int i = 0; i < Values::kCount; ++i) {
      if (!(kept[pack] >> i & 1)) values[pack].values[i] = 0;
    }
    if (args.vector && first + Values::kCount <= args.count) {
      *reinterpret_cast<Values*>(args.output + first) = values[pack];
    } else {
#pragma unroll
      for (int i = 0; i < Values::kCount; ++i) {
        if (first + i < args.count) args.output[first + i] = values[pack].values[i];
      }
    }
  }
}

template <class Bits>
Status mask_gradient(const MaskedGradientArgs& args, Stream stream) {
  const MaskedGradientKernelArgs<Bits> kernel_args{
      static_cast<const Bits*>(args.gradient), args.count, reinterpret_cast<const uint8_t*>(args.mask),
      static_cast<Bits*>(args.output), is_aligned(args.gradient, kPackBytes) && is_aligned(args.output, kPackBytes)};
  return launch(masked_gradient_kernel<Bits>,
                {blocks_for(args.count, int64_t{kThreads} * kPacks * Pack<Bits>::kCount), dim3(kThreads)}, stream,
                kernel_args);
}

}  // namespace

Status masked_gradient(const MaskedGradientArgs& args, Stream stream) noexcept {
  if (!valid(args.type)) return Status::bad_argument;
  if (!addressable(args.count)) return Status::bad_shape;
  return args.type == FloatType::float32 ? mask_gradient<uint32_t>(args, stream)
                                         : mask_gradient<uint16_t>(args, stream);
}

}  // namespace lowbit::cuda
