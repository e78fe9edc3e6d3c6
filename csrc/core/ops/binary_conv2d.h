// acc[n, y, x, o] = sum over taps and channels of the group of a * w, exact in int32 while taps * channels < 2^31.
//   a in {-1, +1} (sign) or {0, 1} (step), w in {-1, +1}.
//   sign: K - 2 popc(a ^ w);  step: 2 popc(a & w) - popc(a).
// A tap in the padding contributes padding_value * w: 0 leaves it out, +1 and -1 stand for that activation (step: 0 or
// +1). Then the epilogue, per output element, every float operation rounded to float32 on its own (no contraction):
//   integer    acc
//   float      value = ((scale * acc) + bias) + residual, absent terms left out, rounded once to the output type
//   bits       acc >= threshold (integer) or value >= threshold (float), with <= where flip. Two thresholds give two
//              output channels from one accumulator: o and filters + o (BinaryDuo).
//   program    the steps of core/epilogue.h, from acc rounded to float32 on; with C = filters
#pragma once

#include "core/conv_shape.h"
#include "core/epilogue.h"
#include "core/status.h"

namespace lowbit {

enum class ConvOutput : int {
  int32 = 0,
  float32 = 1,
  bfloat16 = 2,
  float16 = 3,
  bits_by_integer = 4,  // thresholds are int32 and meet the accumulator
  bits_by_float = 5,    // thresholds are float32 and meet the value
  program = 6,
};

struct BinaryConv2dArgs {
  ConvShape shape;
  Encoding encoding;
  int padding_value;      // 0, +1 or -1
  const uint64_t* input;  // [batch, height, width, groups, words_per_group], tail bits of each group 0
                          // (align_groups.h); on the CPU, of narrow groups: [batch, height, width, words_for(channels)]
  const void* weight;     // private to the level: written by binary_conv2d_block_weight of the same level
  ConvOutput output_kind;
  const float* scale;  // scale_stride = 1: [filters]; 0: one value for all; or null
  int64_t scale_stride;
  const float* bias;     // [filters] or null
  const void* residual;  // [batch, out_height, out_width, filters] of residual_type, or null
  FloatType residual_type;
  const void* threshold;    // [thresholds, filters]; int32 or float32 by output_kind
  const uint8_t* flip;      // [thresholds, filters] of 0 or 1, or null
  int64_t thresholds;       // 1 or 2
  void* output;             // [batch, out_height, out_width, filters], or words [.., words_for(thresholds * filters)]
  void* workspace;          // threads * binary_conv2d_workspace_bytes, 64-byte aligned
  EpilogueProgram program;  // of output_kind program, which reads none of what stands above from scale to output
};

LOWBIT_INLINE bool is_bits(ConvOutput kind) {
  return kind == ConvOutput::bits_by_integer || kind == ConvOutput::bits_by_float;
}

// Output channels of neighbouring blocks of 64 filters share a word, so that their work may not be cut between them.
LOWBIT_INLINE bool conv_blocks_share_words(const BinaryConv2dArgs& args) {
  const int64_t thresholds = args.output_kind == ConvOutput::program ? most_thresholds(args.program)
                             : is_bits(args.output_kind)             ? args.thresholds
                                                                     : 0;
  const bool unaligned_groups = args.shape.groups > 1 && filters_per_group(args.shape) % kWordBits != 0;
  const bool unaligned_second = thresholds == 2 && args.shape.filters % kWordBits != 0;
  return thresholds > 0 && (unaligned_groups || unaligned_second);
}

}  // namespace lowbit
