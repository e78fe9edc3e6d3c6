// Blocks of at most 256 elements between float types, floats and packed codes. Arithmetic is plain loops, which the
// compiler turns into the instructions of each level; changes of width, which it does badly, are written out. Internal
// linkage: each level compiles its own.
#pragma once

#include <cstdint>

#include "core/codes.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace lowbit {
namespace {

static_assert(kBlock == kGroup, "a group is a block");

template <FloatType kType>
struct Bits {
  static constexpr FloatType value = kType;
  using type = uint16_t;
};
template <>
struct Bits<FloatType::float32> {
  static constexpr FloatType value = FloatType::float32;
  using type = float;
};

// Calls body(Bits<type>{}).
template <class Body>
inline void for_type(FloatType type, const Body& body) {
  switch (type) {
    case FloatType::float32:
      return body(Bits<FloatType::float32>{});
    case FloatType::bfloat16:
      return body(Bits<FloatType::bfloat16>{});
    case FloatType::float16:
      return body(Bits<FloatType::float16>{});
  }
}

// A number of elements that the compiler knows.
template <int64_t kCount>
struct Known {
  constexpr operator int64_t() const { return kCount; }
};
using Whole = Known<kBlock>;

// float16 elements that one instruction converts; 1 where there is none.
#if defined(__F16C__)
constexpr int64_t kConverted = 8;
#else
constexpr int64_t kConverted = 1;
#endif

// The floats of `count` elements: themselves, or written to `buffer`.
inline const float* load_block(const float* input, int64_t, float*, Bits<FloatType::float32>) { return input; }

inline const float* load_block(const uint16_t* input, int64_t count, float* buffer, Bits<FloatType::bfloat16>) {
  for (int64_t i = 0; i < count; ++i) buffer[i] = bfloat16_to_float(input[i]);
  return buffer;
}

inline const float* load_block(const uint16_t* input, int64_t count, float* buffer, Bits<FloatType::float16>) {
  const int64_t whole = kConverted > 1 ? kConverted * (count / kConverted) : 0;
#if defined(__F16C__)
  for (int64_t i = 0; i < whole; i += kConverted) {
    _mm256_storeu_ps(buffer + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(input + i))));
  }
#endif
  for (int64_t i = whole; i < count; ++i) buffer[i] = float16_to_float(input[i]);
  return buffer;
}

inline void store_block(const float* values, int64_t count, float* output, Bits<FloatType::float32>) {
  for (int64_t i = 0; i < count; ++i) output[i] = values[i];
}

inline void store_block(const float* values, int64_t count, uint16_t* output, Bits<FloatType::bfloat16>) {
  for (int64_t i = 0; i < count; ++i) output[i] = float_to_bfloat16(values[i]);
}

inline void store_block(const float* values, int64_t count, uint16_t* output, Bits<FloatType::float16>) {
  const int64_t whole = kConverted > 1 ? kConverted * (count / kConverted) : 0;
#if defined(__F16C__)
  for (int64_t i = 0; i < whole; i += kConverted) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(output + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(values + i), _MM_FROUND_TO_NEAREST_INT));
  }
#endif
  for (int64_t i = whole; i < count; ++i) output[i] = float_to_float16(values[i]);
}

// Codes, one a byte, of `count` elements to packed bytes. The codes past count within the last byte count as 0.
inline void pack_block(const uint8_t* codes, int64_t count, int bits, uint8_t* packed) {
  int64_t i = 0;
  if (bits == 8) {
    for (; i < count; ++i) packed[i] = codes[i];
    return;
  }
#if defined(__AVX512BW__)
  // Neighbours are joined by multiply-add, and the low bytes of the sums kept.
  const __m512i pair_i8x64 = _mm512_set1_epi16(static_cast<int16_t>(1 | 1 << (8 + bits)));
  const __m512i quad_i16x32 = _mm512_set1_epi32(1 | 1 << (16 + 4));
  for (; i + 64 <= count; i += 64) {
    const __m512i pairs_i16x32 = _mm512_maddubs_epi16(_mm512_loadu_si512(codes + i), pair_i8x64);
    if (bits == 4) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(packed + i / 2), _mm512_cvtepi16_epi8(pairs_i16x32));
    } else {
      const __m512i quads_i32x16 = _mm512_madd_epi16(pairs_i16x32, quad_i16x32);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(packed + i / 4), _mm512_cvtepi32_epi8(quads_i32x16));
    }
  }
#elif defined(__AVX2__)
  const __m256i pair_i8x32 = _mm256_set1_epi16(static_cast<int16_t>(1 | 1 << (8 + bits)));
  const __m256i quad_i16x16 = _mm256_set1_epi32(1 | 1 << (16 + 4));
  for (; i + 32 <= count; i += 32) {
    const __m256i codes_u8x32 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i));
    const __m256i pairs_i16x16 = _mm256_maddubs_epi16(codes_u8x32, pair_i8x32);
    if (bits == 4) {
      const __m256i bytes_u8x32 = _mm256_permute4x64_epi64(_mm256_packus_epi16(pairs_i16x16, pairs_i16x16), 0x08);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(packed + i / 2), _mm256_castsi256_si128(bytes_u8x32));
    } else {
      const __m256i quads_i32x8 = _mm256_madd_epi16(pairs_i16x16, quad_i16x16);
      const __m256i words_i16x16 = _mm256_packus_epi32(quads_i32x8, quads_i32x8);
      const __m256i bytes_u8x32 = _mm256_packus_epi16(words_i16x16, words_i16x16);
      const int low = _mm256_extract_epi32(bytes_u8x32, 0), high = _mm256_extract_epi32(bytes_u8x32, 4);
      memcpy(packed + i / 4, &low, 4);
      memcpy(packed + i / 4 + 4, &high, 4);
    }
  }
#endif
  const int64_t per_byte = 8 / bits;
  for (; i < count; i += per_byte) {
    unsigned byte = 0;
    for (int64_t j = 0; j < per_byte && i + j < count; ++j) byte |= unsigned{codes[i + j]} << (j * bits);
    packed[i / per_byte] = static_cast<uint8_t>(byte);
  }
}

// Packed bytes to codes, one a byte.
inline void unpack_block(const uint8_t* packed, int64_t count, int bits, uint8_t* codes) {
  int64_t i = 0;
  if (bits == 8) {
    for (; i < count; ++i) codes[i] = packed[i];
    return;
  }
  const int mask = (1 << bits) - 1;
#if defined(__AVX512BW__)
  for (; i + 64 <= count; i += 64) {
    __m512i codes_u8x64;
    if (bits == 4) {
      const __m512i wide_u16x32 =
          _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed + i / 2)));
      codes_u8x64 = _mm512_or_si512(wide_u16x32, _mm512_slli_epi16(wide_u16x32, 4));
    } else {
      const __m512i wide_u32x16 =
          _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + i / 4)));
      const __m512i halves_u32x16 = _mm512_or_si512(wide_u32x16, _mm512_slli_epi32(wide_u32x16, 12));
      codes_u8x64 = _mm512_or_si512(halves_u32x16, _mm512_slli_epi32(halves_u32x16, 6));
    }
    _mm512_storeu_si512(codes + i, _mm512_and_si512(codes_u8x64, _mm512_set1_epi8(static_cast<int8_t>(mask))));
  }
#elif defined(__AVX2__)
  for (; i + 32 <= count; i += 32) {
    __m256i codes_u8x32;
    if (bits == 4) {
      const __m256i wide_u16x16 =
          _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + i / 2)));
      codes_u8x32 = _mm256_or_si256(wide_u16x16, _mm256_slli_epi16(wide_u16x16, 4));
    } else {
      const __m256i wide_u32x8 =
          _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed + i / 4)));
      const __m256i halves_u32x8 = _mm256_or_si256(wide_u32x8, _mm256_slli_epi32(wide_u32x8, 12));
      codes_u8x32 = _mm256_or_si256(halves_u32x8, _mm256_slli_epi32(halves_u32x8, 6));
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + i),
                        _mm256_and_si256(codes_u8x32, _mm256_set1_epi8(static_cast<int8_t>(mask))));
  }
#endif
  const int64_t per_byte = 8 / bits;
  for (; i < count; ++i) codes[i] = static_cast<uint8_t>(packed[i / per_byte] >> (i % per_byte * bits) & mask);
}

// Calls body(group, its number of elements) for groups [begin, end) of `count` elements.
template <class Body>
inline void for_each_group(int64_t count, int64_t begin, int64_t end, const Body& body) {
  for (int64_t group = begin; group < end; ++group) {
    const int64_t left = count - group * kGroup;
    if (left >= kGroup) {
      body(group, Whole{});
    } else {
      body(group, left);
    }
  }
}

// A parameter of a channel for a block of elements: one for all, or one each.
struct Common {
  float value;
  float operator()(int64_t) const { return value; }
};
struct Each {
  const float* values;
  float operator()(int64_t i) const { return values[i]; }
};

// Calls block(first element, count, first byte of codes, parameter) for the blocks of rows [begin, end);
// parameter(row) is the Common or Each of a row of the workspace `grid`.
template <class Block>
inline void for_each_block(const ChannelShape& shape, int bits, const float* grid, int64_t begin, int64_t end,
                           const Block& block) {
  const int64_t length = row_length(shape), row_bytes = code_bytes(length, bits), width = grid_width(shape);
  const auto call = [&](int64_t element, int64_t count, int64_t byte, auto parameter) {
    if (count == kBlock) return block(element, Whole{}, byte, parameter);
    block(element, count, byte, parameter);
  };
  const int64_t pixels = shape.channels_last ? block_pixels(shape, bits) : 1;
  for (int64_t row = begin; row < end; row += pixels) {
    const int64_t rows = pixels < end - row ? pixels : end - row;
    for (int64_t first = 0; first < rows * length; first += kBlock) {
      const int64_t left = rows * length - first, count = left < kBlock ? left : kBlock;
      const int64_t element = row * length + first, byte = row * row_bytes + first * bits / 8;
      if (shape.channels_last) {
        call(element, count, byte, [&](int index) { return Each{grid + index * width + first}; });
      } else {
        call(element, count, byte, [&](int index) { return Common{grid[index * width + row % shape.channels]}; });
      }
    }
  }
}

}  // namespace
}  // namespace lowbit
