// Tiles of pixels by 64 channels go through the steps in L1; of a window the input pixels, a row of taps at a time,
// meet the sums or maxima of the output pixels there. Nothing between input and targets is in memory.
#include "core/tap_range.h"
#include "cpu/pointwise/pointwise.h"
#include "cpu/shared/epilogue.h"

namespace lowbit::LOWBIT_LEVEL {
namespace {

constexpr int64_t kPixels = kPointwisePixels;
static_assert(kPixels <= kTilePixels, "a tile may have a bits step");

// Input pixels under the taps of a tile that are loaded together: the 33 columns of 16 windows of 3 with stride 2 in
// one go, in 16 KiB.
constexpr int64_t kSourcePixels = 64;

// Channels [channel, channel + count) of `pixels` pixels of the input, completed to whole vectors. `pixel` is an index
// in the batch; channels first, the pixels are of one image.
template <class Type>
inline void load_pixels(const PointwiseArgs& args, int64_t pixel, int64_t pixels, int64_t channel, int64_t count,
                        float (*value)[kTileChannels], Type type) {
  const typename Type::type* input = static_cast<const typename Type::type*>(args.input);
  if (args.channels_last) {
    input += pixel * args.stride + channel;
    for (int64_t i = 0; i < pixels; ++i, input += args.stride) {
      for_count(count, [&](auto known) { load(input, known, value[i], type); });
    }
  } else {
    const int64_t image_pixels = args.shape.height * args.shape.width;
    input += (pixel / image_pixels * args.shape.channels + channel) * image_pixels + pixel % image_pixels;
    float row[kSourcePixels];
    for (int64_t c = 0; c < count; ++c, input += image_pixels) {
      load(input, pixels, row, type);
      for (int64_t i = 0; i < pixels; ++i) value[i][c] = row[i];
    }
  }
  for (int64_t i = 0; i < pixels; ++i) complete(value[i], count);
}

// Channels of some pixels that follow each other, from block to block.
class PixelRun {
 public:
  PixelRun(const PointwiseArgs& args, int64_t first, int64_t count, int64_t pixels_per_image)
      : args_(args), count_(count), pixels_per_image_(pixels_per_image) {
    for (int64_t i = 0; i < count; ++i) pixels_[i] = first + i;
  }

  // make(channel, count, value) writes the values, to which the steps of `after` are applied.
  template <class Make>
  void run(const Make& make) const {
    const int64_t channels = args_.shape.channels;
    const bool shared_words = most_thresholds(args_.after) == 2 && channels % kWordBits != 0;
    if (shared_words) clear_bits(args_.after, channels, pixels_, count_);
    alignas(64) float value[kPixels][kTileChannels];
    for (int64_t channel = 0; channel < channels; channel += kTileChannels) {
      const int64_t count = min(channels - channel, kTileChannels);
      make(channel, count, value);
      run_program(args_.after, {value, pixels_, count_, channel, count, channels, pixels_per_image_}, shared_words);
    }
  }

 private:
  const PointwiseArgs& args_;
  const int64_t count_, pixels_per_image_;
  int64_t pixels_[kPixels];
};

template <class Type>
inline void run_pixels(const PointwiseArgs& args, int64_t item, Type type) {
  const PoolShape& s = args.shape;
  const int64_t image_pixels = s.height * s.width;
  int64_t first = item * kPixels, end = s.batch * image_pixels;
  if (!args.channels_last) {
    const int64_t tiles = ceil_div(image_pixels, kPixels);
    first = item / tiles * image_pixels + item % tiles * kPixels;
    end = (item / tiles + 1) * image_pixels;
  }
  const int64_t pixels = min(end - first, kPixels);
  PixelRun(args, first, pixels, image_pixels).run([&](int64_t channel, int64_t count, float (*value)[kTileChannels]) {
    load_pixels(args, first, pixels, channel, count, value, type);
  });
}

// value = combine(value, tap) for `kTaps` taps, `step` floats from one to the next.
template <int64_t kTaps, class Combine>
inline void combine_taps(float* __restrict value, const float* __restrict tap, int64_t step, int64_t lanes,
                         const Combine& combine) {
  for (int64_t i = 0; i < lanes; i += kLanes) {
    for (int64_t j = i; j < i + kLanes; ++j) {
      float sum = value[j];
#pragma GCC unroll 4
      for (int64_t t = 0; t < kTaps; ++t) sum = combine(sum, tap[t * step + j]);
      value[j] = sum;
    }
  }
}

template <class Combine>
inline void combine_row(float* value, const float* tap, int64_t taps, int64_t step, int64_t lanes,
                        const Combine& combine) {
  for (; taps >= 3; taps -= 3, tap += 3 * step) combine_taps<3>(value, tap, step, lanes, combine);
  if (taps == 2) combine_taps<2>(value, tap, step, lanes, combine);
  if (taps == 1) combine_taps<1>(value, tap, step, lanes, combine);
}

// The row of output pixels `item`, whose windows begin as `identity` and take in their taps by `combine`.
template <class Type, class Combine>
inline void run_row(const PointwiseArgs& args, int64_t item, Type type, float identity, const Combine& combine) {
  const PoolShape& s = args.shape;
  const int64_t image = item / s.out_height, out_row = item % s.out_height;
  const TapRange rows = valid_taps(out_row, s.stride_height, s.pad_top, s.dilation_height, s.kernel_height, s.height);
  for (int64_t x = 0; x < s.out_width; x += kPixels) {
    const int64_t pixels = min(s.out_width - x, kPixels);
    const int64_t last = (x + pixels - 1) * s.stride_width - s.pad_left + (s.kernel_width - 1) * s.dilation_width;
    const int64_t begin = max(x * s.stride_width - s.pad_left, 0), end = min(last + 1, s.width);
    const auto make = [&](int64_t channel, int64_t count, float (*value)[kTileChannels]) {
      const int64_t lanes = lanes_for(count);
      for (int64_t i = 0; i < pixels; ++i) {
        for (int64_t c = 0; c < lanes; ++c) value[i][c] = identity;
      }
      alignas(64) float source[kSourcePixels][kTileChannels];
      int64_t source_pixels[kSourcePixels];
      TapRange taps[kPixels];  // of each window, inside the columns at hand
      int64_t taps_column = -1;
      for (int64_t tap = rows.begin; tap < rows.end; ++tap) {
        const int64_t row = out_row * s.stride_height - s.pad_top + tap * s.dilation_height;
        for (int64_t column = begin; column < end; column += kSourcePixels) {
          const int64_t columns = min(end - column, kSourcePixels);
          const int64_t first = (image * s.height + row) * s.width + column;
          load_pixels(args, first, columns, channel, count, source, type);
          for (int64_t i = 0; i < columns; ++i) source_pixels[i] = first + i;
          run_program(args.before, {source, source_pixels, columns, channel, count, s.channels, s.height * s.width},
                      false);
          for (int64_t i = 0; i < pixels; ++i) {
            if (taps_column != column) {
              taps[i] =
                  valid_taps(x + i, s.stride_width, s.pad_left + column, s.dilation_width, s.kernel_width, columns);
            }
            if (taps[i].begin == taps[i].end) continue;
            const int64_t left = (x + i) * s.stride_width - s.pad_left - column;
            combine_row(value[i], source[left + taps[i].begin * s.dilation_width], taps[i].end - taps[i].begin,
                        s.dilation_width * kTileChannels, lanes, combine);
          }
          taps_column = column;
        }
      }
      if (args.reduction != Reduction::average) return;
      for (int64_t i = 0; i < pixels; ++i) {
        const PoolWindow window =
            pool_window(args.count_include_pad, args.divisor_override, row_span(s, out_row), column_span(s, x + i));
        for (int64_t c = 0; c < lanes; ++c) value[i][c] /= window.divisor;
      }
    };
    PixelRun(args, item * s.out_width + x, pixels, s.out_height * s.out_width).run(make);
  }
}

}  // namespace

void pointwise(const PointwiseArgs& args, int64_t begin, int64_t end) noexcept {
  for_type(args.input_type, [&](auto type) {
    for (int64_t item = begin; item < end; ++item) {
      switch (args.reduction) {
        case Reduction::none:
          run_pixels(args, item, type);
          break;
        case Reduction::maximum:
          run_row(args, item, type, -__builtin_inff(),
                  [](float largest, float tap) { return (tap > largest) | (tap != tap) ? tap : largest; });
          break;
        case Reduction::average:
          run_row(args, item, type, 0.0f, [](float sum, float tap) { return sum + tap; });
          break;
      }
    }
  });
}

}  // namespace lowbit::LOWBIT_LEVEL
