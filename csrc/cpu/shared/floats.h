// Blocks of elements between float types. Arithmetic is plain loops, which the compiler turns into the instructions of
// each level; changes of width, which it does badly, are written out. Internal linkage: each level compiles its own.
#pragma once

#include <cstdint>

#include "core/float_type.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace lowbit {
namespace {

// A number of elements that the compiler knows: what the loops run over. Blocks of fewer are padded to it.
template <int64_t kCount>
struct Known {
  constexpr operator int64_t() const { return kCount; }
};

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

}  // namespace
}  // namespace lowbit
