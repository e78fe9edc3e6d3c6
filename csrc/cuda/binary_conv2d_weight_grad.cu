// A plain kernel, right for every argument: a thread sums one element over output pixels, by the order and the partial
// sums of the scalar CPU kernel, and so gives its bits. Neighbouring threads are neighbouring channels: they share an
// output gradient and the input's words. Where the elements are fewer than the threads that a GPU holds, every partial
// sum has a thread of its own, and a second kernel adds them in the same order.
#include "core/ops/binary_conv2d_weight_grad.h"

#include "core/checks.h"
#include "core/divisor.h"
#include "core/half.h"
#include "cuda/platform.cuh"

namespace lowbit::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kEnoughElements = int64_t{1} << 18;  // an H100 holds 132 * 2048 threads

int64_t elements(const ConvShape& shape) { return shape.filters * taps(shape) * channels_per_group(shape); }

// Ranges of output pixels with threads of their own.
int64_t ranges(const ConvShape& shape) {
  const int64_t partial_sums = ceil_div(out_pixels(shape), kPixelsPerPartialSum);
  return elements(shape) >= kEnoughElements || partial_sums <= 1 ? 1 : partial_sums;
}

struct WeightGradKernelArgs {
  BinaryConv2dWeightGradArgs op;
  int64_t count;         // elements
  int64_t ranges;        // of pixels
  int64_t range_pixels;  // a multiple of kPixelsPerPartialSum, or all
  float* sums;           // [ranges, count]
  Divisor by_count, by_group_channels, by_kernel_width, by_kernel_height, by_group_filters, by_out_width, by_out_height;
};

// What a thread sums: the filter's gradients with the bits under one tap, or the padding there.
struct Element {
  int64_t filter;
  int64_t first_row, first_column;  // of the input, under the tap for output pixel (0, 0)
  int64_t word;                     // of an input pixel
  int shift;
};

__device__ inline Element element_at(const WeightGradKernelArgs& args, int64_t index) {
  const ConvShape& shape = args.op.shape;
  const Division by_tap = divide_with_remainder(index, args.by_group_channels);
  const Division by_kx = divide_with_remainder(by_tap.quotient, args.by_kernel_width);
  const Division by_ky = divide_with_remainder(by_kx.quotient, args.by_kernel_height);
  const int64_t words = words_for(static_cast<int64_t>(args.by_group_channels.divisor));
  return {by_ky.quotient, by_ky.remainder * shape.dilation_height - shape.pad_top,
          by_kx.remainder * shape.dilation_width - shape.pad_left,
          divide(by_ky.quotient, args.by_group_filters) * words + by_tap.remainder / kWordBits,
          static_cast<int>(by_tap.remainder % kWordBits)};
}

// Over the output pixels from `begin` to `end`, one output row after the other.
__device__ inline float partial_sum(const WeightGradKernelArgs& args, const Element& element, int64_t begin,
                                    int64_t end) {
  const ConvShape& shape = args.op.shape;
  const int64_t pixel_words = shape.groups * words_for(static_cast<int64_t>(args.by_group_channels.divisor));
  const bool sign = args.op.encoding == Encoding::sign;
  const float padding = static_cast<float>(args.op.padding_value);
  const float* grad_output = args.op.grad_output + begin * shape.filters + element.filter;
  float sum = 0.0f;
  for (int64_t pixel = begin; pixel < end;) {
    const Division line = divide_with_remainder(pixel, args.by_out_width);
    const Division image = divide_with_remainder(line.quotient, args.by_out_height);
    const int64_t row = image.remainder * shape.stride_height + element.first_row;
    const bool row_inside = row >= 0 && row < shape.height;
    const uint64_t* words =
        args.op.input + (image.quotient * shape.height + row) * shape.width * pixel_words + element.word;
    const int64_t left = end - pixel, to_line_end = shape.out_width - line.remainder;
    const int64_t count = left < to_line_end ? left : to_line_end;
    int64_t column = line.remainder * shape.stride_width + element.first_column;
    for (int64_t i = 0; i < count; ++i, column += shape.stride_width, grad_output += shape.filters) {
      if (row_inside && column >= 0 && column < shape.width) {
        const uint32_t bit = static_cast<uint32_t>(words[column * pixel_words] >> element.shift & 1);
        const uint32_t grad = float_to_bits(*grad_output);
        sum += bits_to_float(sign ? grad ^ ((bit ^ 1) << 31) : grad & (0 - bit));
      } else if (args.op.padding_value != 0) {
        sum += padding * *grad_output;
      }
    }
    pixel += count;
  }
  return sum;
}

__global__ void __launch_bounds__(kThreads) binary_conv2d_weight_grad_kernel(WeightGradKernelArgs args) {
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index >= args.ranges * args.count) return;
  const Division range = divide_with_remainder(index, args.by_count);
  const Element element = element_at(args, range.remainder);
  const int64_t pixels = out_pixels(args.op.shape), begin = range.quotient * args.range_pixels;
  const int64_t end = begin + args.range_pixels < pixels ? begin + args.range_pixels : pixels;
  float total = 0.0f;
  for (int64_t first = begin; first < end; first += kPixelsPerPartialSum) {
    total += partial_sum(args, element, first, first + kPixelsPerPartialSum < end ? first + kPixelsPerPartialSum : end);
  }
  args.sums[index] = total;
}

__global__ void __launch_bounds__(kThreads) add_partial_sums_kernel(WeightGradKernelArgs args) {
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index >= args.count) return;
  float total = 0.0f;
  for (int64_t range = 0; range < args.ranges; ++range) total += args.sums[range * args.count + index];
  args.op.grad_weight[index] = total;
}

}  // namespace

int64_t binary_conv2d_weight_grad_workspace_bytes(const BinaryConv2dWeightGradArgs& args) noexcept {
  const int64_t count = ranges(args.shape);
  return count == 1 ? 0 : count * elements(args.shape) * static_cast<int64_t>(sizeof(float));
}

Status binary_conv2d_weight_grad(const BinaryConv2dWeightGradArgs& args, int64_t workspace_bytes,
                                 Stream stream) noexcept {
  const ConvShape& shape = args.shape;
  if (!valid(shape)) return Status::bad_shape;
  if (workspace_bytes < binary_conv2d_weight_grad_workspace_bytes(args)) return Status::small_workspace;
  const int64_t count = elements(shape), range_count = ranges(shape);
  if (count == 0) return Status::ok;
  const WeightGradKernelArgs kernel_args{args,
                                         count,
                                         range_count,
                                         range_count == 1 ? out_pixels(shape) : kPixelsPerPartialSum,
                                         range_count == 1 ? args.grad_weight : static_cast<float*>(args.workspace),
                                         make_divisor(count),
                                         make_divisor(channels_per_group(shape)),
                                         make_divisor(shape.kernel_width),
                                         make_divisor(shape.kernel_height),
                                         make_divisor(filters_per_group(shape)),
                                         make_divisor(shape.out_width > 0 ? shape.out_width : 1),
                                         make_divisor(shape.out_height > 0 ? shape.out_height : 1)};
  const Status status = launch(binary_conv2d_weight_grad_kernel,
                               {blocks_for(range_count * count, kThreads), dim3(kThreads)}, stream, kernel_args);
  if (status != Status::ok || range_count == 1) return status;
  return launch(add_partial_sums_kernel, {blocks_for(count, kThreads), dim3(kThreads)}, stream, kernel_args);
}

}  // namespace lowbit::cuda
