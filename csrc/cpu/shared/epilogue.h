// The steps of core/epilogue.h on a tile of pixels by at most 64 channels. The values of a few pixels stay in registers
// through all steps; a step is chosen once for all of them. Internal linkage: each level compiles its own.
#pragma once

#include "core/epilogue.h"
#include "cpu/shared/lanes_f32.h"

namespace lowbit {
namespace {

constexpr int64_t kTileChannels = 64;

// The packed output of pixels. Where blocks of 64 channels share words, whoever works a pixel works all its blocks:
// `clear` comes before the first, and each block ORs its bits in.
struct BitOutput {
  uint64_t* words;
  int64_t stride;           // words from a pixel to the next
  int64_t words_per_pixel;  // at most stride
  bool shared;

  inline void clear(int64_t pixel) const {
    for (int64_t i = 0; i < words_per_pixel; ++i) words[pixel * stride + i] = 0;
  }

  // `bits` become channels [channel, channel + count) of `pixel`; bits past `count` are 0.
  inline void put(int64_t pixel, int64_t channel, int64_t count, uint64_t bits) const {
    uint64_t* word = words + pixel * stride + channel / kWordBits;
    if (!shared) {
      *word = bits;
      return;
    }
    const int64_t shift = channel % kWordBits;
    word[0] |= bits << shift;
    if (shift + count > kWordBits) word[1] |= bits >> (kWordBits - shift);
  }
};

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

// What a tile's values are made of.
enum class Source { float32, bfloat16, float16, int32 };

inline Source source_of(FloatType type) {
  return type == FloatType::float32    ? Source::float32
         : type == FloatType::bfloat16 ? Source::bfloat16
                                       : Source::float16;
}

// Channels [channel, channel + count), count <= 64, of some output pixels.
struct EpilogueTile {
  const void* const* rows;  // of each pixel, from `channel` on
  Source source;
  const int64_t* pixels;  // indices
  int64_t pixel_count;
  int64_t channel, count;
  int64_t channels;  // C
  int64_t pixels_per_image;
  bool shared_words;               // BitOutput
  float (*result)[kTileChannels];  // where the values go behind the last step, lanes past `count` undefined; or null
};

constexpr int kVectors = static_cast<int>(kTileChannels) / LanesF32::kLanes;  // of a pixel

// Pixels whose values fill half of the registers: 16 of 32 in AVX-512, 8 of 16 in AVX2.
constexpr int kStripPixels = kVectors == 4 ? 4 : 1;

// body(0), body(1), .. body(kCount - 1), the numbers known to the compiler, so that arrays which they index can be
// registers: loops are unrolled too late for that, even where a pragma asks for it.
template <int kIndex>
struct Index {
  constexpr operator int() const { return kIndex; }
};
template <int kCount, int kIndex = 0, class Body>
[[gnu::always_inline]] inline void repeat(const Body& body) {
  if constexpr (kIndex < kCount) {
    body(Index<kIndex>{});
    repeat<kCount, kIndex + 1>(body);
  }
}

// `kPixels` pixels from tile.pixels[first] on; kWhole: of 64 channels.
template <int kPixels, bool kWhole>
[[gnu::noinline, gnu::flatten]] void run_strip(const EpilogueProgram& program, const EpilogueTile& tile,
                                               int64_t first) {
  constexpr int kLanes = LanesF32::kLanes;
  LanesF32 value[kPixels][kVectors];
  const int64_t* const pixels = tile.pixels + first;
  const auto lanes = [&](int j) { return min(max(tile.count - j * kLanes, 0), kLanes); };
  const auto load = [&](const auto* from, int j, auto type) {
    if constexpr (kWhole) return LanesF32::load(from + j * kLanes, type);
    return lanes(j) > 0 ? LanesF32::load(from + j * kLanes, lanes(j), type) : LanesF32::broadcast(0);
  };
  const auto load_floats = [&](const float* from, int j) { return load(from, j, Stored<FloatType::float32>{}); };
  // body(value, pixel, vector)
  const auto for_each = [&](const auto& body) {
    repeat<kVectors>([&](auto j) { repeat<kPixels>([&](auto pixel) { body(value[pixel][j], pixel, j); }); });
  };
  // value = body(value, operand of its channels)
  const auto apply = [&](int64_t address, const auto& body) {
    const float* from = operand<const float>(address) + tile.channel;
    repeat<kVectors>([&](auto j) {
      const LanesF32 of_channels = load_floats(from, j);
      repeat<kPixels>([&](auto pixel) { value[pixel][j] = body(value[pixel][j], of_channels); });
    });
  };
  const auto load_rows = [&](auto type) {
    for_each([&](LanesF32& v, int pixel, int j) {
      v = load(static_cast<const typename decltype(type)::type*>(tile.rows[first + pixel]), j, type);
    });
  };

  switch (tile.source) {
    case Source::float32:
      load_rows(Stored<FloatType::float32>{});
      break;
    case Source::bfloat16:
      load_rows(Stored<FloatType::bfloat16>{});
      break;
    case Source::float16:
      load_rows(Stored<FloatType::float16>{});
      break;
    default:
      load_rows(Integers{});
      break;
  }
  for (int64_t i = 0; i < program.count; ++i) {
    const EpilogueStep& step = program.steps[i];
    switch (kind_of(step)) {
      case StepKind::multiply:
        apply(step.first, [](LanesF32 v, LanesF32 factor) { return v * factor; });
        break;
      case StepKind::add:
        apply(step.first, [](LanesF32 v, LanesF32 summand) { return v + summand; });
        break;
      case StepKind::multiply_add: {
        const float* factor = operand<const float>(step.first) + tile.channel;
        const float* summand = operand<const float>(step.second) + tile.channel;
        repeat<kVectors>([&](auto j) {
          const LanesF32 a = load_floats(factor, j), b = load_floats(summand, j);
          repeat<kPixels>([&](auto pixel) { value[pixel][j] = LanesF32::multiply_add(value[pixel][j], a, b); });
        });
        break;
      }
      case StepKind::multiply_image: {
        const float* factor[kPixels];
        for (int pixel = 0; pixel < kPixels; ++pixel) {
          factor[pixel] =
              operand<const float>(step.first) + pixels[pixel] / tile.pixels_per_image * tile.channels + tile.channel;
        }
        for_each([&](LanesF32& v, int pixel, int j) { v = v * load_floats(factor[pixel], j); });
        break;
      }
      case StepKind::add_tensor:
        for_type(static_cast<FloatType>(step.option), [&](auto type) {
          const auto* tensor = operand<const typename decltype(type)::type>(step.first) + tile.channel;
          for_each([&](LanesF32& v, int pixel, int j) { v = v + load(tensor + pixels[pixel] * step.stride, j, type); });
        });
        break;
      case StepKind::prelu:
        apply(step.first, [](LanesF32 v, LanesF32 slope) { return LanesF32::prelu(v, slope); });
        break;
      case StepKind::clamp:
        apply(step.first, [](LanesF32 v, LanesF32 lowest) { return LanesF32::at_least(v, lowest); });
        apply(step.second, [](LanesF32 v, LanesF32 highest) { return LanesF32::at_most(v, highest); });
        break;
      case StepKind::store:
        for_type(static_cast<FloatType>(step.option), [&](auto type) {
          auto* tensor = operand<typename decltype(type)::type>(step.target) + tile.channel;
          for_each([&](const LanesF32& v, int pixel, int j) {
            auto* to = tensor + pixels[pixel] * step.stride + j * kLanes;
            if constexpr (kWhole) {
              v.store(to, type);
            } else if (lanes(j) > 0) {
              v.store(to, lanes(j), type);
            }
          });
        });
        break;
      case StepKind::bits: {
        const BitOutput output = bit_output(step, tile.channels, tile.shared_words);
        for (int64_t t = 0; t < step.option; ++t) {
          const int64_t channel = t * tile.channels + tile.channel;
          const float* threshold = operand<const float>(step.first) + channel;
          const uint8_t* flip = step.second == 0 ? nullptr : operand<const uint8_t>(step.second) + channel;
          uint64_t bits[kPixels] = {};
          repeat<kVectors>([&](auto j) {
            const LanesF32 limit = load_floats(threshold, j);
            const LanesF32 flips = flip == nullptr || lanes(j) == 0 ? LanesF32::broadcast(0)
                                                                    : LanesF32::flips(flip + j * kLanes, lanes(j));
            repeat<kPixels>(
                [&](auto pixel) { bits[pixel] |= LanesF32::reached(value[pixel][j], limit, flips) << (j * kLanes); });
          });
          for (int pixel = 0; pixel < kPixels; ++pixel) {
            output.put(pixels[pixel], channel, tile.count, bits[pixel] & low_mask(tile.count));
          }
        }
        break;
      }
    }
  }
  if (tile.result == nullptr) return;
  for_each([&](const LanesF32& v, int pixel, int j) {
    v.store(tile.result[first + pixel] + j * kLanes, Stored<FloatType::float32>{});
  });
}

inline void run_program(const EpilogueProgram& program, const EpilogueTile& tile) {
  int64_t i = 0;
  if (tile.count == kTileChannels) {
    for (; i + kStripPixels <= tile.pixel_count; i += kStripPixels) run_strip<kStripPixels, true>(program, tile, i);
    for (; i < tile.pixel_count; ++i) run_strip<1, true>(program, tile, i);
  }
  for (; i < tile.pixel_count; ++i) run_strip<1, false>(program, tile, i);
}

}  // namespace
}  // namespace lowbit
