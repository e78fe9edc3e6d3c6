// The steps of core/epilogue.h on a tile of values in L1: a step at a time over the whole tile, so that choosing it
// costs nothing, in loops that the compiler vectorises for each level. Internal linkage: each level compiles its own.
#pragma once

#include "core/epilogue.h"
#include "cpu/shared/floats.h"
#include "cpu/shared/threshold_bits.h"

namespace lowbit {
namespace {

// Values of channels [channel, channel + count), count <= 64, of some output pixels. Rows are aligned to 64 bytes and
// defined up to lanes_for(count).
struct ValueTile {
  float (*value)[kTileChannels];
  const int64_t* pixels;  // their indices
  int64_t pixel_count;    // at most kTilePixels where there is a bits step
  int64_t channel, count;
  int64_t channels;  // C
  int64_t pixels_per_image;
};

// Loops run over whole vectors of the widest level: less than one is completed with zeros.
constexpr int64_t kLanes = 16;

inline int64_t lanes_for(int64_t count) { return round_up(count, kLanes); }

inline void complete(float* values, int64_t count) {
  for (int64_t i = count; i < lanes_for(count); ++i) values[i] = 0;
}

// `count` channels of an operand as the loops read them: in place, or completed in `buffer`.
inline const float* complete_operand(const float* from, int64_t count, float* buffer) {
  if (count % kLanes == 0) return from;
  memcpy(buffer, from, static_cast<size_t>(count) * sizeof *from);
  complete(buffer, count);
  return buffer;
}

// body(Known<64> or count): most blocks of channels are whole ones.
template <class Body>
inline void for_count(int64_t count, const Body& body) {
  if (count == kTileChannels) return body(Known<kTileChannels>{});
  body(count);
}

template <class Body>
inline void apply(float* __restrict value, const float* __restrict first, const float* __restrict second, int64_t lanes,
                  const Body& body) {
  for (int64_t i = 0; i < lanes; i += kLanes) {
    for (int64_t j = i; j < i + kLanes; ++j) value[j] = body(value[j], first[j], second[j]);
  }
}

// value = body(value, first[c], second[c]).
template <class Body>
inline void apply_channels(const ValueTile& tile, const float* first, const float* second, const Body& body) {
  alignas(64) float buffer[2][kTileChannels];
  first = complete_operand(first + tile.channel, tile.count, buffer[0]);
  second = complete_operand(second + tile.channel, tile.count, buffer[1]);
  const int64_t lanes = lanes_for(tile.count);
  for (int64_t i = 0; i < tile.pixel_count; ++i) apply(tile.value[i], first, second, lanes, body);
}

template <class Body>
inline void apply_channels(const ValueTile& tile, const float* first, const Body& body) {
  apply_channels(tile, first, first, [&](float value, float operand, float) { return body(value, operand); });
}

inline void multiply_image(const ValueTile& tile, const float* factor) {
  alignas(64) float buffer[kTileChannels];
  for (int64_t i = 0; i < tile.pixel_count; ++i) {
    const float* from = factor + tile.pixels[i] / tile.pixels_per_image * tile.channels + tile.channel;
    const float* row = complete_operand(from, tile.count, buffer);
    apply(tile.value[i], row, row, lanes_for(tile.count),
          [](float value, float of_image, float) { return value * of_image; });
  }
}

template <class Type>
inline void add_tensor(const ValueTile& tile, const typename Type::type* tensor, int64_t stride, Type type) {
  alignas(64) float buffer[kTileChannels];
  for (int64_t i = 0; i < tile.pixel_count; ++i) {
    const typename Type::type* from = tensor + tile.pixels[i] * stride + tile.channel;
    for_count(tile.count, [&](auto count) { load(from, count, buffer, type); });
    complete(buffer, tile.count);
    apply(tile.value[i], buffer, buffer, lanes_for(tile.count),
          [](float value, float summand, float) { return value + summand; });
  }
}

template <class Type>
inline void store_tensor(const ValueTile& tile, typename Type::type* tensor, int64_t stride, Type type) {
  for (int64_t i = 0; i < tile.pixel_count; ++i) {
    typename Type::type* to = tensor + tile.pixels[i] * stride + tile.channel;
    for_count(tile.count, [&](auto count) { store(tile.value[i], count, to, type); });
  }
}

inline BitOutput bit_output(const EpilogueStep& step, int64_t channels, bool shared) {
  return {operand<uint64_t>(step.target), step.stride, words_for(step.option * channels), shared};
}

// Before the first block of channels of pixels that share words (BitOutput).
inline void clear_bits(const EpilogueProgram& program, int64_t channels, const int64_t* pixels, int64_t pixel_count) {
  for (int64_t i = 0; i < program.count; ++i) {
    if (kind_of(program.steps[i]) != StepKind::bits) continue;
    const BitOutput output = bit_output(program.steps[i], channels, true);
    for (int64_t j = 0; j < pixel_count; ++j) output.clear(pixels[j]);
  }
}

inline void run_step(const EpilogueStep& step, const ValueTile& tile, bool shared_words) {
  const float* first = operand<const float>(step.first);
  const float* second = operand<const float>(step.second);
  switch (kind_of(step)) {
    case StepKind::multiply:
      return apply_channels(tile, first, [](float value, float factor) { return value * factor; });
    case StepKind::add:
      return apply_channels(tile, first, [](float value, float summand) { return value + summand; });
    case StepKind::multiply_add:
      return apply_channels(tile, first, second, multiply_add);
    case StepKind::multiply_image:
      return multiply_image(tile, first);
    case StepKind::add_tensor:
      return for_type(static_cast<FloatType>(step.option), [&](auto type) {
        add_tensor(tile, operand<const typename decltype(type)::type>(step.first), step.stride, type);
      });
    case StepKind::prelu:
      return apply_channels(tile, first, prelu);
    case StepKind::clamp:
      return apply_channels(tile, first, second, clamp);
    case StepKind::store:
      return for_type(static_cast<FloatType>(step.option), [&](auto type) {
        store_tensor(tile, operand<typename decltype(type)::type>(step.target), step.stride, type);
      });
    case StepKind::bits: {
      const float* rows[kTilePixels];
      for (int64_t i = 0; i < tile.pixel_count; ++i) rows[i] = tile.value[i];
      const Thresholds<float> thresholds = {first, operand<const uint8_t>(step.second), step.option, tile.channels};
      return store_bits(bit_output(step, tile.channels, shared_words), thresholds, rows, tile.pixels, tile.pixel_count,
                        tile.channel, tile.count);
    }
  }
}

inline void run_program(const EpilogueProgram& program, const ValueTile& tile, bool shared_words) {
  for (int64_t i = 0; i < program.count; ++i) run_step(program.steps[i], tile, shared_words);
}

}  // namespace
}  // namespace lowbit
