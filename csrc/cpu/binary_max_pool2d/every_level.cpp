// Plain C++ on the compiler's vector type: a window is loads and ORs of whole words, and no instruction set has
// anything better.
#include <cstring>

#include "core/tap_range.h"
#include "cpu/binary_max_pool2d/binary_max_pool2d.h"

namespace lowbit::LOWBIT_LEVEL {
namespace {

// A lattice of taps seen from a run of neighbouring output pixels. Steps are in words.
struct WindowRun {
  const uint64_t* input;  // first tap of the first output pixel
  int64_t rows, columns;  // taps
  int64_t row_step, column_step, pixel_step;
  int64_t pixels;
  int64_t words;  // of each pixel
};

template <int kWords>
struct Words {
  typedef uint64_t Vector __attribute__((vector_size(kWords * 8)));
};
template <>
struct Words<1> {
  using Vector = uint64_t;
};

// Words word .. word + kWords - 1 of every output pixel. kRows and kColumns unroll the window; 0: any number.
template <int kWords, int kRows, int kColumns>
void or_words(const WindowRun& run, int64_t word, const uint64_t* invert, uint64_t* output) {
  using Vector = typename Words<kWords>::Vector;
  const int64_t rows = kRows > 0 ? kRows : run.rows;
  const int64_t columns = kColumns > 0 ? kColumns : run.columns;
  Vector inverted = {};
  if (invert) memcpy(&inverted, invert + word, sizeof inverted);
  const uint64_t* pixel = run.input + word;
  for (int64_t x = 0; x < run.pixels; ++x, pixel += run.pixel_step) {
    Vector any = {};
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        Vector tap;
        memcpy(&tap, pixel + i * run.row_step + j * run.column_step, sizeof tap);
        any |= tap ^ inverted;
      }
    }
    any ^= inverted;
    memcpy(output + x * run.words + word, &any, sizeof any);
  }
}

template <int kWords>
void or_words(const WindowRun& run, int64_t word, const uint64_t* invert, uint64_t* output) {
  if (run.rows == 2 && run.columns == 2) return or_words<kWords, 2, 2>(run, word, invert, output);
  if (run.rows == 3 && run.columns == 3) return or_words<kWords, 3, 3>(run, word, invert, output);
  or_words<kWords, 0, 0>(run, word, invert, output);
}

void or_windows(WindowRun run, const uint64_t* invert, uint64_t* output) {
  if (run.pixel_step == run.words && !invert) {  // stride 1: the run is one long pixel
    run.words *= run.pixels;
    run.pixels = 1;
  }
  int64_t word = 0;
  for (; run.words - word >= 8; word += 8) or_words<8>(run, word, invert, output);
  if (run.words - word >= 4) or_words<4>(run, word, invert, output), word += 4;
  if (run.words - word >= 2) or_words<2>(run, word, invert, output), word += 2;
  if (run.words - word >= 1) or_words<1>(run, word, invert, output);
}

void max_pool_row(const BinaryMaxPool2dArgs& args, int64_t item) {
  const PoolShape& s = args.shape;
  const int64_t row_words = words_for(s.channels);
  const uint64_t* image = args.input + item / s.out_height * s.height * s.width * row_words;
  uint64_t* output = args.output + item * s.out_width * row_words;
  const int64_t out_row = item % s.out_height;
  const int64_t top = out_row * s.stride_height - s.pad_top;
  const TapRange rows = valid_taps(out_row, s.stride_height, s.pad_top, s.dilation_height, s.kernel_height, s.height);
  const int64_t reach = (s.kernel_width - 1) * s.dilation_width;
  for (int64_t x = 0; x < s.out_width;) {
    const int64_t left = x * s.stride_width - s.pad_left;
    const TapRange columns = valid_taps(x, s.stride_width, s.pad_left, s.dilation_width, s.kernel_width, s.width);
    int64_t pixels = 1;
    if (left >= 0 && left + reach < s.width) {  // so do all windows until one touches the right edge
      const int64_t whole = (s.width - 1 - reach - left) / s.stride_width + 1;
      pixels = min(whole, s.out_width - x);
    }
    const int64_t y0 = top + rows.begin * s.dilation_height;
    const int64_t x0 = left + columns.begin * s.dilation_width;
    or_windows({image + (y0 * s.width + x0) * row_words, rows.end - rows.begin, columns.end - columns.begin,
                s.dilation_height * s.width * row_words, s.dilation_width * row_words, s.stride_width * row_words,
                pixels, row_words},
               args.invert, output + x * row_words);
    x += pixels;
  }
}

}  // namespace

void binary_max_pool2d(const BinaryMaxPool2dArgs& args, int64_t begin, int64_t end) noexcept {
  for (int64_t item = begin; item < end; ++item) max_pool_row(args, item);
}

}  // namespace lowbit::LOWBIT_LEVEL
