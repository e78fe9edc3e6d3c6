#include <algorithm>
#include <cmath>

#include "common.h"
#include "cpu/antithetic_sample/antithetic_sample.h"

namespace lowbit::test {
namespace {

// The generator again, as its paper writes it, so that the test does not lean on core/philox.h.
std::vector<uint32_t> draws_of(uint64_t index, uint64_t seed, int64_t count) {
  std::vector<uint32_t> draws;
  for (uint32_t block = 0; static_cast<int64_t>(draws.size()) < count; ++block) {
    uint32_t x[4] = {static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32), block, 0};
    uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
    for (int round = 0; round < 10; ++round) {
      const uint64_t a = uint64_t{0xD2511F53u} * x[0], b = uint64_t{0xCD9E8D57u} * x[2];
      const uint32_t next[4] = {static_cast<uint32_t>(b >> 32) ^ x[1] ^ key[0], static_cast<uint32_t>(b),
                                static_cast<uint32_t>(a >> 32) ^ x[3] ^ key[1], static_cast<uint32_t>(a)};
      memcpy(x, next, sizeof x);
      key[0] += 0x9E3779B9u;
      key[1] += 0xBB67AE85u;
    }
    draws.insert(draws.end(), x, x + 4);
  }
  draws.resize(static_cast<size_t>(count));
  return draws;
}

uint32_t scaled(long double x) {
  return static_cast<uint32_t>(std::min(std::nearbyint(x * 4294967296.0L), 4294967295.0L));
}

// Standard normal quantile of (u + 1/2) / 2^32 by bisection on the distribution function.
double normal_quantile(uint32_t u) {
  const double p = (static_cast<double>(u) + 0.5) / 4294967296.0;
  double low = -7, high = 7;
  for (int i = 0; i < 70; ++i) {
    const double middle = (low + high) / 2;
    (0.5 * std::erfc(-middle / std::sqrt(2.0)) < p ? low : high) = middle;
  }
  return low;
}

struct Element {
  uint64_t bits = 0;     // sample i in bit i
  uint64_t unclear = 0;  // samples too close to call in float32 (gaussian)
  double ratio = 1;
};

Element sample_element(double logit, double quantile, int64_t n, Coupling coupling, uint64_t index, uint64_t seed) {
  const long double q = 1 / (1 + std::exp(std::fabs(static_cast<long double>(logit))));
  const uint64_t flip = logit > 0 ? low_mask(n) : 0;
  Element element;
  const auto low = [&](int64_t i, bool event) { element.bits |= uint64_t{event} << i; };
  std::vector<uint32_t> u = draws_of(index, seed, n + 1);
  switch (coupling) {
    case Coupling::independent:
      for (int64_t i = 0; i < n; ++i) low(i, u[static_cast<size_t>(i)] < scaled(q));
      break;
    case Coupling::antithetic_pairs:
      for (int64_t i = 0; i < n; ++i) {
        const uint32_t draw = u[static_cast<size_t>(i / 2)];
        low(i, (i % 2 ? ~draw : draw) < scaled(q));
      }
      element.ratio = static_cast<double>(1 - q);
      break;
    case Coupling::dirichlet: {
      u.resize(static_cast<size_t>(n - 1));
      std::sort(u.begin(), u.end());
      const long double root = std::pow(q, 1.0L / static_cast<long double>(n - 1));
      uint32_t before = 0;
      for (int64_t i = 0; i < n; ++i) {
        const uint32_t here = i < n - 1 ? u[static_cast<size_t>(i)] : ~0u;
        low(i, here - before > scaled(1 - root));
        before = here;
      }
      const long double both = std::pow(std::max(0.0L, 2 - 1 / root), static_cast<long double>(n - 1));
      element.ratio = static_cast<double>((1 - q) / (1 - both));
      break;
    }
    case Coupling::systematic: {
      const long double m = std::floor(static_cast<long double>(n) * q);
      int64_t left = static_cast<int64_t>(m) + (u[0] < scaled(static_cast<long double>(n) * q - m));
      for (int64_t i = 0; i < n; ++i) {
        const bool chosen = static_cast<int64_t>(uint64_t{u[static_cast<size_t>(i + 1)]} * (n - i) >> 32) < left;
        low(i, chosen);
        left -= chosen;
      }
      const long double count = static_cast<long double>(n);
      element.ratio = static_cast<double>(q * (1 - q) / (q - m * (2 * count * q - m - 1) / (count * (count - 1))));
      break;
    }
    case Coupling::gaussian: {
      std::vector<double> z;
      double mean = 0;
      for (int64_t i = 0; i < n; ++i) {
        z.push_back(normal_quantile(u[static_cast<size_t>(i)]));
        mean += z.back() / static_cast<double>(n);
      }
      for (int64_t i = 0; i < n; ++i) {
        const double x =
            std::sqrt(static_cast<double>(n) / static_cast<double>(n - 1)) * (z[static_cast<size_t>(i)] - mean);
        low(i, x < quantile);
        element.unclear |= uint64_t{std::fabs(x - quantile) < 1e-5} << i;
      }
      break;
    }
  }
  element.bits ^= flip;
  return element;
}

void check(Random& random, Coupling coupling) {
  const int64_t rows = random.between(0, 3), dimensions = random.size(200);
  int64_t n = random.pick<int64_t>({2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64});
  if (coupling == Coupling::independent) n = random.pick<int64_t>({1, n});
  if (coupling == Coupling::antithetic_pairs) n &= ~int64_t{1};
  // The last element's index may pass 2^32.
  const uint64_t seed = random.bits(), offset = random.pick<uint64_t>({0, random.bits(), 0xffffffffu - 70});
  const float width = random.pick({0.0f, 1.0f, 3.0f, 15.0f});
  Buffer<float> logits(rows * dimensions), quantile(rows * dimensions), ratio(rows * dimensions);
  for (int64_t i = 0; i < logits.size(); ++i) {
    logits[i] = width * random.normal();
    quantile[i] = -std::fabs(random.normal());
  }
  const std::string what = "coupling " + std::to_string(static_cast<int>(coupling)) + ", n " + std::to_string(n) +
                           ", " + std::to_string(rows) + " x " + std::to_string(dimensions);
  Buffer<uint8_t> by_sample(rows * dimensions * sample_bytes(n)), pieced(by_sample.size());
  Buffer<uint64_t> by_dimension(n * rows * words_for(dimensions));
  AntitheticSampleArgs args{logits.data(), quantile.data(),      rows, dimensions, n,
                            coupling,      SampleLayout::sample, seed, offset,     by_sample.data(),
                            ratio.data()};
  expect_ok(what, launch::antithetic_sample(args));
  args.bits = pieced.data();
  args.ratio = nullptr;
  in_pieces(antithetic_sample_items(args), random, [&](int64_t begin, int64_t end) {
    if (!kernels().antithetic_sample(args, begin, end)) fail(what + ": finite logits reported as not finite");
  });
  expect_same(what + " in pieces", pieced, by_sample);
  args.layout = SampleLayout::dimension;
  args.bits = by_dimension.data();
  expect_ok(what, launch::antithetic_sample(args));

  std::vector<uint64_t> dimension_words(static_cast<size_t>(by_dimension.size()));
  for (int64_t i = 0; i < logits.size(); ++i) {
    uint64_t bits = 0;
    memcpy(&bits, by_sample.data() + i * sample_bytes(n), static_cast<size_t>(sample_bytes(n)));
    const Element expected =
        sample_element(logits[i], quantile[i], n, coupling, offset + static_cast<uint64_t>(i), seed);
    if ((bits ^ expected.bits) & ~expected.unclear) fail(what + ": bits of element " + std::to_string(i) + " differ");
    if (coupling != Coupling::gaussian && std::fabs(ratio[i] - expected.ratio) > 2e-7 * expected.ratio) {
      fail(what + ": ratio of element " + std::to_string(i) + " is " + std::to_string(ratio[i]) + ", expected " +
           std::to_string(expected.ratio));
    }
    for (int64_t s = 0; s < n; ++s) {
      if (bits >> s & 1) {
        const int64_t row = s * rows + i / dimensions;
        set_bit(dimension_words.data() + row * words_for(dimensions), i % dimensions);
      }
    }
  }
  expect_same(what + " by dimension", by_dimension, dimension_words);
}

void check_not_finite() {
  Buffer<float> logits(130);
  Buffer<uint8_t> bits(130);
  for (const float bad : {INFINITY, -INFINITY, NAN}) {
    for (int64_t i = 0; i < logits.size(); ++i) logits[i] = 0;
    logits[129] = bad;
    const AntitheticSampleArgs args{logits.data(),        nullptr, 1, 130,         4,      Coupling::dirichlet,
                                    SampleLayout::sample, 0,       0, bits.data(), nullptr};
    if (launch::antithetic_sample(args) != Status::not_finite) fail("a logit that is not finite passes");
  }
}

}  // namespace

LOWBIT_TEST(antithetic_sample) {
  for (int i = 0; i < cases / 10 + 1; ++i) {
    for (const Coupling coupling : {Coupling::independent, Coupling::antithetic_pairs, Coupling::dirichlet,
                                    Coupling::systematic, Coupling::gaussian}) {
      check(random, coupling);
    }
  }
  check_not_finite();
}

}  // namespace lowbit::test
