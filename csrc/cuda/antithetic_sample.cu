// Arithmetic is what counts: about 40 multiplications of 32 bits for four draws, a sort of n - 1 of them, and the
// element's law in double precision, against 4 bytes read and 4 + n/8 written. A thread makes one element with its
// draws in registers; the bits of one sample of 32 neighbouring dimensions meet by a ballot.
#include "core/ops/antithetic_sample.h"

#include "core/checks.h"
#include "core/divisor.h"
#include "core/philox.h"
#include "cuda/platform.cuh"

namespace lowbit::cuda {
namespace {

constexpr int kThreads = 128;

// How one element is drawn.
struct Law {
  uint32_t threshold;  // in units of 2^-32
  uint32_t whole;      // floor(n q), systematic only
  float ratio;
};

__device__ inline Law law_of(uint32_t logit_bits, Coupling coupling, int samples) {
  const double magnitude = logit_magnitude(logit_bits);
  const double e = exp_double(-magnitude);
  const double p = 1.0 / (1.0 + e);
  const double q = e * p;
  double threshold = q, whole = 0, ratio = coupling == Coupling::independent ? 1.0 : p;
  if (coupling == Coupling::dirichlet) {
    const double root = dirichlet_root(magnitude, e, samples);
    const double joint_root = dirichlet_joint_root(root);
    double joint = joint_root;
    for (int k = 2; k < samples; ++k) joint *= joint_root;
    threshold = 1.0 - root;
    ratio = dirichlet_ratio(p, joint);
  }
  if (coupling == Coupling::systematic) {
    const double expected = samples * q;
    whole = systematic_whole(expected);
    threshold = expected - whole;
    ratio = systematic_ratio(p, q, expected, whole, samples);
  }
  return {nearest_u32(threshold * 4294967296.0), static_cast<uint32_t>(whole), static_cast<float>(ratio)};
}

// The first `count` draws of an element; the others of the kMost are ~0, which sorts last.
template <int kMost>
__device__ inline void draw(uint64_t index, uint64_t seed, int count, uint32_t (&draws)[kMost]) {
#pragma unroll
  for (int i = 0; i < kMost; i += kPhiloxOutputs) {
    if (i < count) {
      OneLane counter[kPhiloxOutputs] = {{static_cast<uint32_t>(index)},
                                         {static_cast<uint32_t>(index >> 32)},
                                         {static_cast<uint32_t>(i / kPhiloxOutputs)},
                                         {0}};
      philox(counter, seed);
#pragma unroll
      for (int j = 0; j < kPhiloxOutputs; ++j) draws[i + j] = i + j < count ? counter[j].value : ~0u;
    } else {
#pragma unroll
      for (int j = 0; j < kPhiloxOutputs; ++j) draws[i + j] = ~0u;
    }
  }
}

// Batcher's odd-even merge sort of a power of two.
template <int kCount>
__device__ inline void sort(uint32_t (&values)[kCount]) {
#pragma unroll
  for (int p = 1; p < kCount; p *= 2) {
#pragma unroll
    for (int k = p; k > 0; k /= 2) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const int j = i + k;
        if (i < k % p || (i - k % p) / k % 2 != 0 || j >= kCount || i / (2 * p) != j / (2 * p)) continue;
        const uint32_t low = values[i] < values[j] ? values[i] : values[j];
        values[j] = values[i] < values[j] ? values[j] : values[i];
        values[i] = low;
      }
    }
  }
}

// The low events of one element; sample i is bit i.
template <int kMost>
__device__ inline uint64_t low_events(const AntitheticSampleArgs& args, uint64_t element, Law law, float quantile) {
  const int samples = static_cast<int>(args.samples);
  const uint64_t index = args.offset + element;
  uint64_t bits = 0;
  uint32_t draws[kMost];
  switch (args.coupling) {
    case Coupling::independent:
      draw(index, args.seed, samples, draws);
#pragma unroll
      for (int i = 0; i < kMost; ++i) bits |= uint64_t{i < samples && draws[i] < law.threshold} << i;
      break;
    case Coupling::antithetic_pairs:
      draw(index, args.seed, samples / 2, draws);
#pragma unroll
      for (int i = 0; i < kMost; ++i) {
        const uint32_t u = i % 2 == 0 ? draws[i / 2] : ~draws[i / 2];
        bits |= uint64_t{i < samples && u < law.threshold} << i;
      }
      break;
    case Coupling::dirichlet: {
      draw(index, args.seed, samples - 1, draws);
      sort(draws);
      uint32_t before = 0;
#pragma unroll
      for (int i = 0; i < kMost; ++i) {
        const uint32_t end = i + 1 < samples ? draws[i] : ~0u;
        bits |= uint64_t{i < samples && end - before > law.threshold} << i;
        before = end;
      }
      break;
    }
    case Coupling::systematic: {
      // Draw i + 1 decides sample i: the last draw of all, that of a sample after the last, is never looked at.
      draw(index, args.seed, samples, draws);
      uint32_t left = law.whole + (law.threshold > draws[0] ? 1 : 0);
#pragma unroll
      for (int i = 0; i < kMost; ++i) {
        const uint32_t u = i + 1 < samples ? draws[i + 1 < kMost ? i + 1 : i] : 0;
        const auto position = static_cast<uint32_t>(uint64_t{static_cast<uint32_t>(samples - i)} * u >> 32);
        const bool low = i < samples && left > position;
        bits |= uint64_t{low} << i;
        left -= low ? 1 : 0;
      }
      break;
    }
    case Coupling::gaussian: {
      draw(index, args.seed, samples, draws);
      float mean = 0;
#pragma unroll
      for (int i = 0; i < kMost; ++i) {
        const float normal = normal_from_bits(draws[i]);
        draws[i] = float_to_bits(normal);
        if (i < samples) mean += normal;
      }
      mean /= static_cast<float>(samples);
      const float widen = gaussian_widening(samples);
#pragma unroll
      for (int i = 0; i < kMost; ++i) {
        bits |= uint64_t{i < samples && widen * (bits_to_float(draws[i]) - mean) < quantile} << i;
      }
      break;
    }
  }
  return bits;
}

struct SampleKernelArgs {
  AntitheticSampleArgs op;
  int64_t count;  // elements; by dimension, those of rows padded to whole words
  int64_t row_words;
  Divisor by_row;  // by dimension: elements of a padded row
};

template <int kMost>
__global__ void __launch_bounds__(kThreads) antithetic_sample_kernel(SampleKernelArgs args) {
  const int64_t place = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const bool by_dimension = args.op.layout == SampleLayout::dimension;
  int64_t element = place, row = 0, dimension = 0;
  bool valid = place < args.count;
  if (by_dimension) {
    const Division position = divide_with_remainder(place, args.by_row);
    row = position.quotient, dimension = position.remainder;
    valid = valid && dimension < args.op.dimensions;
    element = row * args.op.dimensions + dimension;
  }
  uint64_t bits = 0;
  if (valid) {
    const int samples = static_cast<int>(args.op.samples);
    const uint32_t logit = float_to_bits(args.op.logits[element]);
    Law law{};
    float quantile = 0;
    if (args.op.coupling == Coupling::gaussian) {
      quantile = args.op.quantile[element];
    } else {
      law = law_of(logit, args.op.coupling, samples);
      const bool finite = (logit & 0x7fffffffu) < 0x7f800000u;
      if (args.op.ratio) args.op.ratio[element] = finite ? law.ratio : bits_to_float(0x7fc00000u);
    }
    bits = low_events<kMost>(args.op, static_cast<uint64_t>(element), law, quantile);
    if (logit - 1 < 0x7fffffffu) bits ^= low_mask(samples);  // above 0, where low stands for b = 0
    if (!by_dimension) {
      if (kMost <= 8) static_cast<uint8_t*>(args.op.bits)[element] = static_cast<uint8_t>(bits);
      if (kMost == 16) static_cast<uint16_t*>(args.op.bits)[element] = static_cast<uint16_t>(bits);
      if (kMost == 32) static_cast<uint32_t*>(args.op.bits)[element] = static_cast<uint32_t>(bits);
      if (kMost == 64) static_cast<uint64_t*>(args.op.bits)[element] = bits;
    }
  }
  if (!by_dimension) return;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  uint32_t* words = static_cast<uint32_t*>(args.op.bits);  // halves of words
  const int64_t half = (row * args.row_words * kWordBits + dimension) / kWarp;
  for (int i = 0; i < static_cast<int>(args.op.samples); ++i) {
    const uint32_t together = __ballot_sync(kAllLanes, bits >> i & 1);
    if (lane == 0 && place < args.count) words[i * args.op.rows * args.row_words * 2 + half] = together;
  }
}

}  // namespace

Status antithetic_sample(const AntitheticSampleArgs& args, Stream stream) noexcept {
  if (!valid_sample_count(args)) return Status::bad_argument;
  if (!addressable(args.rows, args.dimensions, args.samples)) return Status::bad_shape;
  if (args.rows == 0 || args.dimensions == 0) return Status::ok;
  SampleKernelArgs kernel_args{};
  kernel_args.op = args;
  kernel_args.row_words = words_for(args.dimensions);
  kernel_args.by_row = make_divisor(kernel_args.row_words * kWordBits);
  kernel_args.count = args.layout == SampleLayout::dimension ? args.rows * kernel_args.row_words * kWordBits
                                                             : args.rows * args.dimensions;
  const Grid grid{blocks_for(kernel_args.count, kThreads), dim3(kThreads)};
  if (args.samples <= 4) return launch(antithetic_sample_kernel<4>, grid, stream, kernel_args);
  if (args.samples <= 8) return launch(antithetic_sample_kernel<8>, grid, stream, kernel_args);
  if (args.samples <= 16) return launch(antithetic_sample_kernel<16>, grid, stream, kernel_args);
  if (args.samples <= 32) return launch(antithetic_sample_kernel<32>, grid, stream, kernel_args);
  return launch(antithetic_sample_kernel<64>, grid, stream, kernel_args);
}

}  // namespace lowbit::cuda
