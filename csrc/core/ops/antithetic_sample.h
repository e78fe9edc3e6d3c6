// n coupled Bernoulli samples of every logit: margins P(b = 1) = p = 1 / (1 + exp(-logit)), elements independent,
// samples of one element negatively dependent. All comparisons are between 32-bit integers (products with 2^32 are
// rounded to the nearest, at most 2^32 - 1): the margins are exact to n * 2^-32, and every device, instruction set and
// cut of the work gives the same bits.
//
// With q = min(p, 1 - p), u_j the element's 32-bit draws (core/philox.h; element index = offset + position) and the
// rare event `low` of probability q,   b_i = low_i XOR [logit > 0]:
//   independent       low_i = [u_i < q 2^32]
//   antithetic_pairs  low_2j = [u_j < q 2^32], low_2j+1 = [2^32 - 1 - u_j < q 2^32]
//   dirichlet         d = the n spacings of the n - 1 sorted draws in [0, 2^32); low_i = [d_i > tau],
//                     tau = (1 - q^(1/(n-1))) 2^32
//   systematic        m + [u_0 < (nq - m) 2^32] of the n samples, m = floor(nq), chosen by sequential sampling: sample
//                     i is low if floor(u_i+1 (n - i) / 2^32) < the number still to choose
//   gaussian          the normal variables sqrt(n/(n-1)) (z_i - mean z) < Phi^-1(q), z by inversion of u in float32
//
// ratio = 1 / (1 - rho), rho the mean correlation of two samples of the element:
//   1;  1 - q;  (1 - q) / (1 - max(0, 2 - q^(-1/(n-1)))^(n-1));  q (1 - q) / (q - m (2nq - m - 1) / (n (n - 1)));
//   for gaussian the caller computes it.
// Source: Dimitriev and Zhou, "ARMS", ICML 2021: equations of the Dirichlet and Gaussian copulas, and the ratio.
#pragma once

#include "core/layout.h"
#include "core/status.h"

namespace lowbit {

enum class Coupling : int { independent = 0, antithetic_pairs = 1, dirichlet = 2, systematic = 3, gaussian = 4 };

enum class SampleLayout : int {
  sample = 0,     // [rows, dimensions] integers of sample_bytes(n) bytes; sample i is bit i
  dimension = 1,  // words [n, rows, words_for(dimensions)]
};

constexpr int64_t kMostSamples = 64;

struct AntitheticSampleArgs {
  const float* logits;    // [rows, dimensions], finite
  const float* quantile;  // [rows, dimensions], Phi^-1(q); gaussian only
  int64_t rows;
  int64_t dimensions;
  int64_t samples;  // n: 1 (independent only) or 2 .. kMostSamples; even for antithetic_pairs
  Coupling coupling;
  SampleLayout layout;
  uint64_t seed;
  uint64_t offset;
  void* bits;    // see SampleLayout
  float* ratio;  // [rows, dimensions], or null; not written for gaussian
};

// Bytes of the n bits of one element: 1, 2, 4 or 8.
LOWBIT_INLINE constexpr int64_t sample_bytes(int64_t samples) {
  return samples <= 8 ? 1 : samples <= 16 ? 2 : samples <= 32 ? 4 : 8;
}

}  // namespace lowbit
