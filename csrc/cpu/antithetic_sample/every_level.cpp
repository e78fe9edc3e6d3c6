// The sampler: one lane an element.
#include "core/philox.h"
#include "cpu/antithetic_sample/antithetic_sample.h"
#include "cpu/shared/lanes_u32.h"

namespace lowbit::LOWBIT_LEVEL {
namespace {

// --- sorting

constexpr int kMostUnrolled = 15;  // networks up to here are straight-line code: 56 comparators

struct Comparator {
  uint8_t low, high;
};

template <int kCount>
struct Network {
  Comparator comparators[kCount * kCount / 2 + 1];
  int count;
};

// Calls compare(i, j) in the order of Batcher's odd-even merge sort. Knuth, volume 3, 5.2.2, algorithm M.
template <class Compare>
constexpr void batcher(int count, Compare compare) {
  int top = 1;
  while (2 * top < count) top *= 2;
  for (int p = top; p > 0; p /= 2) {
    int q = top, r = 0, distance = p;
    while (true) {
      for (int i = 0; i + distance < count; ++i) {
        if ((i & p) == r) compare(i, i + distance);
      }
      if (q == p) break;
      distance = q - p;
      q /= 2;
      r = p;
    }
  }
}

template <int kCount>
constexpr Network<kCount> make_network() {
  Network<kCount> network{};
  batcher(kCount, [&](int i, int j) {
    network.comparators[network.count++] = {static_cast<uint8_t>(i), static_cast<uint8_t>(j)};
  });
  return network;
}

inline void compare_exchange(LanesU32& a, LanesU32& b) {
  const LanesU32 low = LanesU32::min(a, b);
  b = LanesU32::max(a, b);
  a = low;
}

template <int kCount, int kNext = 0>
inline __attribute__((always_inline)) void run_network(LanesU32* values) {
  constexpr Network<kCount> network = make_network<kCount>();
  if constexpr (kNext < network.count) {
    compare_exchange(values[network.comparators[kNext].low], values[network.comparators[kNext].high]);
    run_network<kCount, kNext + 1>(values);
  }
}

template <int kCount>
void sort_unrolled(LanesU32* values) {
  LanesU32 registers[kCount];
  for (int i = 0; i < kCount; ++i) registers[i] = values[i];
  run_network<kCount>(registers);
  for (int i = 0; i < kCount; ++i) values[i] = registers[i];
}

template <int kCount = kMostUnrolled>
void sort(LanesU32* values, int count) {
  if constexpr (kCount > 1) {
    if (count > kCount) {
      return batcher(count, [&](int i, int j) { compare_exchange(values[i], values[j]); });
    }
    if (count == kCount) return sort_unrolled<kCount>(values);
    sort<kCount - 1>(values, count);
  }
}

// --- from logits to integer thresholds

// One block of a row.
struct Block {
  int64_t row, first;                      // first dimension
  int count;                               // dimensions, 1 to 64
  alignas(64) uint32_t logits[kWordBits];  // bits of the float32, 0 past the end
  alignas(64) uint32_t threshold[kWordBits];
  alignas(64) uint32_t whole[kWordBits];  // floor(n q), systematic only
  alignas(64) uint32_t index_low[kWordBits], index_high[kWordBits];
};

// What the functions below compute for the 64 elements of a block, one loop a step so that each vectorises.
using Doubles = double[kWordBits];

inline void nearest_integers(const Doubles& x, uint32_t* integers) {
  for (int i = 0; i < kWordBits; ++i) integers[i] = nearest_u32(x[i]);
}

// Probability of low and the draws' threshold in units of 2^-32, and the ratio, by the formulas of the contract. `e` is
// exp(-|logit|), p = 1 - q of the likelier value.
inline void dirichlet(const Doubles& magnitude, const Doubles& e, const Doubles& p, int samples, Doubles& threshold,
                      Doubles& ratio) {
  Doubles both, power;
  for (int i = 0; i < kWordBits; ++i) {
    const double root = dirichlet_root(magnitude[i], e[i], samples);
    threshold[i] = 1.0 - root;
    both[i] = power[i] = dirichlet_joint_root(root);
  }
  for (int k = 2; k < samples; ++k) {
    for (int i = 0; i < kWordBits; ++i) power[i] *= both[i];
  }
  for (int i = 0; i < kWordBits; ++i) ratio[i] = dirichlet_ratio(p[i], power[i]);
}

inline void systematic(const Doubles& p, const Doubles& q, int samples, Doubles& threshold, Doubles& whole,
                       Doubles& ratio) {
  for (int i = 0; i < kWordBits; ++i) {
    const double expected = samples * q[i];
    whole[i] = systematic_whole(expected);
    threshold[i] = expected - whole[i];
    ratio[i] = systematic_ratio(p[i], q[i], expected, whole[i], samples);
  }
}

inline void prepare_block(const AntitheticSampleArgs& args, Block& block, float* ratios) {
  const int samples = static_cast<int>(args.samples);
  Doubles magnitude, e, p, q, threshold, whole, ratio;
  for (int i = 0; i < kWordBits; ++i) magnitude[i] = logit_magnitude(block.logits[i]);
  for (int i = 0; i < kWordBits; ++i) e[i] = exp_double(-magnitude[i]);
  for (int i = 0; i < kWordBits; ++i) {
    p[i] = 1.0 / (1.0 + e[i]);
    threshold[i] = q[i] = e[i] * p[i];
    ratio[i] = args.coupling == Coupling::independent ? 1.0 : p[i];
  }
  if (args.coupling == Coupling::dirichlet) dirichlet(magnitude, e, p, samples, threshold, ratio);
  if (args.coupling == Coupling::systematic) {
    systematic(p, q, samples, threshold, whole, ratio);
    nearest_integers(whole, block.whole);
  }
  for (int i = 0; i < kWordBits; ++i) threshold[i] *= 4294967296.0;
  nearest_integers(threshold, block.threshold);
  for (int i = 0; i < kWordBits; ++i) ratios[i] = static_cast<float>(ratio[i]);
}

// Thresholds and counters of an item, and its ratios; false where a logit is not finite.
inline bool read_block(const AntitheticSampleArgs& args, int64_t item, Block& block) {
  const int64_t row_blocks = words_for(args.dimensions);
  block.row = item / row_blocks;
  block.first = item % row_blocks * kWordBits;
  const int64_t left = args.dimensions - block.first;
  block.count = static_cast<int>(min(left, kWordBits));
  const int64_t start = block.row * args.dimensions + block.first;
  memset(block.logits, 0, sizeof block.logits);
  memcpy(block.logits, args.logits + start, static_cast<size_t>(block.count) * sizeof(float));
  uint32_t largest = 0;
  for (int i = 0; i < kWordBits; ++i) {
    const uint32_t magnitude = block.logits[i] & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  const uint64_t index = args.offset + static_cast<uint64_t>(start);
  for (int i = 0; i < kWordBits; ++i) {
    const uint32_t low = static_cast<uint32_t>(index) + static_cast<uint32_t>(i);
    block.index_low[i] = low;
    block.index_high[i] = static_cast<uint32_t>(index >> 32) + (low < static_cast<uint32_t>(index) ? 1u : 0u);
  }
  if (args.coupling != Coupling::gaussian) {
    float ratios[kWordBits];
    prepare_block(args, block, ratios);
    if (args.ratio != nullptr) {
      memcpy(args.ratio + start, ratios, static_cast<size_t>(block.count) * sizeof(float));
    }
  }
  return largest < 0x7f800000u;
}

// Where the logit is above 0, and low stands for b = 0: a bit a lane, or `bits` in the lane.
inline uint32_t flips(const Block& block, int lane) {
  return LanesU32::greater(LanesU32::broadcast(0x7fffffffu),
                           LanesU32::load(block.logits + lane) - LanesU32::broadcast(1));
}
inline LanesU32 flips(const Block& block, int lane, uint32_t bits) {
  return LanesU32::greater(LanesU32::broadcast(0x7fffffffu),
                           LanesU32::load(block.logits + lane) - LanesU32::broadcast(1), bits);
}

// --- the low events of kLanes elements

// Where the events go: bits of one integer an element, kHalves of 32 samples each, or bits of one word a sample.
template <int kHalves>
struct BySample {
  LanesU32 bits[kHalves];

  // low_i = a > b.
  void add(int sample, LanesU32 a, LanesU32 b) {
    const int half = kHalves == 1 ? 0 : sample / 32;
    bits[half] = bits[half] ^ LanesU32::greater(a, b, uint32_t{1} << sample % 32);
  }
};

struct ByDimension {
  uint64_t* words;  // one a sample
  int lane;         // of the first element in its word

  void add(int sample, LanesU32 a, LanesU32 b) {
    words[sample] |= static_cast<uint64_t>(LanesU32::greater(a, b)) << lane;
  }
};

inline void draw(const Block& block, int lane, uint64_t seed, int count, LanesU32* draws) {
  const LanesU32 low = LanesU32::load(block.index_low + lane), high = LanesU32::load(block.index_high + lane);
  for (int i = 0; i < count; i += kPhiloxOutputs) {
    LanesU32 counter[kPhiloxOutputs] = {low, high, LanesU32::broadcast(static_cast<uint32_t>(i / kPhiloxOutputs)),
                                        LanesU32::broadcast(0)};
    philox(counter, seed);
    for (int j = 0; j < kPhiloxOutputs; ++j) draws[i + j] = counter[j];
  }
}

template <class Events>
void gaussian_events(const AntitheticSampleArgs& args, const Block& block, int lane, LanesU32* draws, Events& events) {
  const int samples = static_cast<int>(args.samples);
  const float widen = gaussian_widening(samples);
  const int64_t start = block.row * args.dimensions + block.first;
  float mean[LanesU32::kLanes] = {}, normal[kMostSamples][LanesU32::kLanes];
  for (int i = 0; i < samples; ++i) {
    uint32_t u[LanesU32::kLanes];
    memcpy(u, &draws[i], sizeof u);
    for (int l = 0; l < LanesU32::kLanes; ++l) {
      normal[i][l] = normal_from_bits(u[l]);
      mean[l] += normal[i][l];
    }
  }
  float quantile[LanesU32::kLanes] = {};
  for (int l = 0; l < LanesU32::kLanes; ++l) {
    mean[l] /= static_cast<float>(samples);
    if (lane + l < block.count) quantile[l] = args.quantile[start + lane + l];
  }
  for (int i = 0; i < samples; ++i) {
    uint32_t low[LanesU32::kLanes];
    for (int l = 0; l < LanesU32::kLanes; ++l) low[l] = widen * (normal[i][l] - mean[l]) < quantile[l];
    events.add(i, LanesU32::load(low), LanesU32::broadcast(0));
  }
}

template <class Events>
inline void low_events(const AntitheticSampleArgs& args, const Block& block, int lane, Events& events) {
  const int samples = static_cast<int>(args.samples);
  const LanesU32 threshold = LanesU32::load(block.threshold + lane);
  LanesU32 draws[kMostSamples];
  switch (args.coupling) {
    case Coupling::independent:
      draw(block, lane, args.seed, samples, draws);
      for (int i = 0; i < samples; ++i) events.add(i, threshold, draws[i]);
      break;
    case Coupling::antithetic_pairs:
      draw(block, lane, args.seed, samples / 2, draws);
      for (int i = 0; i < samples / 2; ++i) {
        events.add(2 * i, threshold, draws[i]);
        events.add(2 * i + 1, threshold, draws[i] ^ LanesU32::broadcast(~0u));
      }
      break;
    case Coupling::dirichlet: {
      draw(block, lane, args.seed, samples - 1, draws);
      sort(draws, samples - 1);
      LanesU32 before = LanesU32::broadcast(0);
      for (int i = 0; i + 1 < samples; ++i) {
        events.add(i, draws[i] - before, threshold);
        before = draws[i];
      }
      events.add(samples - 1, before ^ LanesU32::broadcast(~0u), threshold);
      break;
    }
    case Coupling::systematic: {
      draw(block, lane, args.seed, samples, draws);
      LanesU32 left = LanesU32::load(block.whole + lane) + LanesU32::greater(threshold, draws[0], 1);
      for (int i = 0; i < samples; ++i) {
        LanesU32 position = LanesU32::broadcast(0);  // the last one's
        if (i + 1 < samples) LanesU32::multiply(static_cast<uint32_t>(samples - i), draws[i + 1], position);
        events.add(i, left, position);
        left = left - LanesU32::greater(left, position, 1);
      }
      break;
    }
    case Coupling::gaussian:
      draw(block, lane, args.seed, samples, draws);
      gaussian_events(args, block, lane, draws, events);
      break;
  }
}

// --- output

void sample_by_dimension(const AntitheticSampleArgs& args, const Block& block) {
  uint64_t words[kMostSamples] = {}, flip = 0;
  for (int lane = 0; lane < block.count; lane += LanesU32::kLanes) {
    flip |= static_cast<uint64_t>(flips(block, lane)) << lane;
    ByDimension events{words, lane};
    low_events(args, block, lane, events);
  }
  const int64_t row_words = words_for(args.dimensions);
  uint64_t* output = static_cast<uint64_t*>(args.bits) + block.row * row_words + block.first / kWordBits;
  for (int64_t i = 0; i < args.samples; ++i) {
    output[i * args.rows * row_words] = (words[i] ^ flip) & low_mask(block.count);
  }
}

template <class Element>
void sample_by_sample(const AntitheticSampleArgs& args, const Block& block) {
  constexpr int kHalves = sizeof(Element) == 8 ? 2 : 1;
  alignas(64) uint32_t halves[kHalves][kWordBits];
  for (int lane = 0; lane < block.count; lane += LanesU32::kLanes) {
    BySample<kHalves> events;
    for (int half = 0; half < kHalves; ++half) {
      events.bits[half] = flips(block, lane, static_cast<uint32_t>(low_mask(args.samples) >> 32 * half));
    }
    low_events(args, block, lane, events);
    for (int half = 0; half < kHalves; ++half) memcpy(halves[half] + lane, &events.bits[half], sizeof(LanesU32));
  }
  Element elements[kWordBits];
  for (int i = 0; i < kWordBits; ++i) {
    if constexpr (kHalves == 1) {
      elements[i] = static_cast<Element>(halves[0][i]);
    } else {
      elements[i] = uint64_t{halves[1][i]} << 32 | halves[0][i];
    }
  }
  Element* output = static_cast<Element*>(args.bits) + block.row * args.dimensions + block.first;
  memcpy(output, elements, static_cast<size_t>(block.count) * sizeof(Element));
}

}  // namespace

bool antithetic_sample(const AntitheticSampleArgs& args, int64_t begin, int64_t end) noexcept {
  bool finite = true;
  for (int64_t item = begin; item < end; ++item) {
    Block block;
    finite &= read_block(args, item, block);
    if (args.layout == SampleLayout::dimension) {
      sample_by_dimension(args, block);
    } else if (args.samples <= 8) {
      sample_by_sample<uint8_t>(args, block);
    } else if (args.samples <= 16) {
      sample_by_sample<uint16_t>(args, block);
    } else if (args.samples <= 32) {
      sample_by_sample<uint32_t>(args, block);
    } else {
      sample_by_sample<uint64_t>(args, block);
    }
  }
  return finite;
}

}  // namespace lowbit::LOWBIT_LEVEL
