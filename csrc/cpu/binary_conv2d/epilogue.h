// From accumulators to the destination: the output kinds of binary_conv2d.h, for one tile of pixels and one filter
// block. ScalarEpilogue is the portable one; a level may bring its own with the same `store` (epilogue_avx512.h).
#pragma once

#include <cstring>

#include "core/half.h"
#include "cpu/binary_conv2d/binary_conv2d.h"
#include "cpu/shared/epilogue.h"

namespace lowbit {
namespace {

inline BitOutput bit_output(const BinaryConv2dArgs& args) {
  const int64_t words = words_for(args.thresholds * args.shape.filters);
  return {static_cast<uint64_t*>(args.output), words, words, conv_blocks_share_words(args)};
}

// Before the first filter block of pixels that share words (BitOutput).
inline void clear_words(const BinaryConv2dArgs& args, const int64_t* pixels, int64_t count) {
  if (args.output_kind == ConvOutput::program) return clear_bits(args.program, args.shape.filters, pixels, count);
  const BitOutput output = bit_output(args);
  for (int64_t i = 0; i < count; ++i) output.clear(pixels[i]);
}

// Every output kind but int32, which store_tile copies, and program. One pixel at a time.
struct ScalarEpilogue {
  static inline void store(const BinaryConv2dArgs& args, const int32_t* const* acc, const int64_t* pixels,
                           int64_t count, int64_t filter, int64_t filters) {
    alignas(64) float value[64];
    const BitOutput bits = bit_output(args);
    const int64_t row = args.shape.filters;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t first = pixels[i] * row + filter;
      if (args.output_kind == ConvOutput::bits_by_integer) {
        store_bits(args, bits, acc[i], pixels[i], filter, filters);
        continue;
      }
      if (args.output_kind == ConvOutput::float32) {
        to_float(args, acc[i], pixels[i], filter, filters, static_cast<float*>(args.output) + first);
        continue;
      }
      to_float(args, acc[i], pixels[i], filter, filters, value);
      if (args.output_kind == ConvOutput::bits_by_float) {
        store_bits(args, bits, value, pixels[i], filter, filters);
        continue;
      }
      uint16_t* out = static_cast<uint16_t*>(args.output) + first;
      if (args.output_kind == ConvOutput::bfloat16) {
        for (int64_t j = 0; j < filters; ++j) out[j] = float_to_bfloat16(value[j]);
      } else {
        for (int64_t j = 0; j < filters; ++j) out[j] = float_to_float16(value[j]);
      }
    }
  }

 private:
  // value[i] = ((scale * acc[i]) + bias) + residual of filters [filter, filter + count) of one output pixel.
  // One pass per term: each is a loop that compilers vectorise, and the 64 values stay in L1.
  static inline void to_float(const BinaryConv2dArgs& args, const int32_t* acc, int64_t pixel, int64_t filter,
                              int64_t count, float* value) {
    for (int64_t i = 0; i < count; ++i) value[i] = static_cast<float>(acc[i]);
    if (args.scale != nullptr) {
      if (args.scale_stride == 0) {
        const float scale = args.scale[0];
        for (int64_t i = 0; i < count; ++i) value[i] *= scale;
      } else {
        const float* scale = args.scale + filter;
        for (int64_t i = 0; i < count; ++i) value[i] *= scale[i];
      }
    }
    if (args.bias != nullptr) {
      const float* bias = args.bias + filter;
      for (int64_t i = 0; i < count; ++i) value[i] += bias[i];
    }
    if (args.residual != nullptr) {
      const int64_t offset = pixel * args.shape.filters + filter;
      if (args.residual_type == FloatType::float32) {
        const float* residual = static_cast<const float*>(args.residual) + offset;
        for (int64_t i = 0; i < count; ++i) value[i] += residual[i];
      } else if (args.residual_type == FloatType::bfloat16) {
        const uint16_t* residual = static_cast<const uint16_t*>(args.residual) + offset;
        for (int64_t i = 0; i < count; ++i) value[i] += bfloat16_to_float(residual[i]);
      } else {
        const uint16_t* residual = static_cast<const uint16_t*>(args.residual) + offset;
        for (int64_t i = 0; i < count; ++i) value[i] += float16_to_float(residual[i]);
      }
    }
  }

  // Bit i = value[i] >= threshold[i], or <= where flip; count <= 64. A NaN gives 0.
  template <class Number>
  static inline void store_bits(const BinaryConv2dArgs& args, const BitOutput& output, const Number* value,
                                int64_t pixel, int64_t filter, int64_t count) {
    for (int64_t t = 0; t < args.thresholds; ++t) {
      const int64_t channel = t * args.shape.filters + filter;
      const Number* threshold = static_cast<const Number*>(args.threshold) + channel;
      uint64_t bits = 0;
      for (int64_t i = 0; i < count; ++i) {
        const bool flipped = args.flip != nullptr && args.flip[channel + i] != 0;
        const bool bit = flipped ? value[i] <= threshold[i] : value[i] >= threshold[i];
        bits |= uint64_t{bit} << i;
      }
      output.put(pixel, channel, count, bits);
    }
  }
};

// The most pixels of a tile, those of the avx2 level.
constexpr int64_t kMostTilePixels = 32;

// The steps of args.program on the accumulators of a tile.
inline void store_program(const BinaryConv2dArgs& args, const int32_t* const* acc, const int64_t* pixels, int64_t count,
                          int64_t filter, int64_t filters) {
  const void* rows[kMostTilePixels];
  for (int64_t i = 0; i < count; ++i) rows[i] = acc[i];
  const int64_t pixels_per_image = args.shape.out_height * args.shape.out_width;
  run_program(args.program, {rows, Source::int32, pixels, count, filter, filters, args.shape.filters, pixels_per_image,
                             conv_blocks_share_words(args), nullptr});
}

// Stores filters [filter, filter + filters) of the output pixels pixels[0, count). acc[i] points at the accumulators of
// pixels[i]; with int32 output it may point at their destination, and then nothing is left to do.
template <class Epilogue>
inline void store_tile(const BinaryConv2dArgs& args, const int32_t* const* acc, const int64_t* pixels, int64_t count,
                       int64_t filter, int64_t filters) {
  if (args.output_kind == ConvOutput::program) return store_program(args, acc, pixels, count, filter, filters);
  if (args.output_kind != ConvOutput::int32) return Epilogue::store(args, acc, pixels, count, filter, filters);
  for (int64_t i = 0; i < count; ++i) {
    int32_t* out = static_cast<int32_t*>(args.output) + pixels[i] * args.shape.filters + filter;
    if (out != acc[i]) memcpy(out, acc[i], static_cast<size_t>(filters) * sizeof(int32_t));
  }
}

}  // namespace
}  // namespace lowbit
