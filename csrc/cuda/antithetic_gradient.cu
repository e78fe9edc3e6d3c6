// Reads n/8 + 4 bytes an element and writes 4; a thread makes one element. The weights of a row are the same for all
// its elements and stay in the first-level cache.
#include "core/ops/antithetic_gradient.h"

#include <type_traits>

#include "core/checks.h"
#include "core/divisor.h"
#include "cuda/platform.cuh"

namespace lowbit::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kGroup = 4;  // samples whose products are summed first

struct GradientKernelArgs {
  AntitheticGradientArgs op;
  int64_t count;  // elements
  int64_t row_words;
  Divisor by_row;  // elements of a row
};

// The bits of one element, sample i in bit i. Element: the integer that holds them; void: one word a sample.
template <class Element>
__device__ inline uint64_t element_bits(const GradientKernelArgs& args, int64_t element, Division position) {
  if constexpr (std::is_void_v<Element>) {
    const int64_t word = position.quotient * args.row_words + position.remainder / kWordBits;
    const uint64_t* words = static_cast<const uint64_t*>(args.op.bits) + word;
    uint64_t bits = 0;
    for (int i = 0; i < static_cast<int>(args.op.samples); ++i) {
      bits |= (words[i * args.op.rows * args.row_words] >> position.remainder % kWordBits & 1) << i;
    }
    return bits;
  } else {
    return static_cast<const Element*>(args.op.bits)[element];
  }
}

// kVector: a row's weights are groups of four at addresses for 16-byte loads.
template <class Element, bool kVector>
__global__ void __launch_bounds__(kThreads) antithetic_gradient_kernel(GradientKernelArgs args) {
  const int64_t element = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (element >= args.count) return;
  const Division position = divide_with_remainder(element, args.by_row);
  const uint64_t bits = element_bits<Element>(args, element, position);
  const float ratio = args.op.ratio ? args.op.ratio[element] : 1.0f;
  const int samples = static_cast<int>(args.op.samples);
  const float* weight = args.op.weight + position.quotient * samples;
  float sum = 0;
  for (int first = 0; first < samples; first += kGroup) {
    Pack<float> weights{};
    if constexpr (kVector) {
      weights = *reinterpret_cast<const Pack<float>*>(weight + first);
    } else {
#pragma unroll
      for (int k = 0; k < kGroup; ++k) {
        if (first + k < samples) weights.values[k] = weight[first + k];
      }
    }
    float part = 0;
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      if (bits >> (first + k) & 1) part += weights.values[k];
    }
    sum = first == 0 ? part : sum + part;
  }
  args.op.gradient[element] = args.op.ratio ? sum * ratio : sum;
}

template <class Element>
Status gradient_of(const GradientKernelArgs& args, Stream stream) {
  const bool vector = args.op.samples % kGroup == 0 && is_aligned(args.op.weight, kPackBytes);
  return launch(vector ? antithetic_gradient_kernel<Element, true> : antithetic_gradient_kernel<Element, false>,
                {blocks_for(args.count, kThreads), dim3(kThreads)}, stream, args);
}

}  // namespace

Status antithetic_gradient(const AntitheticGradientArgs& args, Stream stream) noexcept {
  if (args.samples < 1 || args.samples > kMostSamples) return Status::bad_argument;
  if (!addressable(args.rows, args.dimensions, args.samples)) return Status::bad_shape;
  if (args.rows == 0 || args.dimensions == 0) return Status::ok;
  const GradientKernelArgs kernel_args{args, args.rows * args.dimensions, words_for(args.dimensions),
                                       make_divisor(args.dimensions)};
  if (args.layout == SampleLayout::dimension) return gradient_of<void>(kernel_args, stream);
  switch (sample_bytes(args.samples)) {
    case 1:
      return gradient_of<uint8_t>(kernel_args, stream);
    case 2:
      return gradient_of<uint16_t>(kernel_args, stream);
    case 4:
      return gradient_of<uint32_t>(kernel_args, stream);
    default:
      return gradient_of<uint64_t>(kernel_args, stream);
  }
}

}  // namespace lowbit::cuda
