// Tiles of pixels by 64 channels go through the steps in registers; of a window the input pixels, a row of taps at a
// time, meet the sums or maxima of the output pixels in L1. Nothing between input and targets is in memory.
#include "core/tap_range.h"
#include "cpu/pointwise/pointwise.h"
#include "cpu/shared/epilogue.h"

namespace lowbit::LOWBIT_LEVEL {
namespace {

// Output pixels of a tile with a window, 16 KiB of sums or maxima: rows of the input are read in long runs.
constexpr int64_t kWindowPixels = 64;
constexpr int64_t kMostPixels = max(kWindowPixels, kPointwisePixels);

// Input pixels that are loaded together, 8 KiB.
constexpr int64_t kSourcePixels = 32;
static_assert(kPointwisePixels <= kSourcePixels);

// Channels of input pixels that follow each other, as rows of a tile.
class Pixels {
 public:
  // Channels [channel, channel + count) of pixels [first, first + pixels), indices in the batch; channels first, they
  // are of one image, and copied.
  void take(const PointwiseArgs& args, int64_t first, int64_t pixels, int64_t channel, int64_t count) {
    const int64_t bytes = float_bytes(args.input_type);
    const char* input = static_cast<const char*>(args.input);
    if (args.channels_last) {
      input += (first * args.stride + channel) * bytes;
      for (int64_t i = 0; i < pixels; ++i) rows_[i] = input + i * args.stride * bytes;
      source_ = source_of(args.input_type);
      return;
    }
    const int64_t image_pixels = args.shape.height * args.shape.width;
    const int64_t element =
        (first / image_pixels * args.shape.channels + channel) * image_pixels + first % image_pixels;
    for_type(args.input_type, [&](auto type) {
      transpose(static_cast<const typename decltype(type)::type*>(args.input) + element, image_pixels, pixels, count,
                type);
    });
    for (int64_t i = 0; i < pixels; ++i) rows_[i] = values_[i];
    source_ = Source::float32;
  }

  const void* const* rows() const { return rows_; }
  Source source() const { return source_; }

 private:
  template <class Type>
  void transpose(const typename Type::type* input, int64_t step, int64_t pixels, int64_t count, Type type) {
    constexpr int64_t kLanes = LanesF32::kLanes;
    float column[kSourcePixels + kLanes];
    for (int64_t c = 0; c < count; ++c, input += step) {
      int64_t i = 0;
      for (; i + kLanes <= pixels; i += kLanes) {
        LanesF32::load(input + i, type).store(column + i, Stored<FloatType::float32>{});
      }
      if (i < pixels) LanesF32::load(input + i, pixels - i, type).store(column + i, Stored<FloatType::float32>{});
      for (i = 0; i < pixels; ++i) values_[i][c] = column[i];
    }
  }

  const void* rows_[kSourcePixels];
  Source source_;
  alignas(64) float values_[kSourcePixels][kTileChannels];
};

// Output pixels that follow each other, from block to block of channels.
class OutputRun {
 public:
  OutputRun(const PointwiseArgs& args, int64_t first, int64_t count) : args_(args), count_(count) {
    for (int64_t i = 0; i < count; ++i) pixels_[i] = first + i;
  }

  // values(channel, count, tile) sets rows and source of the tile, on which the steps of `after` run.
  template <class Values>
  void run(const Values& values) const {
    const PoolShape& s = args_.shape;
    const bool shared_words = most_thresholds(args_.after) == 2 && s.channels % kWordBits != 0;
    if (shared_words) clear_bits(args_.after, s.channels, pixels_, count_);
    for (int64_t channel = 0; channel < s.channels; channel += kTileChannels) {
      const int64_t count = min(s.channels - channel, kTileChannels);
      EpilogueTile tile = {nullptr,      Source::float32, pixels_,    count_,
                           channel,      count,           s.channels, s.out_height * s.out_width,
                           shared_words, nullptr};
      values(channel, count, tile);
      run_program(args_.after, tile);
    }
  }

 private:
  const PointwiseArgs& args_;
  const int64_t count_;
  int64_t pixels_[kMostPixels];
};

void run_pixels(const PointwiseArgs& args, int64_t item) {
  const int64_t image_pixels = args.shape.height * args.shape.width;
  int64_t first = item * kPointwisePixels, end = args.shape.batch * image_pixels;
  if (!args.channels_last) {
    const int64_t tiles = ceil_div(image_pixels, kPointwisePixels);
    first = item / tiles * image_pixels + item % tiles * kPointwisePixels;
    end = (item / tiles + 1) * image_pixels;
  }
  const int64_t pixels = min(end - first, kPointwisePixels);
  Pixels input;
  OutputRun(args, first, pixels).run([&](int64_t channel, int64_t count, EpilogueTile& tile) {
    input.take(args, first, pixels, channel, count);
    tile.rows = input.rows();
    tile.source = input.source();
  });
}

// value = combine(value, tap) for all taps, `step` floats from one to the next.
template <class Combine>
inline void combine_taps(float* value, const float* tap, int64_t taps, int64_t step, const Combine& combine) {
  constexpr Stored<FloatType::float32> kFloat;
  LanesF32 sum[kVectors];
#pragma GCC unroll 16
  for (int j = 0; j < kVectors; ++j) sum[j] = LanesF32::load(value + j * LanesF32::kLanes, kFloat);
  for (int64_t t = 0; t < taps; ++t, tap += step) {
#pragma GCC unroll 16
    for (int j = 0; j < kVectors; ++j) sum[j] = combine(sum[j], LanesF32::load(tap + j * LanesF32::kLanes, kFloat));
  }
#pragma GCC unroll 16
  for (int j = 0; j < kVectors; ++j) sum[j].store(value + j * LanesF32::kLanes, kFloat);
}

// Taps of a window, from column `left` on, in columns [begin, end).
inline TapRange taps_in(int64_t left, int64_t begin, int64_t end, int64_t kernel, int64_t dilation) {
  if (dilation != 1) return valid_taps(0, 1, begin - left, dilation, kernel, end - begin);
  const int64_t first = max(begin - left, 0);
  return {first, max(min(end - left, kernel), first)};
}

// value[i] = combine(value[i], tap) of channels [channel, channel + count) for all taps of the window of output pixel
// x + i of row `item`, in row-major order, after the steps of `before`.
template <class Combine>
inline void combine_windows(const PointwiseArgs& args, int64_t item, int64_t x, int64_t pixels, int64_t channel,
                            int64_t count, float (*value)[kTileChannels], const Combine& combine) {
  const PoolShape& s = args.shape;
  const int64_t image = item / s.out_height, out_row = item % s.out_height;
  const TapRange rows = valid_taps(out_row, s.stride_height, s.pad_top, s.dilation_height, s.kernel_height, s.height);
  const int64_t reach = (s.kernel_width - 1) * s.dilation_width;
  const int64_t first_left = x * s.stride_width - s.pad_left;
  const int64_t begin = max(first_left, 0);
  const int64_t end = min(first_left + (pixels - 1) * s.stride_width + reach + 1, s.width);
  Pixels input;
  int64_t indices[kSourcePixels];
  alignas(64) float source[kSourcePixels][kTileChannels];
  for (int64_t tap = rows.begin; tap < rows.end; ++tap) {
    const int64_t row = out_row * s.stride_height - s.pad_top + tap * s.dilation_height;
    for (int64_t column = begin; column < end; column += kSourcePixels) {
      const int64_t columns = min(end - column, kSourcePixels);
      const int64_t first = (image * s.height + row) * s.width + column;
      for (int64_t i = 0; i < columns; ++i) indices[i] = first + i;
      input.take(args, first, columns, channel, count);
      run_program(args.before, {input.rows(), input.source(), indices, columns, channel, count, s.channels,
                                s.height * s.width, false, source});
      // Windows that begin behind the columns or end before them have no taps in them.
      const int64_t skipped = column - reach - first_left;
      for (int64_t i = skipped <= 0 ? 0 : ceil_div(skipped, s.stride_width); i < pixels; ++i) {
        const int64_t left = first_left + i * s.stride_width;
        if (left >= column + columns) break;
        const TapRange taps = taps_in(left, column, column + columns, s.kernel_width, s.dilation_width);
        if (taps.begin == taps.end) continue;
        combine_taps(value[i], source[left + taps.begin * s.dilation_width - column], taps.end - taps.begin,
                     s.dilation_width * kTileChannels, combine);
      }
    }
  }
}

inline void fill(float (*value)[kTileChannels], int64_t pixels, float number) {
  for (int64_t i = 0; i < pixels; ++i) {
    for (int64_t c = 0; c < kTileChannels; ++c) value[i][c] = number;
  }
}

void run_row(const PointwiseArgs& args, int64_t item) {
  const PoolShape& s = args.shape;
  alignas(64) float value[kWindowPixels][kTileChannels];
  const void* rows[kWindowPixels];
  for (int64_t i = 0; i < kWindowPixels; ++i) rows[i] = value[i];
  for (int64_t x = 0; x < s.out_width; x += kWindowPixels) {
    const int64_t pixels = min(s.out_width - x, kWindowPixels);
    OutputRun(args, item * s.out_width + x, pixels).run([&](int64_t channel, int64_t count, EpilogueTile& tile) {
      tile.rows = rows;
      if (args.reduction == Reduction::maximum) {
        fill(value, pixels, -__builtin_inff());
        return combine_windows(args, item, x, pixels, channel, count, value,
                               [](LanesF32 largest, LanesF32 tap) { return LanesF32::later_maximum(largest, tap); });
      }
      fill(value, pixels, 0);
      combine_windows(args, item, x, pixels, channel, count, value,
                      [](LanesF32 sum, LanesF32 tap) { return sum + tap; });
      const PoolSpan row = row_span(s, item % s.out_height);
      for (int64_t i = 0; i < pixels; ++i) {
        const PoolWindow window =
            pool_window(args.count_include_pad, args.divisor_override, row, column_span(s, x + i));
        for (int64_t c = 0; c < kTileChannels; ++c) value[i][c] /= window.divisor;
      }
    });
  }
}

}  // namespace

void pointwise(const PointwiseArgs& args, int64_t begin, int64_t end) noexcept {
  for (int64_t item = begin; item < end; ++item) works_rows(args) ? run_row(args, item) : run_pixels(args, item);
}

}  // namespace lowbit::LOWBIT_LEVEL
