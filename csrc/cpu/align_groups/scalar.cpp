#include "cpu/align_groups/align_groups.h"

namespace lowbit::scalar {
namespace {

// 64 bits of a packed row from bit `first` on; 0 past the row's end.
uint64_t bits_from(const uint64_t* row, uint64_t row_words, uint64_t first) {
  const uint64_t word = first / kWordBits;
  const uint64_t shift = first % kWordBits;
  const uint64_t bits = row[word] >> shift;
  if (shift == 0 || word + 1 == row_words) return bits;
  return bits | row[word + 1] << (kWordBits - shift);
}

}  // namespace

void align_groups(const AlignGroupsArgs& args, int64_t begin, int64_t end) noexcept {
  const int64_t row_words = words_for(args.groups * args.channels_per_group);
  const int64_t group_words = words_for(args.channels_per_group);
  const uint64_t tail_mask = low_mask(args.channels_per_group - (group_words - 1) * kWordBits);
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    const uint64_t* row = args.words + pixel * row_words;
    uint64_t* output = args.output + pixel * args.groups * group_words;
    for (int64_t group = 0; group < args.groups; ++group) {
      const int64_t first = group * args.channels_per_group;
      for (int64_t word = 0; word < group_words; ++word) {
        *output++ = bits_from(row, static_cast<uint64_t>(row_words), static_cast<uint64_t>(first + word * kWordBits));
      }
      output[-1] &= tail_mask;
    }
  }
}

}  // namespace lowbit::scalar
