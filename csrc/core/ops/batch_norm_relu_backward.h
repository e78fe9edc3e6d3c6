// Backward of relu(batch_norm(x)) from channel codes: with g = code >= shift ? grad : 0,
//   grad_beta = sum g, grad_gamma = sum g xhat, and
//   grad_input = gamma invstd (g - mean(g) - xhat mean(g xhat)) in training, gamma invstd g in evaluation.
// Sums are made in chunks that do not depend on the number of threads: an image's row of a channel, or, channels last,
// 1024 pixels. Within one, floats are added in lanes, 128 terms of a lane at a time, then to the lane's double, and at
// last the lanes in order. Lanes are sixteen of a row; channels last, a block's elements (block_pixels).
#pragma once

#include "core/codes.h"
#include "core/status.h"

namespace lowbit {

constexpr int64_t kChunkPixels = 1024;  // channels last; a chunk is one of `outer` otherwise
constexpr int kSumLanes = 16;
constexpr int64_t kLaneTerms = 128;

struct BatchNormReluBackwardArgs {
  const void* grad_output;  // of type
  FloatType type;
  ChannelShape shape;
  const uint8_t* codes;
  const float *gamma, *beta, *invstd;  // [channels]
  int bits;
  float span;
  bool relu, training;
  void* grad_input;               // of type
  float *grad_gamma, *grad_beta;  // [channels]
  double* sums;                   // workspace, see set_workspace: [chunks, 2, channels], of g, of g xhat
  float* grid;                    // and [kBackwardRows, grid_width]
};

LOWBIT_INLINE int64_t chunks(const ChannelShape& s) {
  return s.channels_last ? ceil_div(s.outer * s.spatial, kChunkPixels) : s.outer;
}

// Rows of the workspace: xhat = code * step + origin; grad_input = gain * (g - (mean + xhat * slope)).
enum BackwardRow : int { kStep = 0, kXhatOrigin, kBackwardShift, kGain, kMean, kSlope, kBackwardRows };

LOWBIT_INLINE int64_t sums_count(const ChannelShape& s) { return 2 * chunks(s) * s.channels; }

LOWBIT_INLINE int64_t workspace_bytes(const BatchNormReluBackwardArgs& args) {
  return sums_count(args.shape) * static_cast<int64_t>(sizeof *args.sums) +
         kBackwardRows * grid_width(args.shape) * static_cast<int64_t>(sizeof *args.grid);
}

LOWBIT_INLINE void set_workspace(BatchNormReluBackwardArgs& args, void* workspace) {
  args.sums = static_cast<double*>(workspace);
  args.grid = reinterpret_cast<float*>(args.sums + sums_count(args.shape));
}

LOWBIT_INLINE void fill_grid(const BatchNormReluBackwardArgs& args, int64_t column) {
  const int64_t width = grid_width(args.shape), channel = column % args.shape.channels;
  const ChannelGrid grid = channel_grid(args.gamma[channel], args.beta[channel], args.bits, args.span, args.relu);
  args.grid[kStep * width + column] = code_step(grid);
  args.grid[kXhatOrigin * width + column] = code_origin(grid);
  args.grid[kBackwardShift * width + column] = grid.shift;
  args.grid[kGain * width + column] = args.gamma[channel] * args.invstd[channel];
}

// After the sum of g or of g xhat over all chunks: a gradient, and a row of the workspace.
LOWBIT_INLINE void finish_sum(const BatchNormReluBackwardArgs& args, bool with_xhat, int64_t channel, double sum) {
  (with_xhat ? args.grad_gamma : args.grad_beta)[channel] = static_cast<float>(sum);
  const double count = static_cast<double>(args.shape.outer * args.shape.spatial);
  const int64_t width = grid_width(args.shape);
  float* row = args.grid + (with_xhat ? kSlope : kMean) * width;
  for (int64_t column = channel; column < width; column += args.shape.channels) {
    row[column] = args.training ? static_cast<float>(sum / count) : 0.0f;
  }
}

// Both of a channel.
LOWBIT_INLINE void finish_sums(const BatchNormReluBackwardArgs& args, int64_t channel) {
  const int64_t channels = args.shape.channels;
  double sum = 0.0, product = 0.0;
  for (int64_t chunk = 0; chunk < chunks(args.shape); ++chunk) {
    sum += args.sums[2 * chunk * channels + channel];
    product += args.sums[(2 * chunk + 1) * channels + channel];
  }
  finish_sum(args, false, channel, sum);
  finish_sum(args, true, channel, product);
}

}  // namespace lowbit
