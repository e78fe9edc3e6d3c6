// A convolution for each matrix, one after the other on the stream. With b of steps a second pass reads and writes 4
// bytes an element; a thread has one row's sum and several of its elements.
#include "core/ops/binary_matmul.h"

#include "core/checks.h"
#include "core/divisor.h"
#include "cuda/platform.cuh"

namespace lowbit::cuda {
namespace {

constexpr int kThreads = 256;

struct HalveKernelArgs {
  BinaryMatmulArgs op;
  int64_t words;  // of a row of a
};

// A block a row.
__global__ void __launch_bounds__(kThreads) binary_matmul_halve_kernel(HalveKernelArgs args) {
  const int64_t row = blockIdx.x;
  int ones = 0;
  for (int64_t i = 0; i < args.words; ++i) ones += __popcll(args.op.a[row * args.words + i]);
  const int32_t of_a = row_sum(args.op, ones);
  const bool integer = args.op.output_kind == ConvOutput::int32;
  const float scale = args.op.scale == nullptr ? 1.0f : *args.op.scale;
  int32_t* sums = static_cast<int32_t*>(args.op.output) + row * args.op.columns;
  for (int64_t n = threadIdx.x; n < args.op.columns; n += kThreads) {
    const int32_t sum = (sums[n] + of_a) >> 1;
    sums[n] = integer ? sum : static_cast<int32_t>(float_to_bits(static_cast<float>(sum) * scale));
  }
}

int64_t weight_bytes(const BinaryMatmulArgs& args) {
  return round_up(binary_conv2d_weight_bytes(matmul_shape(args, args.rows)), 64);
}

}  // namespace

int64_t binary_matmul_workspace_bytes(const BinaryMatmulArgs& args) noexcept { return weight_bytes(args); }

Status binary_matmul(const BinaryMatmulArgs& args, int64_t workspace_bytes, Stream stream) noexcept {
  Status status = check_matmul(args);
  if (status != Status::ok) return status;
  if (workspace_bytes < binary_matmul_workspace_bytes(args)) return Status::small_workspace;
  if (args.batch == 0 || args.rows == 0 || args.columns == 0) return Status::ok;
  const ConvEngine engine = binary_conv2d_default_engine(stream.device);
  for (int64_t i = 0; i < args.batch && status == Status::ok; ++i) {
    BinaryConv2dArgs conv = matmul_conv(args, i, 0, args.rows);
    conv.weight = args.workspace;
    status = binary_conv2d_block_weight(conv.shape, args.b + i * args.columns * words_for(args.depth), args.workspace,
                                        stream);
    if (status == Status::ok) status = binary_conv2d(conv, 0, engine, stream);
  }
  if (status != Status::ok || args.b_encoding == Encoding::sign) return status;
  return launch(binary_matmul_halve_kernel, {blocks_for(args.batch * args.rows, 1), dim3(kThreads)}, stream,
                HalveKernelArgs{args, words_for(args.depth)});
}

}  // namespace lowbit::cuda
