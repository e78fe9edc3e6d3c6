// The output kinds of binary_conv2d.h in AVX-512, for the avx512 and amx levels. Vector by vector of 16 filters, and
// for each all pixels of the tile, so that scales, biases and thresholds are loaded once a tile.
#pragma once

#include <immintrin.h>

#include "cpu/binary_conv2d/epilogue.h"

namespace lowbit {
namespace {

struct Avx512Epilogue {
  static constexpr int64_t kMaxPixels = 16;  // of a tile
  static constexpr int64_t kVectorFilters = 16;

  static inline void store(const BinaryConv2dArgs& args, const int32_t* const* acc, const int64_t* pixels,
                           int64_t count, int64_t filter, int64_t filters) {
    const Tile tile = {acc, pixels, count, filter, filters};
    switch (args.output_kind) {
      case ConvOutput::int32:
      case ConvOutput::program:
        return;
      case ConvOutput::float32: {
        float* out = static_cast<float*>(args.output);
        return store_floats(args, tile, [&](int64_t, int64_t offset, __mmask16 mask, __m512 value_f32x16) {
          _mm512_mask_storeu_ps(out + offset, mask, value_f32x16);
        });
      }
      case ConvOutput::bfloat16: {
        uint16_t* out = static_cast<uint16_t*>(args.output);
        return store_floats(args, tile, [&](int64_t, int64_t offset, __mmask16 mask, __m512 value_f32x16) {
          _mm256_mask_storeu_epi16(out + offset, mask, to_bfloat16(value_f32x16));
        });
      }
      case ConvOutput::float16: {
        uint16_t* out = static_cast<uint16_t*>(args.output);
        return store_floats(args, tile, [&](int64_t, int64_t offset, __mmask16 mask, __m512 value_f32x16) {
          const __m256i half_u16x16 = _mm512_cvtps_ph(value_f32x16, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
          _mm256_mask_storeu_epi16(out + offset, mask, half_u16x16);
        });
      }
      case ConvOutput::bits_by_integer:
        return store_bits(args, tile, acc);
      case ConvOutput::bits_by_float: {
        alignas(64) float value[kMaxPixels][64];
        const float* rows[kMaxPixels];
        for (int64_t i = 0; i < count; ++i) rows[i] = value[i];
        store_floats(args, tile, [&](int64_t i, int64_t offset, __mmask16, __m512 value_f32x16) {
          _mm512_store_ps(value[i] + (offset - (pixels[i] * args.shape.filters + filter)), value_f32x16);
        });
        return store_bits(args, tile, rows);
      }
    }
  }

 private:
  struct Tile {
    const int32_t* const* acc;
    const int64_t* pixels;
    int64_t count, filter, filters;
  };

  static inline __mmask16 lanes(int64_t count) { return static_cast<__mmask16>(low_mask(count)); }

  // put(i, index of its first element in the output, lanes, value) for each vector of each pixel i. An absent scale is
  // 1 and an absent bias -0, which leave every value as it is.
  template <class Put>
  static inline void store_floats(const BinaryConv2dArgs& args, const Tile& tile, const Put& put) {
    for (int64_t v = 0; v < tile.filters; v += kVectorFilters) {
      const __mmask16 mask = lanes(tile.filters - v);
      const int64_t filter = tile.filter + v;
      const __m512 scale_f32x16 = args.scale == nullptr    ? _mm512_set1_ps(1.0f)
                                  : args.scale_stride == 0 ? _mm512_set1_ps(args.scale[0])
                                                           : _mm512_maskz_loadu_ps(mask, args.scale + filter);
      const __m512 bias_f32x16 =
          args.bias == nullptr ? _mm512_set1_ps(-0.0f) : _mm512_maskz_loadu_ps(mask, args.bias + filter);
      for (int64_t i = 0; i < tile.count; ++i) {
        const int64_t offset = tile.pixels[i] * args.shape.filters + filter;
        const __m512 acc_f32x16 = _mm512_cvtepi32_ps(_mm512_maskz_loadu_epi32(mask, tile.acc[i] + v));
        __m512 value_f32x16 = _mm512_add_ps(_mm512_mul_ps(acc_f32x16, scale_f32x16), bias_f32x16);
        if (args.residual != nullptr) value_f32x16 = _mm512_add_ps(value_f32x16, load_residual(args, mask, offset));
        put(i, offset, mask, value_f32x16);
      }
    }
  }

  // Bits value >= threshold, or <= where flip: (value ^ f) >= (threshold ^ f), where f reverses the order.
  template <class Number>
  static inline void store_bits(const BinaryConv2dArgs& args, const Tile& tile, const Number* const* value) {
    const BitOutput output = bit_output(args);
    for (int64_t t = 0; t < args.thresholds; ++t) {
      const int64_t channel = t * args.shape.filters + tile.filter;
      const Number* threshold = static_cast<const Number*>(args.threshold) + channel;
      uint64_t bits[kMaxPixels] = {};
      for (int64_t v = 0; v < tile.filters; v += kVectorFilters) {
        const __mmask16 mask = lanes(tile.filters - v);
        const __m512i flip_i32x16 =
            args.flip == nullptr ? _mm512_setzero_si512() : order(mask, args.flip + channel + v, Number());
        const __m512i limit_i32x16 = _mm512_xor_si512(_mm512_maskz_loadu_epi32(mask, threshold + v), flip_i32x16);
        for (int64_t i = 0; i < tile.count; ++i) {
          const __m512i flipped_i32x16 = _mm512_xor_si512(_mm512_maskz_loadu_epi32(mask, value[i] + v), flip_i32x16);
          bits[i] |= uint64_t{reached(mask, flipped_i32x16, limit_i32x16, Number())} << v;
        }
      }
      for (int64_t i = 0; i < tile.count; ++i) output.put(tile.pixels[i], channel, tile.filters, bits[i]);
    }
  }

  // All bits of an integer, the sign of a float, where flip.
  static inline __m512i order(__mmask16 mask, const uint8_t* flip, int32_t) {
    const __m128i bytes_u8x16 = _mm_maskz_loadu_epi8(mask, flip);
    return _mm512_maskz_set1_epi32(_mm_test_epi8_mask(bytes_u8x16, bytes_u8x16), -1);
  }
  static inline __m512i order(__mmask16 mask, const uint8_t* flip, float) {
    return _mm512_slli_epi32(order(mask, flip, int32_t{}), 31);
  }
  static inline __mmask16 reached(__mmask16 mask, __m512i value_i32x16, __m512i limit_i32x16, int32_t) {
    return _mm512_mask_cmpge_epi32_mask(mask, value_i32x16, limit_i32x16);
  }
  static inline __mmask16 reached(__mmask16 mask, __m512i value_i32x16, __m512i limit_i32x16, float) {
    return _mm512_mask_cmp_ps_mask(mask, _mm512_castsi512_ps(value_i32x16), _mm512_castsi512_ps(limit_i32x16),
                                   _CMP_GE_OQ);
  }

  static inline __m512 load_residual(const BinaryConv2dArgs& args, __mmask16 mask, int64_t offset) {
    if (args.residual_type == FloatType::float32) {
      return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(args.residual) + offset);
    }
    const __m256i half_u16x16 = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(args.residual) + offset);
    if (args.residual_type == FloatType::float16) return _mm512_cvtph_ps(half_u16x16);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half_u16x16), 16));
  }

  // float_to_bfloat16 of half.h.
  static inline __m256i to_bfloat16(__m512 value_f32x16) {
    const __m512i bits_u32x16 = _mm512_castps_si512(value_f32x16);
    const __m512i high_u32x16 = _mm512_srli_epi32(bits_u32x16, 16);
    const __m512i tie_u32x16 = _mm512_and_si512(high_u32x16, _mm512_set1_epi32(1));
    const __m512i rounded_u32x16 =
        _mm512_add_epi32(_mm512_add_epi32(bits_u32x16, _mm512_set1_epi32(0x7fff)), tie_u32x16);
    const __m512i quiet_u32x16 = _mm512_or_si512(high_u32x16, _mm512_set1_epi32(0x40));
    const __mmask16 nan = _mm512_cmp_ps_mask(value_f32x16, value_f32x16, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(rounded_u32x16, 16), nan, quiet_u32x16));
  }
};

}  // namespace
}  // namespace lowbit
