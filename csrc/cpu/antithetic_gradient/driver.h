// Rows, tables and layouts, written once over vectors of float lanes. `Floats` is a level's vector:
//   kLanes, zero, load, load_bits (low bits of kLanes integers), store, broadcast, operators + *,
//   lookup(table, bits): table[bits & 15] a lane and bits >> 4, add_where(sum, mask, value): sum + value in lanes of
//   mask.
// Everything has internal linkage: each level compiles its own copy.
#pragma once

#include <cstring>

#include "cpu/antithetic_gradient/antithetic_gradient.h"

namespace lowbit {
namespace {

constexpr int kTableEntries = 16;
constexpr int kMostTables = kMostSamples / 4;

// table[g][m] = sum of the weights of samples 4g + k over the bits k of m, lowest first.
inline int make_tables(const float* weight, int64_t samples, float (*tables)[kTableEntries]) {
  int count = 0;
  for (int64_t first = 0; first < samples; first += 4, ++count) {
    tables[count][0] = 0;
    for (int k = 0; k < 4; ++k) {
      const float value = first + k < samples ? weight[first + k] : 0;
      for (int m = 0; m < 1 << k; ++m) tables[count][m | 1 << k] = tables[count][m] + value;
    }
  }
  return count;
}

// One range of dimensions of one row.
struct GradientRange {
  int64_t row, begin, end;
};

inline GradientRange gradient_range(const AntitheticGradientArgs& args, int64_t item) {
  const int64_t pieces = ceil_div(args.dimensions, kGradientDimensions);
  const int64_t begin = item % pieces * kGradientDimensions;
  const int64_t end = begin + kGradientDimensions;
  return {item / pieces, begin, min(end, args.dimensions)};
}

// Multiplies by the ratio and stores `count` lanes of the result.
template <class Floats>
inline void finish(const AntitheticGradientArgs& args, int64_t start, int64_t count, Floats sum) {
  if (count >= Floats::kLanes) {
    if (args.ratio != nullptr) sum = sum * Floats::load(args.ratio + start);
    return sum.store(args.gradient + start);
  }
  alignas(64) float values[Floats::kLanes] = {};
  const size_t bytes = static_cast<size_t>(count) * sizeof(float);
  if (args.ratio != nullptr) {
    memcpy(values, args.ratio + start, bytes);
    sum = sum * Floats::load(values);
  }
  sum.store(values);
  memcpy(args.gradient + start, values, bytes);
}

template <class Element, class Floats>
void gradient_by_sample(const AntitheticGradientArgs& args, GradientRange range) {
  float tables[kMostTables][kTableEntries];
  const int count = make_tables(args.weight + range.row * args.samples, args.samples, tables);
  const Element* bits = static_cast<const Element*>(args.bits) + range.row * args.dimensions;
  for (int64_t d = range.begin; d < range.end; d += Floats::kLanes) {
    const int64_t left = range.end - d;
    Element tail[Floats::kLanes] = {};
    const Element* elements = bits + d;
    if (left < Floats::kLanes) {
      memcpy(tail, elements, static_cast<size_t>(left) * sizeof(Element));
      elements = tail;
    }
    Floats sum = Floats::zero();
    for (int half = 0; half < (sizeof(Element) == 8 ? 2 : 1); ++half) {
      auto nibbles = Floats::load_bits(elements, half);
      const int end = count < 8 * half + 8 ? count : 8 * half + 8;
      for (int g = 8 * half; g < end; ++g) {
        const Floats part = Floats::lookup(tables[g], nibbles);
        sum = g == 0 ? part : sum + part;
      }
    }
    finish(args, range.row * args.dimensions + d, left, sum);
  }
}

template <class Floats>
void gradient_by_dimension(const AntitheticGradientArgs& args, GradientRange range) {
  const int64_t row_words = words_for(args.dimensions);
  const uint64_t* words = static_cast<const uint64_t*>(args.bits) + range.row * row_words;
  const float* weight = args.weight + range.row * args.samples;
  for (int64_t word = range.begin / kWordBits; word * kWordBits < range.end; ++word) {
    constexpr int kVectors = kWordBits / Floats::kLanes;
    Floats sums[kVectors];
    for (int64_t first = 0; first < args.samples; first += 4) {
      Floats parts[kVectors];
      for (int v = 0; v < kVectors; ++v) parts[v] = Floats::zero();
      for (int64_t i = first; i < first + 4 && i < args.samples; ++i) {
        const uint64_t bits = words[i * args.rows * row_words + word];
        const Floats value = Floats::broadcast(weight[i]);
        for (int v = 0; v < kVectors; ++v) {
          parts[v] = Floats::add_where(parts[v], static_cast<uint32_t>(bits >> v * Floats::kLanes), value);
        }
      }
      for (int v = 0; v < kVectors; ++v) sums[v] = first == 0 ? parts[v] : sums[v] + parts[v];
    }
    for (int v = 0; v < kVectors; ++v) {
      const int64_t d = word * kWordBits + v * Floats::kLanes;
      if (d < range.end) finish(args, range.row * args.dimensions + d, range.end - d, sums[v]);
    }
  }
}

template <class Floats>
void antithetic_gradient_range(const AntitheticGradientArgs& args, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const GradientRange range = gradient_range(args, item);
    if (args.layout == SampleLayout::dimension) {
      gradient_by_dimension<Floats>(args, range);
    } else if (args.samples <= 8) {
      gradient_by_sample<uint8_t, Floats>(args, range);
    } else if (args.samples <= 16) {
      gradient_by_sample<uint16_t, Floats>(args, range);
    } else if (args.samples <= 32) {
      gradient_by_sample<uint32_t, Floats>(args, range);
    } else {
      gradient_by_sample<uint64_t, Floats>(args, range);
    }
  }
}

}  // namespace
}  // namespace lowbit
