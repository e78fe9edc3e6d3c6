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

#include "core/elementary.h"
#include "core/half.h"
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
  const float* logits;    // [rows, dimensions], finite: the CPU refuses others, CUDA makes their ratio NaN
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

LOWBIT_INLINE bool valid_sample_count(const AntitheticSampleArgs& args) {
  const int64_t least = args.coupling == Coupling::independent ? 1 : 2;
  const bool odd_pairs = args.coupling == Coupling::antithetic_pairs && args.samples % 2 != 0;
  return args.samples >= least && args.samples <= kMostSamples && !odd_pairs;
}

// --- the formulas, an element each

// |logit|, which sets the rare event's probability q = e / (1 + e), e = exp(-|logit|), and p = 1 - q = 1 / (1 + e).
LOWBIT_INLINE double logit_magnitude(uint32_t logit_bits) {
  const double absolute = bits_to_float(logit_bits & 0x7fffffffu);
  return absolute < 700 ? absolute : 700;
}

// Nearest integer to x in [0, 2^32], at most 2^32 - 1.
LOWBIT_INLINE uint32_t nearest_u32(double x) {
  const double shifted = (x < 4294967295.0 ? x : 4294967295.0) + 0x1p52;
  uint64_t bits;
  memcpy(&bits, &shifted, sizeof bits);
  return static_cast<uint32_t>(bits);
}

// q^(1/(n-1)); the spacings' threshold is 1 minus it.
LOWBIT_INLINE double dirichlet_root(double magnitude, double e, int samples) {
  return exp_double(-(magnitude + log1p_double(e)) / (samples - 1));
}
// Its (n-1)th power is the probability that two samples are both low.
LOWBIT_INLINE double dirichlet_joint_root(double root) {
  const double excess = 2.0 - 1.0 / root;
  return excess > 0 ? excess : 0;
}
LOWBIT_INLINE double dirichlet_ratio(double p, double joint) { return p / (1.0 - joint); }

// floor(n q), `expected` being n q.
LOWBIT_INLINE double systematic_whole(double expected) {
  const double nearest = (expected + 0x1p52) - 0x1p52;
  return nearest - (nearest > expected ? 1.0 : 0.0);
}
LOWBIT_INLINE double systematic_ratio(double p, double q, double expected, double whole, int samples) {
  const double joint = whole * (2 * expected - whole - 1) / (samples * (samples - 1.0));
  return q * p / (q - joint);
}

// Factor of z_i - mean z in the gaussian coupling.
LOWBIT_INLINE float gaussian_widening(int samples) {
  return __builtin_sqrtf(static_cast<float>(samples) / static_cast<float>(samples - 1));
}

// Standard normal variable by inversion of (u + 1/2) / 2^32: Wichura, "Algorithm AS 241", PPND7, in float32 operations
// that are rounded one by one.
LOWBIT_INLINE float normal_from_bits(uint32_t u) {
  const uint32_t tail = u < ~u ? u : ~u;
  const float p = (static_cast<float>(static_cast<int32_t>(tail)) + 0.5f) * 0x1p-32f;  // in (0, 1/2)
  const float central = 0.5f - p;
  float r = 0.180625f - central * central;
  const float inner = central * (((59.109374720f * r + 159.29113202f) * r + 50.434271938f) * r + 3.3871327179f) /
                      (((67.187563600f * r + 78.757757664f) * r + 17.895169469f) * r + 1.0f);
  // -log p: p = 2^k m with m in [1, 2), log m = 2 atanh((m - 1) / (m + 1)).
  const uint32_t bits = float_to_bits(p);
  const float exponent = static_cast<float>(static_cast<int32_t>(bits >> 23) - 127);
  const float m = bits_to_float((bits & 0x7fffffu) | 0x3f800000u);
  const float s = (m - 1.0f) / (m + 1.0f);
  const float t = s * s;
  const float atanh = s + s * t * (0.33333333f + t * (0.2f + t * (0.14285714f + t * (0.11111111f + t * 0.09090909f))));
  const float minus_log = -(exponent * 0.69314718f + 2.0f * atanh);
  r = __builtin_sqrtf(minus_log);
  const float near = r - 1.6f, far = r - 5.0f;
  const float outer = r <= 5.0f
                          ? (((0.17023821103f * near + 1.3067284816f) * near + 2.7568153900f) * near + 1.4234372777f) /
                                ((0.12021132975f * near + 0.73700164250f) * near + 1.0f)
                          : (((0.017337203997f * far + 0.42868294337f) * far + 3.0812263860f) * far + 6.6579051150f) /
                                ((0.012258202635f * far + 0.24197894225f) * far + 1.0f);
  const float magnitude = central <= 0.425f ? inner : outer;
  return u < 0x80000000u ? -magnitude : magnitude;
}
}  // namespace lowbit
