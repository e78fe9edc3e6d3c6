// Tables of 8 entries: VPERMPS reads one ymm register with the low 3 bits of each lane of another.
//
// Signs double the reach: the sums of +-t are symmetric, so 8 entries and a sign flip give the 16 combinations of 4
// terms. An index lane holds the entry's number in bits 0..2 and the flip in bit 31, and the looked-up value is xored
// with the whole lane; entry i is stored xored with i, which undoes what bits 0..2 would do to the value. Permutation,
// xor and addition go to three ports: 32 multiply-adds a cycle against 16 by FMA. Presence (step) has no such symmetry:
// 3 terms and no flip, 24 a cycle.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "core/layout.h"

namespace lowbit {
namespace {

template <Encoding kEncoding>
struct Lookup {
  using Floats = __m256;
  using Indices = __m256i;
  static constexpr bool kSigned = kEncoding == Encoding::sign;
  static constexpr int kLanes = 8;
  static constexpr int kTerms = kSigned ? 4 : 3;
  static constexpr int kTableFloats = 8;
  static constexpr int kTileVectors = 4;
  static constexpr int kTileRows = 3;  // 12 sums, one index vector and the looked-up values: 16 ymm

  static Floats zero() { return _mm256_setzero_ps(); }
  static Floats load(const float* from) { return _mm256_loadu_ps(from); }
  static void store(float* to, Floats value) { _mm256_storeu_ps(to, value); }
  static Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
  static Indices load_indices(const int32_t* from) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(from)); }
  static Floats lookup(const float* table, Indices indices_i32x8) {
    const __m256 entry_f32x8 = _mm256_permutevar8x32_ps(_mm256_load_ps(table), indices_i32x8);
    return kSigned ? _mm256_xor_ps(entry_f32x8, _mm256_castsi256_ps(indices_i32x8)) : entry_f32x8;
  }

  // The first `count` <= kLanes lanes where the bit of `keep` is 1, and 0 in the others of them.
  static void store_kept(float* to, Floats value_f32x8, int64_t count, uint64_t keep) {
    const __m256i bit_i32x8 = lane_bit();
    const __m256i kept_i32x8 =
        _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(keep & 0xff)), bit_i32x8), bit_i32x8);
    _mm256_maskstore_ps(to, first_lanes(count), _mm256_and_ps(value_f32x8, _mm256_castsi256_ps(kept_i32x8)));
  }

  static void make_table(const float (&terms)[kTerms], float* table) {
    const __m256 first_f32x8 = _mm256_set1_ps(terms[0]);
    const __m256 second_f32x8 = _mm256_set1_ps(terms[1]);
    const __m256 third_f32x8 = _mm256_set1_ps(terms[2]);
    const float low = kSigned ? -1.0f : 0.0f;
    // Lane i holds the factor that bit j of i stands for.
    __m256 sum_f32x8 = _mm256_mul_ps(_mm256_setr_ps(low, 1, low, 1, low, 1, low, 1), first_f32x8);
    sum_f32x8 = _mm256_fmadd_ps(_mm256_setr_ps(low, low, 1, 1, low, low, 1, 1), second_f32x8, sum_f32x8);
    sum_f32x8 = _mm256_fmadd_ps(_mm256_setr_ps(low, low, low, low, 1, 1, 1, 1), third_f32x8, sum_f32x8);
    if constexpr (kSigned) {
      sum_f32x8 = _mm256_add_ps(sum_f32x8, _mm256_set1_ps(terms[3]));
      sum_f32x8 = _mm256_xor_ps(sum_f32x8, _mm256_castsi256_ps(lane_number()));
    }
    _mm256_store_ps(table, sum_f32x8);
  }

  // indices[8 v + c]: the lane for bits 8 v + c of the words.
  static void make_indices(const uint64_t (&words)[kTerms], int vectors, int32_t* indices) {
    // Byte i of the words side by side, so that one 32-bit element holds all bits of 8 channels.
    const __m128i words_01_u8x16 = _mm_unpacklo_epi8(load_word(words[0]), load_word(words[1]));
    const __m128i words_23_u8x16 =
        _mm_unpacklo_epi8(load_word(words[2]), kSigned ? load_word(words[kTerms - 1]) : _mm_setzero_si128());
    alignas(16) int32_t bits[kTileVectors];
    _mm_store_si128(reinterpret_cast<__m128i*>(bits), _mm_unpacklo_epi16(words_01_u8x16, words_23_u8x16));
    for (int v = 0; v < vectors; ++v) {
      const __m256i shifted_u32x8 = _mm256_srlv_epi32(_mm256_set1_epi32(bits[v]), lane_number());
      const __m256i bit_u8x32 = _mm256_and_si256(shifted_u32x8, _mm256_set1_epi8(1));
      const __m256i pair_i16x16 = _mm256_maddubs_epi16(bit_u8x32, _mm256_set1_epi32(0x08040201));
      __m256i lane_i32x8 = _mm256_madd_epi16(pair_i16x16, _mm256_set1_epi16(1));
      if constexpr (kSigned) {
        // A table holds the sums with +t[3]. Bit 3 = 0 asks for -t[3]: minus the entry of the opposite bits 0..2.
        const __m256i flip_i32x8 = _mm256_cmpgt_epi32(_mm256_set1_epi32(8), lane_i32x8);
        lane_i32x8 = _mm256_and_si256(_mm256_xor_si256(lane_i32x8, flip_i32x8),
                                      _mm256_set1_epi32(static_cast<int>(0x80000007u)));
      }
      _mm256_store_si256(reinterpret_cast<__m256i*>(indices + v * kLanes), lane_i32x8);
    }
  }

 private:
  static __m128i load_word(uint64_t word) { return _mm_cvtsi64_si128(static_cast<int64_t>(word)); }
  static __m256i lane_number() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
  static __m256i lane_bit() { return _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128); }
  static __m256i first_lanes(int64_t count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane_number());
  }
};

}  // namespace
}  // namespace lowbit
