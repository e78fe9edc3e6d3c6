// A group at a time: its extremes, then its codes, from the first-level cache. `Coder`, a level's, has both for whole
// groups:
//   extremes(x): of those elements that are not NaN; low > high where there is none.
//   encode(x, coding, thresholds, codes): codes, one a byte; thresholds: of each element, null for 1/2.
#pragma once

#include "cpu/group_quantize/group_quantize.h"
#include "cpu/shared/codes.h"
#include "cpu/shared/lanes_u32.h"

namespace lowbit {
namespace {

struct Extremes {
  float low, high;
};

struct GroupCoding {
  float minimum, inverse, last;
  bool positive;
};

// Thresholds of a group, core/codes.h.
inline void rounding_thresholds(uint64_t seed, uint64_t first_block, float* thresholds) {
  alignas(64) uint32_t words[kPhiloxOutputs][kRoundingBlocks];
  for (int i = 0; i < kRoundingBlocks; ++i) {
    const uint64_t block = first_block + static_cast<uint64_t>(i);
    words[0][i] = static_cast<uint32_t>(block);
    words[1][i] = static_cast<uint32_t>(block >> 32);
  }
  for (int i = 0; i < kRoundingBlocks; i += LanesU32::kLanes) {
    LanesU32 counter[kPhiloxOutputs] = {LanesU32::load(words[0] + i), LanesU32::load(words[1] + i),
                                        LanesU32::broadcast(0), LanesU32::broadcast(0)};
    philox(counter, seed);
    for (int word = 0; word < kPhiloxOutputs; ++word) counter[word].store(words[word] + i);
  }
  for (int word = 0; word < kPhiloxOutputs; ++word) {
    const auto fill = [&](auto turn) {
      const int slot = 4 * word + static_cast<int>(turn);
      for (int i = 0; i < kRoundingBlocks; ++i) {
        thresholds[slot * kRoundingBlocks + i] = rounding_threshold(rounding_bits(words[word][i], turn));
      }
    };
    fill(Known<0>{});
    fill(Known<1>{});
    fill(Known<2>{});
    fill(Known<3>{});
  }
}

// A group whose scale is known.
struct ScaledGroup {
  alignas(64) float buffer[kGroup];
  const float* x;
  int64_t count;
  GroupCoding coding;
};

template <class Coder, class Type>
inline void scale_group(const GroupQuantizeArgs& args, int64_t group, ScaledGroup& scaled, Type type) {
  const auto* input = static_cast<const typename Type::type*>(args.input) + group * kGroup;
  scaled.count = min(args.count - group * kGroup, kGroup);
  // Padded by what counts for nothing.
  scaled.x = load_block(input, scaled.count, Whole{}, scaled.buffer, type, __builtin_nanf(""));
  const float last = static_cast<float>((1 << args.bits) - 1);
  const Extremes found = Coder::extremes(scaled.x);
  const GroupScale scale = group_scale(found.low, found.high, last, finite_limit(Type::value), args.positive);
  args.scale_minimum[2 * group] = scale.scale;
  args.scale_minimum[2 * group + 1] = scale.minimum;
  scaled.coding = {bfloat16_to_float(scale.minimum) * scale.unit, scale.inverse, last, args.positive};
  if (scale.unit != 1) {
    for (int64_t i = 0; i < kGroup; ++i) scaled.buffer[i] = scaled.x[i] * scale.unit;
    scaled.x = scaled.buffer;
  }
}

// A group is encoded while the scale of the next, a chain of two divisions, is under way: 1.3 times as fast from
// memory.
template <class Coder, class Type>
inline void quantize_groups(const GroupQuantizeArgs& args, int64_t begin, int64_t end, Type type) {
  alignas(64) float thresholds[kGroup];
  alignas(64) uint8_t codes[kGroup];
  ScaledGroup scaled[2];
  if (begin < end) scale_group<Coder>(args, begin, scaled[begin % 2], type);
  for (int64_t group = begin; group < end; ++group) {
    if (group + 1 < end) scale_group<Coder>(args, group + 1, scaled[(group + 1) % 2], type);
    const ScaledGroup& now = scaled[group % 2];
    if (args.stochastic) {
      rounding_thresholds(args.seed, args.offset + static_cast<uint64_t>(group * kRoundingBlocks), thresholds);
    }
    Coder::encode(now.x, now.coding, args.stochastic ? thresholds : nullptr, codes);
    pack_block(codes, now.count, Whole{}, args.bits, args.codes + group * kGroup * args.bits / 8);
  }
}

template <class Coder>
inline void run_group_quantize(const GroupQuantizeArgs& args, int64_t begin, int64_t end) {
  for_type(args.type, [&](auto type) { quantize_groups<Coder>(args, begin, end, type); });
}

}  // namespace
}  // namespace lowbit
