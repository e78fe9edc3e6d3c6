// A warp makes an output pixel, 32 neighbouring channels at a time: with channels last every load and store of a warp
// is one of 128 or 64 bytes, and a channel's window is in one lane. Channels first, input loads lie apart.
#include "core/ops/pointwise.h"

#include "core/checks.h"
#include "cuda/epilogue.cuh"

namespace lowbit::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;  // pixels of a block

struct PointwiseKernelArgs {
  PointwiseArgs op;
  const int32_t* accumulators;         // [pixels, channels] instead of the input; or null
  int64_t pixels;                      // of the output
  int64_t input_pixel, input_channel;  // elements of the input from one to the next
  Divisor by_out_width, by_out_height;
  Steps before, after;
};

__device__ inline float load_pixel(const PointwiseKernelArgs& args, int64_t image, int64_t pixel, int64_t channel) {
  const PoolShape& s = args.op.shape;
  const int64_t images = image * s.height * s.width * (args.op.channels_last ? args.op.stride : s.channels);
  return load_float(args.op.input, args.op.input_type,
                    images + pixel * args.input_pixel + channel * args.input_channel);
}

// What the window makes of one channel. Lanes without a channel take part with any value.
__device__ inline float reduce(const PointwiseKernelArgs& args, int64_t image, int64_t y, int64_t x, int64_t channel,
                               bool exists) {
  const PoolShape& s = args.op.shape;
  const bool maximum = args.op.reduction == Reduction::maximum;
  const int64_t top = y * s.stride_height - s.pad_top, left = x * s.stride_width - s.pad_left;
  const int64_t bottom = top + (s.kernel_height - 1) * s.dilation_height;
  const int64_t right = left + (s.kernel_width - 1) * s.dilation_width;
  // Without dilation a window may begin far outside the image.
  const int64_t first_row = s.dilation_height == 1 ? max(top, 0) : top;
  const int64_t first_column = s.dilation_width == 1 ? max(left, 0) : left;
  float value = maximum ? bits_to_float(0xff800000u) : 0.0f;  // -infinity
#pragma unroll 1
  for (int64_t row = first_row; row <= bottom && row < s.height; row += s.dilation_height) {
    if (row < 0) continue;
#pragma unroll 1
    for (int64_t column = first_column; column <= right && column < s.width; column += s.dilation_width) {
      if (column < 0) continue;
      const int64_t pixel = row * s.width + column;
      float tap = exists ? load_pixel(args, image, pixel, channel) : 0.0f;
      tap = run_steps(args.before, tap, image * s.height * s.width + pixel, channel, exists, false);
      value = maximum ? later_maximum(value, tap) : value + tap;
    }
  }
  if (maximum) return value;
  const PoolWindow window =
      pool_window(args.op.count_include_pad, args.op.divisor_override, row_span(s, y), column_span(s, x));
  return value / window.divisor;
}

// Without the second bound ptxas keeps to 40 registers, and spills.
__global__ void __launch_bounds__(kThreads, 2) pointwise_kernel(PointwiseKernelArgs args) {
  const int64_t pixel = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  if (pixel >= args.pixels) return;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t channels = args.op.shape.channels;
  if (args.after.shared_words && lane == 0) {
    for (int i = 0; i < args.after.count; ++i) {
      const EpilogueStep& step = args.after.steps[i];
      if (kind_of(step) != StepKind::bits) continue;
      for (int64_t word = 0; word < words_for(step.option * channels); ++word) {
        operand<uint64_t>(step.target)[pixel * step.stride + word] = 0;
      }
    }
  }
  const Division row = divide_with_remainder(pixel, args.by_out_width);
  const Division image = divide_with_remainder(row.quotient, args.by_out_height);
  // To the end of the last word.
  for (int64_t first = 0; first < words_for(channels) * kWordBits; first += kWarp) {
    const int64_t channel = first + lane;
    const bool exists = channel < channels;
    float value = 0.0f;
    if (args.accumulators) {
      if (exists) value = static_cast<float>(args.accumulators[pixel * channels + channel]);
    } else if (args.op.reduction != Reduction::none) {
      value = reduce(args, image.quotient, image.remainder, row.remainder, channel, exists);
    } else if (exists) {
      value = load_pixel(args, image.quotient, image.remainder * args.op.shape.width + row.remainder, channel);
    }
    run_steps(args.after, value, pixel, channel, exists, true);
  }
}

Status launch_pixels(PointwiseKernelArgs& args, Stream stream) {
  const PoolShape& s = args.op.shape;
  args.pixels = s.batch * s.out_height * s.out_width;
  if (args.pixels == 0 || s.channels == 0) return Status::ok;
  args.by_out_width = make_divisor(s.out_width);
  args.by_out_height = make_divisor(s.out_height);
  args.after = make_steps(args.op.after, s.channels, s.out_height * s.out_width);
  return launch(pointwise_kernel, {blocks_for(args.pixels, kWarps), dim3(kThreads)}, stream, args);
}

}  // namespace

Status pointwise(const PointwiseArgs& args, Stream stream) noexcept {
  const Status status = check_pointwise(args);
  if (status != Status::ok) return status;
  const int64_t image_pixels = args.shape.height * args.shape.width;
  PointwiseKernelArgs kernel_args{};
  kernel_args.op = args;
  kernel_args.input_pixel = args.channels_last ? args.stride : 1;
  kernel_args.input_channel = args.channels_last ? 1 : image_pixels;
  kernel_args.before = make_steps(args.before, args.shape.channels, image_pixels);
  return launch_pixels(kernel_args, stream);
}

Status run_on_accumulators(const int32_t* accumulators, const EpilogueProgram& program, int64_t pixels,
                           int64_t channels, int64_t pixels_per_image, Stream stream) noexcept {
  PointwiseKernelArgs kernel_args{};
  PoolShape& shape = kernel_args.op.shape;
  shape.batch = pixels / pixels_per_image;
  shape.channels = channels;
  shape.out_height = 1;
  shape.out_width = pixels_per_image;
  kernel_args.op.after = program;
  kernel_args.accumulators = accumulators;
  return launch_pixels(kernel_args, stream);
}

}  // namespace lowbit::cuda
