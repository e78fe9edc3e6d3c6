// output = what channel codes stand for: code >= shift ? max(0, |gamma| u + beta) : 0, without ReLU |gamma| u + beta,
// at most the type's greatest finite number on either side.
#pragma once

#include "core/codes.h"
#include "core/status.h"

namespace lowbit {

struct ChannelDequantizeArgs {
  const uint8_t* codes;
  ChannelShape shape;
  const float *gamma, *beta;  // [channels]
  int bits;
  float span;
  bool relu;
  void* output;  // of type
  FloatType type;
  float* grid;  // workspace [kDequantizeRows, grid_width]
};

// Rows of the workspace: value = (code + offset) * scale + beta.
enum DequantizeRow : int { kCodeOffset = 0, kScale, kBeta, kDequantizeShift, kDequantizeRows };

LOWBIT_INLINE int64_t workspace_bytes(const ChannelDequantizeArgs& args) {
  return kDequantizeRows * grid_width(args.shape) * static_cast<int64_t>(sizeof *args.grid);
}

LOWBIT_INLINE void fill_grid(const ChannelDequantizeArgs& args, int64_t column) {
  const int64_t width = grid_width(args.shape), channel = column % args.shape.channels;
  const float gamma = args.gamma[channel], beta = args.beta[channel];
  const ChannelGrid grid = channel_grid(gamma, beta, args.bits, args.span, args.relu);
  const bool finite = gamma - gamma == 0 && beta - beta == 0;
  const float scale = gamma * code_step(grid), within = scale < kGreatestFloat ? scale : kGreatestFloat;
  args.grid[kCodeOffset * width + column] = code_offset(grid);
  args.grid[kScale * width + column] = finite ? within : 0.0f;
  args.grid[kBeta * width + column] = finite ? beta : __builtin_nanf("");
  args.grid[kDequantizeShift * width + column] = finite ? grid.shift : 0.0f;
}

// Of one element; NaN stays NaN. floor: 0 with ReLU, otherwise -ceiling; ceiling: finite_limit of the type.
LOWBIT_INLINE float channel_value(float code, float offset, float scale, float beta, float shift, float floor,
                                  float ceiling) {
  const float value = (code + offset) * scale + beta;
  const float above = value < floor ? floor : value;
  const float within = above > ceiling ? ceiling : above;
  return code >= shift ? within : 0.0f;
}

}  // namespace lowbit
