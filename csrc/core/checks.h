// What every launcher, CPU and CUDA, asks of sizes before a kernel sees them.
#pragma once

#include "core/codes.h"
#include "core/conv_shape.h"
#include "core/float_type.h"
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
