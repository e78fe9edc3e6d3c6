#include "core/half.h"
#include "cpu/binary_conv2d_weight_grad/binary_conv2d_weight_grad.h"

namespace lowbit::scalar {
namespace {

// sums[c] += a[c] * grad
void add_pixel(Encoding encoding, const uint64_t* input, int64_t channels, float grad, float* sums) {
  const uint32_t grad_bits = float_to_bits(grad);
  for (int64_t c = 0; c < channels; ++c) {
    const uint32_t bit = static_cast<uint32_t>(input[c / kWordBits] >> (c % kWordBits) & 1);
    sums[c] += bits_to_float(encoding == Encoding::sign ? grad_bits ^ ((bit ^ 1) << 31) : grad_bits & (0 - bit));
  }
}

// total += partial; partial = 0
void flush(int64_t channels, float* partial, float* total) {
  for (int64_t c = 0; c < channels; ++c) {
    total[c] += partial[c];
    partial[c] = 0.0f;
  }
}

void sum_tap(const BinaryConv2dWeightGradArgs& args, int64_t filter, int64_t ky, int64_t kx, float* partial,
             float* total) {
  const ConvShape& shape = args.shape;
  const int64_t channels = channels_per_group(shape);
  const int64_t group = filter / filters_per_group(shape);
  const float padding = static_cast<float>(args.padding_value);
  for (int64_t c = 0; c < channels; ++c) partial[c] = total[c] = 0.0f;
  for (int64_t pixel = 0; pixel < out_pixels(shape); ++pixel) {
    const int64_t image = pixel / shape.out_width / shape.out_height;
    const int64_t row =
        pixel / shape.out_width % shape.out_height * shape.stride_height - shape.pad_top + ky * shape.dilation_height;
    const int64_t column = pixel % shape.out_width * shape.stride_width - shape.pad_left + kx * shape.dilation_width;
    const float grad = args.grad_output[pixel * shape.filters + filter];
    if (row >= 0 && row < shape.height && column >= 0 && column < shape.width) {
      const int64_t input_pixel = (image * shape.height + row) * shape.width + column;
      add_pixel(args.encoding, args.input + (input_pixel * shape.groups + group) * words_per_group(shape), channels,
                grad, partial);
    } else if (args.padding_value != 0) {
      for (int64_t c = 0; c < channels; ++c) partial[c] += padding * grad;
    }
    if (pixel % kPixelsPerPartialSum == kPixelsPerPartialSum - 1) flush(channels, partial, total);
  }
  flush(channels, partial, total);
}

}  // namespace

int64_t binary_conv2d_weight_grad_workspace_bytes(const BinaryConv2dWeightGradArgs& args) noexcept {
  return round_up(channels_per_group(args.shape) * static_cast<int64_t>(sizeof(float)), 64);
}

// One item is one filter at one tap.
int64_t binary_conv2d_weight_grad_items(const BinaryConv2dWeightGradArgs& args) noexcept {
  return args.shape.filters * taps(args.shape);
}

void binary_conv2d_weight_grad(const BinaryConv2dWeightGradArgs& args, int64_t begin, int64_t end,
                               void* workspace) noexcept {
  const ConvShape& shape = args.shape;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t tap = item % taps(shape);
    sum_tap(args, item / taps(shape), tap / shape.kernel_width, tap % shape.kernel_width,
            static_cast<float*>(workspace), args.grad_weight + item * channels_per_group(shape));
  }
}

}  // namespace lowbit::scalar
