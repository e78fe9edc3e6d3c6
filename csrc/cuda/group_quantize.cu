// Reads 4 or 2 bytes an element and writes an eighth of `bits`: 16 bytes at a time where the addresses allow it. Half a
// warp makes a group, all its loads under way together: extremes by shuffles, then the codes from registers. Stochastic
// rounding costs about 40 multiplications of 32 bits for sixteen elements: a lane makes one of the group's philox
// blocks, and the lanes exchange them through shared memory.
#include "core/ops/group_quantize.h"

#include "core/checks.h"
#include "core/philox.h"
#include "cuda/codes.cuh"

namespace lowbit::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kLanes = kWarp / 2;  // of a group
constexpr int kGroups = kThreads / kLanes;
static_assert(kLanes == kRoundingBlocks, "a lane makes a block");

struct QuantizeKernelArgs {
  GroupQuantizeArgs op;
  bool vector;  // whether the addresses allow whole packs
};

struct Shared {
  // [group][word of a block][block]; the padding keeps two groups in different banks.
  struct {
    uint32_t words[kPhiloxOutputs][kRoundingBlocks];
    uint32_t padding[kRoundingBlocks];
  } groups[kGroups];
};

// SASS of group_quantize_kernel: LDG.E.128
template <FloatType kType>
__global__ void __launch_bounds__(kThreads) group_quantize_kernel(QuantizeKernelArgs args) {
  constexpr int kCount = Values<kType>::kCount;
  constexpr int kPacks = static_cast<int>(kGroup) / kLanes / kCount;  // of a lane
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int64_t group = int64_t{blockIdx.x} * kGroups + threadIdx.x / kLanes;
  const auto* input = static_cast<const BitsOf<kType>*>(args.op.input) + group * kGroup;
  const int bits = args.op.bits;
  const int64_t of_all = args.op.count - group * kGroup;
  const int left = static_cast<int>(of_all < kGroup ? (of_all > 0 ? of_all : 0) : kGroup);
  const auto first_of = [&](int pack) { return (pack * kLanes + lane) * kCount; };  // in the group
  const auto is_whole = [&](int first) { return args.vector && first + kCount <= left; };
  Values<kType> values[kPacks];
#pragma unroll
  for (int pack = 0; pack < kPacks; ++pack) {
    const int first = first_of(pack);
    values[pack] = load_values<kType>(input + first, left - first, is_whole(first));
  }
  auto& words = shared_memory<Shared>().groups[threadIdx.x / kLanes].words;
  if (args.op.stochastic) {
    const uint64_t block = args.op.offset + static_cast<uint64_t>(group * kRoundingBlocks + lane);
    OneLane counter[kPhiloxOutputs] = {{static_cast<uint32_t>(block)}, {static_cast<uint32_t>(block >> 32)}, {0}, {0}};
    philox(counter, args.op.seed);
#pragma unroll
    for (int i = 0; i < kPhiloxOutputs; ++i) words[i][lane] = counter[i].value;
    __syncwarp();
  }
  float x[kPacks][kCount];  // NaN past the end, which counts for nothing and has code 0
  float low = __builtin_inff(), high = -__builtin_inff();
#pragma unroll
  for (int pack = 0; pack < kPacks; ++pack) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float value = to_float<kType>(values[pack].values[i]);
      x[pack][i] = first_of(pack) + i < left ? value : __builtin_nanf("");
      low = x[pack][i] < low ? x[pack][i] : low;
      high = x[pack][i] > high ? x[pack][i] : high;
    }
  }
#pragma unroll
  for (int lanes = 1; lanes < kLanes; lanes *= 2) {
    const float other_low = __shfl_xor_sync(kAllLanes, low, lanes),
                other_high = __shfl_xor_sync(kAllLanes, high, lanes);
    low = other_low < low ? other_low : low;
    high = other_high > high ? other_high : high;
  }
  if (left == 0) return;
  const float last = static_cast<float>((1 << bits) - 1);
  const GroupScale scale = group_scale(low, high, last, finite_limit(kType), args.op.positive);
  const float minimum = bfloat16_to_float(scale.minimum) * scale.unit;
  if (scale.unit != 1) {
#pragma unroll
    for (int i = 0; i < kPacks * kCount; ++i) x[i / kCount][i % kCount] *= scale.unit;
  }
  if (lane == 0) {
    args.op.scale_minimum[2 * group] = scale.scale;
    args.op.scale_minimum[2 * group + 1] = scale.minimum;
  }
  PackCodes<kCount> codes[kPacks];
#pragma unroll
  for (int pack = 0; pack < kPacks; ++pack) {
    const int first = first_of(pack), slot = first / kRoundingBlocks;
    float thresholds[kCount];
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      Pack<uint32_t> four{};
      if (args.op.stochastic)
        four = *reinterpret_cast<const Pack<uint32_t>*>(&words[slot / 4][first % kRoundingBlocks + i]);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float threshold = rounding_threshold(rounding_bits(four.values[j], slot));
        thresholds[i + j] = args.op.stochastic ? threshold : 0.5f;
      }
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float code = group_code(x[pack][i], minimum, scale.inverse, thresholds[i], last, args.op.positive);
      codes[pack].put(i, bits, static_cast<uint32_t>(static_cast<int32_t>(code)));
    }
  }
#pragma unroll
  for (int pack = 0; pack < kPacks; ++pack) {
    const int first = first_of(pack);
    const int count = left - first < kCount ? left - first : kCount;
    store_codes(args.op.codes + (group * kGroup + first) * bits / 8, codes[pack], bits, count, is_whole(first));
  }
}

template <FloatType kType>
Status quantize(const GroupQuantizeArgs& args, Stream stream) {
  return launch(group_quantize_kernel<kType>,
                {blocks_for(args.count, kGroups * kGroup), dim3(kThreads), args.stochastic ? sizeof(Shared) : 0},
                stream, QuantizeKernelArgs{args, are_aligned<kType>(args.input, args.codes, args.bits)});
}

}  // namespace

Status group_quantize(const GroupQuantizeArgs& args, Stream stream) noexcept {
  if (!valid_bits(args.bits) || !valid(args.type)) return Status::bad_argument;
  if (!addressable(args.count)) return Status::bad_shape;
  return for_type(args.type, [&](auto type) { return quantize<type.value>(args, stream); });
}

}  // namespace lowbit::cuda
