// Loops of binary_conv2d_weight_grad round the register tile of lookup.h: `Vector` is its Lookup.
//
// A tile is kTileRows filters times kTileChannels channels at one tap. The terms of a table are one filter's gradients
// at kTerms output pixels (a step), so a table serves every tap and channel, and the indices of a step at a tap serve
// every filter. Pixels come in chunks of kChunkSteps steps. The indices of a chunk, one panel for each tap and channel
// tile, stay in L2 for all filters of a block; the tables of one filter tile are made in L1 just before all panels meet
// them. A tile sums a chunk in registers and then adds to memory, which also keeps long sums accurate.
//
// Where padding contributes nothing although a bit cannot say so (sign, padding value 0), steps are formed among pixels
// for which the same taps fall inside, and a tap skips the steps for which it falls outside.
#include "cpu/binary_conv2d_weight_grad/binary_conv2d_weight_grad.h"
#include "cpu/shared/lookup.h"

namespace lowbit::LOWBIT_LEVEL {
namespace {

constexpr int64_t kChunkSteps =
    48;  // 21 KiB of tables at avx512, 4.5 KiB at avx2; 32 is 3 % slower, 64 1.5 %, at avx512
constexpr int64_t kBlockFilters = 64;         // enough to hide the cost of the indices
constexpr int64_t kBlockPanels = 18;          // at avx512 216 KiB of indices and 315 KiB of sums; a third of it at avx2
constexpr int64_t kChunksPerPartialSum = 64;  // longer sums are made of partial sums: rounding errors grow slower

// Equal parts of [0, size), as few as a part of at most `longest` allows.
struct Partition {
  int64_t size, parts;

  static Partition of_at_most(int64_t longest, int64_t size) { return {size, ceil_div(size, longest)}; }
  int64_t begin(int64_t part) const { return size * part / parts; }
};

template <class Vector>
class WeightGrad {
 public:
  WeightGrad(const BinaryConv2dWeightGradArgs& args, void* workspace)
      : args_(args),
        shape_(args.shape),
        skip_padding_(args.encoding == Encoding::sign && args.padding_value == 0),
        filter_tiles_(Partition::of_at_most(Vector::kTileRows, filters_per_group(shape_))),
        channel_tiles_(Partition::of_at_most(kTileChannels<Vector>, channels_per_group(shape_))),
        filter_blocks_(Partition::of_at_most(ceil_div(kBlockFilters, Vector::kTileRows), filter_tiles_.parts)),
        channel_blocks_(Partition::of_at_most(1 + (kBlockPanels - 1) / taps(shape_), channel_tiles_.parts)) {
    const int64_t block_tiles = channel_blocks_.parts > 0 ? ceil_div(channel_tiles_.parts, channel_blocks_.parts) : 0;
    WorkspaceCursor cursor(workspace);
    tables_ = cursor.take<float>(kChunkSteps * kStepFloats);
    indices_ = cursor.take<int32_t>(taps(shape_) * block_tiles * kPanelInts);
    pixels_ = cursor.take<Pixel>(kChunkSteps * Vector::kTerms);
    runs_ = cursor.take<Run>(taps(shape_) * block_tiles * kChunkSteps);
    sums_ = cursor.take<float>(ceil_div(kBlockFilters, Vector::kTileRows) * taps(shape_) * block_tiles *
                               kTileFloats<Vector>);
    run_counts_ = cursor.take<int64_t>(taps(shape_) * block_tiles);
    workspace_bytes_ = cursor.bytes();
  }

  int64_t workspace_bytes() const { return workspace_bytes_; }

  // One item is one tile at one tap. Items are counted block by block; in a block filter tiles are slowest, then taps.
  int64_t items() const { return shape_.groups * filter_tiles_.parts * taps(shape_) * channel_tiles_.parts; }

  void run(int64_t begin, int64_t end) {
    int64_t first_item = 0;  // of the block
    for (int64_t group = 0; group < shape_.groups; ++group) {
      for (int64_t filter_block = 0; filter_block < filter_blocks_.parts; ++filter_block) {
        for (int64_t channel_block = 0; channel_block < channel_blocks_.parts; ++channel_block) {
          group_ = group;
          first_filter_tile_ = filter_blocks_.begin(filter_block);
          first_channel_tile_ = channel_blocks_.begin(channel_block);
          panels_ = taps(shape_) * (channel_blocks_.begin(channel_block + 1) - first_channel_tile_);
          const int64_t items = (filter_blocks_.begin(filter_block + 1) - first_filter_tile_) * panels_;
          begin_item_ = max(begin - first_item, 0);
          end_item_ = min(end - first_item, items);
          first_item += items;
          if (begin_item_ < end_item_) sum_block();
        }
      }
    }
  }

 private:
  static constexpr int64_t kStepFloats = Vector::kTileRows * Vector::kTableFloats;
  static constexpr int64_t kPanelInts = kChunkSteps * kTileChannels<Vector>;
  static constexpr float kNoGradients[Vector::kTileRows] = {};

  // The place of an output pixel in both images.
  struct Pixel {
    const float* grad_output;  // of the group's first filter; null where the pixel only fills up a step
    int64_t row, column;       // input coordinates under tap 0, perhaps outside
    int64_t word;              // offset into the input there
  };

  // Items of a block are numbered [filter tile, panel], panels [tap, channel tile].
  int64_t block_channel_tiles() const { return panels_ / taps(shape_); }
  int64_t first_channel(int64_t panel) const {
    return (first_channel_tile_ + panel % block_channel_tiles()) * kTileChannels<Vector>;
  }
  int64_t panel_channels(int64_t panel) const {
    return min(channels_per_group(shape_) - first_channel(panel), kTileChannels<Vector>);
  }

  // Of the group, by number of the tile in the block.
  int64_t first_filter(int64_t filter_tile) const { return filter_tiles_.begin(first_filter_tile_ + filter_tile); }
  int64_t tile_filters(int64_t filter_tile) const { return first_filter(filter_tile + 1) - first_filter(filter_tile); }

  void sum_block() {
    pixel_count_ = 0;
    chunk_count_ = 0;
    clear_sums();
    const int64_t out_height = shape_.out_height;
    for (int64_t begin_row = 0, end_row = 0; begin_row < out_height; begin_row = end_row) {
      end_row = end_of_class(begin_row, out_height, shape_.stride_height, shape_.pad_top, shape_.dilation_height,
                             shape_.kernel_height, shape_.height);
      const int64_t out_width = shape_.out_width;
      for (int64_t begin_column = 0, end_column = 0; begin_column < out_width; begin_column = end_column) {
        end_column = end_of_class(begin_column, out_width, shape_.stride_width, shape_.pad_left, shape_.dilation_width,
                                  shape_.kernel_width, shape_.width);
        add_class(begin_row, end_row, begin_column, end_column);
      }
    }
    if (pixel_count_ > 0) add_chunk();
    flush();
  }

  // End of the run of output rows (or columns) from `begin` on that may share a step.
  int64_t end_of_class(int64_t begin, int64_t out_size, int64_t stride, int64_t pad, int64_t dilation, int64_t kernel,
                       int64_t size) const {
    if (!skip_padding_) return out_size;
    const TapRange inside = valid_taps(begin, stride, pad, dilation, kernel, size);
    for (int64_t end = begin + 1; end < out_size; ++end) {
      const TapRange other = valid_taps(end, stride, pad, dilation, kernel, size);
      if (other.begin != inside.begin || other.end != inside.end) return end;
    }
    return out_size;
  }

  void add_class(int64_t begin_row, int64_t end_row, int64_t begin_column, int64_t end_column) {
    const float* group_grad = args_.grad_output + group_ * filters_per_group(shape_);
    const int64_t pixel_words = shape_.groups * words_per_group(shape_);
    for (int64_t image = 0; image < shape_.batch; ++image) {
      for (int64_t out_row = begin_row; out_row < end_row; ++out_row) {
        for (int64_t out_column = begin_column; out_column < end_column; ++out_column) {
          const int64_t out_pixel = (image * shape_.out_height + out_row) * shape_.out_width + out_column;
          const int64_t row = out_row * shape_.stride_height - shape_.pad_top;
          const int64_t column = out_column * shape_.stride_width - shape_.pad_left;
          add_pixel({group_grad + out_pixel * shape_.filters, row, column,
                     ((image * shape_.height + row) * shape_.width + column) * pixel_words});
        }
      }
    }
    while (pixel_count_ % Vector::kTerms != 0) add_pixel({nullptr, shape_.height, shape_.width, 0});
  }

  void add_pixel(const Pixel& pixel) {
    pixels_[pixel_count_++] = pixel;
    if (pixel_count_ == kChunkSteps * Vector::kTerms) {
      add_chunk();
      pixel_count_ = 0;
    }
  }

  void add_chunk() {
    if (chunk_count_ > 0 && chunk_count_ % kChunksPerPartialSum == 0) {
      flush();
      clear_sums();
    }
    ++chunk_count_;
    const int64_t steps = pixel_count_ / Vector::kTerms;
    const int64_t used_panels = min(end_item_ - begin_item_, panels_);
    for (int64_t i = 0; i < used_panels; ++i) make_panel((begin_item_ + i) % panels_, steps);
    int64_t filter_tile = -1;
    for (int64_t item = begin_item_; item < end_item_; ++item) {
      if (item / panels_ != filter_tile) {
        filter_tile = item / panels_;
        make_tables(filter_tile, steps);
      }
      add_tile(item);
    }
  }

  // Gathers the indices of the chunk for one tap and channel tile, leaving out the steps for which the tap falls into
  // skipped padding. Each run is a stretch of neighbouring steps.
  void make_panel(int64_t panel, int64_t steps) {
    const int64_t tap = panel / block_channel_tiles();
    const int64_t row_offset = tap / shape_.kernel_width * shape_.dilation_height;
    const int64_t column_offset = tap % shape_.kernel_width * shape_.dilation_width;
    const int64_t group_words = words_per_group(shape_);
    const int64_t channel = first_channel(panel);
    const int64_t word_offset = (row_offset * shape_.width + column_offset) * shape_.groups * group_words +
                                group_ * group_words + channel / kWordBits;
    const uint64_t padding = args_.padding_value > 0 ? ~uint64_t{0} : 0;
    const int vectors = tile_vectors<Vector>(panel_channels(panel));
    int32_t* indices = indices_ + panel * kPanelInts;
    Run* const runs = runs_ + panel * kChunkSteps;
    int64_t run_count = 0;
    int64_t end_of_run = -1;  // step that would continue it
    for (int64_t step = 0; step < steps; ++step) {
      uint64_t words[Vector::kTerms];
      bool is_inside = false;  // some pixel; when padding is skipped, all pixels that do not merely fill up
      for (int term = 0; term < Vector::kTerms; ++term) {
        const Pixel& pixel = pixels_[step * Vector::kTerms + term];
        words[term] = padding;
        if (is_index(pixel.row + row_offset, shape_.height) && is_index(pixel.column + column_offset, shape_.width)) {
          words[term] = args_.input[pixel.word + word_offset] >> channel % kWordBits;
          is_inside = true;
        }
      }
      if (skip_padding_ && !is_inside) continue;
      if (step != end_of_run) runs[run_count++] = {tables_ + step * kStepFloats, indices, 0};
      ++runs[run_count - 1].steps;
      end_of_run = step + 1;
      Vector::make_indices(words, vectors, indices);
      indices += vectors * Vector::kLanes;
    }
    run_counts_[panel] = run_count;
  }

  static bool is_index(int64_t index, int64_t size) {
    return static_cast<uint64_t>(index) < static_cast<uint64_t>(size);
  }

  // Tables [steps, filters of the tile] of the chunk, kTileRows apart.
  void make_tables(int64_t filter_tile, int64_t steps) {
    const int64_t filters = tile_filters(filter_tile);
    const int64_t first = first_filter(filter_tile);
    for (int64_t step = 0; step < steps; ++step) {
      const float* grads[Vector::kTerms];
      for (int term = 0; term < Vector::kTerms; ++term) {
        const float* grad = pixels_[step * Vector::kTerms + term].grad_output;
        grads[term] = grad == nullptr ? kNoGradients : grad + first;
      }
      float* tables = tables_ + step * kStepFloats;
      for (int64_t filter = 0; filter < filters; ++filter) {
        float terms[Vector::kTerms];
        for (int term = 0; term < Vector::kTerms; ++term) terms[term] = grads[term][filter];
        Vector::make_table(terms, tables + filter * Vector::kTableFloats);
      }
    }
  }

  void add_tile(int64_t item) {
    const int64_t panel = item % panels_;
    if (run_counts_[panel] == 0) return;
    accumulate<Vector>(static_cast<int>(tile_filters(item / panels_)), tile_vectors<Vector>(panel_channels(panel)),
                       runs_ + panel * kChunkSteps, run_counts_[panel], 0, kStepFloats, item_sums(item));
  }

  float* item_sums(int64_t item) const { return sums_ + item * kTileFloats<Vector>; }

  void clear_sums() {
    for (float* sum = item_sums(begin_item_); sum != item_sums(end_item_); ++sum) *sum = 0.0f;
  }

  // Moves the partial sums to grad_weight.
  void flush() {
    const bool is_first = chunk_count_ <= kChunksPerPartialSum;
    const int64_t channels = channels_per_group(shape_);
    for (int64_t item = begin_item_; item < end_item_; ++item) {
      const int64_t panel = item % panels_;
      const int64_t filter = group_ * filters_per_group(shape_) + first_filter(item / panels_);
      const int64_t tap = panel / block_channel_tiles();
      const int64_t filters = tile_filters(item / panels_);
      const int64_t count = panel_channels(panel);
      for (int64_t row = 0; row < filters; ++row) {
        float* grad_weight =
            args_.grad_weight + ((filter + row) * taps(shape_) + tap) * channels + first_channel(panel);
        const float* sums = item_sums(item) + row * kTileChannels<Vector>;
        for (int64_t c = 0; c < count; ++c) grad_weight[c] = is_first ? sums[c] : grad_weight[c] + sums[c];
      }
    }
  }

  const BinaryConv2dWeightGradArgs& args_;
  const ConvShape& shape_;
  const bool skip_padding_;
  const Partition filter_tiles_, channel_tiles_;    // of one group
  const Partition filter_blocks_, channel_blocks_;  // of those tiles
  int64_t workspace_bytes_;

  float* tables_;        // [kChunkSteps, kTileRows, kTableFloats]
  int32_t* indices_;     // [panels, kPanelInts]
  Pixel* pixels_;        // [kChunkSteps, kTerms]
  Run* runs_;            // [panels, kChunkSteps]
  int64_t* run_counts_;  // [panels]
  float* sums_;          // [items of the block, kTileRows, kTileChannels]

  // The block, and the part [begin_item_, end_item_) of its items that is to be computed.
  int64_t group_ = 0, first_filter_tile_ = 0, first_channel_tile_ = 0, panels_ = 0;
  int64_t begin_item_ = 0, end_item_ = 0;
  int64_t pixel_count_ = 0;  // in pixels_
  int64_t chunk_count_ = 0;  // of the block so far
};

using SignGradient = WeightGrad<Lookup<Encoding::sign>>;
using StepGradient = WeightGrad<Lookup<Encoding::step>>;

}  // namespace

int64_t binary_conv2d_weight_grad_workspace_bytes(const BinaryConv2dWeightGradArgs& args) noexcept {
  return args.encoding == Encoding::sign ? SignGradient(args, nullptr).workspace_bytes()
                                         : StepGradient(args, nullptr).workspace_bytes();
}

int64_t binary_conv2d_weight_grad_items(const BinaryConv2dWeightGradArgs& args) noexcept {
  return args.encoding == Encoding::sign ? SignGradient(args, nullptr).items() : StepGradient(args, nullptr).items();
}

void binary_conv2d_weight_grad(const BinaryConv2dWeightGradArgs& args, int64_t begin, int64_t end,
                               void* workspace) noexcept {
  if (args.encoding == Encoding::sign) {
    SignGradient(args, workspace).run(begin, end);
  } else {
    StepGradient(args, workspace).run(begin, end);
  }
}

}  // namespace lowbit::LOWBIT_LEVEL
