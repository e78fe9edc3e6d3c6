// Random calls of pointwise and what they make.
#pragma once

#include "core/ops/pointwise.h"
#include "epilogue_case.h"
#include "pool_shapes.h"

namespace lowbit::test {

// Input of a case and its values [pixels, channels].
struct PointwiseSource {
  FloatType type;
  bool channels_last;
  int64_t stride;
  StepTensor memory;
  std::vector<float> values;

  PointwiseSource(Random& random, const PoolShape& s)
      : type(random.pick({FloatType::float32, FloatType::bfloat16, FloatType::float16})),
        channels_last(random.coin()),
        stride(channels_last ? s.channels + random.pick<int64_t>({0, 0, 1, 64}) : s.channels),
        memory(type, s.batch * s.height * s.width * stride),
        values(static_cast<size_t>(s.batch * s.height * s.width * s.channels)) {
    const bool strange = random.between(0, 3) == 0;
    for (int64_t i = 0; i < memory.size(); ++i) {
      const int64_t kind = strange ? random.between(0, 30) : 9;
      memory.set(i, kind == 0 ? NAN : kind == 1 ? -INFINITY : kind == 2 ? -0.0f : random.normal());
    }
    const int64_t pixels = s.height * s.width;
    for (int64_t pixel = 0; pixel < s.batch * pixels; ++pixel) {
      for (int64_t c = 0; c < s.channels; ++c) {
        const int64_t first = (pixel / pixels * s.channels + c) * pixels + pixel % pixels;
        values[static_cast<size_t>(pixel * s.channels + c)] = memory.get(channels_last ? pixel * stride + c : first);
      }
    }
  }
};

// One window of one channel; value(row, column) is a pixel's.
template <class Value>
inline float reduce_window(const PointwiseArgs& args, int64_t y, int64_t x, const Value& value) {
  const PoolShape& s = args.shape;
  const int64_t top = y * s.stride_height - s.pad_top, left = x * s.stride_width - s.pad_left;
  float largest = -INFINITY, sum = 0;
  int64_t taps = 0;
  for (int64_t ky = 0; ky < s.kernel_height; ++ky) {
    for (int64_t kx = 0; kx < s.kernel_width; ++kx) {
      const int64_t row = top + ky * s.dilation_height, column = left + kx * s.dilation_width;
      if (row < 0 || row >= s.height || column < 0 || column >= s.width) continue;
      const float tap = value(row, column);
      if (tap > largest || std::isnan(tap)) largest = tap;
      sum += tap;
      ++taps;
    }
  }
  if (args.reduction == Reduction::maximum) return largest;
  const int64_t rows = min(top + s.kernel_height, s.height + s.pad_top) - top;
  const int64_t columns = min(left + s.kernel_width, s.width + s.pad_left) - left;
  int64_t divisor = args.count_include_pad ? rows * columns : taps;
  if (args.divisor_override > 0) divisor = args.divisor_override;
  return taps == 0 ? 0.0f : sum / static_cast<float>(divisor);
}

inline PoolShape without_window(Random& random) {
  PoolShape s{};
  s.batch = random.between(0, 3);
  s.height = random.between(1, 6);
  s.width = random.between(1, 20);
  s.channels = random.size(300);
  s.kernel_height = s.kernel_width = s.stride_height = s.stride_width = s.dilation_height = s.dilation_width = 1;
  s.out_height = s.height;
  s.out_width = s.width;
  return s;
}

// Wider than what is loaded together, and windows as wide.
inline PoolShape wide_window(Random& random) {
  PoolShape s = random_pool_shape(random, 1);
  s.channels = random.size(130);
  s.width = random.between(60, 150);
  s.kernel_width = random.between(1, s.width);
  s.stride_width = random.between(1, 90);
  s.pad_left = random.between(0, s.kernel_width / 2);
  s.out_width = pool_out_size(s.width, s.kernel_width, s.stride_width, s.pad_left, 1, random.coin());
  return s;
}

// A call and its targets.
class PointwiseCase {
 public:
  explicit PointwiseCase(Random& random) : args_(random_args(random)), source_(random, args_.shape) {
    const PoolShape& s = args_.shape;
    args_.input = source_.memory.data();
    args_.input_type = source_.type;
    args_.channels_last = source_.channels_last;
    args_.stride = source_.stride;
    std::vector<float> values = source_.values;
    if (args_.reduction != Reduction::none) {
      before_.emplace_back(random, values, s.channels, s.batch, false);
      args_.before = before_.front().program();
      values = windows(before_.front().values());
    }
    after_.emplace_back(random, values, s.channels, s.batch, true);
    args_.after = after_.front().program();
  }

  const PointwiseArgs& args() const { return args_; }
  EpilogueCase& after() { return after_.front(); }
  std::string what() const {
    return describe(args_.shape) + ", reduction " + std::to_string(static_cast<int>(args_.reduction)) +
           (args_.channels_last ? ", channels last" : ", channels first");
  }

 private:
  static PointwiseArgs random_args(Random& random) {
    PointwiseArgs args{};
    args.reduction = random.pick({Reduction::none, Reduction::maximum, Reduction::average});
    if (args.reduction == Reduction::none) {
      args.shape = without_window(random);
    } else if (random.between(0, 4) == 0) {
      args.shape = wide_window(random);
    } else {
      args.shape = random_pool_shape(random, args.reduction == Reduction::maximum ? 3 : 1);
    }
    args.count_include_pad = random.coin();
    args.divisor_override = random.coin() ? random.between(1, 20) : 0;
    return args;
  }

  std::vector<float> windows(const std::vector<float>& pixels) const {
    const PoolShape& s = args_.shape;
    std::vector<float> values;
    for (int64_t out = 0; out < s.batch * s.out_height * s.out_width; ++out) {
      const int64_t x = out % s.out_width, y = out / s.out_width % s.out_height, n = out / s.out_width / s.out_height;
      for (int64_t c = 0; c < s.channels; ++c) {
        values.push_back(reduce_window(args_, y, x, [&](int64_t row, int64_t column) {
          return pixels[static_cast<size_t>(((n * s.height + row) * s.width + column) * s.channels + c)];
        }));
      }
    }
    return values;
  }

  PointwiseArgs args_;
  PointwiseSource source_;
  std::deque<EpilogueCase> before_, after_;
};

}  // namespace lowbit::test
