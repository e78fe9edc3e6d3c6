// A thread makes one or two neighbouring words of the output: loads of 8 or 16 bytes, side by side across a warp. The
// usual windows, 2 x 2 and 3 x 3, are unrolled: all their loads are under way before the first is needed.
#include "core/ops/binary_max_pool2d.h"

#include "core/checks.h"
#include "core/divisor.h"
#include "core/tap_range.h"
#include "cuda/platform.cuh"

namespace lowbit::cuda {
namespace {

constexpr int kThreads = 256;

struct MaxPoolKernelArgs {
  BinaryMaxPool2dArgs op;
  int64_t row_words;
  int64_t count;  // threads' worth of output
  Divisor by_pixel, by_out_width, by_out_height;
};

// kWords: of a thread. kKernel: height and width of the window; 0: any.
template <int kWords, int kKernel>
__global__ void __launch_bounds__(kThreads) binary_max_pool2d_kernel(MaxPoolKernelArgs args) {
  using Words = Pack<uint64_t, kWords>;
  const PoolShape& s = args.op.shape;
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index >= args.count) return;
  const Division pixel = divide_with_remainder(index, args.by_pixel);
  const Division row = divide_with_remainder(pixel.quotient, args.by_out_width);
  const Division image = divide_with_remainder(row.quotient, args.by_out_height);
  const int64_t word = pixel.remainder * kWords;
  const int64_t top = image.remainder * s.stride_height - s.pad_top;
  const int64_t left = row.remainder * s.stride_width - s.pad_left;
  const uint64_t* input = args.op.input + image.quotient * s.height * s.width * args.row_words + word;
  Words inverted{}, any{};
  if (args.op.invert) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) inverted.values[i] = args.op.invert[word + i];
  }
  const auto tap = [&](int64_t y, int64_t x) {
    return *reinterpret_cast<const Words*>(input + (y * s.width + x) * args.row_words);
  };
  if constexpr (kKernel > 0) {
    Words taps[kKernel * kKernel];
#pragma unroll
    for (int i = 0; i < kKernel * kKernel; ++i) {
      const int64_t y = top + i / kKernel * s.dilation_height, x = left + i % kKernel * s.dilation_width;
      // What lies outside adds nothing: the neutral element of the OR behind the inversion.
      taps[i] = y >= 0 && y < s.height && x >= 0 && x < s.width ? tap(y, x) : inverted;
    }
#pragma unroll
    for (int i = 0; i < kKernel * kKernel; ++i) {
#pragma unroll
      for (int j = 0; j < kWords; ++j) any.values[j] |= taps[i].values[j] ^ inverted.values[j];
    }
  } else {
    const TapRange rows =
        valid_taps(image.remainder, s.stride_height, s.pad_top, s.dilation_height, s.kernel_height, s.height);
    const TapRange columns =
        valid_taps(row.remainder, s.stride_width, s.pad_left, s.dilation_width, s.kernel_width, s.width);
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      for (int64_t j = columns.begin; j < columns.end; ++j) {
        const Words here = tap(top + i * s.dilation_height, left + j * s.dilation_width);
#pragma unroll
        for (int k = 0; k < kWords; ++k) any.values[k] |= here.values[k] ^ inverted.values[k];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kWords; ++i) any.values[i] ^= inverted.values[i];
  reinterpret_cast<Words*>(args.op.output)[index] = any;
}

template <int kWords>
Status max_pool(const BinaryMaxPool2dArgs& args, Stream stream) {
  const PoolShape& s = args.shape;
  const int64_t row_words = words_for(s.channels);
  const int64_t count = s.batch * s.out_height * s.out_width * row_words / kWords;
  const MaxPoolKernelArgs kernel_args{
      args, row_words, count, make_divisor(row_words / kWords), make_divisor(s.out_width), make_divisor(s.out_height)};
  const bool square = s.kernel_height == s.kernel_width;
  return launch(square && s.kernel_height == 2   ? binary_max_pool2d_kernel<kWords, 2>
                : square && s.kernel_height == 3 ? binary_max_pool2d_kernel<kWords, 3>
                                                 : binary_max_pool2d_kernel<kWords, 0>,
                {blocks_for(count, kThreads), dim3(kThreads)}, stream, kernel_args);
}

}  // namespace

Status binary_max_pool2d(const BinaryMaxPool2dArgs& args, Stream stream) noexcept {
  const PoolShape& s = args.shape;
  if (!valid(s)) return Status::bad_shape;
  if (s.batch == 0 || s.channels == 0 || s.out_height == 0 || s.out_width == 0) return Status::ok;
  const bool pairs =
      words_for(s.channels) % 2 == 0 && is_aligned(args.input, kPackBytes) && is_aligned(args.output, kPackBytes);
  return pairs ? max_pool<2>(args, stream) : max_pool<1>(args, stream);
}

}  // namespace lowbit::cuda
