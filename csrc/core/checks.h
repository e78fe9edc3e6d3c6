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

// Whether the product of the sizes, times 8 bytes, is addressable.
template <class... Sizes>
static inline bool addressable(Sizes... sizes) {
  int64_t product = 8;
  return (multiply(product, sizes) && ...);
}

// Every size in range, channels and filters divisible by groups, and taps * channels_per_group inside int32.
static inline bool valid(const ConvShape& shape) {
  if (shape.groups <= 0 || shape.channels <= 0 || shape.filters < 0 || shape.channels % shape.groups != 0 ||
      shape.filters % shape.groups != 0 || shape.kernel_height <= 0 || shape.kernel_width <= 0 ||
      shape.stride_height <= 0 || shape.stride_width <= 0 || shape.dilation_height <= 0 || shape.dilation_width <= 0 ||
      shape.pad_top < 0 || shape.pad_left < 0) {
    return false;
  }
  int64_t products = channels_per_group(shape);
  if (!multiply(products, shape.kernel_height) || !multiply(products, shape.kernel_width)) return false;
  return products < (int64_t{1} << 31) &&
         addressable(shape.batch, shape.height, shape.width, shape.groups, words_per_group(shape)) &&
         addressable(shape.filters, shape.kernel_height, shape.kernel_width, channels_per_group(shape)) &&
         addressable(shape.batch, shape.out_height, shape.out_width, shape.filters);
}

static inline bool valid(const PoolShape& shape) {
  return shape.kernel_height > 0 && shape.kernel_width > 0 && shape.stride_height > 0 && shape.stride_width > 0 &&
         shape.dilation_height > 0 && shape.dilation_width > 0 && shape.pad_top >= 0 && shape.pad_left >= 0 &&
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
