// Loops of binary_conv2d_weight_grad round the register tile of lookup.h, one source for avx2 and avx512.
//
// A tile is kTileRows filters times kTileChannels channels at one tap. The terms of a table are one filter's gradients
// at kTerms output pixels (a step), so a table serves every tap and channel, and the indices of a step at a tap serve
// every filter. Pixels come in chunks of kChunkSteps steps whose tables stay in L2 and whose indices at one tap stay in
// L1; a tile sums a chunk in registers and then adds to memory, which also keeps long sums accurate.
//
// Where padding contributes nothing although a bit cannot say so (sign, padding value 0), steps are formed among pixels
// for which the same taps fall inside, and a tap skips the steps for which it falls outside.
#pragma once

#include "cpu/binary_conv2d_input_grad/lookup.h"
#include "cpu/binary_conv2d_weight_grad/binary_conv2d_weight_grad.h"

namespace lowbit {
namespace {

constexpr int64_t kChunkSteps = 64;       // 16 KiB of indices at avx512, a third of its L1; 8 KiB at avx2, a quarter
constexpr int64_t kBlockFilters = 70;     // 64 in tiles of 6 and 7 or of 3 rows: 256 KiB of tables at avx512
constexpr int64_t kBlockSums = 80 << 10;  // of grad_weight: 320 KiB, 2 tiles of 64 channels at 3 x 3 taps

// Equal parts of [0, size), as few as a part may be long.
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
        filter_blocks_(Partition::of_at_most(kBlockFilterTiles, filter_tiles_.parts)),
        channel_blocks_(Partition::of_at_most(
            1 + kBlockSums / (taps(shape_) * kBlockFilters * kTileChannels<Vector> + 1), channel_tiles_.parts)) {
    WorkspaceCursor cursor(workspace);
    tables_ = cursor.take<float>(kBlockFilterTiles * kChunkSteps * kStepFloats);
    indices_ = cursor.take<int32_t>(kChunkSteps * kTileChannels<Vector>);
    pixels_ = cursor.take<Pixel>(kChunkSteps * Vector::kTerms);
    runs_ = cursor.take<Run>(kChunkSteps);
    workspace_bytes_ = cursor.bytes();
  }

  int64_t workspace_bytes() const { return workspace_bytes_; }

  // One item is one tile at one tap. Items are counted block by block; in a block filter tiles are slowest, then taps.
  int64_t items() const { return shape_.groups * filter_tiles_.parts * taps(shape_) * channel_tiles_.parts; }

  void run(int64_t begin, int64_t end) {
    int64_t first = 0;  // item of the block
    for (int64_t group = 0; group < shape_.groups; ++group) {
      for (int64_t filter_block = 0; filter_block < filter_blocks_.parts; ++filter_block) {
        for (int64_t channel_block = 0; channel_block < channel_blocks_.parts; ++channel_block) {
          block_ = {group,
                    filter_blocks_.begin(filter_block),
                    filter_blocks_.begin(filter_block + 1),
                    channel_blocks_.begin(channel_block),
                    channel_blocks_.begin(channel_block + 1),
                    0,
                    0};
          const int64_t count = (block_.end_filter_tile - block_.first_filter_tile) * taps(shape_) *
                                (block_.end_channel_tile - block_.first_channel_tile);
          block_.begin_item = begin > first ? begin - first : 0;
          block_.end_item = end < first + count ? end - first : count;
          first += count;
          if (block_.begin_item < block_.end_item) sum_block();
        }
      }
    }
  }

 private:
  static constexpr int64_t kBlockFilterTiles = kBlockFilters / Vector::kTileRows;
  static constexpr int64_t kStepFloats = Vector::kTileRows * Vector::kTableFloats;  // tables of a tile at one step

  static constexpr float kNoGradients[Vector::kTileRows] = {};

  // The place of an output pixel in both images; no_pixel() fills up a step.
  struct Pixel {
    const float* grad_output;  // null: none
    int64_t image;
    int64_t row, column;  // input coordinates under tap 0, perhaps outside
  };

  // A block of tiles and the part [begin_item, end_item) of its items that is to be computed.
  struct Block {
    int64_t group;
    int64_t first_filter_tile, end_filter_tile;
    int64_t first_channel_tile, end_channel_tile;
    int64_t begin_item, end_item;
  };

  bool has_item(int64_t filter_tile, int64_t tap, int64_t channel_tile) const {
    const int64_t channel_tiles = block_.end_channel_tile - block_.first_channel_tile;
    const int64_t item = ((filter_tile - block_.first_filter_tile) * taps(shape_) + tap) * channel_tiles +
                         channel_tile - block_.first_channel_tile;
    return item >= block_.begin_item && item < block_.end_item;
  }

  // Filter tiles of which the block has items at all: [first, end).
  int64_t first_used_filter_tile() const { return block_.first_filter_tile + block_.begin_item / filter_tile_items(); }
  int64_t end_used_filter_tile() const {
    return block_.first_filter_tile + ceil_div(block_.end_item, filter_tile_items());
  }
  int64_t filter_tile_items() const { return taps(shape_) * (block_.end_channel_tile - block_.first_channel_tile); }

  int64_t first_channel(int64_t channel_tile) const { return channel_tile * kTileChannels<Vector>; }

  int64_t tile_channels(int64_t channel_tile) const {
    const int64_t rest = channels_per_group(shape_) - first_channel(channel_tile);
    return rest < kTileChannels<Vector> ? rest : kTileChannels<Vector>;
  }

  float* grad_weight(int64_t filter, int64_t tap, int64_t channel_tile) const {
    const int64_t row = (block_.group * filters_per_group(shape_) + filter) * taps(shape_) + tap;
    return args_.grad_weight + row * channels_per_group(shape_) + first_channel(channel_tile);
  }

  void sum_block() {
    clear_block();
    pixel_count_ = 0;
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
  }

  // End of the run of output rows (or columns) from `begin` on that form steps together.
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
    const float* group_grad = args_.grad_output + block_.group * filters_per_group(shape_);
    for (int64_t image = 0; image < shape_.batch; ++image) {
      for (int64_t row = begin_row; row < end_row; ++row) {
        for (int64_t column = begin_column; column < end_column; ++column) {
          const int64_t out_pixel = (image * shape_.out_height + row) * shape_.out_width + column;
          add_pixel({group_grad + out_pixel * shape_.filters, image, row * shape_.stride_height - shape_.pad_top,
                     column * shape_.stride_width - shape_.pad_left});
        }
      }
    }
    while (pixel_count_ % Vector::kTerms != 0) add_pixel({nullptr, 0, 0, 0});
  }

  void add_pixel(const Pixel& pixel) {
    pixels_[pixel_count_++] = pixel;
    if (pixel_count_ == kChunkSteps * Vector::kTerms) {
      add_chunk();
      pixel_count_ = 0;
    }
  }

  // The sums are added to grad_weight chunk by chunk, so it starts at zero.
  void clear_block() {
    for_each_tile([this](int64_t filter_tile, int64_t tap, int64_t channel_tile) {
      for (int64_t filter = filter_tiles_.begin(filter_tile); filter < filter_tiles_.begin(filter_tile + 1); ++filter) {
        float* sums = grad_weight(filter, tap, channel_tile);
        for (int64_t channel = 0; channel < tile_channels(channel_tile); ++channel) sums[channel] = 0.0f;
      }
    });
  }

  template <class Body>
  void for_each_tile(const Body& body) const {
    for (int64_t filter_tile = first_used_filter_tile(); filter_tile < end_used_filter_tile(); ++filter_tile) {
      for (int64_t tap = 0; tap < taps(shape_); ++tap) {
        for (int64_t tile = block_.first_channel_tile; tile < block_.end_channel_tile; ++tile) {
          if (has_item(filter_tile, tap, tile)) body(filter_tile, tap, tile);
        }
      }
    }
  }

  float* tile_tables(int64_t filter_tile) const {
    return tables_ + (filter_tile - block_.first_filter_tile) * kChunkSteps * kStepFloats;
  }

  void add_chunk() {
    const int64_t steps = pixel_count_ / Vector::kTerms;
    const int64_t begin_tile = first_used_filter_tile();
    const int64_t end_tile = end_used_filter_tile();
    for (int64_t tile = begin_tile; tile < end_tile; ++tile) make_tables(tile, steps);
    for (int64_t tap = 0; tap < taps(shape_); ++tap) {
      for (int64_t channel_tile = block_.first_channel_tile; channel_tile < block_.end_channel_tile; ++channel_tile) {
        bool is_made = false;
        int64_t run_count = 0;
        for (int64_t tile = begin_tile; tile < end_tile; ++tile) {
          if (!has_item(tile, tap, channel_tile)) continue;
          if (!is_made) run_count = make_runs(tap, channel_tile, steps);
          is_made = true;
          if (run_count > 0) add_tile(tile, tap, channel_tile, run_count);
        }
      }
    }
  }

  // Tables [steps, filters of the tile] of the chunk.
  void make_tables(int64_t filter_tile, int64_t steps) {
    const int64_t begin_filter = filter_tiles_.begin(filter_tile);
    const int64_t end_filter = filter_tiles_.begin(filter_tile + 1);
    for (int64_t step = 0; step < steps; ++step) {
      const float* grads[Vector::kTerms];
      for (int term = 0; term < Vector::kTerms; ++term) {
        const float* grad = pixels_[step * Vector::kTerms + term].grad_output;
        grads[term] = grad == nullptr ? kNoGradients : grad + begin_filter;
      }
      float* table = tile_tables(filter_tile) + step * kStepFloats;
      for (int64_t filter = 0; filter < end_filter - begin_filter; ++filter, table += Vector::kTableFloats) {
        float terms[Vector::kTerms];
        for (int term = 0; term < Vector::kTerms; ++term) terms[term] = grads[term][filter];
        Vector::make_table(terms, table);
      }
    }
  }

  // Gathers the indices of the chunk at one tap, leaving out the steps for which the tap falls into skipped padding.
  // Each run is a stretch of neighbouring steps; its tables are those of the block's first filter tile.
  int64_t make_runs(int64_t tap, int64_t channel_tile, int64_t steps) {
    const int64_t row_offset = tap / shape_.kernel_width * shape_.dilation_height;
    const int64_t column_offset = tap % shape_.kernel_width * shape_.dilation_width;
    const int64_t pixel_words = shape_.groups * words_per_group(shape_);
    const int64_t channel = first_channel(channel_tile);
    const uint64_t* input = args_.input + block_.group * words_per_group(shape_) + channel / kWordBits;
    const uint64_t padding = args_.padding_value > 0 ? ~uint64_t{0} : 0;
    const int vectors = tile_vectors<Vector>(tile_channels(channel_tile));
    int32_t* indices = indices_;
    int64_t run_count = 0;
    bool is_open = false;
    for (int64_t step = 0; step < steps; ++step) {
      uint64_t words[Vector::kTerms];
      bool any_inside = false;
      for (int term = 0; term < Vector::kTerms; ++term) {
        const Pixel& pixel = pixels_[step * Vector::kTerms + term];
        const int64_t row = pixel.row + row_offset;
        const int64_t column = pixel.column + column_offset;
        const bool inside =
            pixel.grad_output != nullptr && row >= 0 && row < shape_.height && column >= 0 && column < shape_.width;
        const int64_t word = ((pixel.image * shape_.height + row) * shape_.width + column) * pixel_words;
        words[term] = inside ? input[word] >> channel % kWordBits : padding;
        any_inside |= inside;
      }
      if (skip_padding_ && !any_inside) {
        is_open = false;
        continue;
      }
      if (!is_open) runs_[run_count++] = {tables_ + step * kStepFloats, indices, 0};
      is_open = true;
      ++runs_[run_count - 1].steps;
      Vector::make_indices(words, vectors, indices);
      indices += vectors * Vector::kLanes;
    }
    return run_count;
  }

  void add_tile(int64_t filter_tile, int64_t tap, int64_t channel_tile, int64_t run_count) {
    const int64_t begin_filter = filter_tiles_.begin(filter_tile);
    const int rows = static_cast<int>(filter_tiles_.begin(filter_tile + 1) - begin_filter);
    const int64_t channels = tile_channels(channel_tile);
    alignas(64) float sums[kTileFloats<Vector>];
    accumulate<Vector>(rows, tile_vectors<Vector>(channels), runs_, run_count, tile_tables(filter_tile) - tables_,
                       kStepFloats, sums);
    for (int r = 0; r < rows; ++r) {
      float* row = grad_weight(begin_filter + r, tap, channel_tile);
      for (int64_t lane = 0; lane < channels; lane += Vector::kLanes) {
        Vector::add_to(row + lane, Vector::load(sums + r * kTileChannels<Vector> + lane), channels - lane);
      }
    }
  }

  const BinaryConv2dWeightGradArgs& args_;
  const ConvShape& shape_;
  const bool skip_padding_;
  const Partition filter_tiles_, channel_tiles_;    // of one group
  const Partition filter_blocks_, channel_blocks_;  // of those tiles
  int64_t workspace_bytes_;

  float* tables_;     // [kBlockFilterTiles, kChunkSteps, kTileRows, kTableFloats]
  int32_t* indices_;  // [kChunkSteps, vectors, kLanes]
  Pixel* pixels_;     // [kChunkSteps, kTerms]
  Run* runs_;         // [kChunkSteps]

  Block block_ = {};
  int64_t pixel_count_ = 0;  // in pixels_
};

}  // namespace
}  // namespace lowbit
