// A plain kernel, right for every argument: a thread sums one element in double, in the order of the scalar CPU kernel,
// and so gives its bits. Neighbouring threads are neighbouring channels: they share an output gradient and their
// weights' words. Its multiplications are sign changes; double additions are what it costs.
#include "core/ops/binary_conv2d_input_grad.h"

#include "core/checks.h"
#include "core/divisor.h"
#include "core/half.h"
#include "cuda/platform.cuh"

namespace lowbit::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kHalfBits = 32;  // words are read by halves
constexpr uint32_t kSign = 0x80000000u;

struct InputGradKernelArgs {
  BinaryConv2dInputGradArgs op;
  int64_t count;  // elements of grad_input
  Divisor by_channels, by_width, by_height, by_group_channels, by_group_filters, by_stride_height, by_stride_width;
};

__global__ void __launch_bounds__(kThreads) binary_conv2d_input_grad_kernel(InputGradKernelArgs args) {
  const int64_t element = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (element >= args.count) return;
  const ConvShape& shape = args.op.shape;
  const Division by_pixel = divide_with_remainder(element, args.by_channels);
  const int64_t pixel = by_pixel.quotient, channel = by_pixel.remainder;
  if (args.op.mask != nullptr) {
    const uint64_t word = args.op.mask[pixel * words_for(shape.channels) + channel / kWordBits];
    if ((word >> (channel % kWordBits) & 1) == 0) {
      args.op.grad_input[element] = 0.0f;
      return;
    }
  }
  const Division by_line = divide_with_remainder(pixel, args.by_width);
  const Division by_image = divide_with_remainder(by_line.quotient, args.by_height);
  const Division by_group = divide_with_remainder(channel, args.by_group_channels);
  const int64_t filters = static_cast<int64_t>(args.by_group_filters.divisor);
  const int64_t tap_halves = 2 * words_for(static_cast<int64_t>(args.by_group_channels.divisor));
  const int64_t filter_halves = taps(shape) * tap_halves;
  const uint32_t* first_halves = reinterpret_cast<const uint32_t*>(args.op.weight) +
                                 by_group.quotient * filters * filter_halves + by_group.remainder / kHalfBits;
  const int lift = kHalfBits - 1 - static_cast<int>(by_group.remainder % kHalfBits);  // of a bit to a float's sign
  double sum = 0.0;
  for (int64_t ky = 0; ky < shape.kernel_height; ++ky) {
    const int64_t reach_row = by_image.remainder + shape.pad_top - ky * shape.dilation_height;
    if (reach_row < 0) continue;
    const Division y = divide_with_remainder(reach_row, args.by_stride_height);
    if (y.remainder != 0 || y.quotient >= shape.out_height) continue;
    for (int64_t kx = 0; kx < shape.kernel_width; ++kx) {
      const int64_t reach_column = by_line.remainder + shape.pad_left - kx * shape.dilation_width;
      if (reach_column < 0) continue;
      const Division x = divide_with_remainder(reach_column, args.by_stride_width);
      if (x.remainder != 0 || x.quotient >= shape.out_width) continue;
      const int64_t out_pixel = (by_image.quotient * shape.out_height + y.quotient) * shape.out_width + x.quotient;
      const float* grad_output = args.op.grad_output + out_pixel * shape.filters + by_group.quotient * filters;
      const float* scale = args.op.scale + by_group.quotient * filters * args.op.scale_stride;
      const uint32_t* halves = first_halves + (ky * shape.kernel_width + kx) * tap_halves;
#pragma unroll 4
      for (int64_t o = 0; o < filters; ++o, halves += filter_halves, scale += args.op.scale_stride) {
        const float term = args.op.scale == nullptr ? grad_output[o] : *scale * grad_output[o];
        sum += bits_to_float(float_to_bits(term) ^ (~(*halves << lift) & kSign));
      }
    }
  }
  args.op.grad_input[element] = static_cast<float>(sum);
}

}  // namespace

int64_t binary_conv2d_input_grad_workspace_bytes(const BinaryConv2dInputGradArgs&) noexcept { return 0; }

Status binary_conv2d_input_grad(const BinaryConv2dInputGradArgs& args, int64_t, Stream stream) noexcept {
  const ConvShape& shape = args.shape;
  if (!valid(shape)) return Status::bad_shape;
  const int64_t count = shape.batch * shape.height * shape.width * shape.channels;
  if (count == 0) return Status::ok;
  const InputGradKernelArgs kernel_args{args,
                                        count,
                                        make_divisor(shape.channels),
                                        make_divisor(shape.width),
                                        make_divisor(shape.height),
                                        make_divisor(channels_per_group(shape)),
                                        make_divisor(filters_per_group(shape)),
                                        make_divisor(shape.stride_height),
                                        make_divisor(shape.stride_width)};
  return launch(binary_conv2d_input_grad_kernel, {blocks_for(count, kThreads), dim3(kThreads)}, stream, kernel_args);
}

}  // namespace lowbit::cuda
