// Two passes over the codes and the gradient: sums of each channel, then the gradient of the input.
#pragma once

#include "cpu/batch_norm_relu_backward/batch_norm_relu_backward.h"
#include "cpu/codes/codes.h"

namespace lowbit {
namespace {

// Masked gradients and xhat of a block.
template <class Type, class Count, class Parameter>
inline void masked_block(const BatchNormReluBackwardArgs& args, int64_t element, Count count, int64_t byte,
                         const Parameter& parameter, float* masked, float* xhat, Type type) {
  alignas(64) uint8_t codes[kBlock];
  alignas(64) float buffer[kBlock];
  const auto* input = static_cast<const typename Type::type*>(args.grad_output) + element;
  const float* grad = load_block(input, count, buffer, type);
  unpack_block(args.codes + byte, count, args.bits, codes);
  const auto step = parameter(kStep), origin = parameter(kXhatOrigin), shift = parameter(kBackwardShift);
  for (int64_t i = 0; i < count; ++i) {
    const float code = static_cast<float>(codes[i]);
    masked[i] = code >= shift(i) ? grad[i] : 0.0f;
    xhat[i] = code * step(i) + origin(i);
  }
}

// Sums of g and g xhat in lanes: floats, emptied into doubles before a lane has had more than kLaneTerms terms.
template <int64_t kLanes>
struct LaneSums {
  alignas(64) float sums[kLanes] = {}, products[kLanes] = {};
  alignas(64) double sum[kLanes] = {}, product[kLanes] = {};
  int64_t terms = 0;  // at most, a lane

  template <class Count>
  void add(const float* masked, const float* xhat, Count count) {
    for (int64_t i = 0; i < count; ++i) {
      sums[i] += masked[i];
      products[i] += masked[i] * xhat[i];
    }
  }
  void add_term() {
    if (++terms == kLaneTerms) empty();
  }
  void empty() {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      sum[lane] += static_cast<double>(sums[lane]);
      product[lane] += static_cast<double>(products[lane]);
      sums[lane] = products[lane] = 0.0f;
    }
    terms = 0;
  }
  // Of the lanes first, first + step, ...
  void total(int64_t first, int64_t step, int64_t past, double* sum_out, double* product_out) const {
    double of_sums = 0.0, of_products = 0.0;
    for (int64_t lane = first; lane < past; lane += step) {
      of_sums += sum[lane];
      of_products += product[lane];
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
    for_each_block(args.shape, args.bits, args.grid, row, row + 1,
                   [&](int64_t element, auto count, int64_t byte, auto parameter) {
                     alignas(64) float masked[kBlock], xhat[kBlock];
                     masked_block(args, element, count, byte, parameter, masked, xhat, type);
                     int64_t i = 0;
                     for (; i + kSumLanes <= count; i += kSumLanes) {
                       lanes.add(masked + i, xhat + i, Known<kSumLanes>{});
                       lanes.add_term();
                     }
                     if (i == count) return;
                     lanes.add(masked + i, xhat + i, count - i);
                     lanes.add_term();
                   });
    lanes.empty();
    double* sums = args.sums + 2 * (row / channels) * channels + row % channels;
    lanes.total(0, 1, kSumLanes, sums, sums + channels);
  }
}

// Chunks of pixels.
template <class Type>
inline void sum_pixels(const BatchNormReluBackwardArgs& args, int64_t begin, int64_t end, Type type) {
  const int64_t channels = args.shape.channels, pixels = args.shape.outer * args.shape.spatial;
  const int64_t row_bytes = code_bytes(channels, args.bits), width = grid_width(args.shape);
  const int64_t step = block_pixels(args.shape, args.bits);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t past = (chunk + 1) * kChunkPixels < pixels ? (chunk + 1) * kChunkPixels : pixels;
    for (int64_t first = 0; first < channels; first += kBlock) {
      const int64_t block_channels = channels - first < kBlock ? channels - first : kBlock;
      const auto parameter = [&](int index) { return Each{args.grid + index * width + first}; };
      LaneSums<kBlock> lanes;
      for (int64_t pixel = chunk * kChunkPixels; pixel < past; pixel += step) {
        const int64_t count = step == 1 ? block_channels : (step < past - pixel ? step : past - pixel) * channels;
        const auto add = [&](auto block_count) {
          alignas(64) float masked[kBlock], xhat[kBlock];
          masked_block(args, pixel * channels + first, block_count, pixel * row_bytes + first * args.bits / 8,
                       parameter, masked, xhat, type);
          lanes.add(masked, xhat, block_count);
        };
        if (count == kBlock) {
          add(Whole{});
        } else {
          add(count);
        }
        lanes.add_term();
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
  for_each_block(args.shape, args.bits, args.grid, begin, end,
                 [&](int64_t element, auto count, int64_t byte, auto parameter) {
                   alignas(64) float masked[kBlock], xhat[kBlock];
                   masked_block(args, element, count, byte, parameter, masked, xhat, type);
                   const auto gain = parameter(kGain), mean = parameter(kMean), slope = parameter(kSlope);
                   for (int64_t i = 0; i < count; ++i)
                     masked[i] = gain(i) * (masked[i] - (mean(i) + xhat[i] * slope(i)));
                   store_block(masked, count, static_cast<typename Type::type*>(args.grad_input) + element, type);
                 });
}

inline void run_batch_norm_relu_sums(const BatchNormReluBackwardArgs& args, int64_t begin, int64_t end) {
  for_type(args.type, [&](auto type) {
    if (args.shape.channels_last) return sum_pixels(args, begin, end, type);
    sum_rows(args, begin, end, type);
  });
}

inline void run_batch_norm_relu_backward(const BatchNormReluBackwardArgs& args, int64_t begin, int64_t end) {
  for_type(args.type, [&](auto type) { input_rows(args, begin, end, type); });
}

}  // namespace
}  // namespace lowbit
