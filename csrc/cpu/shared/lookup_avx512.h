// Tables of 16 entries: VPERMPS reads one zmm register with the low 4 bits of each lane of another.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "core/layout.h"

namespace lowbit {
namespace {

template <Encoding kEncoding>
struct Lookup {
  using Floats = __m512;
  using Indices = __m512i;
  static constexpr int kLanes = 16;
  static constexpr int kTerms = 4;
  static constexpr int kTableFloats = 16;
  static constexpr int kTileVectors = 4;
  static constexpr int kTileRows = 7;  // 28 sums, one index vector and the looked-up values: 32 zmm; 7 divides 7..224

  static Floats zero() { return _mm512_setzero_ps(); }
  static Floats load(const float* from) { return _mm512_loadu_ps(from); }
  static void store(float* to, Floats value) { _mm512_storeu_ps(to, value); }
  static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static Indices load_indices(const int32_t* from) { return _mm512_load_si512(from); }
  static Floats lookup(const float* table, Indices indices_i32x16) {
    return _mm512_permutexvar_ps(indices_i32x16, _mm512_load_ps(table));
  }

  // The first `count` <= kLanes lanes where the bit of `keep` is 1, and 0 in the others of them.
  static void store_kept(float* to, Floats value_f32x16, int64_t count, uint64_t keep) {
    _mm512_mask_storeu_ps(to, static_cast<__mmask16>(low_mask(count)),
                          _mm512_maskz_mov_ps(static_cast<__mmask16>(keep), value_f32x16));
  }

  static void make_table(const float (&terms)[kTerms], float* table) {
    const __m512 high_f32x16 = _mm512_set1_ps(1.0f);
    const __m512 low_f32x16 = _mm512_set1_ps(kEncoding == Encoding::sign ? -1.0f : 0.0f);
    // Lane i holds the factor that bit j of i stands for.
    __m512 sum_f32x16 = _mm512_mul_ps(_mm512_mask_blend_ps(0xaaaa, low_f32x16, high_f32x16), _mm512_set1_ps(terms[0]));
    sum_f32x16 =
        _mm512_fmadd_ps(_mm512_mask_blend_ps(0xcccc, low_f32x16, high_f32x16), _mm512_set1_ps(terms[1]), sum_f32x16);
    sum_f32x16 =
        _mm512_fmadd_ps(_mm512_mask_blend_ps(0xf0f0, low_f32x16, high_f32x16), _mm512_set1_ps(terms[2]), sum_f32x16);
    sum_f32x16 =
        _mm512_fmadd_ps(_mm512_mask_blend_ps(0xff00, low_f32x16, high_f32x16), _mm512_set1_ps(terms[3]), sum_f32x16);
    _mm512_store_ps(table, sum_f32x16);
  }

  // indices[16 v + c]: bit 16 v + c of words[j] becomes bit j.
  static void make_indices(const uint64_t (&words)[kTerms], int vectors, int32_t* indices) {
    // Byte i of the four words side by side, so that one 64-bit element holds all bits of 16 channels.
    const __m128i words_01_u8x16 = _mm_unpacklo_epi8(load_word(words[0]), load_word(words[1]));
    const __m128i words_23_u8x16 = _mm_unpacklo_epi8(load_word(words[2]), load_word(words[3]));
    alignas(32) uint64_t bits[kTileVectors];
    _mm_store_si128(reinterpret_cast<__m128i*>(bits), _mm_unpacklo_epi16(words_01_u8x16, words_23_u8x16));
    _mm_store_si128(reinterpret_cast<__m128i*>(bits + 2), _mm_unpackhi_epi16(words_01_u8x16, words_23_u8x16));
    // Byte j of lane c takes the 8 bits from 32 (c / 8) + 8 j + c % 8 on; its lowest is the bit wanted.
    const __m512i first_bit_u8x64 =
        _mm512_add_epi32(_mm512_set1_epi32(0x18100800),
                         _mm512_setr_epi32(0x00000000, 0x01010101, 0x02020202, 0x03030303, 0x04040404, 0x05050505,
                                           0x06060606, 0x07070707, 0x20202020, 0x21212121, 0x22222222, 0x23232323,
                                           0x24242424, 0x25252525, 0x26262626, 0x27272727));
    for (int v = 0; v < vectors; ++v) {
      const __m512i shifted_u8x64 =
          _mm512_multishift_epi64_epi8(first_bit_u8x64, _mm512_set1_epi64(static_cast<int64_t>(bits[v])));
      const __m512i bit_u8x64 = _mm512_and_si512(shifted_u8x64, _mm512_set1_epi8(1));
      const __m512i pair_i16x32 = _mm512_maddubs_epi16(bit_u8x64, _mm512_set1_epi32(0x08040201));
      _mm512_store_si512(indices + v * kLanes, _mm512_madd_epi16(pair_i16x32, _mm512_set1_epi16(1)));
    }
  }

 private:
  static __m128i load_word(uint64_t word) { return _mm_cvtsi64_si128(static_cast<int64_t>(word)); }
};

}  // namespace
}  // namespace lowbit
