// codes of x (core/codes.h, channel codes), and y = relu(y) in place, where y is gamma xhat + beta as the caller's
// batch norm rounded it: its sign is what the codes keep exactly. Without ReLU y is not touched.
#pragma once

#include "core/codes.h"
#include "core/status.h"

namespace lowbit {

struct BatchNormReluQuantizeArgs {
  const void* input;  // of type
  FloatType type;
  ChannelShape shape;
  const float *mean, *invstd, *gamma, *beta;  // [channels]
  int bits;
  float span;
  bool relu;
  void* output;    // y, of type; null without ReLU
  uint8_t* codes;  // [row_count, code_bytes(row_length, bits)]
  float* grid;     // workspace [kQuantizeRows, grid_width]
};

// Rows of the workspace: cell = (x - mean) * multiplier + offset.
enum QuantizeRow : int { kCenter = 0, kMultiplier, kOffset, kQuantizeShift, kQuantizeRows };

LOWBIT_INLINE int64_t workspace_bytes(const BatchNormReluQuantizeArgs& args) {
  return kQuantizeRows * grid_width(args.shape) * static_cast<int64_t>(sizeof *args.grid);
}

LOWBIT_INLINE void fill_grid(const BatchNormReluQuantizeArgs& args, int64_t column) {
  const int64_t width = grid_width(args.shape), channel = column % args.shape.channels;
  const ChannelGrid grid = channel_grid(args.gamma[channel], args.beta[channel], args.bits, args.span, args.relu);
  args.grid[kCenter * width + column] = args.mean[channel];
  args.grid[kMultiplier * width + column] = grid.sign * args.invstd[channel] * (grid.cells / args.span);
  args.grid[kOffset * width + column] = grid.cells / 2 + grid.edge;
  args.grid[kQuantizeShift * width + column] = grid.shift;
}

}  // namespace lowbit
