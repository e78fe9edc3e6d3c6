// What every launcher, CPU and CUDA, asks of sizes before a kernel sees them.
#pragma once

#include "core/codes.h"
#include "core/conv_shape.h"
#include "core/epilogue.h"
#include "core/float_type.h"
#include "core/ops/binary_matmul.h"
#include "core/ops/pointwise.h"
#include "core/pool_shape.h"
#include "core/status.h"

namespace lowbit {

// False where a is negative, b is negative or a * b overflows; else a *= b.
static inline bool multiply(int64_t& a, int64_t b) { return a >= 0 && b >= 0 && !__builtin_mul_overflow(a, b, &a); }

// No process has more memory: the user's half of 48-bit addresses. Sizes that pass leave a factor of 2^16 below 2^63,
// so that kernels multiply them by what a layout adds (lanes, phases, tables) without asking again.
constexpr int64_t kMostBytes = int64_t{1} << 47;

// Steps of a window over an image, kernel * dilation and the like, are products of two of these.
constexpr int64_t kMostStep = int64_t{1} << 31;

// Whether the product of the sizes, times 8 bytes, is addressable.
template <class... Sizes>
static inline bool addressable(Sizes... sizes) {
  int64_t product = 8;
  return (multiply(product, sizes) && ...) && product <= kMostBytes;
}

// One dimension of a window that moves over an image.
struct WindowAxis {
  int64_t size, kernel, out_size, stride, pad, dilation;
};

// Positions from the first of the padding to the last that the image or a window has; -1 where a number is out of
// range.
static inline int64_t extent(const WindowAxis& axis) {
  if (axis.size < 0 || axis.out_size < 0 || axis.pad < 0 || axis.pad >= kMostBytes || axis.size >= kMostBytes)
    return -1;
  if (axis.kernel <= 0 || axis.kernel >= kMostStep || axis.stride <= 0 || axis.stride >= kMostStep ||
      axis.dilation <= 0 || axis.dilation >= kMostStep) {
    return -1;
  }
  int64_t last_window = axis.out_size > 0 ? axis.out_size - 1 : 0;
  if (!multiply(last_window, axis.stride) || last_window >= kMostBytes) return -1;
  const int64_t windows = last_window + (axis.kernel - 1) * axis.dilation + 1;
  const int64_t image = axis.pad + axis.size;
  return windows > image ? windows : image;
}

// Every size in range, channels and filters divisible by groups, taps * channels_per_group inside int32, and the image
// with its padding and all that windows reach addressable.
static inline bool valid(const ConvShape& shape) {
  if (shape.groups <= 0 || shape.channels <= 0 || shape.filters < 0 || shape.channels % shape.groups != 0 ||
      shape.filters % shape.groups != 0) {
    return false;
  }
  const int64_t rows = extent(
      {shape.height, shape.kernel_height, shape.out_height, shape.stride_height, shape.pad_top, shape.dilation_height});
  const int64_t columns = extent(
      {shape.width, shape.kernel_width, shape.out_width, shape.stride_width, shape.pad_left, shape.dilation_width});
  if (rows < 0 || columns < 0) return false;
  int64_t products = channels_per_group(shape);
  if (!multiply(products, shape.kernel_height) || !multiply(products, shape.kernel_width)) return false;
  return products < (int64_t{1} << 31) && addressable(shape.groups, words_per_group(shape), rows, columns) &&
         addressable(shape.batch, shape.groups, words_per_group(shape), rows, columns) &&
         addressable(shape.filters, rows, columns) &&
         addressable(shape.filters, shape.kernel_height, shape.kernel_width, channels_per_group(shape)) &&
         addressable(shape.batch, shape.out_height, shape.out_width, shape.filters);
}

// Every size in range, and the taps of a window that lie inside the image few enough for int32 sums of +-1.
static inline bool valid(const PoolShape& shape) {
  const auto within = [](int64_t kernel, int64_t size) { return kernel < size ? kernel : size; };
  int64_t taps = within(shape.kernel_height, shape.height);
  return extent({shape.height, shape.kernel_height, shape.out_height, shape.stride_height, shape.pad_top,
                 shape.dilation_height}) >= 0 &&
         extent({shape.width, shape.kernel_width, shape.out_width, shape.stride_width, shape.pad_left,
                 shape.dilation_width}) >= 0 &&
         multiply(taps, within(shape.kernel_width, shape.width)) && taps < (int64_t{1} << 30) &&
         addressable(shape.batch, shape.height, shape.width, shape.channels) &&
         addressable(shape.batch, shape.out_height, shape.out_width, shape.channels);
}

// What a program of steps on `pixels` pixels of so many channels asks of its steps.
static inline Status check_program(const EpilogueProgram& program, int64_t pixels, int64_t channels) {
  if (program.count < 0 || program.count > kMostSteps) return Status::bad_argument;
  for (int64_t i = 0; i < program.count; ++i) {
    const EpilogueStep& step = program.steps[i];
    const bool empty = pixels == 0 || channels == 0;  // tensors without elements have no address
    int64_t row = 0;                                  // what a pixel has
    switch (kind_of(step)) {
      case StepKind::multiply:
      case StepKind::add:
      case StepKind::multiply_image:
      case StepKind::prelu:
        if (!empty && step.first == 0) return Status::bad_argument;
        break;
      case StepKind::multiply_add:
      case StepKind::clamp:
        if (!empty && (step.first == 0 || step.second == 0)) return Status::bad_argument;
        break;
      case StepKind::add_tensor:
      case StepKind::store:
        if (!valid(static_cast<FloatType>(step.option))) return Status::bad_argument;
        if (!empty && (kind_of(step) == StepKind::store ? step.target : step.first) == 0) return Status::bad_argument;
        row = channels;
        break;
      case StepKind::bits:
        if (step.option != 1 && step.option != 2) return Status::bad_argument;
        if (!empty && (step.first == 0 || step.target == 0)) return Status::bad_argument;
        row = words_for(step.option * channels);
        break;
      default:
        return Status::bad_argument;
    }
    if (row > 0 && (step.stride < row || !addressable(pixels, step.stride))) return Status::bad_shape;
  }
  return Status::ok;
}

// Whether all steps need the value and its channel alone.
static inline bool is_elementwise(const EpilogueProgram& program) {
  for (int64_t i = 0; i < program.count; ++i) {
    const StepKind kind = kind_of(program.steps[i]);
    if (kind == StepKind::add_tensor || kind == StepKind::store || kind == StepKind::bits) return false;
  }
  return true;
}

// What pointwise asks of its arguments.
static inline Status check_pointwise(const PointwiseArgs& args) {
  const PoolShape& s = args.shape;
  if (!valid(args.input_type) || args.reduction < Reduction::none || args.reduction > Reduction::average ||
      !is_elementwise(args.before)) {
    return Status::bad_argument;
  }
  if (!valid(s)) return Status::bad_shape;
  const bool same_size = s.kernel_height == 1 && s.kernel_width == 1 && s.stride_height == 1 && s.stride_width == 1 &&
                         s.pad_top == 0 && s.pad_left == 0 && s.out_height == s.height && s.out_width == s.width;
  const bool dilated = s.dilation_height != 1 || s.dilation_width != 1;
  if ((args.reduction == Reduction::none && (!same_size || args.before.count > 0)) ||
      (args.reduction == Reduction::average && dilated)) {
    return Status::bad_argument;
  }
  const int64_t pixels = s.batch * s.height * s.width, out_pixels = s.batch * s.out_height * s.out_width;
  if (args.channels_last && (args.stride < s.channels || !addressable(pixels, args.stride))) return Status::bad_shape;
  const Status status = check_program(args.before, pixels, s.channels);
  return status == Status::ok ? check_program(args.after, out_pixels, s.channels) : status;
}

// What binary_matmul asks of its arguments.
static inline Status check_matmul(const BinaryMatmulArgs& args) {
  const bool signs = args.b_encoding == Encoding::sign;
  const bool wide = args.output_kind == ConvOutput::int32 || args.output_kind == ConvOutput::float32;
  if (is_bits(args.output_kind) || args.output_kind == ConvOutput::program || (!wide && !signs) ||
      (args.scale != nullptr && args.output_kind == ConvOutput::int32)) {
    return Status::bad_argument;
  }
  if (args.batch < 0 || args.rows < 0 || args.columns < 0 || !valid(matmul_shape(args, args.rows)) ||
      (!signs && args.depth >= int64_t{1} << 30) || !addressable(args.batch, args.rows, words_for(args.depth)) ||
      !addressable(args.batch, args.columns, words_for(args.depth)) ||
      !addressable(args.batch, args.rows, args.columns)) {
    return Status::bad_shape;
  }
  return Status::ok;
}

// The second is for the workspaces, which are there although a tensor is empty.
static inline bool valid(const ChannelShape& shape) {
  return addressable(shape.outer, shape.channels, shape.spatial) && addressable(shape.outer, shape.channels, 4);
}

// What an op of channel codes asks of its arguments.
template <class Args>
static inline Status check_channel_codes(const Args& args, int64_t given_bytes) {
  if (!valid_bits(args.bits) || !valid(args.type) || !(args.span > 0)) return Status::bad_argument;
  if (!valid(args.shape)) return Status::bad_shape;
  return given_bytes < workspace_bytes(args) ? Status::small_workspace : Status::ok;
}

}  // namespace lowbit
