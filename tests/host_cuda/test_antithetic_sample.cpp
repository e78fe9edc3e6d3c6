#include <cmath>

#include "cpu/antithetic_sample/antithetic_sample.h"

#include "tests.h"

namespace lowbit::test {
namespace {

constexpr Coupling kCouplings[] = {Coupling::independent, Coupling::antithetic_pairs, Coupling::dirichlet,
                                   Coupling::systematic, Coupling::gaussian};

void check(Random& random, Coupling coupling, SampleLayout layout) {
  const int64_t rows = random.between(0, 5), dimensions = random.size(200);
  int64_t samples = random.between(coupling == Coupling::independent ? 1 : 2, random.between(0, 3) ? 20 : kMostSamples);
  if (coupling == Coupling::antithetic_pairs) samples += samples % 2;
  const int64_t elements = rows * dimensions;
  const bool by_dimension = layout == SampleLayout::dimension;
  const int64_t bytes = by_dimension ? samples * rows * words_for(dimensions) * 8 : elements * sample_bytes(samples);
  Buffer<float> logits(elements, random_alignment(random)), quantile(elements, random_alignment(random));
  for (int64_t i = 0; i < elements; ++i) {
    logits[i] = random.normal() * (random.between(0, 3) ? 2.0f : 30.0f);
    quantile[i] = random.normal();
  }
  Buffer<uint8_t> got(bytes, Alignment::allocator), expected(bytes, Alignment::allocator);
  Buffer<float> got_ratio(elements, random_alignment(random)), expected_ratio(elements);
  const bool gaussian = coupling == Coupling::gaussian;
  AntitheticSampleArgs args{logits.data(), gaussian ? quantile.data() : nullptr,
                            rows,          dimensions,
                            samples,       coupling,
                            layout,        random.bits(),
                            random.bits(), expected.data(),
                            nullptr};
  const bool with_ratio = !gaussian && random.between(0, 3) != 0;
  if (with_ratio) args.ratio = expected_ratio.data();
  scalar::antithetic_sample(args, 0, antithetic_sample_items(args));
  args.bits = got.data();
  if (with_ratio) args.ratio = got_ratio.data();
  const std::string what = std::to_string(rows) + " x " + std::to_string(dimensions) + ", n " +
                           std::to_string(samples) + ", coupling " + std::to_string(static_cast<int>(coupling)) +
                           ", layout " + std::to_string(static_cast<int>(layout));
  expect_ok(what, cuda::antithetic_sample(args, kStream));
  expect_same(what, got, expected);
  if (with_ratio) expect_same(what + ", ratio", got_ratio, expected_ratio);
}

// What the CPU refuses after looking at every number, the device marks.
void check_not_finite(Random& random) {
  Buffer<float> logits(3), ratio(3);
  Buffer<uint8_t> bits(3, Alignment::allocator);
  logits[0] = random.normal(), logits[1] = NAN, logits[2] = -INFINITY;
  const AntitheticSampleArgs args{logits.data(),        nullptr, 1, 3,           4,           Coupling::dirichlet,
                                  SampleLayout::sample, 1,       0, bits.data(), ratio.data()};
  expect_ok("not finite", cuda::antithetic_sample(args, kStream));
  if (std::isnan(ratio[0]) || !std::isnan(ratio[1]) || !std::isnan(ratio[2])) fail("ratios of NaN and infinity");
}

void check_refused() {
  AntitheticSampleArgs args{};
  args.rows = args.dimensions = 1;
  args.coupling = Coupling::antithetic_pairs;
  for (const int64_t samples : {int64_t{0}, int64_t{1}, int64_t{3}, kMostSamples + 2}) {
    args.samples = samples;
    if (cuda::antithetic_sample(args, kStream) != Status::bad_argument) fail(std::to_string(samples) + " samples");
  }
}

}  // namespace

LOWBIT_TEST(antithetic_sample) {
  for (int i = 0; i < cases; ++i) {
    for (const Coupling coupling : kCouplings) {
      check(random, coupling, SampleLayout::sample);
      check(random, coupling, SampleLayout::dimension);
    }
  }
  check_not_finite(random);
  check_refused();
}

}  // namespace lowbit::test
