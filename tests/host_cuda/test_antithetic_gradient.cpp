#include "cpu/antithetic_gradient/antithetic_gradient.h"

#include "tests.h"

namespace lowbit::test {
namespace {

void check(Random& random, SampleLayout layout) {
  const int64_t rows = random.between(0, 5), dimensions = random.size(200);
  const int64_t samples = random.between(1, random.between(0, 3) ? 20 : kMostSamples);
  const int64_t elements = rows * dimensions;
  const int64_t bytes =
      layout == SampleLayout::dimension ? samples * rows * words_for(dimensions) * 8 : elements * sample_bytes(samples);
  Buffer<uint8_t> bits(bytes, Alignment::allocator);
  for (int64_t i = 0; i < bytes; ++i) bits[i] = static_cast<uint8_t>(random.bits());
  Buffer<float> weight(rows * samples, random_alignment(random)), ratio(elements, random_alignment(random));
  for (int64_t i = 0; i < rows * samples; ++i) weight[i] = random.normal();
  for (int64_t i = 0; i < elements; ++i) ratio[i] = random.normal();
  Buffer<float> got(elements, random_alignment(random)), expected(elements);
  AntitheticGradientArgs args{bits.data(), layout,        rows,         dimensions,
                              samples,     weight.data(), ratio.data(), expected.data()};
  if (random.between(0, 3) == 0) args.ratio = nullptr;
  scalar::antithetic_gradient(args, 0, antithetic_gradient_items(args));
  args.gradient = got.data();
  const std::string what = std::to_string(rows) + " x " + std::to_string(dimensions) + ", n " +
                           std::to_string(samples) + ", layout " + std::to_string(static_cast<int>(layout));
  expect_ok(what, cuda::antithetic_gradient(args, kStream));
  expect_same(what, got, expected);
}

}  // namespace

LOWBIT_TEST(antithetic_gradient) {
  for (int i = 0; i < cases; ++i) {
    check(random, SampleLayout::sample);
    check(random, SampleLayout::dimension);
  }
}

}  // namespace lowbit::test
