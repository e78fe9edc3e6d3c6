#include "cpu/launch.h"

#include <algorithm>
#include <atomic>
#include <limits>

#include "core/checks.h"
#include "cpu/parallel.h"

namespace lowbit::launch {
namespace {

// Starting a team costs a few microseconds. A thread is given at least this much of what one core does in about that
// time: bytes moved by the packers, multiply-adds by the float gradients, binary multiply-adds by the convolution,
// random draws by the sampler.
constexpr int64_t kGrainBytes = 1 << 16;
constexpr int64_t kGrainFloatMacs = 1 << 17;
constexpr int64_t kGrainBinaryMacs = 1 << 22;
constexpr int64_t kGrainDraws = 1 << 14;

int64_t grain_for(int64_t grain_total, int64_t per_item) {
  return per_item >= grain_total ? 1 : grain_total / max(per_item, 1);
}

// The product of sizes; the largest number where it is larger.
template <class... Sizes>
int64_t work(Sizes... sizes) {
  int64_t product = 1;
  return (multiply(product, sizes) && ...) ? product : std::numeric_limits<int64_t>::max();
}

int64_t macs(const ConvShape& shape) {
  return work(taps(shape), channels_per_group(shape), shape.filters, out_pixels(shape));
}

// Taps of a row of output pixels that lie inside the image, at most.
int64_t row_taps(const PoolShape& shape) {
  return work(std::min(shape.kernel_height, shape.height), std::min(shape.kernel_width, shape.width), shape.out_width);
}

template <class Args, class Kernel>
Status run_with_workspace(const Args& args, int64_t items, int64_t grain, int64_t per_thread, int64_t workspace_bytes,
                          Kernel kernel) {
  if (workspace_bytes < per_thread * omp_get_max_threads()) return Status::small_workspace;
  parallel_for(items, grain, [&](int64_t begin, int64_t end, int thread) {
    kernel(args, begin, end, static_cast<char*>(args.workspace) + thread * per_thread);
  });
  return Status::ok;
}

// For the ops of channel codes: the workspace's parameters of each channel, where nothing is to be refused.
template <class Args>
Status make_grid(const Args& args, int64_t workspace_bytes) {
  const Status status = check_channel_codes(args, workspace_bytes);
  if (status != Status::ok) return status;
  for (int64_t column = 0; column < grid_width(args.shape); ++column) fill_grid(args, column);
  return Status::ok;
}

// Rows of a that meet b before the next: b's private copy, made for each thread, costs them a few per cent, and their
// results stay in L2.
constexpr int64_t kMatmulRows = 256;

// What a thread of binary_matmul works in: b's private copy, then the convolution's own workspace.
struct MatmulWorkspace {
  int64_t weight_bytes, bytes;
};

MatmulWorkspace matmul_workspace(const BinaryMatmulArgs& args) {
  const int64_t last = args.rows % kMatmulRows;
  MatmulWorkspace layout = {};
  for (const int64_t rows : {min(args.rows, kMatmulRows), last}) {
    if (rows == 0) continue;
    const BinaryConv2dArgs conv = matmul_conv(args, 0, 0, rows);
    layout.weight_bytes = round_up(kernels().binary_conv2d_weight_bytes(conv.shape), 64);
    layout.bytes = max(layout.bytes, layout.weight_bytes + kernels().binary_conv2d_plan(conv).workspace_bytes);
  }
  return layout;
}

}  // namespace

Status binarize(const BinarizeArgs& args) noexcept {
  if (!valid(args.input_type) || (args.thresholds != 1 && args.thresholds != 2)) return Status::bad_argument;
  if (args.thresholds == 2 && (!args.threshold || args.mask)) return Status::bad_argument;
  if (!addressable(args.outer, args.channels, args.spatial, args.thresholds)) return Status::bad_shape;
  const int64_t pixels_per_item = args.channels_last ? 1 : kBinarizePixels;
  parallel_for(binarize_items(args), grain_for(kGrainBytes, 4 * bits_per_pixel(args) * pixels_per_item),
               [&](int64_t begin, int64_t end, int) { kernels().binarize(args, begin, end); });
  return Status::ok;
}

Status unpack(const UnpackArgs& args) noexcept {
  if (!valid(args.output_type)) return Status::bad_argument;
  if (!addressable(args.pixels, args.channels)) return Status::bad_shape;
  parallel_for(args.pixels, grain_for(kGrainBytes, 4 * args.channels),
               [&](int64_t begin, int64_t end, int) { kernels().unpack(args, begin, end); });
  return Status::ok;
}

Status align_groups(const AlignGroupsArgs& args) noexcept {
  if (args.channels_per_group < 1 || !addressable(args.pixels, args.groups, args.channels_per_group)) {
    return Status::bad_shape;
  }
  const int64_t bytes = 8 * args.groups * words_for(args.channels_per_group);
  parallel_for(args.pixels, grain_for(kGrainBytes, bytes),
               [&](int64_t begin, int64_t end, int) { kernels().align_groups(args, begin, end); });
  return Status::ok;
}

Status binary_max_pool2d(const BinaryMaxPool2dArgs& args) noexcept {
  if (!valid(args.shape)) return Status::bad_shape;
  const PoolShape& shape = args.shape;
  const int64_t bytes = work(8, row_taps(shape), words_for(shape.channels));
  parallel_for(shape.batch * shape.out_height, grain_for(kGrainBytes, bytes),
               [&](int64_t begin, int64_t end, int) { kernels().binary_max_pool2d(args, begin, end); });
  return Status::ok;
}

Status binary_avg_pool2d(const BinaryAvgPool2dArgs& args) noexcept {
  if (!valid(args.shape)) return Status::bad_shape;
  const PoolShape& shape = args.shape;
  const int64_t bytes = work(row_taps(shape), shape.channels);
  parallel_for(shape.batch * shape.out_height, grain_for(kGrainBytes, bytes),
               [&](int64_t begin, int64_t end, int) { kernels().binary_avg_pool2d(args, begin, end); });
  return Status::ok;
}

int64_t binary_conv2d_workspace_bytes(const BinaryConv2dArgs& args) noexcept {
  return kernels().binary_conv2d_plan(args).workspace_bytes * omp_get_max_threads();
}

Status binary_conv2d(const BinaryConv2dArgs& args, int64_t workspace_bytes) noexcept {
  if (!valid(args.shape)) return Status::bad_shape;
  const Status status = check_program(args.program, out_pixels(args.shape), args.shape.filters);
  if (status != Status::ok) return status;
  const KernelTable& table = kernels();
  const BinaryConv2dPlan plan = table.binary_conv2d_plan(args);
  const int64_t grain = grain_for(kGrainBinaryMacs, macs(args.shape) / max(plan.items, 1));
  return run_with_workspace(args, plan.items, grain, plan.workspace_bytes, workspace_bytes,
                            [&](const BinaryConv2dArgs&, int64_t begin, int64_t end, void* workspace) {
                              table.binary_conv2d(args, plan, begin, end, workspace);
                            });
}

int64_t binary_conv2d_input_grad_workspace_bytes(const BinaryConv2dInputGradArgs& args) noexcept {
  return kernels().binary_conv2d_input_grad_workspace_bytes(args) * omp_get_max_threads();
}

Status binary_conv2d_input_grad(const BinaryConv2dInputGradArgs& args, int64_t workspace_bytes) noexcept {
  if (!valid(args.shape)) return Status::bad_shape;
  const KernelTable& table = kernels();
  const int64_t items = table.binary_conv2d_input_grad_items(args);
  const int64_t grain = grain_for(kGrainFloatMacs, macs(args.shape) / max(items, 1));
  return run_with_workspace(args, items, grain, table.binary_conv2d_input_grad_workspace_bytes(args), workspace_bytes,
                            table.binary_conv2d_input_grad);
}

int64_t binary_conv2d_weight_grad_workspace_bytes(const BinaryConv2dWeightGradArgs& args) noexcept {
  return kernels().binary_conv2d_weight_grad_workspace_bytes(args) * omp_get_max_threads();
}

Status binary_conv2d_weight_grad(const BinaryConv2dWeightGradArgs& args, int64_t workspace_bytes) noexcept {
  if (!valid(args.shape)) return Status::bad_shape;
  const KernelTable& table = kernels();
  const int64_t items = table.binary_conv2d_weight_grad_items(args);
  const int64_t grain = grain_for(kGrainFloatMacs, macs(args.shape) / max(items, 1));
  return run_with_workspace(args, items, grain, table.binary_conv2d_weight_grad_workspace_bytes(args), workspace_bytes,
                            table.binary_conv2d_weight_grad);
}

int64_t binary_matmul_workspace_bytes(const BinaryMatmulArgs& args) noexcept {
  return matmul_workspace(args).bytes * omp_get_max_threads();
}

Status binary_matmul(const BinaryMatmulArgs& args, int64_t workspace_bytes) noexcept {
  const Status status = check_matmul(args);
  if (status != Status::ok) return status;
  if (args.rows == 0) return Status::ok;
  const KernelTable& table = kernels();
  const MatmulWorkspace layout = matmul_workspace(args);
  const int64_t parts = ceil_div(args.rows, kMatmulRows);  // of a matrix
  const int64_t macs_per_item = work(min(args.rows, kMatmulRows), args.columns, args.depth);
  return run_with_workspace(
      args, args.batch * parts, grain_for(kGrainBinaryMacs, macs_per_item), layout.bytes, workspace_bytes,
      [&](const BinaryMatmulArgs&, int64_t begin, int64_t end, void* workspace) {
        int64_t blocked = -1;  // the matrix of b in the workspace
        for (int64_t item = begin; item < end; ++item) {
          const int64_t i = item / parts, first = item % parts * kMatmulRows;
          BinaryConv2dArgs conv = matmul_conv(args, i, first, min(args.rows - first, kMatmulRows));
          if (i != blocked) {
            table.binary_conv2d_block_weight(conv.shape, args.b + i * args.columns * words_for(args.depth), workspace);
          }
          blocked = i;
          conv.weight = workspace;
          const BinaryConv2dPlan plan = table.binary_conv2d_plan(conv);
          table.binary_conv2d(conv, plan, 0, plan.items, static_cast<char*>(workspace) + layout.weight_bytes);
          if (args.b_encoding == Encoding::step) {
            const int64_t row = i * args.rows + first;
            table.binary_matmul_halve(args, row, row + conv.shape.width);
          }
        }
      });
}

Status pointwise(const PointwiseArgs& args) noexcept {
  const Status status = check_pointwise(args);
  if (status != Status::ok) return status;
  const int64_t items = pointwise_items(args), pixels = args.shape.batch * args.shape.height * args.shape.width;
  // A step counts as the bytes of a float.
  const int64_t bytes = work(4 * (2 + args.before.count + args.after.count), args.shape.channels, pixels);
  parallel_for(items, grain_for(kGrainBytes, bytes / max(items, 1)),
               [&](int64_t begin, int64_t end, int) { kernels().pointwise(args, begin, end); });
  return Status::ok;
}

Status quantized_activation(const QuantizedActivationArgs& args) noexcept {
  if (!valid(args.type)) return Status::bad_argument;
  if (!addressable(args.count)) return Status::bad_shape;
  parallel_for(words_for(args.count), grain_for(kGrainBytes, 4 * kWordBits),
               [&](int64_t begin, int64_t end, int) { kernels().quantized_activation(args, begin, end); });
  return Status::ok;
}

Status masked_gradient(const MaskedGradientArgs& args) noexcept {
  if (!valid(args.type)) return Status::bad_argument;
  if (!addressable(args.count)) return Status::bad_shape;
  parallel_for(words_for(args.count), grain_for(kGrainBytes, 4 * kWordBits),
               [&](int64_t begin, int64_t end, int) { kernels().masked_gradient(args, begin, end); });
  return Status::ok;
}

int64_t batch_norm_relu_quantize_workspace_bytes(const BatchNormReluQuantizeArgs& args) noexcept {
  return workspace_bytes(args);
}

Status batch_norm_relu_quantize(const BatchNormReluQuantizeArgs& args, int64_t workspace_bytes) noexcept {
  const Status status = make_grid(args, workspace_bytes);
  if (status != Status::ok) return status;
  parallel_for(row_count(args.shape), grain_for(kGrainBytes, 8 * row_length(args.shape)),
               [&](int64_t begin, int64_t end, int) { kernels().batch_norm_relu_quantize(args, begin, end); });
  return Status::ok;
}

int64_t channel_dequantize_workspace_bytes(const ChannelDequantizeArgs& args) noexcept { return workspace_bytes(args); }

Status channel_dequantize(const ChannelDequantizeArgs& args, int64_t workspace_bytes) noexcept {
  const Status status = make_grid(args, workspace_bytes);
  if (status != Status::ok) return status;
  parallel_for(row_count(args.shape), grain_for(kGrainBytes, 4 * row_length(args.shape)),
               [&](int64_t begin, int64_t end, int) { kernels().channel_dequantize(args, begin, end); });
  return Status::ok;
}

int64_t batch_norm_relu_backward_workspace_bytes(const BatchNormReluBackwardArgs& args) noexcept {
  return workspace_bytes(args);
}

Status batch_norm_relu_backward(const BatchNormReluBackwardArgs& args, int64_t workspace_bytes) noexcept {
  const Status status = make_grid(args, workspace_bytes);
  if (status != Status::ok) return status;
  const ChannelShape& shape = args.shape;
  const int64_t pixels = shape.channels_last ? kChunkPixels : shape.spatial;
  parallel_for(chunks(shape), grain_for(kGrainBytes, 4 * pixels * shape.channels),
               [&](int64_t begin, int64_t end, int) { kernels().batch_norm_relu_sums(args, begin, end); });
  parallel_for(shape.channels, grain_for(kGrainBytes, 16 * chunks(shape)), [&](int64_t begin, int64_t end, int) {
    for (int64_t channel = begin; channel < end; ++channel) finish_sums(args, channel);
  });
  parallel_for(row_count(shape), grain_for(kGrainBytes, 8 * row_length(shape)),
               [&](int64_t begin, int64_t end, int) { kernels().batch_norm_relu_backward(args, begin, end); });
  return Status::ok;
}

Status group_quantize(const GroupQuantizeArgs& args) noexcept {
  if (!valid_bits(args.bits) || !valid(args.type)) return Status::bad_argument;
  if (!addressable(args.count)) return Status::bad_shape;
  parallel_for(ceil_div(args.count, kGroup), grain_for(kGrainBytes, 4 * kGroup),
               [&](int64_t begin, int64_t end, int) { kernels().group_quantize(args, begin, end); });
  return Status::ok;
}

Status group_dequantize(const GroupDequantizeArgs& args) noexcept {
  if (!valid_bits(args.bits) || !valid(args.type)) return Status::bad_argument;
  if (!addressable(args.count)) return Status::bad_shape;
  parallel_for(ceil_div(args.count, kGroup), grain_for(kGrainBytes, 4 * kGroup),
               [&](int64_t begin, int64_t end, int) { kernels().group_dequantize(args, begin, end); });
  return Status::ok;
}

Status antithetic_sample(const AntitheticSampleArgs& args) noexcept {
  if (!valid_sample_count(args)) return Status::bad_argument;
  if (!addressable(args.rows, args.dimensions, args.samples)) return Status::bad_shape;
  std::atomic<bool> finite{true};
  parallel_for(antithetic_sample_items(args), grain_for(kGrainDraws, kWordBits * args.samples),
               [&](int64_t begin, int64_t end, int) {
                 if (!kernels().antithetic_sample(args, begin, end)) finite.store(false, std::memory_order_relaxed);
               });
  return finite.load() ? Status::ok : Status::not_finite;
}

Status antithetic_gradient(const AntitheticGradientArgs& args) noexcept {
  if (args.samples < 1 || args.samples > kMostSamples) return Status::bad_argument;
  if (!addressable(args.rows, args.dimensions, args.samples)) return Status::bad_shape;
  const int64_t width = min(args.dimensions, kGradientDimensions);
  parallel_for(antithetic_gradient_items(args), grain_for(kGrainBytes, 10 * width),
               [&](int64_t begin, int64_t end, int) { kernels().antithetic_gradient(args, begin, end); });
  return Status::ok;
}

int64_t popcount_peak(Isa level, int64_t iterations) noexcept {
  if (level < Isa::scalar || level > best_isa()) return 0;
  std::atomic<int64_t> operations{0};
  parallel_for(omp_get_max_threads(), 1,
               [&](int64_t, int64_t, int) { operations += kernels(level).popcount_peak(iterations); });
  return operations;
}

}  // namespace lowbit::launch
