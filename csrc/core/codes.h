// Codes of 2, 4 or 8 bits, the lowest bits of a byte first. A row of codes is padded with zeros to whole bytes.
//
// Channel codes: the grid of a channel is fixed, because an element normalised by its channel's statistics has standard
// deviation 1. The code of x is that of u = sign(gamma) (x - mean) invstd on n = 2^bits cells over `span` standard
// deviations, with an edge where gamma xhat + beta = 0: codes from `shift` on are positive elements, exactly. Source:
// Chakrabarti and Moseley, NeurIPS 2019, section 3; the upper clamp of the shift and negative gamma are ours.
//
// Group codes: 256 neighbours share a scale and a minimum in bfloat16: an element is code * scale + minimum. The
// minimum is rounded down and the scale up, so that they cover the group.
//
// Finite stays finite: finite elements decode to finite numbers of their type.
//   Group codes: a minimum that is infinite in the type is the next bfloat16 above instead, and a scale whose last code
//     decodes to infinity the next bfloat16 below, which cuts off 2^-7 of the group's extent at most. A NaN has code 0
//     and counts for nothing else. +infinity decodes to itself; a group with -infinity decodes to that.
//   Channel codes: a cell that reaches past the type's finite numbers decodes to the last of these. Elements farther
//     from the mean than the greatest float are in the last cell on their side. A channel whose gamma or beta is not
//     finite decodes to NaN.
#pragma once

#include "core/half.h"
#include "core/layout.h"

namespace lowbit {

constexpr int64_t kGroup = 256;  // elements

LOWBIT_INLINE constexpr bool valid_bits(int bits) { return bits == 2 || bits == 4 || bits == 8; }
LOWBIT_INLINE constexpr int64_t code_bytes(int64_t count, int bits) { return ceil_div(count * bits, 8); }

// A tensor (outer, channels, spatial), or (outer, spatial, channels) where channels_last. Its rows are the runs of
// memory along the fastest of these dimensions: (outer, channels) of them, or (outer, spatial).
struct ChannelShape {
  int64_t outer, channels, spatial;
  bool channels_last;
};

LOWBIT_INLINE constexpr int64_t row_length(const ChannelShape& s) { return s.channels_last ? s.channels : s.spatial; }
LOWBIT_INLINE constexpr int64_t row_count(const ChannelShape& s) {
  return s.outer * (s.channels_last ? s.spatial : s.channels);
}

// Columns of a per-channel array in the kernels' workspace. Channels last, the channels are repeated for the pixels of
// a block: rows of few elements would leave the vectors empty. A multiple of 64, so that kernels may read whole
// vectors.
constexpr int64_t kBlock = 256;
LOWBIT_INLINE constexpr int64_t repeats(const ChannelShape& s) {
  return s.channels_last && s.channels > 0 && s.channels < kBlock ? kBlock / s.channels : 1;
}
LOWBIT_INLINE constexpr int64_t grid_width(const ChannelShape& s) { return round_up(s.channels * repeats(s), 64); }
// Pixels of a block of a channels-last tensor: as many as have codes without padding between them.
LOWBIT_INLINE constexpr int64_t block_pixels(const ChannelShape& s, int bits) {
  return s.channels * bits % 8 == 0 ? repeats(s) : 1;
}

struct ChannelGrid {
  float cells;  // n
  float edge;   // of the grid within a cell, in cells
  float shift;  // codes from here on are positive elements; 0 without ReLU
  float sign;   // of gamma, +1 for 0
  float width;  // of a cell, in standard deviations
};

LOWBIT_INLINE ChannelGrid channel_grid(float gamma, float beta, int bits, float span, bool relu) {
  constexpr float kFarthest = 1.0e6f;  // cells from the mean to the edge, past which no element is near
  const float cells = static_cast<float>(1 << bits);
  const float magnitude = gamma < 0 ? -gamma : gamma;
  float position = magnitude > 0 ? beta / magnitude * (cells / span) : 0.0f;
  position = position > -kFarthest ? position : -kFarthest;
  position = position < kFarthest ? position : kFarthest;
  const float truncated = static_cast<float>(static_cast<int32_t>(position));
  const float below = truncated > position ? truncated - 1 : truncated;
  float shift = cells / 2 - below;
  shift = shift > 1 ? shift : 1;
  shift = shift < cells - 1 ? shift : cells - 1;
  // A channel without gain is beta everywhere: all codes are positive elements, or none is.
  if (!(magnitude > 0)) shift = beta > 0 ? 0 : cells;
  return {cells, position - below, relu ? shift : 0.0f, gamma < 0 ? -1.0f : 1.0f, span / cells};
}

// xhat = (code + offset) * step = code * step + origin.
LOWBIT_INLINE float code_offset(const ChannelGrid& grid) { return 0.5f - grid.cells / 2 - grid.edge; }
LOWBIT_INLINE float code_step(const ChannelGrid& grid) { return grid.sign * grid.width; }
LOWBIT_INLINE float code_origin(const ChannelGrid& grid) { return grid.sign * (code_offset(grid) * grid.width); }

// The cell of a position in cells, 0 for NaN.
LOWBIT_INLINE float cell(float position, float last) {
  const float above = position > 0 ? position : 0.0f;
  const float within = above < last ? above : last;
  return static_cast<float>(static_cast<int32_t>(within));
}

LOWBIT_INLINE float channel_code(float x, float y, float mean, float multiplier, float offset, float shift, float last,
                                 bool relu) {
  const float code = cell((x - mean) * multiplier + offset, last);
  if (!relu) return code;
  const float positive = code > shift ? code : shift;
  const float negative = code < shift - 1 ? code : shift - 1;
  const float exact = y > 0 ? positive : negative;
  const float above = exact > 0 ? exact : 0.0f;
  return above < last ? above : last;
}

constexpr float kGreatestFloat = 0x1.fffffep127f;
constexpr uint16_t kSmallestNormal = 0x0080;  // bfloat16, and as float

// The greatest float that rounds to a finite number of the type.
LOWBIT_INLINE constexpr float finite_limit(FloatType type) {
  return type == FloatType::float32 ? kGreatestFloat : type == FloatType::bfloat16 ? 0x1.fefffep127f : 0x1.ffdffep15f;
}

// The nearest bfloat16 on one side.
LOWBIT_INLINE uint16_t bfloat16_below(float value) {
  const uint32_t bits = float_to_bits(value);
  const bool away = (bits >> 31) != 0 && (bits & 0xffffu) != 0;
  return static_cast<uint16_t>((bits >> 16) + (away ? 1 : 0));
}
LOWBIT_INLINE uint16_t bfloat16_above(float value) {  // of value >= 0; at most the greatest finite number
  const uint32_t bits = float_to_bits(value);
  const uint32_t rounded = (bits >> 16) + ((bits & 0xffffu) != 0 ? 1 : 0);
  return static_cast<uint16_t>(rounded < 0x7f7fu ? rounded : 0x7f7fu);
}

// code * scale + minimum, rounded once, for scale >= 0. The product of twice eight significant bits is exact: rounding
// it as well changes nothing but where it is infinite and the sum is not.
LOWBIT_INLINE float group_value(float code, float scale, float minimum) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(code, scale, minimum);
#elif defined(__FMA__)
  return __builtin_fmaf(code, scale, minimum);
#else
  const float product = code * scale;
  const float part = code * (scale * 0x1p-8f) + minimum * 0x1p-8f;
  return product <= kGreatestFloat ? product + minimum : part * 0x1p8f;
#endif
}

struct GroupScale {
  uint16_t scale, minimum;
  float unit;     // that elements and minimum are multiplied by: a power of two that keeps the next numbers in range
  float inverse;  // of scale * unit, 0 for 0
};

// `limit`: finite_limit of the elements' type.
LOWBIT_INLINE GroupScale group_scale(float low, float high, float last, float limit, bool positive) {
  // Nothing but NaN: 0. Of zeros of both signs either may have been found: +0.
  uint16_t minimum = positive || !(low <= high) ? uint16_t{0} : bfloat16_below(low + 0.0f);
  if (low >= -limit && bfloat16_to_float(minimum) < -limit) --minimum;
  const float base = bfloat16_to_float(minimum), extent = high - base;
  if (!(extent > 0)) return {0, minimum, 1.0f, 0.0f};
  // Differences and inverses of floats may pass the greatest float: elements are coded in a unit where they do not.
  float unit = 1.0f;
  uint16_t scale;
  if (extent > kGreatestFloat) {
    unit = 0x1p-24f;
    scale = bfloat16_above((high * unit - base * unit) / last * 0x1p24f);
  } else {
    scale = bfloat16_above(extent / last);
    if (scale < kSmallestNormal) unit = 0x1p24f;
    if (scale == 0) scale = 1;
  }
  if (high <= limit && group_value(last, bfloat16_to_float(scale), base) > limit) --scale;
  return {scale, minimum, unit, 1.0f / (bfloat16_to_float(scale) * unit)};
}

// A group's code; x and minimum are in the group's unit. `threshold` is 1/2 for the nearest, a uniform number for
// stochastic rounding. `positive`: 0 for x <= 0 and for nothing else.
LOWBIT_INLINE float group_code(float x, float minimum, float inverse, float threshold, float last, bool positive) {
  const float code = cell((x - minimum) * inverse + threshold, last);
  if (!positive) return code;
  const float least = code > 1 ? code : 1.0f;
  return x > 0 ? least : 0.0f;
}

// Stochastic rounding takes sixteen bits an element from sixteen philox blocks a group, whose counters are
// offset + 16 group + (0 to 15), counter words {low, high, 0, 0}. Element e of the group has block e % 16 and, by its
// slot e / 16, the lower half of word slot / 4 rotated right by 8 (slot % 4) bits. All sixteen bits are uniform. Slots
// of a word share bytes, once as the upper and once as the lower: half the calls of the generator, at a correlation of
// 2^-8.
constexpr int kRoundingBlocks = 16;  // a group
LOWBIT_INLINE constexpr uint32_t rounding_bits(uint32_t word, int slot) {
  const int turn = 8 * (slot % 4);
  return (turn == 0 ? word : word >> turn | word << (32 - turn)) & 0xffffu;
}
LOWBIT_INLINE float rounding_threshold(uint32_t sixteen_bits) {  // in (0, 1)
  return (static_cast<float>(static_cast<int32_t>(sixteen_bits)) + 0.5f) * (1.0f / 65536.0f);
}

}  // namespace lowbit
