#include "common.h"
#include "cpu/antithetic_gradient/antithetic_gradient.h"

namespace lowbit::test {
namespace {

void check(Random& random) {
  const int64_t rows = random.between(0, 3), dimensions = random.pick<int64_t>({random.size(640), 1023, 1024, 1025});
  const int64_t n = random.between(1, kMostSamples);
  const bool with_ratio = random.coin();
  Buffer<uint64_t> by_sample(ceil_div(rows * dimensions * sample_bytes(n), 8));  // aligned for every width of element
  uint8_t* const sample_memory = reinterpret_cast<uint8_t*>(by_sample.data());
  Buffer<uint64_t> by_dimension(n * rows * words_for(dimensions));
  Buffer<float> weight(rows * n), ratio(rows * dimensions), gradient(rows * dimensions);
  for (int64_t i = 0; i < weight.size(); ++i) weight[i] = random.normal();
  for (int64_t i = 0; i < ratio.size(); ++i) ratio[i] = random.normal();
  memset(by_dimension.data(), 0, static_cast<size_t>(by_dimension.bytes()));

  std::vector<float> expected;
  for (int64_t i = 0; i < gradient.size(); ++i) {
    const int64_t row = i / dimensions;
    const uint64_t bits = random.bits() & low_mask(n);
    memcpy(sample_memory + i * sample_bytes(n), &bits, static_cast<size_t>(sample_bytes(n)));
    float sum = 0;
    for (int64_t first = 0; first < n; first += 4) {
      float part = 0;
      for (int64_t s = first; s < first + 4 && s < n; ++s) {
        if (!(bits >> s & 1)) continue;
        part += weight[row * n + s];
        set_bit(by_dimension.data() + (s * rows + row) * words_for(dimensions), i % dimensions);
      }
      sum += part;
    }
    expected.push_back(with_ratio ? sum * ratio[i] : sum);
  }

  AntitheticGradientArgs args{
      by_sample.data(), SampleLayout::sample, rows, dimensions, n, weight.data(), with_ratio ? ratio.data() : nullptr,
      gradient.data()};
  const std::string what = "n " + std::to_string(n) + ", " + std::to_string(rows) + " x " + std::to_string(dimensions);
  expect_ok(what, launch::antithetic_gradient(args));
  expect_same(what, gradient, expected);
  args.layout = SampleLayout::dimension;
  args.bits = by_dimension.data();
  expect_ok(what, launch::antithetic_gradient(args));
  expect_same(what + " by dimension", gradient, expected);
  memset(gradient.data(), 0, static_cast<size_t>(gradient.bytes()));
  in_pieces(antithetic_gradient_items(args), random,
            [&](int64_t begin, int64_t end) { kernels().antithetic_gradient(args, begin, end); });
  expect_same(what + " in pieces", gradient, expected);
}

}  // namespace

LOWBIT_TEST(antithetic_gradient) {
  for (int i = 0; i < cases; ++i) check(random);
}

}  // namespace lowbit::test
