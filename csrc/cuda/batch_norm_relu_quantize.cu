// Reads x, reads and writes y, 4 or 2 bytes an element each, and writes an eighth of `bits` bytes: 16 bytes at a time
// where rows and addresses allow it, a thread's loads under way together.
#include "core/ops/batch_norm_relu_quantize.h"

#include "core/checks.h"
#include "cuda/channel_codes.cuh"

namespace lowbit::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPacks = 2;  // of a thread, of x and of y

struct QuantizeKernelArgs {
  BatchNormReluQuantizeArgs op;
  ChannelPacks packs;
};

// SASS of batch_norm_relu_quantize_kernel: LDG.E.128, STG.E.128
template <FloatType kType>
__global__ void __launch_bounds__(kThreads) batch_norm_relu_quantize_kernel(QuantizeKernelArgs args) {
  constexpr int kCount = Values<kType>::kCount;
  const auto* input = static_cast<const BitsOf<kType>*>(args.op.input);
  auto* output = static_cast<BitsOf<kType>*>(args.op.output);
  const int bits = args.op.bits;
  const bool relu = args.op.relu;
  const float last = static_cast<float>((1 << bits) - 1);
  PackPlace places[kPacks];
  Values<kType> x[kPacks], y[kPacks];
#pragma unroll
  for (int pack = 0; pack < kPacks; ++pack) {
    const int64_t index = (int64_t{blockIdx.x} * kPacks + pack) * kThreads + threadIdx.x;
    const PackPlace place = place_of<kCount>(args.packs, bits, index);
    places[pack] = place;
    x[pack] = load_values<kType>(input + place.element, place.count, place.whole);
    if (relu) y[pack] = load_values<kType>(output + place.element, place.count, place.whole);
  }
#pragma unroll
  for (int pack = 0; pack < kPacks; ++pack) {
    const PackPlace place = places[pack];
    if (place.count == 0) continue;
    const auto parameter = [&](int row) { return load_parameter<kCount>(args.op.grid, row, args.packs, place); };
    const auto mean = parameter(kCenter), multiplier = parameter(kMultiplier), offset = parameter(kOffset);
    const auto shift = parameter(kQuantizeShift);
    PackCodes<kCount> codes;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float own = relu ? to_float<kType>(y[pack].values[i]) : 0.0f;
      const float code = channel_code(to_float<kType>(x[pack].values[i]), own, mean.values[i], multiplier.values[i],
                                      offset.values[i], shift.values[i], last, relu);
      if (i < place.count) codes.put(i, bits, static_cast<uint32_t>(static_cast<int32_t>(code)));
      if (own <= 0) y[pack].values[i] = 0;
    }
    if (relu) store_values<kType>(output + place.element, y[pack], place.count, place.whole);
    store_codes(args.op.codes + place.byte, codes, bits, place.count, place.whole);
  }
}

template <FloatType kType>
Status quantize(const BatchNormReluQuantizeArgs& args, Stream stream) {
  const bool aligned = are_aligned<kType>(args.input, args.codes, args.bits) && is_aligned(args.output, kPackBytes) &&
                       is_aligned(args.grid, kPackBytes);
  const QuantizeKernelArgs kernel_args{args, make_channel_packs<kType>(args.shape, args.bits, aligned)};
  return launch(batch_norm_relu_quantize_kernel<kType>,
                {blocks_for(kernel_args.packs.count, kThreads * kPacks), dim3(kThreads)}, stream, kernel_args);
}

}  // namespace

int64_t batch_norm_relu_quantize_workspace_bytes(const BatchNormReluQuantizeArgs& args) noexcept {
  return workspace_bytes(args);
}

Status batch_norm_relu_quantize(const BatchNormReluQuantizeArgs& args, int64_t workspace_bytes,
                                Stream stream) noexcept {
  Status status = check_channel_codes(args, workspace_bytes);
  if (status != Status::ok) return status;
  if (args.shape.outer == 0 || args.shape.channels == 0 || args.shape.spatial == 0) return Status::ok;
  status = launch_fill_grid(args, stream);
  if (status != Status::ok) return status;
  return for_type(args.type, [&](auto type) { return quantize<type.value>(args, stream); });
}

}  // namespace lowbit::cuda
