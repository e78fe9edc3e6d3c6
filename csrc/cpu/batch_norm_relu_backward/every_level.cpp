// Two passes over the codes and the gradient: sums of each channel, then the gradient of the input.
#include "cpu/batch_norm_relu_backward/batch_norm_relu_backward.h"
#include "cpu/shared/codes.h"

namespace lowbit::LOWBIT_LEVEL {
namespace {

// Masked gradients and xhat of a block; masked gradients past `count` are 0.
template <class Type, class Size, class Parameter>
inline void masked_block(const BatchNormReluBackwardArgs& args, int64_t element, int64_t count, Size size, int64_t byte,
                         const Parameter& parameter, float* masked, float* xhat, Type type) {
  alignas(64) uint8_t codes[kBlock];
  alignas(64) float buffer[kBlock];
  const auto* input = static_cast<const typename Type::type*>(args.grad_output) + element;
  const float* grad = load_block(input, count, size, buffer, type);
  unpack_block(args.codes + byte, count, size, args.bits, codes);
  const auto step = parameter(kStep), origin = parameter(kXhatOrigin), shift = parameter(kBackwardShift);
  for (int64_t i = 0; i < size; ++i) {
    const float code = static_cast<float>(codes[i]);
    masked[i] = code >= shift(i) ? grad[i] : 0.0f;
    xhat[i] = code * step(i) + origin(i);
  }
}

// Sixteen lanes; left to itself, the compiler takes loops over them apart.
using Floats = float __attribute__((vector_size(kSumLanes * sizeof(float))));
using Doubles = double __attribute__((vector_size(kSumLanes * sizeof(double))));

// Sums of g and g xhat in lanes: floats, emptied into doubles after kLaneTerms terms a lane.
template <int64_t kLanes>
struct LaneSums {
  static constexpr int64_t kVectors = kLanes / kSumLanes;
  Floats sums[kVectors] = {}, products[kVectors] = {};
  Doubles sum[kVectors] = {}, product[kVectors] = {};
  int64_t terms = 0;  // a lane

  // Sixteen elements to the lanes of a vector.
  void add(int64_t vector, const float* masked, const float* xhat) {
    Floats g, x;
    memcpy(&g, masked, sizeof g);
    memcpy(&x, xhat, sizeof x);
    sums[vector] += g;
    products[vector] += g * x;
  }
  void add_terms(int64_t count) {
    terms += count;
    if (terms == kLaneTerms) empty();
  }
  void empty() {
    for (int64_t vector = 0; vector < kVectors; ++vector) {
      sum[vector] += __builtin_convertvector(sums[vector], Doubles);
      product[vector] += __builtin_convertvector(products[vector], Doubles);
      sums[vector] = products[vector] = Floats{};
    }
    terms = 0;
  }
  // Writes the totals of the lanes first, first + step, ...
  void total(int64_t first, int64_t step, int64_t past, double* sum_out, double* product_out) const {
    double of_sums = 0.0, of_products = 0.0;
    for (int64_t lane = first; lane < past; lane += step) {
      of_sums += sum[lane / kSumLanes][lane % kSumLanes];
      of_products += product[lane / kSumLanes][lane % kSumLanes];
    }
    *sum_out = of_sums;
    *product_out = of_products;
  }
};

// Chunks of an image.
template <class Type>
inline void sum_rows(const BatchNormReluBackwardArgs& args, int64_t begin, int64_t end, Type type) {
  const int64_t channels = args.shape.channels;
  for (int64_t row = begin * channels; row < end * channels; ++row) {
    LaneSums<kSumLanes> lanes;
    const auto add = [&](int64_t element, int64_t count, auto size, int64_t byte, const auto& parameter) {
      alignas(64) float masked[kBlock], xhat[kBlock];
      masked_block(args, element, count, size, byte, parameter, masked, xhat, type);
      for (int64_t i = 0; i < size; i += kSumLanes) lanes.add(0, masked + i, xhat + i);
      lanes.add_terms(size / kSumLanes);
    };
    for_each_block(args.shape, args.bits, args.grid, row, row + 1, add);
    lanes.empty();
    double* sums = args.sums + 2 * (row / channels) * channels + row % channels;
    lanes.total(0, 1, kSumLanes, sums, sums + channels);
  }
}

// Chunks of pixels, up to 256 columns at a time: channels of one pixel or of several.
template <class Type>
inline void sum_pixels(const BatchNormReluBackwardArgs& args, int64_t begin, int64_t end, Type type) {
  const int64_t channels = args.shape.channels, pixels = args.shape.outer * args.shape.spatial;
  const int64_t row_bytes = code_bytes(channels, args.bits), width = grid_width(args.shape);
  const int64_t step = block_pixels(args.shape, args.bits);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t past = min((chunk + 1) * kChunkPixels, pixels);
    for (int64_t first = 0; first < channels; first += kBlock) {
      const int64_t block_channels = min(channels - first, kBlock);
      LaneSums<kBlock> lanes;
      for (int64_t pixel = chunk * kChunkPixels; pixel < past; pixel += step) {
        const int64_t here = min(step, past - pixel);
        for_each_part(here * block_channels, [&](int64_t part, int64_t count, auto size) {
          const int64_t column = first + part;
          const auto parameter = [&](int index) { return Each{args.grid + index * width + column}; };
          alignas(64) float masked[kBlock], xhat[kBlock];
          masked_block(args, pixel * channels + column, count, size, pixel * row_bytes + column * args.bits / 8,
                       parameter, masked, xhat, type);
          for (int64_t i = 0; i < size; i += kSumLanes) lanes.add((part + i) / kSumLanes, masked + i, xhat + i);
        });
        lanes.add_terms(1);
      }
      lanes.empty();
      double* sums = args.sums + 2 * chunk * channels + first;
      for (int64_t channel = 0; channel < block_channels; ++channel) {
        lanes.total(channel, block_channels, step * block_channels, sums + channel, sums + channels + channel);
      }
    }
  }
}

template <class Type>
inline void input_rows(const BatchNormReluBackwardArgs& args, int64_t begin, int64_t end, Type type) {
  const auto differentiate = [&](int64_t element, int64_t count, auto size, int64_t byte, const auto& parameter) {
    alignas(64) float masked[kBlock], xhat[kBlock];
    masked_block(args, element, count, size, byte, parameter, masked, xhat, type);
    const auto gain = parameter(kGain), mean = parameter(kMean), slope = parameter(kSlope);
    for (int64_t i = 0; i < size; ++i) masked[i] = gain(i) * (masked[i] - (mean(i) + xhat[i] * slope(i)));
    store_block(masked, count, size, static_cast<typename Type::type*>(args.grad_input) + element, type);
  };
  for_each_block(args.shape, args.bits, args.grid, begin, end, differentiate);
}

}  // namespace

void batch_norm_relu_sums(const BatchNormReluBackwardArgs& args, int64_t begin, int64_t end) noexcept {
  for_type(args.type, [&](auto type) {
    if (args.shape.channels_last) return sum_pixels(args, begin, end, type);
    sum_rows(args, begin, end, type);
  });
}

void batch_norm_relu_backward(const BatchNormReluBackwardArgs& args, int64_t begin, int64_t end) noexcept {
  for_type(args.type, [&](auto type) { input_rows(args, begin, end, type); });
}

}  // namespace lowbit::LOWBIT_LEVEL
