// Blocks of at most 256 elements between float types, floats and packed codes. Arithmetic is plain loops, which the
// compiler turns into the instructions of each level; changes of width, which it does badly, are written out. Internal
// linkage: each level compiles its own.
#pragma once

#include <cstdint>

#include "core/codes.h"
#include "core/float_type.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace lowbit {
namespace {

static_assert(kBlock == kGroup, "a group is a block");

// A number of elements that the compiler knows: what the loops run over. Blocks of fewer are padded to it.
template <int64_t kCount>
struct Known {
  constexpr operator int64_t() const { return kCount; }
};
using Whole = Known<kBlock>;
using Quarter = Known<kBlock / 4>;

// float16 elements that one instruction converts; 1 where there is none.
#if defined(__F16C__)
constexpr int64_t kConverted = 8;
#else
constexpr int64_t kConverted = 1;
#endif

inline void load(const float* input, int64_t count, float* values, Stored<FloatType::float32>) {
  for (int64_t i = 0; i < count; ++i) values[i] = input[i];
}

inline void load(const uint16_t* input, int64_t count, float* values, Stored<FloatType::bfloat16>) {
  for (int64_t i = 0; i < count; ++i) values[i] = bfloat16_to_float(input[i]);
}

inline void load(const uint16_t* input, int64_t count, float* values, Stored<FloatType::float16>) {
  const int64_t whole = kConverted > 1 ? kConverted * (count / kConverted) : 0;
#if defined(__F16C__)
  for (int64_t i = 0; i < whole; i += kConverted) {
    _mm256_storeu_ps(values + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(input + i))));
  }
#endif
  for (int64_t i = whole; i < count; ++i) values[i] = float16_to_float(input[i]);
}

inline void store(const float* values, int64_t count, float* output, Stored<FloatType::float32>) {
  for (int64_t i = 0; i < count; ++i) output[i] = values[i];
}

// Sixteen floats to bfloat16 as float_to_bfloat16 does.
#if defined(__AVX512BW__)
inline void store_bfloat16x16(const float* values, uint16_t* output) {
  const __m512 values_f32x16 = _mm512_loadu_ps(values);
  const __m512i bits_u32x16 = _mm512_castps_si512(values_f32x16), upper_u32x16 = _mm512_srli_epi32(bits_u32x16, 16);
  const __m512i half_u32x16 =
      _mm512_add_epi32(_mm512_and_si512(upper_u32x16, _mm512_set1_epi32(1)), _mm512_set1_epi32(0x7fff));
  const __m512i rounded_u32x16 = _mm512_srli_epi32(_mm512_add_epi32(bits_u32x16, half_u32x16), 16);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(values_f32x16, values_f32x16, _CMP_UNORD_Q);
  const __m512i halves_u32x16 = _mm512_mask_or_epi32(rounded_u32x16, is_nan, upper_u32x16, _mm512_set1_epi32(0x40));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(output), _mm512_cvtepi32_epi16(halves_u32x16));
}
#elif defined(__AVX2__)
inline __m256i round_bfloat16x8(const float* values) {
  const __m256 values_f32x8 = _mm256_loadu_ps(values);
  const __m256i bits_u32x8 = _mm256_castps_si256(values_f32x8), upper_u32x8 = _mm256_srli_epi32(bits_u32x8, 16);
  const __m256i half_u32x8 =
      _mm256_add_epi32(_mm256_and_si256(upper_u32x8, _mm256_set1_epi32(1)), _mm256_set1_epi32(0x7fff));
  const __m256i rounded_u32x8 = _mm256_srli_epi32(_mm256_add_epi32(bits_u32x8, half_u32x8), 16);
  const __m256 is_nan_f32x8 = _mm256_cmp_ps(values_f32x8, values_f32x8, _CMP_UNORD_Q);
  const __m256i quiet_u32x8 = _mm256_or_si256(upper_u32x8, _mm256_set1_epi32(0x40));
  return _mm256_blendv_epi8(rounded_u32x8, quiet_u32x8, _mm256_castps_si256(is_nan_f32x8));
}

inline void store_bfloat16x16(const float* values, uint16_t* output) {
  // The pack works in halves of a vector.
  const __m256i packed_u16x16 = _mm256_packus_epi32(round_bfloat16x8(values), round_bfloat16x8(values + 8));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(output), _mm256_permute4x64_epi64(packed_u16x16, 0xd8));
}
#else
inline void store_bfloat16x16(const float* values, uint16_t* output) {
  for (int64_t i = 0; i < 16; ++i) output[i] = float_to_bfloat16(values[i]);
}
#endif

inline void store(const float* values, int64_t count, uint16_t* output, Stored<FloatType::bfloat16>) {
  const int64_t whole = count / 16 * 16;
  for (int64_t i = 0; i < whole; i += 16) store_bfloat16x16(values + i, output + i);
  for (int64_t i = whole; i < count; ++i) output[i] = float_to_bfloat16(values[i]);
}

inline void store(const float* values, int64_t count, uint16_t* output, Stored<FloatType::float16>) {
  const int64_t whole = kConverted > 1 ? kConverted * (count / kConverted) : 0;
#if defined(__F16C__)
  for (int64_t i = 0; i < whole; i += kConverted) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(output + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(values + i), _MM_FROUND_TO_NEAREST_INT));
  }
#endif
  for (int64_t i = whole; i < count; ++i) output[i] = float_to_float16(values[i]);
}

// The floats of `count` elements, padded with `padding`: the input itself, or `buffer`.
template <class Size, class Type>
inline const float* load_block(const typename Type::type* input, int64_t count, Size size, float* buffer, Type type,
                               float padding = 0.0f) {
  if (count == size) {
    if constexpr (Type::value == FloatType::float32) return input;
    load(input, size, buffer, type);
    return buffer;
  }
  load(input, count, buffer, type);
  for (int64_t i = count; i < size; ++i) buffer[i] = padding;
  return buffer;
}

// Where to make the floats of a block for store_block: the output itself, or `buffer`.
template <class Size, class Type>
inline float* floats_of(typename Type::type* output, int64_t count, Size size, float* buffer, Type) {
  if constexpr (Type::value == FloatType::float32) return count == size ? output : buffer;
  return buffer;
}

template <class Size, class Type>
inline void store_block(const float* values, int64_t count, Size size, typename Type::type* output, Type type) {
  if constexpr (Type::value == FloatType::float32) {
    if (values == output) return;
  }
  if (count == size) return store(values, size, output, type);
  store(values, count, output, type);
}

// Codes, one a byte, to packed bytes. `kSize` is a multiple of 64.
template <int64_t kSize>
inline void pack(const uint8_t* codes, int bits, uint8_t* packed) {
  if (bits == 8) {
    for (int64_t i = 0; i < kSize; ++i) packed[i] = codes[i];
    return;
  }
#if defined(__AVX512BW__)
  // Neighbours are joined by multiply-add, and the low bytes of the sums kept.
  const __m512i pair_i8x64 = _mm512_set1_epi16(static_cast<int16_t>(1 | 1 << (8 + bits)));
  const __m512i quad_i16x32 = _mm512_set1_epi32(1 | 1 << (16 + 4));
  for (int64_t i = 0; i < kSize; i += 64) {
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
  for (int64_t i = 0; i < kSize; i += 32) {
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
#else
  const int64_t per_byte = 8 / bits;
  for (int64_t byte = 0; byte < kSize / per_byte; ++byte) {
    unsigned joined = 0;
    for (int64_t j = 0; j < per_byte; ++j) joined |= unsigned{codes[byte * per_byte + j]} << (j * bits);
    packed[byte] = static_cast<uint8_t>(joined);
  }
#endif
}

// Packed bytes to codes, one a byte. `kSize` is a multiple of 64.
template <int64_t kSize>
inline void unpack(const uint8_t* packed, int bits, uint8_t* codes) {
  if (bits == 8) {
    for (int64_t i = 0; i < kSize; ++i) codes[i] = packed[i];
    return;
  }
  const int mask = (1 << bits) - 1;
#if defined(__AVX512BW__)
  for (int64_t i = 0; i < kSize; i += 64) {
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
  for (int64_t i = 0; i < kSize; i += 32) {
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
#else
  const int64_t per_byte = 8 / bits;
  for (int64_t i = 0; i < kSize; ++i)
    codes[i] = static_cast<uint8_t>(packed[i / per_byte] >> (i % per_byte * bits) & mask);
#endif
}

// Writes the bytes of `count` codes; those past count within the last byte are made 0.
template <int64_t kSize>
inline void pack_block(uint8_t* codes, int64_t count, Known<kSize>, int bits, uint8_t* packed) {
  if (count == kSize) return pack<kSize>(codes, bits, packed);
  for (int64_t i = count; i < kSize; ++i) codes[i] = 0;
  uint8_t bytes[kSize];
  pack<kSize>(codes, bits, bytes);
  memcpy(packed, bytes, static_cast<size_t>(code_bytes(count, bits)));
}

// Reads the bytes of `count` codes; the codes past them are 0.
template <int64_t kSize>
inline void unpack_block(const uint8_t* packed, int64_t count, Known<kSize>, int bits, uint8_t* codes) {
  if (count == kSize) return unpack<kSize>(packed, bits, codes);
  uint8_t bytes[kSize] = {};
  memcpy(bytes, packed, static_cast<size_t>(code_bytes(count, bits)));
  unpack<kSize>(bytes, bits, codes);
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

// Calls body(first, count, size) for the parts of `total` elements: whole blocks, then quarters padded to `size`, a
// Known.
template <class Body>
inline void for_each_part(int64_t total, const Body& body) {
  int64_t first = 0;
  for (; first + Whole{} <= total; first += Whole{}) body(first, int64_t{Whole{}}, Whole{});
  for (; first < total; first += Quarter{}) {
    body(first, min(total - first, Quarter{}), Quarter{});
  }
}

// Calls block(first element, count, size, first byte of codes, parameter) for the parts of rows [begin, end).
// parameter(index) is the Common or Each of a row of the workspace `grid`.
template <class Block>
inline void for_each_block(const ChannelShape& shape, int bits, const float* grid, int64_t begin, int64_t end,
                           const Block& block) {
  const int64_t length = row_length(shape), row_bytes = code_bytes(length, bits), width = grid_width(shape);
  if (!shape.channels_last) {
    for (int64_t row = begin; row < end; ++row) {
      const float* column = grid + row % shape.channels;
      const auto parameter = [=](int index) { return Common{column[index * width]}; };
      for_each_part(length, [&](int64_t first, int64_t count, auto size) {
        block(row * length + first, count, size, row * row_bytes + first * bits / 8, parameter);
      });
    }
    return;
  }
  const int64_t step = block_pixels(shape, bits);
  for (int64_t row = begin; row < end; row += step) {
    const int64_t rows = min(step, end - row);
    for_each_part(rows * length, [&](int64_t first, int64_t count, auto size) {
      const auto parameter = [=](int index) { return Each{grid + index * width + first}; };
      block(row * length + first, count, size, row * row_bytes + first * bits / 8, parameter);
    });
  }
}

}  // namespace
}  // namespace lowbit
