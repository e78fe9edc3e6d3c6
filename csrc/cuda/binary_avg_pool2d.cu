// Writes 4 bytes a channel and reads an eighth of a byte for every tap: the stores are what counts. A thread makes four
// neighbouring channels of one output pixel, 16 bytes; its four bits of a tap are spread to four byte counters at once.
#include "core/ops/binary_avg_pool2d.h"

#include "core/checks.h"
#include "core/divisor.h"
#include "cuda/platform.cuh"

namespace lowbit::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kChannels = 4;        // of a thread
constexpr int64_t kByteTaps = 255;  // additions of 1 that a byte holds

struct AvgPoolKernelArgs {
  BinaryAvgPool2dArgs op;
  int64_t row_words;
  int64_t count;  // threads
  Divisor by_pixel, by_out_width, by_out_height;
  bool whole;  // a thread's channels are all there, and 16 bytes of the output may be stored at once
};

__global__ void __launch_bounds__(kThreads) binary_avg_pool2d_kernel(AvgPoolKernelArgs args) {
  const PoolShape& s = args.op.shape;
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index >= args.count) return;
  const Division pixel = divide_with_remainder(index, args.by_pixel);
  const Division row = divide_with_remainder(pixel.quotient, args.by_out_width);
  const Division image = divide_with_remainder(row.quotient, args.by_out_height);
  const int64_t channel = pixel.remainder * kChannels;
  const int shift = static_cast<int>(channel % kWordBits);
  const uint64_t* input = args.op.input + image.quotient * s.height * s.width * args.row_words + channel / kWordBits;
  const PoolWindow window = pool_window(args.op.count_include_pad, args.op.divisor_override,
                                        row_span(s, image.remainder), column_span(s, row.remainder));
  int32_t ones[kChannels] = {};
  uint32_t counts = 0;
  int64_t room = kByteTaps;
  const auto add_counts = [&] {
#pragma unroll
    for (int i = 0; i < kChannels; ++i) ones[i] += static_cast<int32_t>(counts >> (8 * i) & 0xff);
    counts = 0;
    room = kByteTaps;
  };
  for (int64_t y = window.top; y < window.bottom; ++y) {
    for (int64_t x = window.left; x < window.right; ++x) {
      const uint32_t bits = static_cast<uint32_t>(input[(y * s.width + x) * args.row_words] >> shift) & 0xf;
      counts += bits * 0x00204081u & 0x01010101u;  // bit i to byte i
      if (--room == 0) add_counts();
    }
  }
  add_counts();
  Pack<float> averages;
#pragma unroll
  for (int i = 0; i < kChannels; ++i) {
    const int32_t sum = args.op.encoding == Encoding::sign ? 2 * ones[i] - static_cast<int32_t>(window.taps) : ones[i];
    averages.values[i] = static_cast<float>(sum) / window.divisor;
  }
  float* output = args.op.output + pixel.quotient * s.channels + channel;
  if (args.whole) {
    *reinterpret_cast<Pack<float>*>(output) = averages;
  } else {
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      if (channel + i < s.channels) output[i] = averages.values[i];
    }
  }
}

}  // namespace

Status binary_avg_pool2d(const BinaryAvgPool2dArgs& args, Stream stream) noexcept {
  const PoolShape& s = args.shape;
  if (!valid(s)) return Status::bad_shape;
  if (s.batch == 0 || s.channels == 0 || s.out_height == 0 || s.out_width == 0) return Status::ok;
  const int64_t per_pixel = ceil_div(s.channels, kChannels);
  const int64_t count = s.batch * s.out_height * s.out_width * per_pixel;
  const AvgPoolKernelArgs kernel_args{args,
                                      words_for(s.channels),
                                      count,
                                      make_divisor(per_pixel),
                                      make_divisor(s.out_width),
                                      make_divisor(s.out_height),
                                      s.channels % kChannels == 0 && is_aligned(args.output, kPackBytes)};
  return launch(binary_avg_pool2d_kernel, {blocks_for(count, kThreads), dim3(kThreads)}, stream, kernel_args);
}

}  // namespace lowbit::cuda
