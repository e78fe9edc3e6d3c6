// output = what channel codes stand for: code >= shift ? max(0, |gamma| u + beta) : 0, without ReLU gamma xhat + beta.
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

// Rows of the workspace: value = code * scale + origin.
enum DequantizeRow : int { kScale = 0, kOrigin, kDequantizeShift, kDequantizeRows };

LOWBIT_INLINE int64_t workspace_bytes(const ChannelDequantizeArgs& args) {
  return kDequantizeRows * grid_width(args.shape) * static_cast<int64_t>(sizeof *args.grid);
}

LOWBIT_INLINE void fill_grid(const ChannelDequantizeArgs& args, int64_t column) {
  const int64_t width = grid_width(args.shape), channel = column % args.shape.channels;
  const float gamma = args.gamma[channel], beta = args.beta[channel];
  const ChannelGrid grid = channel_grid(gamma, beta, args.bits, args.span, args.relu);
  args.grid[kScale * width + column] = gamma * code_step(grid);
  args.grid[kOrigin * width + column] = gamma * code_origin(grid) + beta;
  args.grid[kDequantizeShift * width + column] = grid.shift;
}

}  // namespace lowbit
