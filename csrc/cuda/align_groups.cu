// Reads and writes 8 bytes a word of the output, once. A thread makes several words, all of their loads under way at
// the same time.
#include "core/ops/align_groups.h"

#include "core/checks.h"
#include "core/divisor.h"
#include "cuda/platform.cuh"

namespace lowbit::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWordsPerThread = 4;

struct AlignGroupsKernelArgs {
  AlignGroupsArgs op;
  int64_t row_words;  // of the input
  int64_t count;      // words of the output
  Divisor by_pixel, by_group;
  uint64_t tail_mask;  // of a group's last word
};

__global__ void __launch_bounds__(kThreads) align_groups_kernel(AlignGroupsKernelArgs args) {
  const int64_t first = int64_t{blockIdx.x} * kThreads * kWordsPerThread + threadIdx.x;
  uint64_t words[kWordsPerThread];
#pragma unroll
  for (int i = 0; i < kWordsPerThread; ++i) {
    const int64_t index = first + i * kThreads;
    if (index >= args.count) break;
    const Division pixel = divide_with_remainder(index, args.by_pixel);
    const Division group = divide_with_remainder(pixel.remainder, args.by_group);
    const int64_t bit = group.quotient * args.op.channels_per_group + group.remainder * kWordBits;
    const int64_t word = bit / kWordBits;
    const int shift = static_cast<int>(bit % kWordBits);
    const uint64_t* row = args.op.words + pixel.quotient * args.row_words;
    words[i] = row[word] >> shift;
    if (shift != 0 && word + 1 < args.row_words) words[i] |= row[word + 1] << (kWordBits - shift);
    if (group.remainder + 1 == static_cast<int64_t>(args.by_group.divisor)) words[i] &= args.tail_mask;
  }
#pragma unroll
  for (int i = 0; i < kWordsPerThread; ++i) {
    const int64_t index = first + i * kThreads;
    if (index < args.count) args.op.output[index] = words[i];
  }
}

}  // namespace

Status align_groups(const AlignGroupsArgs& args, Stream stream) noexcept {
  if (!addressable(args.pixels, args.groups, args.channels_per_group)) return Status::bad_shape;
  if (args.pixels == 0 || args.groups == 0 || args.channels_per_group == 0) return Status::ok;
  const int64_t group_words = words_for(args.channels_per_group);
  const AlignGroupsKernelArgs kernel_args{args,
                                          words_for(args.groups * args.channels_per_group),
                                          args.pixels * args.groups * group_words,
                                          make_divisor(args.groups * group_words),
                                          make_divisor(group_words),
                                          low_mask(args.channels_per_group - (group_words - 1) * kWordBits)};
  return launch(align_groups_kernel, {blocks_for(kernel_args.count, kThreads * kWordsPerThread), dim3(kThreads)},
                stream, kernel_args);
}

}  // namespace lowbit::cuda
