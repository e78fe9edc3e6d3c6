// Loops of binary_conv2d_input_grad round the register tile of lookup.h: `Vector` is its Lookup.
//
// A tile is kTileRows input pixels of one row, a column stride apart, times kTileChannels channels. The terms of a
// table are the scaled output gradients of kTerms filters at one output pixel, so a table serves every tap and channel;
// pixels that neighbour in a tile read neighbouring tables, and a tap merely shifts the first one. Tables live in a
// ring of the output rows that one input row reaches, the indices of a block of channels in a panel; both are sized to
// stay in L2.
#include "cpu/binary_conv2d_input_grad/binary_conv2d_input_grad.h"
#include "cpu/shared/lookup.h"

namespace lowbit::LOWBIT_LEVEL {
namespace {

// Together 1 MiB: the L2 of Zen 4, half that of Intel's servers.
constexpr int64_t kIndexPanelBytes = 640 << 10;
constexpr int64_t kTableRingBytes = 384 << 10;
constexpr int64_t kMostColumns = 56;           // output columns of a chunk: 8 full tiles at avx512
constexpr int64_t kStepsPerPartialSum = 1024;  // longer sums are made of partial sums: rounding errors grow slower

inline int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

inline int64_t clamp(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : value > high ? high : value;
}

// A 1 x 1 kernel that maps pixel to pixel knows no rows: they become one, and tiles are full whatever the image size.
inline ConvShape join_rows(ConvShape shape) {
  const bool pointwise = taps(shape) == 1 && shape.stride_height == 1 && shape.stride_width == 1 &&
                         shape.pad_top == 0 && shape.pad_left == 0 && shape.out_height == shape.height &&
                         shape.out_width == shape.width;
  if (pointwise) {
    shape.width *= shape.batch * shape.height;
    shape.out_width = shape.width;
    shape.batch = shape.height = shape.out_height = 1;
  }
  return shape;
}

// `count` bits, at most 64, from bit `first` of a row of words on; reads no word that holds none of them.
inline uint64_t bits_at(const uint64_t* words, int64_t first, int64_t count) {
  const int64_t shift = first % kWordBits;
  const uint64_t* word = words + first / kWordBits;
  uint64_t bits = word[0] >> shift;
  if (shift + count > kWordBits) bits |= word[1] << (kWordBits - shift);
  return bits;
}

template <class Vector>
class InputGrad {
 public:
  InputGrad(const BinaryConv2dInputGradArgs& args, void* workspace) : args_(args), shape_(join_rows(args.shape)) {
    const int64_t filters = filters_per_group(shape_);
    steps_ = ceil_div(filters, int64_t{Vector::kTerms});
    panel_ints_ = taps(shape_) * steps_ * kTileChannels<Vector>;
    channel_tiles_ = ceil_div(channels_per_group(shape_), int64_t{kTileChannels<Vector>});
    block_tiles_ = clamp(kIndexPanelBytes / (panel_ints_ * 4 + 1), 1, channel_tiles_);
    channel_blocks_ = ceil_div(channel_tiles_, block_tiles_);

    const int64_t span_height = (shape_.kernel_height - 1) * shape_.dilation_height;
    const int64_t span_width = (shape_.kernel_width - 1) * shape_.dilation_width;
    ring_rows_ = clamp(span_height / shape_.stride_height + 1, 1, shape_.out_height > 0 ? shape_.out_height : 1);
    const int64_t columns =
        kTableRingBytes / (ring_rows_ * steps_ * kTableBytes<Vector> + 1) - span_width / shape_.stride_width;
    const int64_t most_columns = shape_.stride_width * clamp(columns, 2 * Vector::kTileRows, kMostColumns);
    chunks_ = shape_.width > 0 ? ceil_div(shape_.width, most_columns) : 1;
    // Odd, so that the tables of consecutive steps fall into different sets of the cache.
    table_columns_ = ((ceil_div(shape_.width, chunks_) - 1 + span_width) / shape_.stride_width + 2) | 1;

    WorkspaceCursor cursor(workspace);
    indices_ = cursor.take<int32_t>(block_tiles_ * panel_ints_);
    tables_ = cursor.take<float>(ring_rows_ * steps_ * table_columns_ * Vector::kTableFloats);
    terms_ = cursor.take<float>(steps_ * Vector::kTerms);
    runs_ = cursor.take<Run>(taps(shape_) * ceil_div(steps_, kStepsPerPartialSum));
    workspace_bytes_ = cursor.bytes();
  }

  int64_t workspace_bytes() const { return workspace_bytes_; }

  // One item is the part of an input row that lies in one chunk of columns, times one block of channels.
  int64_t items() const { return shape_.groups * channel_blocks_ * shape_.batch * chunks_ * shape_.height; }

  void run(int64_t begin, int64_t end) {
    int64_t block = -1;  // of all groups
    int64_t strip = -1;  // of all blocks: a chunk of columns of one image
    for (int64_t item = begin; item < end; ++item) {
      if (item / shape_.height != strip) {
        strip = item / shape_.height;
        if (strip / (chunks_ * shape_.batch) != block) {
          block = strip / (chunks_ * shape_.batch);
          begin_block(block);
        }
        begin_strip(strip % (chunks_ * shape_.batch));
      }
      write_row(item % shape_.height);
    }
  }

 private:
  // Indices of every channel tile, tap and step of filters of the block.
  void begin_block(int64_t block) {
    group_ = block / channel_blocks_;
    first_tile_ = block % channel_blocks_ * block_tiles_;
    end_tile_ = clamp(first_tile_ + block_tiles_, 0, channel_tiles_);
    const int64_t filters = filters_per_group(shape_);
    const int64_t filter_words = taps(shape_) * words_per_group(shape_);
    const uint64_t* weight = args_.weight + group_ * filters * filter_words;
    int32_t* indices = indices_;
    for (int64_t tile = first_tile_; tile < end_tile_; ++tile) {
      const int64_t first_channel = tile * kTileChannels<Vector>;
      const int vectors = tile_vectors<Vector>(channels_per_group(shape_) - first_channel);
      const uint64_t* tile_words = weight + first_channel / kWordBits;
      for (int64_t tap = 0; tap < taps(shape_); ++tap) {
        for (int64_t step = 0; step < steps_; ++step) {
          uint64_t words[Vector::kTerms];
          for (int term = 0; term < Vector::kTerms; ++term) {
            const int64_t filter = step * Vector::kTerms + term;
            const uint64_t* word = tile_words + filter * filter_words + tap * words_per_group(shape_);
            words[term] = filter < filters ? *word >> first_channel % kWordBits : 0;
          }
          Vector::make_indices(words, vectors, indices);
          indices += vectors * Vector::kLanes;
        }
      }
    }
  }

  void begin_strip(int64_t strip) {
    image_ = strip / chunks_;
    begin_column_ = strip % chunks_ * shape_.width / chunks_;
    end_column_ = (strip % chunks_ + 1) * shape_.width / chunks_;
    const int64_t span_width = (shape_.kernel_width - 1) * shape_.dilation_width;
    first_table_column_ = floor_div(begin_column_ + shape_.pad_left - span_width, shape_.stride_width);
    end_table_column_ = floor_div(end_column_ - 1 + shape_.pad_left, shape_.stride_width) + 1;
    end_table_row_ = 0;
  }

  int64_t step_floats() const { return table_columns_ * Vector::kTableFloats; }

  float* table_row(int64_t out_row) const { return tables_ + out_row % ring_rows_ * steps_ * step_floats(); }

  // Tables of one output row, [steps, table columns]; zero where a column lies outside.
  void make_tables(int64_t out_row) {
    const int64_t filters = filters_per_group(shape_);
    const int64_t stride = step_floats();
    const float* scale = args_.scale == nullptr ? nullptr : args_.scale + group_ * filters * args_.scale_stride;
    for (int64_t filter = filters; filter < steps_ * Vector::kTerms; ++filter) terms_[filter] = 0.0f;
    float* tables = table_row(out_row);
    for (int64_t column = first_table_column_; column < end_table_column_; ++column, tables += Vector::kTableFloats) {
      if (column < 0 || column >= shape_.out_width) {
        const float none[Vector::kTerms] = {};
        for (int64_t step = 0; step < steps_; ++step) Vector::make_table(none, tables + step * stride);
        continue;
      }
      const int64_t out_pixel = (image_ * shape_.out_height + out_row) * shape_.out_width + column;
      const float* grad = args_.grad_output + out_pixel * shape_.filters + group_ * filters;
      for (int64_t filter = 0; filter < filters; ++filter) {
        terms_[filter] = scale == nullptr ? grad[filter] : grad[filter] * scale[filter * args_.scale_stride];
      }
      for (int64_t step = 0; step < steps_; ++step) {
        float terms[Vector::kTerms];
        for (int term = 0; term < Vector::kTerms; ++term) terms[term] = terms_[step * Vector::kTerms + term];
        Vector::make_table(terms, tables + step * stride);
      }
    }
  }

  void write_row(int64_t row) {
    const int64_t span_height = (shape_.kernel_height - 1) * shape_.dilation_height;
    const int64_t first_row =
        clamp(floor_div(row + shape_.pad_top - span_height + shape_.stride_height - 1, shape_.stride_height), 0,
              shape_.out_height);
    const int64_t end_row = clamp((row + shape_.pad_top) / shape_.stride_height + 1, 0, shape_.out_height);
    if (end_table_row_ < first_row) end_table_row_ = first_row;
    for (; end_table_row_ < end_row; ++end_table_row_) make_tables(end_table_row_);
    // Columns a stride apart are reached by the same taps, from consecutive output columns.
    for (int64_t phase = 0; phase < shape_.stride_width && begin_column_ + phase < end_column_; ++phase) {
      write_phase(row, begin_column_ + phase);
    }
  }

  void write_phase(int64_t row, int64_t first_column) {
    const int64_t columns = ceil_div(end_column_ - first_column, shape_.stride_width);
    const int64_t row_tiles = ceil_div(columns, int64_t{Vector::kTileRows});
    const int64_t runs_per_sum = clamp(kStepsPerPartialSum / (steps_ + 1), 1, kStepsPerPartialSum);
    const int32_t* tile_indices = indices_;
    for (int64_t tile = first_tile_; tile < end_tile_; ++tile) {
      const int64_t first_channel = tile * kTileChannels<Vector>;
      const int64_t channels = channels_per_group(shape_) - first_channel;
      const int vectors = tile_vectors<Vector>(channels);
      const int64_t step_ints = vectors * Vector::kLanes;
      const int64_t run_count = make_runs(row, first_column, columns, tile_indices, step_ints);
      tile_indices += taps(shape_) * steps_ * step_ints;
      for (int64_t row_tile = 0; row_tile < row_tiles; ++row_tile) {
        const int64_t begin = columns * row_tile / row_tiles;
        const int rows = static_cast<int>(columns * (row_tile + 1) / row_tiles - begin);
        alignas(64) float sums[kTileFloats<Vector>] = {};
        for (int64_t run = 0; run < run_count; run += runs_per_sum) {
          accumulate<Vector>(rows, vectors, runs_ + run, clamp(run_count - run, 0, runs_per_sum),
                             begin * Vector::kTableFloats, step_floats(), sums);
        }
        for (int r = 0; r < rows; ++r) {
          const int64_t column = first_column + (begin + r) * shape_.stride_width;
          write_pixel((image_ * shape_.height + row) * shape_.width + column, first_channel, channels,
                      sums + r * kTileChannels<Vector>);
        }
      }
    }
  }

  // Runs of the taps that reach the pixels first_column, first_column + stride, ... of the row.
  int64_t make_runs(int64_t row, int64_t first_column, int64_t columns, const int32_t* indices, int64_t step_ints) {
    int64_t count = 0;
    for (int64_t ky = 0; ky < shape_.kernel_height; ++ky) {
      const int64_t reach_row = row + shape_.pad_top - ky * shape_.dilation_height;
      const int64_t out_row = reach_row / shape_.stride_height;
      if (reach_row < 0 || reach_row % shape_.stride_height != 0 || out_row >= shape_.out_height) continue;
      for (int64_t kx = 0; kx < shape_.kernel_width; ++kx) {
        const int64_t reach_column = first_column + shape_.pad_left - kx * shape_.dilation_width;
        const int64_t out_column = reach_column / shape_.stride_width;
        if (reach_column % shape_.stride_width != 0 || out_column + columns <= 0 || out_column >= shape_.out_width) {
          continue;
        }
        const float* tables = table_row(out_row) + (out_column - first_table_column_) * Vector::kTableFloats;
        const int32_t* tap_indices = indices + (ky * shape_.kernel_width + kx) * steps_ * step_ints;
        for (int64_t step = 0; step < steps_; step += kStepsPerPartialSum) {
          runs_[count++] = {tables + step * step_floats(), tap_indices + step * step_ints,
                            clamp(steps_ - step, 0, kStepsPerPartialSum)};
        }
      }
    }
    return count;
  }

  void write_pixel(int64_t pixel, int64_t first_channel, int64_t channels, const float* sums) {
    const int64_t first = group_ * channels_per_group(shape_) + first_channel;
    const int64_t count = clamp(channels, 0, kTileChannels<Vector>);
    const uint64_t kept =
        args_.mask == nullptr ? ~uint64_t{0} : bits_at(args_.mask + pixel * words_for(shape_.channels), first, count);
    float* grad_input = args_.grad_input + pixel * shape_.channels + first;
    for (int64_t lane = 0; lane < count; lane += Vector::kLanes) {
      Vector::store_kept(grad_input + lane, Vector::load(sums + lane), count - lane, kept >> lane);
    }
  }

  const BinaryConv2dInputGradArgs& args_;
  const ConvShape shape_;
  int64_t steps_;           // of kTerms filters each, per tap
  int64_t panel_ints_;      // index lanes of one channel tile
  int64_t channel_tiles_;   // of one group
  int64_t block_tiles_;     // channel tiles of one block
  int64_t channel_blocks_;  // of one group
  int64_t ring_rows_;       // output rows that one input row can reach
  int64_t chunks_;          // of columns
  int64_t table_columns_;
  int64_t workspace_bytes_;

  int32_t* indices_;  // [tiles of the block, taps, steps, vectors, kLanes]
  float* tables_;     // [ring_rows_, steps_, table_columns_, kTableFloats]
  float* terms_;      // one pixel's scaled gradients, zero past the last filter
  Run* runs_;

  int64_t group_ = 0, first_tile_ = 0, end_tile_ = 0;      // of the block
  int64_t image_ = 0, begin_column_ = 0, end_column_ = 0;  // of the strip
  int64_t first_table_column_ = 0, end_table_column_ = 0, end_table_row_ = 0;
};

using Gradient = InputGrad<Lookup<Encoding::sign>>;

}  // namespace

int64_t binary_conv2d_input_grad_workspace_bytes(const BinaryConv2dInputGradArgs& args) noexcept {
  return Gradient(args, nullptr).workspace_bytes();
}

int64_t binary_conv2d_input_grad_items(const BinaryConv2dInputGradArgs& args) noexcept {
  return Gradient(args, nullptr).items();
}

void binary_conv2d_input_grad(const BinaryConv2dInputGradArgs& args, int64_t begin, int64_t end,
                              void* workspace) noexcept {
  Gradient(args, workspace).run(begin, end);
}

}  // namespace lowbit::LOWBIT_LEVEL
