#include "common.h"
#include "cpu/align_groups/align_groups.h"

namespace lowbit::test {

LOWBIT_TEST(align_groups) {
  for (int i = 0; i < cases; ++i) {
    const int64_t pixels = random.between(0, 9), groups = random.between(1, 9), channels = random.size(200);
    const int64_t row_words = words_for(groups * channels), group_words = words_for(channels);
    Buffer<uint64_t> words(pixels * row_words);
    fill_bits(words, groups * channels, random);

    std::vector<uint64_t> expected(static_cast<size_t>(pixels * groups * group_words));
    for (int64_t pixel = 0; pixel < pixels; ++pixel) {
      for (int64_t channel = 0; channel < groups * channels; ++channel) {
        if (!bit_at(words.data() + pixel * row_words, channel)) continue;
        const int64_t group = pixel * groups + channel / channels;
        set_bit(expected.data() + group * group_words, channel % channels);
      }
    }

    Buffer<uint64_t> launched(pixels * groups * group_words), pieced(pixels * groups * group_words);
    AlignGroupsArgs args{words.data(), pixels, groups, channels, launched.data()};
    const std::string what = std::to_string(groups) + " groups of " + std::to_string(channels) + " channels";
    expect_ok(what, launch::align_groups(args));
    expect_same(what, launched, expected);
    args.output = pieced.data();
    in_pieces(pixels, random, [&](int64_t begin, int64_t end) { kernels().align_groups(args, begin, end); });
    expect_same(what + " in pieces", pieced, expected);
  }
}

}  // namespace lowbit::test
