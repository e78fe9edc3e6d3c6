// Reads an eighth of `bits` bytes an element and writes 4 or 2: 16 bytes at a time where the addresses allow it, the
// loads of a thread's packs under way together. Scale and minimum of a group are read by neighbours at the same time.
#include "core/ops/group_dequantize.h"

#include "core/checks.h"
#include "cuda/codes.cuh"

namespace lowbit::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPacks = 4;  // of a thread

struct DequantizeKernelArgs {
  GroupDequantizeArgs op;
  bool vector;  // whether the addresses allow whole packs
};

// SASS of group_dequantize_kernel: STG.E.128
template <FloatType kType>
__global__ void __launch_bounds__(kThreads) group_dequantize_kernel(DequantizeKernelArgs args) {
  constexpr int kCount = Values<kType>::kCount;
  auto* output = static_cast<BitsOf<kType>*>(args.op.output);
  const int bits = args.op.bits;
  const auto first_of = [&](int pack) {
    return ((int64_t{blockIdx.x} * kPacks + pack) * kThreads + threadIdx.x) * kCount;
  };
  const auto count_of = [&](int64_t first) {
    const int64_t left = args.op.count - first;
    return static_cast<int>(left < kCount ? (left > 0 ? left : 0) : kCount);
  };
  PackCodes<kCount> codes[kPacks];
  uint16_t scale[kPacks], minimum[kPacks];
#pragma unroll
  for (int pack = 0; pack < kPacks; ++pack) {
    const int64_t first = first_of(pack), group = first / kGroup;
    const int count = count_of(first);
    codes[pack] = load_codes<kCount>(args.op.codes + first * bits / 8, bits, count, args.vector && count == kCount);
    scale[pack] = count > 0 ? args.op.scale_minimum[2 * group] : 0;
    minimum[pack] = count > 0 ? args.op.scale_minimum[2 * group + 1] : 0;
  }
#pragma unroll
  for (int pack = 0; pack < kPacks; ++pack) {
    const int64_t first = first_of(pack);
    const int count = count_of(first);
    Values<kType> values;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float code = static_cast<float>(codes[pack].get(i, bits));
      values.values[i] =
          from_float<kType>(group_value(code, bfloat16_to_float(scale[pack]), bfloat16_to_float(minimum[pack])));
    }
    store_values<kType>(output + first, values, count, args.vector && count == kCount);
  }
}

template <FloatType kType>
Status dequantize(const GroupDequantizeArgs& args, Stream stream) {
  return launch(group_dequantize_kernel<kType>,
                {blocks_for(args.count, int64_t{kThreads} * kPacks * Values<kType>::kCount), dim3(kThreads)}, stream,
                DequantizeKernelArgs{args, are_aligned<kType>(args.output, args.codes, args.bits)});
}

}  // namespace

Status group_dequantize(const GroupDequantizeArgs& args, Stream stream) noexcept {
  if (!valid_bits(args.bits) || !valid(args.type)) return Status::bad_argument;
  if (!addressable(args.count)) return Status::bad_shape;
  return for_type(args.type, [&](auto type) { return dequantize<type.value>(args, stream); });
}

}  // namespace lowbit::cuda
