// The output kinds of binary_conv2d.h in AVX2, in vectors of 8 filters. Scales, biases and thresholds are first copied
// and completed to whole vectors, once a tile. Accumulators may be read up to a whole vector, as kLanes of the kernel
// promises; everything else ends with the last filter.
#pragma once

#include <immintrin.h>

#include "cpu/binary_conv2d/epilogue.h"

namespace lowbit {
namespace {

struct Avx2Epilogue {
  static inline void store(const BinaryConv2dArgs& args, const int32_t* const* acc, const int64_t* pixels,
                           int64_t count, int64_t filter, int64_t filters) {
    const Tile tile = {acc, pixels, count, filter, filters};
    switch (args.output_kind) {
      case ConvOutput::int32:
      case ConvOutput::program:
        return;
      case ConvOutput::float32: {
        float* out = static_cast<float*>(args.output);
        return store_floats(args, tile, [=](int64_t offset, int64_t lanes, __m256 value_f32x8) {
          store_lanes(out + offset, lanes, _mm256_castps_si256(value_f32x8));
        });
      }
      case ConvOutput::bfloat16: {
        uint16_t* out = static_cast<uint16_t*>(args.output);
        return store_floats(args, tile, [=](int64_t offset, int64_t lanes, __m256 value_f32x8) {
          store_half_lanes(out + offset, lanes, to_bfloat16(value_f32x8));
        });
      }
      case ConvOutput::float16: {
        uint16_t* out = static_cast<uint16_t*>(args.output);
        return store_floats(args, tile, [=](int64_t offset, int64_t lanes, __m256 value_f32x8) {
          const __m128i half_u16x8 = _mm256_cvtps_ph(value_f32x8, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
          store_half_lanes(out + offset, lanes, half_u16x8);
        });
      }
      case ConvOutput::bits_by_integer:
        return store_bits<false>(args, tile);
      case ConvOutput::bits_by_float:
        return store_bits<true>(args, tile);
    }
  }

 private:
  static constexpr int64_t kMaxFilters = 64;

  struct Tile {
    const int32_t* const* acc;
    const int64_t* pixels;
    int64_t count, filter, filters;
  };

  // What the filters of a tile do to their accumulators. An absent scale is 1 and an absent bias -0, which leave every
  // value as it is.
  struct Terms {
    alignas(32) float scale[kMaxFilters];
    alignas(32) float bias[kMaxFilters];

    Terms(const BinaryConv2dArgs& args, const Tile& tile) {
      const bool one_scale = args.scale != nullptr && args.scale_stride == 0;
      fill(args.scale == nullptr || one_scale ? nullptr : args.scale + tile.filter, tile.filters,
           one_scale ? args.scale[0] : 1.0f, scale);
      fill(args.bias == nullptr ? nullptr : args.bias + tile.filter, tile.filters, -0.0f, bias);
    }
    static inline void fill(const float* from, int64_t count, float other, float* to) {
      for (int64_t i = 0; i < kMaxFilters; ++i) to[i] = other;
      if (from != nullptr) memcpy(to, from, static_cast<size_t>(count) * sizeof *to);
    }
  };

  // put(index of its first element in the output, lanes, value) for each vector of a pixel.
  template <class Put>
  static inline void put_pixel(const BinaryConv2dArgs& args, const Tile& tile, const Terms& terms, int64_t pixel,
                               const Put& put) {
    const int64_t first = tile.pixels[pixel] * args.shape.filters + tile.filter;
    const auto put_vector = [&](int64_t i, int64_t lanes) {
      const __m256 acc_f32x8 = _mm256_cvtepi32_ps(load(tile.acc[pixel] + i));
      __m256 value_f32x8 =
          _mm256_add_ps(_mm256_mul_ps(acc_f32x8, _mm256_load_ps(terms.scale + i)), _mm256_load_ps(terms.bias + i));
      if (args.residual != nullptr) value_f32x8 = _mm256_add_ps(value_f32x8, load_residual(args, first + i, lanes));
      put(first + i, lanes, value_f32x8);
    };
    int64_t i = 0;
    for (; i + 8 <= tile.filters; i += 8) put_vector(i, 8);
    if (i < tile.filters) put_vector(i, tile.filters - i);
  }

  template <class Put>
  static inline void store_floats(const BinaryConv2dArgs& args, const Tile& tile, const Put& put) {
    const Terms terms(args, tile);
    for (int64_t pixel = 0; pixel < tile.count; ++pixel) put_pixel(args, tile, terms, pixel, put);
  }

  // Bits value >= threshold, or <= where flip: (value ^ f) >= (threshold ^ f), where f reverses the order: all bits of
  // an integer, the sign of a float.
  template <bool kFloat>
  static inline void store_bits(const BinaryConv2dArgs& args, const Tile& tile) {
    alignas(32) int32_t flip[2][kMaxFilters] = {};
    alignas(32) int32_t limit[2][kMaxFilters] = {};
    for (int64_t t = 0; t < args.thresholds; ++t) {
      const int64_t first = t * args.shape.filters + tile.filter;
      memcpy(limit[t], static_cast<const int32_t*>(args.threshold) + first, static_cast<size_t>(tile.filters) * 4);
      if (args.flip == nullptr) continue;
      for (int64_t i = 0; i < tile.filters; ++i) {
        flip[t][i] = args.flip[first + i] == 0 ? 0 : kFloat ? INT32_MIN : -1;
        limit[t][i] ^= flip[t][i];
      }
    }
    const BitOutput output = bit_output(args);
    const Terms terms(args, tile);
    alignas(32) int32_t floats[kMaxFilters];
    for (int64_t pixel = 0; pixel < tile.count; ++pixel) {
      const int32_t* value = tile.acc[pixel];
      if (kFloat) {
        int32_t* next = floats;
        put_pixel(args, tile, terms, pixel, [&](int64_t, int64_t, __m256 value_f32x8) {
          _mm256_store_si256(reinterpret_cast<__m256i*>(next), _mm256_castps_si256(value_f32x8));
          next += 8;
        });
        value = floats;
      }
      for (int64_t t = 0; t < args.thresholds; ++t) {
        uint64_t bits = 0;
        for (int64_t i = 0; i < tile.filters; i += 8) {
          const __m256i flipped_i32x8 = _mm256_xor_si256(load(value + i), load(flip[t] + i));
          bits |= at_least<kFloat>(flipped_i32x8, load(limit[t] + i)) << i;
        }
        const int64_t channel = t * args.shape.filters + tile.filter;
        output.put(tile.pixels[pixel], channel, tile.filters, bits & low_mask(tile.filters));
      }
    }
  }

  // Bit i = value[i] >= limit[i], of 8.
  template <bool kFloat>
  static inline uint64_t at_least(__m256i value_i32x8, __m256i limit_i32x8) {
    if (kFloat) {
      const __m256 reached_f32x8 =
          _mm256_cmp_ps(_mm256_castsi256_ps(value_i32x8), _mm256_castsi256_ps(limit_i32x8), _CMP_GE_OQ);
      return static_cast<uint64_t>(_mm256_movemask_ps(reached_f32x8));
    }
    const __m256i below_i32x8 = _mm256_cmpgt_epi32(limit_i32x8, value_i32x8);
    return static_cast<uint64_t>(_mm256_movemask_ps(_mm256_castsi256_ps(below_i32x8)) ^ 0xff);
  }

  static inline __m256i load(const int32_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }

  // Lanes [0, lanes) of 8; the others are 0.
  static inline __m256 load_residual(const BinaryConv2dArgs& args, int64_t offset, int64_t lanes) {
    if (args.residual_type == FloatType::float32) {
      const float* from = static_cast<const float*>(args.residual) + offset;
      if (lanes == 8) return _mm256_loadu_ps(from);
      __m256 value_f32x8 = _mm256_setzero_ps();
      memcpy(&value_f32x8, from, static_cast<size_t>(lanes) * sizeof *from);
      return value_f32x8;
    }
    __m128i half_u16x8 = _mm_setzero_si128();
    memcpy(&half_u16x8, static_cast<const uint16_t*>(args.residual) + offset,
           static_cast<size_t>(lanes) * sizeof(uint16_t));
    if (args.residual_type == FloatType::float16) return _mm256_cvtph_ps(half_u16x8);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half_u16x8), 16));
  }

  static inline void store_lanes(float* to, int64_t lanes, __m256i vector_i32x8) {
    if (lanes == 8) return _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), vector_i32x8);
    memcpy(to, &vector_i32x8, static_cast<size_t>(lanes) * sizeof *to);
  }
  static inline void store_half_lanes(uint16_t* to, int64_t lanes, __m128i vector_u16x8) {
    if (lanes == 8) return _mm_storeu_si128(reinterpret_cast<__m128i*>(to), vector_u16x8);
    memcpy(to, &vector_u16x8, static_cast<size_t>(lanes) * sizeof *to);
  }

  // float_to_bfloat16 of half.h.
  static inline __m128i to_bfloat16(__m256 value_f32x8) {
    const __m256i bits_u32x8 = _mm256_castps_si256(value_f32x8);
    const __m256i high_u32x8 = _mm256_srli_epi32(bits_u32x8, 16);
    const __m256i tie_u32x8 = _mm256_and_si256(high_u32x8, _mm256_set1_epi32(1));
    const __m256i rounded_u32x8 = _mm256_add_epi32(_mm256_add_epi32(bits_u32x8, _mm256_set1_epi32(0x7fff)), tie_u32x8);
    const __m256i quiet_u32x8 = _mm256_or_si256(high_u32x8, _mm256_set1_epi32(0x40));
    const __m256i nan_u32x8 = _mm256_castps_si256(_mm256_cmp_ps(value_f32x8, value_f32x8, _CMP_UNORD_Q));
    const __m256i half_u32x8 = _mm256_blendv_epi8(_mm256_srli_epi32(rounded_u32x8, 16), quiet_u32x8, nan_u32x8);
    return _mm_packus_epi32(_mm256_castsi256_si128(half_u32x8), _mm256_extracti128_si256(half_u32x8, 1));
  }
};

}  // namespace
}  // namespace lowbit
