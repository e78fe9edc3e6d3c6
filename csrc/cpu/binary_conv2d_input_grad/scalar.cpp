#include "cpu/binary_conv2d_input_grad/binary_conv2d_input_grad.h"

namespace lowbit::scalar {
namespace {

// sums[i] += w[i] * term, w the signs of one word.
void add_signed(uint64_t weight, int64_t count, float term, double* sums) {
  for (int64_t i = 0; i < count; ++i) sums[i] += (weight >> i & 1) != 0 ? term : -term;
}

// The gradient of up to 64 channels of one input pixel, those of one weight word of a group, without the mask. Summed
// in double: a plain float32 sum over all filters and taps would lose more than torch's blocked ones.
void sum_word(const BinaryConv2dInputGradArgs& args, int64_t image, int64_t row, int64_t column, int64_t group,
              int64_t word, int64_t count, float* grad_input) {
  const ConvShape& shape = args.shape;
  const int64_t filters = filters_per_group(shape);
  double sums[kWordBits] = {};
  for (int64_t ky = 0; ky < shape.kernel_height; ++ky) {
    const int64_t reach_row = row + shape.pad_top - ky * shape.dilation_height;
    const int64_t y = reach_row / shape.stride_height;
    if (reach_row < 0 || reach_row % shape.stride_height != 0 || y >= shape.out_height) continue;
    for (int64_t kx = 0; kx < shape.kernel_width; ++kx) {
      const int64_t reach_column = column + shape.pad_left - kx * shape.dilation_width;
      const int64_t x = reach_column / shape.stride_width;
      if (reach_column < 0 || reach_column % shape.stride_width != 0 || x >= shape.out_width) continue;
      const float* grad_output =
          args.grad_output + ((image * shape.out_height + y) * shape.out_width + x) * shape.filters;
      for (int64_t o = group * filters; o < (group + 1) * filters; ++o) {
        const float scale = args.scale == nullptr ? 1.0f : args.scale[o * args.scale_stride];
        const int64_t tap = (o * shape.kernel_height + ky) * shape.kernel_width + kx;
        add_signed(args.weight[tap * words_per_group(shape) + word], count, scale * grad_output[o], sums);
      }
    }
  }
  for (int64_t i = 0; i < count; ++i) grad_input[i] = static_cast<float>(sums[i]);
}

}  // namespace

int64_t binary_conv2d_input_grad_workspace_bytes(const BinaryConv2dInputGradArgs&) noexcept { return 0; }

// One item is one input row.
int64_t binary_conv2d_input_grad_items(const BinaryConv2dInputGradArgs& args) noexcept {
  return args.shape.batch * args.shape.height;
}

void binary_conv2d_input_grad(const BinaryConv2dInputGradArgs& args, int64_t begin, int64_t end, void*) noexcept {
  const ConvShape& shape = args.shape;
  for (int64_t pixel = begin * shape.width; pixel < end * shape.width; ++pixel) {
    const int64_t row = pixel / shape.width % shape.height;
    const int64_t image = pixel / shape.width / shape.height;
    float* grad_input = args.grad_input + pixel * shape.channels;
    for (int64_t group = 0; group < shape.groups; ++group) {
      for (int64_t word = 0; word < words_per_group(shape); ++word) {
        const int64_t channel = word * kWordBits, rest = channels_per_group(shape) - channel;
        sum_word(args, image, row, pixel % shape.width, group, word, min(rest, kWordBits),
                 grad_input + group * channels_per_group(shape) + channel);
      }
    }
    if (args.mask == nullptr) continue;
    const uint64_t* mask = args.mask + pixel * words_for(shape.channels);
    for (int64_t c = 0; c < shape.channels; ++c) {
      if ((mask[c / kWordBits] >> (c % kWordBits) & 1) == 0) grad_input[c] = 0.0f;
    }
  }
}

}  // namespace lowbit::scalar
