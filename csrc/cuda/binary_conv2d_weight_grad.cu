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
constexpr int kHalfBits = 32;  // words are read by halves
constexpr uint32_t kSign = 0x80000000u;
constexpr int64_t kEnoughElements = int64_t{1} << 18;  // an H100 holds 132 * 2048 threads

int64_t elements(const ConvShape& shape) { return shape.filters * taps(shape) * channels_per_group(shape); }

// Ranges of output pixels with threads of their own.
int64_t ranges(const ConvShape& shape) {
  const int64_t partial_sums = ceil_div(out_pixels(shape), kPixelsPerPartialSum);
  return elements(shape) >= kEnoughElements || partial_sums <= 1 ? 1 : partial_sums;
}

__device__ inline int64_t clamp(int64_t value, int64_t least, int64_t most) {
  return value < least ? least : value > most ? most : value;
}

struct WeightGradKernelArgs {
  BinaryConv2dWeightGradArgs op;
  int64_t count;         // elements
  int64_t ranges;        // of pixels
  int64_t range_pixels;  // a multiple of kPixelsPerPartialSum, or all
  float* sums;           // [ranges, count]
  Divisor by_count, by_group_channels, by_kernel_width, by_kernel_height, by_group_filters, by_out_width, by_out_height,
      by_stride_width;
};

// What a thread sums: the filter's gradients with the bits under one tap, or the padding there.
struct Element {
  int64_t filter;
  int64_t first_row, first_column;   // of the input, under the tap for output pixel (0, 0)
  int64_t inside_begin, inside_end;  // output columns for which the tap is inside the image's columns
  int64_t half;                      // of a word, of an input pixel
  int lift;                          // takes the bit to the sign of a float
};

__device__ inline Element element_at(const WeightGradKernelArgs& args, int64_t index) {
  const ConvShape& shape = args.op.shape;
  const Division by_tap = divide_with_remainder(index, args.by_group_channels);
  const Division by_kx = divide_with_remainder(by_tap.quotient, args.by_kernel_width);
  const Division by_ky = divide_with_remainder(by_kx.quotient, args.by_kernel_height);
  const int64_t group_halves = 2 * words_for(static_cast<int64_t>(args.by_group_channels.divisor));
  const int64_t column = by_kx.remainder * shape.dilation_width - shape.pad_left;
  // The first output column whose tap is at `least` or right of it.
  const auto first_from = [&](int64_t least) {
    const int64_t way = least - column + shape.stride_width - 1;
    const int64_t x = way < shape.stride_width ? 0 : divide(way, args.by_stride_width);
    return x < shape.out_width ? x : shape.out_width;
  };
  return {by_ky.quotient,
          by_ky.remainder * shape.dilation_height - shape.pad_top,
          column,
          first_from(0),
          first_from(shape.width),
          divide(by_ky.quotient, args.by_group_filters) * group_halves + by_tap.remainder / kHalfBits,
          kHalfBits - 1 - static_cast<int>(by_tap.remainder % kHalfBits)};
}

// sum + the gradients at `count` output pixels, times padding_value.
__device__ inline float add_padding(const WeightGradKernelArgs& args, const float* grad_output, int64_t count,
                                    float sum) {
  if (args.op.padding_value == 0) return sum;
  const float padding = static_cast<float>(args.op.padding_value);
#pragma unroll 1
  for (int64_t i = 0; i < count; ++i, grad_output += args.op.shape.filters) sum += padding * *grad_output;
  return sum;
}

// sum + the gradients at `count` output pixels of a row, times the values of the bits that begin at `halves`.
__device__ inline float add_inside(const WeightGradKernelArgs& args, const float* grad_output, const uint32_t* halves,
                                   int64_t step, int lift, int64_t count, float sum) {
  const bool sign = args.op.encoding == Encoding::sign;
#pragma unroll 4
  for (int64_t i = 0; i < count; ++i, grad_output += args.op.shape.filters, halves += step) {
    const uint32_t lifted = *halves << lift, grad = float_to_bits(*grad_output);
    sum += bits_to_float(sign ? grad ^ (~lifted & kSign) : lifted & kSign ? grad : 0);
  }
  return sum;
}

// Over the output pixels from `begin` to `end`, one output row after the other.
__device__ inline float partial_sum(const WeightGradKernelArgs& args, const Element& element, int64_t begin,
                                    int64_t end) {
  const ConvShape& shape = args.op.shape;
  const int64_t pixel_halves = 2 * shape.groups * words_for(static_cast<int64_t>(args.by_group_channels.divisor));
  const uint32_t* input = reinterpret_cast<const uint32_t*>(args.op.input) + element.half;
  const float* grad_output = args.op.grad_output + element.filter;
  float sum = 0.0f;
  for (int64_t pixel = begin; pixel < end;) {
    const Division line = divide_with_remainder(pixel, args.by_out_width);
    const Division image = divide_with_remainder(line.quotient, args.by_out_height);
    const int64_t row = image.remainder * shape.stride_height + element.first_row;
    const int64_t first = line.remainder, rest = first + (end - pixel);
    const int64_t last = rest < shape.out_width ? rest : shape.out_width;
    int64_t inside = last, after = last;
    if (row >= 0 && row < shape.height) {
      inside = clamp(element.inside_begin, first, last);
      after = clamp(element.inside_end, first, last);
    }
    const int64_t column = inside * shape.stride_width + element.first_column;
    const int64_t input_pixel = (image.quotient * shape.height + row) * shape.width + column;
    const auto grads = [&](int64_t x) { return grad_output + (pixel + x - first) * shape.filters; };
    sum = add_padding(args, grads(first), inside - first, sum);
    sum = add_inside(args, grads(inside), input + input_pixel * pixel_halves, shape.stride_width * pixel_halves,
                     element.lift, after - inside, sum);
    sum = add_padding(args, grads(after), last - after, sum);
    pixel += last - first;
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
                                         make_divisor(shape.out_height > 0 ? shape.out_height : 1),
                                         make_divisor(shape.stride_width)};
  const Status status = launch(binary_conv2d_weight_grad_kernel,
                               {blocks_for(range_count * count, kThreads), dim3(kThreads)}, stream, kernel_args);
  if (status != Status::ok || range_count == 1) return status;
  return launch(add_partial_sums_kernel, {blocks_for(count, kThreads), dim3(kThreads)}, stream, kernel_args);
}

}  // namespace lowbit::cuda
