// Random programs of steps (core/epilogue.h), and what they make of given values: each formula as a loop.
#pragma once

#include <cmath>
#include <deque>

#include "common.h"
#include "core/epilogue.h"

namespace lowbit::test {

// A tensor of some type that a step reads or writes: its pixels may lie apart.
class StepTensor {
 public:
  StepTensor(FloatType type, int64_t count, Alignment alignment = Alignment::value)
      : type_(type),
        wide_(type == FloatType::float32 ? count : 0, alignment),
        narrow_(type == FloatType::float32 ? 0 : count, alignment) {
    for (int64_t i = 0; i < count; ++i) set(i, 0);
    keep();
  }

  void* data() {
    return type_ == FloatType::float32 ? static_cast<void*>(wide_.data()) : static_cast<void*>(narrow_.data());
  }
  FloatType type() const { return type_; }
  int64_t size() const { return wide_.size() + narrow_.size(); }
  float get(int64_t i) { return load_float(data(), type_, i); }
  void set(int64_t i, float value) {
    if (type_ == FloatType::float32) {
      wide_[i] = value;
    } else {
      narrow_[i] = static_cast<uint16_t>(float_bits(value, type_));
    }
  }
  // Initial contents are the present ones, and so is what is expected until expect_element says otherwise.
  void keep() {
    initial_.clear();
    for (int64_t i = 0; i < size(); ++i) initial_.push_back(get(i));
    expected_ = initial_;
  }
  void reset() {
    for (int64_t i = 0; i < size(); ++i) set(i, initial_[static_cast<size_t>(i)]);
  }
  void expect_element(int64_t i, float value) {
    const uint32_t bits = float_bits(value, type_);
    expected_[static_cast<size_t>(i)] = type_ == FloatType::float32 ? value : load_half(static_cast<uint16_t>(bits));
  }
  void expect(const std::string& what) {
    for (int64_t i = 0; i < size(); ++i) {
      const float got = get(i), expected = expected_[static_cast<size_t>(i)];
      if (std::isnan(got) && std::isnan(expected)) continue;
      if (float_to_bits(got) == float_to_bits(expected)) continue;
      return fail(what + ": element " + std::to_string(i) + " is " + std::to_string(got) + ", expected " +
                  std::to_string(expected));
    }
  }

 private:
  float load_half(uint16_t bits) const {
    return type_ == FloatType::bfloat16 ? bfloat16_to_float(bits) : float16_to_float(bits);
  }

  FloatType type_;
  Buffer<float> wide_;
  Buffer<uint16_t> narrow_;
  std::vector<float> initial_, expected_;
};

class EpilogueCase {
 public:
  // `values` [pixels, channels] are those before the first step. Without `outputs`, steps that need no tensor.
  EpilogueCase(Random& random, std::vector<float> values, int64_t channels, int64_t images, bool outputs)
      : random_(random),
        values_(std::move(values)),
        channels_(channels),
        pixels_(channels == 0 ? 0 : static_cast<int64_t>(values_.size()) / channels),
        pixels_per_image_(images == 0 ? 1 : max(pixels_ / images, 1)),
        images_(images) {
    const int64_t count = random.between(outputs ? 1 : 0, random.coin() ? 5 : kMostSteps);
    for (int64_t i = 0; i < count; ++i) {
      const bool last = i == count - 1;  // without which the others could not be seen
      StepKind kind = random.pick({StepKind::multiply, StepKind::add, StepKind::multiply_add, StepKind::multiply_image,
                                   StepKind::prelu, StepKind::clamp});
      if (outputs && (last || random.coin())) kind = random.pick({StepKind::store, StepKind::bits});
      if (outputs && !last && random.between(0, 3) == 0) kind = StepKind::add_tensor;
      add_step(kind);
    }
  }

  EpilogueProgram program() const { return {steps_.data(), static_cast<int64_t>(steps_.size())}; }
  const std::vector<EpilogueStep>& steps() const { return steps_; }
  const std::vector<float>& values() const { return values_; }  // after the last step

  // Memory as it was before the call.
  void reset() {
    for (StepTensor& tensor : tensors_) tensor.reset();
    for (Words& words : words_) memset(words.got.data(), 0xa5, static_cast<size_t>(words.got.bytes()));
  }

  void expect(const std::string& what) {
    std::string kinds = what + ", steps";
    for (const EpilogueStep& step : steps_) kinds += " " + std::to_string(step.kind);
    for (StepTensor& tensor : tensors_) tensor.expect(kinds);
    for (Words& words : words_) expect_same(kinds + ", words", words.got, words.expected);
  }

 private:
  struct Words {
    Buffer<uint64_t> got;
    std::vector<uint64_t> expected;
    explicit Words(int64_t count) : got(count), expected(static_cast<size_t>(count), 0xa5a5a5a5a5a5a5a5) {
      memset(got.data(), 0xa5, static_cast<size_t>(got.bytes()));
    }
  };

  float factor() {
    switch (random_.between(0, 200)) {
      case 0:
        return NAN;
      case 1:
        return INFINITY;
      case 2:
        return -0.0f;
      default:
        return random_.normal();
    }
  }

  // Random numbers that a step reads.
  const float* numbers(int64_t count) {
    floats_.emplace_back(count);
    for (int64_t i = 0; i < count; ++i) floats_.back()[i] = factor();
    return floats_.back().data();
  }

  static int64_t address(const void* pointer) { return static_cast<int64_t>(reinterpret_cast<uintptr_t>(pointer)); }

  // values = formula(value, pixel, channel).
  template <class Formula>
  void apply(const Formula& formula) {
    for (int64_t pixel = 0; pixel < pixels_; ++pixel) {
      for (int64_t c = 0; c < channels_; ++c) {
        float& value = values_[static_cast<size_t>(pixel * channels_ + c)];
        value = formula(value, pixel, c);
      }
    }
  }

  void add_step(StepKind kind) {
    EpilogueStep step{};
    step.kind = static_cast<int64_t>(kind);
    const auto take = [&](int64_t count) {
      const float* first = numbers(count);
      step.first = address(first);
      return first;
    };
    switch (kind) {
      case StepKind::multiply: {
        const float* first = take(channels_);
        apply([&](float value, int64_t, int64_t c) { return value * first[c]; });
        break;
      }
      case StepKind::add: {
        const float* first = take(channels_);
        apply([&](float value, int64_t, int64_t c) { return value + first[c]; });
        break;
      }
      case StepKind::multiply_add: {
        const float *first = take(channels_), *second = numbers(channels_);
        step.second = address(second);
        apply([&](float value, int64_t, int64_t c) { return std::fma(value, first[c], second[c]); });
        break;
      }
      case StepKind::multiply_image: {
        const float* first = take(images_ * channels_);
        apply([&](float value, int64_t pixel, int64_t c) {
          return value * first[pixel / pixels_per_image_ * channels_ + c];
        });
        break;
      }
      case StepKind::add_tensor: {
        StepTensor& tensor = new_tensor(step);
        for (int64_t i = 0; i < tensor.size(); ++i) tensor.set(i, 10 * factor());
        tensor.keep();
        added_.push_back({&tensor, step.stride});
        step.first = address(tensor.data());
        apply([&](float value, int64_t pixel, int64_t c) { return value + tensor.get(pixel * step.stride + c); });
        break;
      }
      case StepKind::prelu: {
        const float* first = take(channels_);
        apply([&](float value, int64_t, int64_t c) { return value > 0 ? value : value * first[c]; });
        break;
      }
      case StepKind::clamp: {
        const float *first = take(channels_), *second = numbers(channels_);
        step.second = address(second);
        apply([&](float value, int64_t, int64_t c) {
          if (value < first[c]) value = first[c];
          if (value > second[c]) value = second[c];
          return value;
        });
        break;
      }
      case StepKind::store: {
        const bool in_place = !added_.empty() && random_.coin();
        StepTensor& tensor = in_place ? *added_.back().first : new_tensor(step);
        if (in_place) {
          step.option = static_cast<int64_t>(tensor.type());
          step.stride = added_.back().second;
          added_.pop_back();
        }
        step.target = address(tensor.data());
        apply([&](float value, int64_t pixel, int64_t c) {
          tensor.expect_element(pixel * step.stride + c, value);
          return value;
        });
        break;
      }
      case StepKind::bits:
        add_bits(step);
        break;
    }
    steps_.push_back(step);
  }

  StepTensor& new_tensor(EpilogueStep& step) {
    const FloatType type = random_.pick({FloatType::float32, FloatType::bfloat16, FloatType::float16});
    step.option = static_cast<int64_t>(type);
    step.stride = channels_ + (random_.coin() ? 0 : random_.between(1, 70));
    tensors_.emplace_back(type, spread(step.stride, channels_));
    return tensors_.back();
  }

  // Elements from the first pixel to the end of the last.
  int64_t spread(int64_t stride, int64_t row) const { return pixels_ == 0 ? 0 : (pixels_ - 1) * stride + row; }

  // Thresholds are values that occur, so that equality is met, and the ends, always and never met.
  void add_bits(EpilogueStep& step) {
    step.option = random_.between(1, 2);
    const int64_t bits = step.option * channels_, row = words_for(bits);
    step.stride = row + (random_.coin() ? 0 : random_.between(1, 3));
    floats_.emplace_back(bits);
    Buffer<float>& threshold = floats_.back();
    for (int64_t i = 0; i < bits; ++i) {
      const int64_t pixel = pixels_ == 0 ? 0 : random_.between(0, pixels_ - 1);
      const bool extreme = pixels_ == 0 || random_.between(0, 9) == 0;
      threshold[i] = extreme ? random_.pick({-INFINITY, INFINITY})
                             : values_[static_cast<size_t>(pixel * channels_ + i % channels_)];
    }
    flips_.emplace_back(bits);
    for (int64_t i = 0; i < bits; ++i) flips_.back()[i] = static_cast<uint8_t>(random_.between(0, 1));
    const uint8_t* flip = random_.coin() ? flips_.back().data() : nullptr;
    words_.emplace_back(spread(step.stride, row));
    Words& words = words_.back();
    step.first = address(threshold.data());
    step.second = address(flip);
    step.target = address(words.got.data());
    for (int64_t pixel = 0; pixel < pixels_; ++pixel) {
      uint64_t* pixel_words = words.expected.data() + pixel * step.stride;
      for (int64_t i = 0; i < row; ++i) pixel_words[i] = 0;
      for (int64_t i = 0; i < bits; ++i) {
        const float value = values_[static_cast<size_t>(pixel * channels_ + i % channels_)];
        if (flip && flip[i] ? value <= threshold[i] : value >= threshold[i]) set_bit(pixel_words, i);
      }
    }
  }

  Random& random_;
  std::vector<float> values_;
  int64_t channels_, pixels_, pixels_per_image_, images_;
  std::vector<EpilogueStep> steps_;
  std::deque<Buffer<float>> floats_;
  std::deque<Buffer<uint8_t>> flips_;
  std::deque<StepTensor> tensors_;
  std::deque<Words> words_;
  std::vector<std::pair<StepTensor*, int64_t>> added_;  // tensors that have been added, and their strides
};

}  // namespace lowbit::test
