// What the kernels of codes share. Their unit is a pack: the neighbours of 16 bytes, whose codes are whole bytes. A
// pack is `whole` where it has all its elements, at addresses for one load of them and one of their codes.
#pragma once

#include "core/codes.h"
#include "cuda/ptx.cuh"

namespace lowbit::cuda {

template <FloatType kType>
using Values = Pack<BitsOf<kType>>;

// Past the end they are `past`: an int, which 16-bit values are chosen as, takes up to 26 registers less in the kernels
// of float16 than a choice between two uint16_t.
template <FloatType kType>
__device__ inline Values<kType> load_values(const BitsOf<kType>* from, int count, bool whole, int past = 0) {
  using Loaded = Values<kType>;
  if (whole) return *reinterpret_cast<const Loaded*>(from);
  Loaded values;
#pragma unroll
  for (int i = 0; i < Loaded::kCount; ++i)
    values.values[i] = static_cast<BitsOf<kType>>(i < count ? static_cast<int>(from[i]) : past);
  return values;
}

// The values of a pack of 16 bytes as floats. Of bfloat16 one instruction each: halves that are taken out of their
// words first need two.
template <FloatType kType>
__device__ inline void to_floats(const Pack<uint32_t>& words, float (&floats)[Values<kType>::kCount]) {
  constexpr int kOfWord = 4 / sizeof(BitsOf<kType>);
#pragma unroll
  for (int i = 0; i < Values<kType>::kCount; ++i) {
    const uint32_t word = words.values[i / kOfWord];
    if constexpr (kType == FloatType::float32) floats[i] = bits_to_float(word);
    if constexpr (kType == FloatType::bfloat16) floats[i] = bits_to_float(i % 2 == 0 ? word << 16 : word & 0xffff0000u);
    if constexpr (kType == FloatType::float16) floats[i] = half_to_float(static_cast<uint16_t>(word >> (i % 2 * 16)));
  }
}

// The nearest values of the type; of 16 bits two an instruction, where the hardware has it.
template <FloatType kType>
__device__ inline Values<kType> from_floats(const float (&floats)[Values<kType>::kCount]) {
  Values<kType> values;
  if constexpr (kType == FloatType::float32) {
#pragma unroll
    for (int i = 0; i < Values<kType>::kCount; ++i) values.values[i] = float_to_bits(floats[i]);
  } else {
    Pack<uint32_t> pairs;
#pragma unroll
    for (int i = 0; i < Pack<uint32_t>::kCount; ++i) {
      pairs.values[i] = pair_of<kType == FloatType::bfloat16>(floats[2 * i], floats[2 * i + 1]);
    }
    memcpy(&values, &pairs, sizeof values);
  }
  return values;
}

template <FloatType kType>
__device__ inline void store_values(BitsOf<kType>* to, const Values<kType>& values, int count, bool whole) {
  if (whole) return store_pack(to, values);
#pragma unroll
  for (int i = 0; i < Values<kType>::kCount; ++i) {
    if (i < count) to[i] = values.values[i];
  }
}

// The codes of a pack, the first four in the lowest bits of one word, the next four in those of another.
template <int kCount>
struct PackCodes {
  uint32_t fours[kCount / 4] = {};

  __device__ uint32_t get(int i, int bits) const { return fours[i / 4] >> (i % 4 * bits) & ((1u << bits) - 1); }
  __device__ void put(int i, int bits, uint32_t code) { fours[i / 4] |= code << (i % 4 * bits); }
};

template <int kCount>
__device__ inline PackCodes<kCount> load_codes(const uint8_t* from, int bits, int count, bool whole) {
  uint64_t word = 0;
  if (!whole) {
#pragma unroll 1
    for (int byte = 0; 8 * byte < count * bits; ++byte) word |= uint64_t{from[byte]} << (8 * byte);
  } else if (kCount * bits == 64) {
    word = *reinterpret_cast<const uint64_t*>(from);
  } else if (kCount * bits == 32) {
    word = *reinterpret_cast<const uint32_t*>(from);
  } else if (kCount * bits == 16) {
    word = *reinterpret_cast<const uint16_t*>(from);
  } else {
    word = *from;
  }
  PackCodes<kCount> codes;
#pragma unroll
  for (int four = 0; four < kCount / 4; ++four) codes.fours[four] = static_cast<uint32_t>(word >> (four * 4 * bits));
  return codes;
}

// The codes of a whole pack as kBits * kCount bits: with the shifts constants, 1 or 2 instructions.
template <class Word, int kCount>
__device__ inline void store_whole_codes(uint8_t* to, const PackCodes<kCount>& codes) {
  constexpr int kBitsOfFour = 8 * sizeof(Word) / (kCount / 4);
  Word word = 0;
#pragma unroll
  for (int four = 0; four < kCount / 4; ++four) {
    word = static_cast<Word>(word | static_cast<Word>(codes.fours[four]) << (four * kBitsOfFour));
  }
  *reinterpret_cast<Word*>(to) = word;
}

template <int kCount>
__device__ inline void store_codes(uint8_t* to, const PackCodes<kCount>& codes, int bits, int count, bool whole) {
  if (!whole) {
    uint64_t word = 0;
#pragma unroll
    for (int four = 0; four < kCount / 4; ++four) word |= uint64_t{codes.fours[four]} << (four * 4 * bits);
#pragma unroll 1
    for (int byte = 0; 8 * byte < count * bits; ++byte) to[byte] = static_cast<uint8_t>(word >> (8 * byte));
  } else if (kCount * bits == 64) {
    store_whole_codes<uint64_t>(to, codes);
  } else if (kCount * bits == 32) {
    store_whole_codes<uint32_t>(to, codes);
  } else if (kCount * bits == 16) {
    store_whole_codes<uint16_t>(to, codes);
  } else {
    store_whole_codes<uint8_t>(to, codes);
  }
}

// Whether values and codes, both first of packs, allow loads of whole packs.
template <FloatType kType>
bool are_aligned(const void* values, const uint8_t* codes, int bits) {
  return is_aligned(values, kPackBytes) && is_aligned(codes, static_cast<size_t>(Values<kType>::kCount * bits / 8));
}

}  // namespace lowbit::cuda
