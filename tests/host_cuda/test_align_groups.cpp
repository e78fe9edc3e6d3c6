#include "cpu/align_groups/align_groups.h"

#include "tests.h"

namespace lowbit::test {

LOWBIT_TEST(align_groups) {
  for (int i = 0; i < cases; ++i) {
    const int64_t pixels = random.between(0, 300), groups = random.between(1, 9), channels = random.size(200);
    Buffer<uint64_t> words(pixels * words_for(groups * channels));
    fill_bits(words, groups * channels, random);
    Buffer<uint64_t> got(pixels * groups * words_for(channels)), expected(got.size());
    AlignGroupsArgs args{words.data(), pixels, groups, channels, expected.data()};
    scalar::align_groups(args, 0, pixels);
    args.output = got.data();
    const std::string what = std::to_string(pixels) + " pixels of " + std::to_string(groups) + " groups of " +
                             std::to_string(channels) + " channels";
    expect_ok(what, cuda::align_groups(args, kStream));
    expect_same(what, got, expected);
  }
}

}  // namespace lowbit::test
