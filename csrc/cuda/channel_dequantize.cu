// Reads an eighth of `bits` bytes an element and writes 4 or 2: 16 bytes at a time where rows and addresses allow it,
// the loads of a thread's packs under way together.
#include "core/ops/channel_dequantize.h"

#include "core/checks.h"
#include "cuda/channel_codes.cuh"

namespace lowbit::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPacks = 4;  // of a thread

struct DequantizeKernelArgs {
  ChannelDequantizeArgs op;
  ChannelPacks packs;
  float floor;  // of the values
};

// SASS of channel_dequantize_kernel: STG.E.128
template <FloatType kType>
__global__ void __launch_bounds__(kThreads) channel_dequantize_kernel(DequantizeKernelArgs args) {
  constexpr int kCount = Values<kType>::kCount;
  auto* output = static_cast<BitsOf<kType>*>(args.op.output);
  const int bits = args.op.bits;
  PackPlace places[kPacks];
  PackCodes<kCount> codes[kPacks];
#pragma unroll
  for (int pack = 0; pack < kPacks; ++pack) {
    const int64_t index = (int64_t{blockIdx.x} * kPacks + pack) * kThreads + threadIdx.x;
    const PackPlace place = place_of<kCount>(args.packs, bits, index);
    places[pack] = place;
    codes[pack] = load_codes<kCount>(args.op.codes + place.byte, bits, place.count, place.whole);
  }
#pragma unroll
  for (int pack = 0; pack < kPacks; ++pack) {
    const PackPlace place = places[pack];
    if (place.count == 0) continue;
    const auto parameter = [&](int row) { return load_parameter<kCount>(args.op.grid, row, args.packs, place); };
    const auto offset = parameter(kCodeOffset), scale = parameter(kScale), beta = parameter(kBeta);
    const auto shift = parameter(kDequantizeShift);
    Values<kType> values;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float code = static_cast<float>(codes[pack].get(i, bits));
      values.values[i] = from_float<kType>(channel_value(code, offset.values[i], scale.values[i], beta.values[i],
                                                         shift.values[i], args.floor, finite_limit(kType)));
    }
    store_values<kType>(output + place.element, values, place.count, place.whole);
  }
}

template <FloatType kType>
Status dequantize(const ChannelDequantizeArgs& args, Stream stream) {
  const bool aligned = are_aligned<kType>(args.output, args.codes, args.bits) && is_aligned(args.grid, kPackBytes);
  const DequantizeKernelArgs kernel_args{args, make_channel_packs<kType>(args.shape, args.bits, aligned),
                                         args.relu ? 0.0f : -finite_limit(kType)};
  return launch(channel_dequantize_kernel<kType>,
                {blocks_for(kernel_args.packs.count, kThreads * kPacks), dim3(kThreads)}, stream, kernel_args);
}

}  // namespace

int64_t channel_dequantize_workspace_bytes(const ChannelDequantizeArgs& args) noexcept { return workspace_bytes(args); }

Status channel_dequantize(const ChannelDequantizeArgs& args, int64_t workspace_bytes, Stream stream) noexcept {
  Status status = check_channel_codes(args, workspace_bytes);
  if (status != Status::ok) return status;
  if (args.shape.outer == 0 || args.shape.channels == 0 || args.shape.spatial == 0) return Status::ok;
  status = launch_fill_grid(args, stream);
  if (status != Status::ok) return status;
  return for_type(args.type, [&](auto type) { return dequantize<type.value>(args, stream); });
}

}  // namespace lowbit::cuda
