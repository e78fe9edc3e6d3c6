// Reads 4 or 2 bytes an element and writes an eighth of `bits`: 16 bytes at a time where the addresses allow it. A
// quarter of a warp makes a group, all its loads under way together: extremes by shuffles, then the codes from
// registers. Stochastic rounding costs about 40 multiplications of 32 bits for sixteen elements: a lane makes two of
// the group's philox blocks, and the lanes exchange them through shared memory.
//
// Instructions of a thread, 32 elements at 4 bits, on sm_90a, and the share of issue slots (132 multiprocessors, 1.75
// GHz) that they take at 3.0 TB/s; before, with 16 elements a thread, 79 and 140 %, stochastic about 101 and 165 %:
//              bytes    nearest     stochastic
//   float32    144.5    459, 32 %   551, 39 %
//   16 bits     80.5    476, 60 %   567, 71 %
// About 190 of them are codes (6 an element), 64 extremes, 80 the group's scale, 90 philox and thresholds.
#include "core/ops/group_quantize.h"

#include "core/checks.h"
#include "core/philox.h"
#include "cuda/codes.cuh"

namespace lowbit::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kLanes = kWarp / 4;  // of a group
constexpr int kGroups = kThreads / kLanes;
constexpr int kBlocksOfLane = kRoundingBlocks / kLanes;

struct QuantizeKernelArgs {
  GroupQuantizeArgs op;
  int64_t groups;
  int64_t whole_groups;  // the first of them, where the addresses allow whole packs
  uint32_t last;         // code
  uint32_t places[4];    // what the codes of four neighbours are multiplied by, to be one number
};

struct Shared {
  // [group][word of a block][block]; the padding keeps neighbouring groups in different banks.
  struct {
    uint32_t words[kPhiloxOutputs][kRoundingBlocks];
    uint32_t padding[kRoundingBlocks / 2];
  } groups[kGroups];
};

using RoundingWords = uint32_t[kPhiloxOutputs][kRoundingBlocks];

// The philox blocks of a group, for its lanes.
__device__ inline void draw_blocks(const GroupQuantizeArgs& args, int64_t group, int lane, RoundingWords& words) {
#pragma unroll
  for (int i = 0; i < kBlocksOfLane; ++i) {
    const int of_group = i * kLanes + lane;
    const uint64_t block = args.offset + static_cast<uint64_t>(group * kRoundingBlocks + of_group);
    OneLane counter[kPhiloxOutputs] = {{static_cast<uint32_t>(block)}, {static_cast<uint32_t>(block >> 32)}, {0}, {0}};
    philox(counter, args.seed);
#pragma unroll
    for (int word = 0; word < kPhiloxOutputs; ++word) words[word][of_group] = counter[word].value;
  }
  __syncwarp();
}

// Which bytes of a word and of 0x4b000000 are 2^23 plus the sixteen bits of a slot, as a float's bits.
__device__ inline unsigned bytes_of_slot(unsigned slot) { return 0x7400u | (slot + 1) % 4 << 4 | slot % 4; }

// rounding_threshold(rounding_bits(word, slot)): nothing is rounded.
__device__ inline float threshold_of(uint32_t word, unsigned bytes) {
  return __fmaf_rn(bits_to_float(__byte_perm(word, 0x4b000000u, bytes)), 0x1p-16f, -(128 - 0x1p-17f));
}

// group_code of four neighbours, one after the other in a word; 6 instructions each. The conversion to an integer drops
// what is negative or NaN. Where codes are positive, an element above 0 has at least 1.
template <bool kPositive>
__device__ inline uint32_t four_codes(const float* x, const float (&thresholds)[4], float minimum, float inverse,
                                      const QuantizeKernelArgs& args) {
  uint32_t codes = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t code = whole_part((x[i] - minimum) * inverse + thresholds[i]);
    code = code < args.last ? code : args.last;
    if (kPositive) code = x[i] > 0 ? (code > 1 ? code : 1) : 0;
    codes += code * args.places[i];
  }
  return codes;
}

// The codes of a lane's packs of a whole group, the number of bits told apart once for all.
template <FloatType kType, int kPacks>
__device__ inline void store_lane(uint8_t* to, const PackCodes<Values<kType>::kCount> (&codes)[kPacks], int bits) {
  const auto store = [&](auto constant) {
#pragma unroll
    for (int pack = 0; pack < kPacks; ++pack) {
      constexpr int kStep = kLanes * Values<kType>::kCount * constant.value / 8;
      store_codes(to + pack * kStep, codes[pack], constant.value, Values<kType>::kCount, true);
    }
  };
  if (bits == 2) store(std::integral_constant<int, 2>{});
  if (bits == 4) store(std::integral_constant<int, 4>{});
  if (bits == 8) store(std::integral_constant<int, 8>{});
}

// Count of group_quantize_kernel<0>, nearest: 8 LDG.E.128, 8 STG.E.U16, 2 MUFU.RCP; 144.5 bytes
// Count of group_quantize_kernel<1>, nearest: 4 LDG.E.128, 4 STG.E, 2 MUFU.RCP; 80.5 bytes
// Count of group_quantize_kernel<0>, stochastic: 8 LDG.E.128, 8 STG.E.U16, 2 MUFU.RCP, 4 LDS.128; 144.5 bytes
// Count of group_quantize_kernel<1>, stochastic: 4 LDG.E.128, 4 STG.E, 2 MUFU.RCP, 8 LDS.128; 80.5 bytes
// SASS of group_quantize_kernel: LDG.E.128
template <FloatType kType>
__global__ void __launch_bounds__(kThreads) group_quantize_kernel(QuantizeKernelArgs args) {
  constexpr int kCount = Values<kType>::kCount;
  constexpr int kPacks = static_cast<int>(kGroup) / kLanes / kCount;  // of a lane
  constexpr BitsOf<kType> kNan = kType == FloatType::float32   ? static_cast<BitsOf<kType>>(0x7fc00000u)
                                 : kType == FloatType::float16 ? 0x7e00
                                                               : 0x7fc0;  // counts for nothing and has code 0
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int64_t group = int64_t{blockIdx.x} * kGroups + threadIdx.x / kLanes;
  const auto* input = static_cast<const BitsOf<kType>*>(args.op.input) + group * kGroup + lane * kCount;
  const int bits = args.op.bits;
  const bool whole = group < args.whole_groups;
  const auto left = [&] {
    return static_cast<int>(max(min(args.op.count - group * kGroup, kGroup), 0)) - lane * kCount;
  };
  Pack<uint32_t> values[kPacks];
  if (whole) {
#pragma unroll
    for (int pack = 0; pack < kPacks; ++pack) {
      values[pack] = *reinterpret_cast<const Pack<uint32_t>*>(input + pack * kLanes * kCount);
    }
  } else {
#pragma unroll
    for (int pack = 0; pack < kPacks; ++pack) {
      const int first = pack * kLanes * kCount;
      const auto loaded = load_values<kType>(input + first, left() - first, false, kNan);
      memcpy(&values[pack], &loaded, sizeof loaded);
    }
  }
  auto& words = shared_memory<Shared>().groups[threadIdx.x / kLanes].words;
  if (args.op.stochastic) draw_blocks(args.op, group, lane, words);
  float x[kPacks][kCount];
  float low = __builtin_inff(), high = -__builtin_inff();
#pragma unroll
  for (int pack = 0; pack < kPacks; ++pack) {
    to_floats<kType>(values[pack], x[pack]);
    // bfloat16 and float16 are otherwise expanded once more for the codes: 32 instructions.
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      x[pack][i] = keep(x[pack][i]);
      low = least_of(low, x[pack][i]);
      high = greatest_of(high, x[pack][i]);
    }
  }
#pragma unroll
  for (int lanes = 1; lanes < kLanes; lanes *= 2) {
    low = least_of(low, __shfl_xor_sync(kAllLanes, low, lanes));
    high = greatest_of(high, __shfl_xor_sync(kAllLanes, high, lanes));
  }
  if (group >= args.groups) return;
  const GroupScale scale = group_scale(low, high, static_cast<float>(args.last), finite_limit(kType), args.op.positive);
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
  constexpr int kSlots = kLanes * kCount / kRoundingBlocks;  // of the lanes' packs, one of each
  static_assert(kPhiloxOutputs % kSlots == 0);
  const int of_lane = lane * kCount / kRoundingBlocks;
  const auto make_codes = [&](auto positive, auto stochastic) {
#pragma unroll
    for (int four = 0; four < kPacks * kCount / 4; ++four) {
      const int pack = four * 4 / kCount, within = four * 4 % kCount;
      float thresholds[4] = {0.5f, 0.5f, 0.5f, 0.5f};
      if (stochastic.value) {
        const unsigned bytes = bytes_of_slot(static_cast<unsigned>(pack * kSlots % 4 + of_lane));
        const uint32_t* const from = &words[pack * kSlots / 4][lane * kCount % kRoundingBlocks + within];
        const auto draws = *reinterpret_cast<const Pack<uint32_t>*>(from);
#pragma unroll
        for (int i = 0; i < 4; ++i) thresholds[i] = threshold_of(draws.values[i], bytes);
      }
      codes[pack].fours[within / 4] =
          four_codes<positive.value>(&x[pack][within], thresholds, minimum, scale.inverse, args);
    }
  };
  using Yes = std::true_type;
  using No = std::false_type;
  if (args.op.stochastic) {
    args.op.positive ? make_codes(Yes{}, Yes{}) : make_codes(No{}, Yes{});
  } else {
    args.op.positive ? make_codes(Yes{}, No{}) : make_codes(No{}, No{});
  }
  uint8_t* const to = args.op.codes + group * (kGroup / 8) * bits +
                      static_cast<unsigned>(lane * kCount) * static_cast<unsigned>(bits) / 8;
  if (whole) return store_lane<kType>(to, codes, bits);
#pragma unroll 1
  for (int pack = 0; pack < kPacks; ++pack) {
    const int count = left() - pack * kLanes * kCount;
    store_codes(to + pack * kLanes * kCount * bits / 8, codes[pack], bits, count < kCount ? count : kCount, false);
  }
}

template <FloatType kType>
Status quantize(const GroupQuantizeArgs& args, Stream stream) {
  const bool aligned = are_aligned<kType>(args.input, args.codes, args.bits);
  QuantizeKernelArgs kernel_args{
      args, ceil_div(args.count, kGroup), aligned ? args.count / kGroup : 0, (1u << args.bits) - 1, {}};
  for (int i = 0; i < 4; ++i) kernel_args.places[i] = 1u << (i * args.bits);
  return launch(group_quantize_kernel<kType>,
                {blocks_for(args.count, kGroups * kGroup), dim3(kThreads), args.stochastic ? sizeof(Shared) : 0},
                stream, kernel_args);
}

}  // namespace

Status group_quantize(const GroupQuantizeArgs& args, Stream stream) noexcept {
  if (!valid_bits(args.bits) || !valid(args.type)) return Status::bad_argument;
  if (!addressable(args.count)) return Status::bad_shape;
  return for_type(args.type, [&](auto type) { return quantize<type.value>(args, stream); });
}

}  // namespace lowbit::cuda
