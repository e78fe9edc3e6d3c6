// Tile registers multiply int8, so the bits are expanded in cache: activations to -1/+1 (sign) or 0/1 (step), weights
// to -1/+1. TDPBSSD does 16 x 16 x 64 multiply-adds in 16 cycles, 2048 operations a cycle against 682 of xor + popcount
// + add in AVX-512; with its operands from L1 19 to 20 cycles, from L2 up to 28, and fewer rows make it no faster.
//   - A band of padded activations is expanded once for all taps and filters. Channels past the last are 0 in it, so
//     that the weights need no mask, and padding is a value like any other.
//   - Strides are taken out by splitting the band into phases, input index mod stride, so that neighbouring outputs are
//     neighbours under every tap. Images lie innermost: the 16 rows of a tile are consecutive cells (y, x, image), and
//     small images fill whole tiles as soon as there are several of them.
//   - 32 filters by 12 steps of 64 channels stay in L1 while all pixels of the range pass them. Weights are kept as
//     bits: in int8 they would be eight times the traffic from L3.
// 256 -> 256 filters, 3 x 3, 14 x 14, one core: bits out 1.5 times as fast as the AVX-512 level at 8 images and 1.24
// times at one; int32 out 1.3 and 1.09 times. 18 or 9 steps were 6 to 16 % slower there. Where AMX cannot win (use_amx)
// the work goes to the AVX-512 level, whose weight copy comes first in ours.

#include <immintrin.h>

#include "cpu/binary_conv2d/binary_conv2d.h"
#include "cpu/binary_conv2d/epilogue_avx512.h"

namespace lowbit::amx {
namespace {

constexpr int64_t kStripFilters = 32;  // of a micro-kernel

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
const TileConfig kTileConfig;

// --- weights

constexpr int64_t kMaskBytes = kTileRows * static_cast<int64_t>(sizeof(uint64_t));  // of a weight tile

// For each group and strip of 32 filters, for each word and tap, for each 16 filters (one tile if the group has no
// more): 16 masks, the rows of the weight tile. A row holds 4 channels of 16 filters, filter by filter. This is the
// order in which they are used.
struct WeightLayout {
  int64_t avx512_bytes;  // the copy of the AVX-512 level comes first
  int64_t tile_bytes;    // 16 filters, all steps
  int64_t group_bytes;
  int64_t bytes;

  explicit WeightLayout(const ConvShape& shape)
      : avx512_bytes(round_up(avx512::binary_conv2d_weight_bytes(shape), kLine)),
        tile_bytes(words_per_group(shape) * taps(shape) * kMaskBytes),
        group_bytes(ceil_div(filters_per_group(shape), kTileRows) * tile_bytes),
        bytes(avx512_bytes + (weight_suits_tiles(shape) ? shape.groups * group_bytes : 0)) {}
};

// 1 KiB of int8 for each 16 masks.
inline void expand_weight(const uint8_t* masks, int64_t tiles, int8_t* out) {
  const __m512i plus_i8x64 = _mm512_set1_epi8(1), minus_i8x64 = _mm512_set1_epi8(-1);
  for (int64_t tile = 0; tile < tiles; ++tile) {
#pragma GCC unroll 16
    for (int row = 0; row < 16; ++row) {
      uint64_t mask;
      memcpy(&mask, masks + row * sizeof mask, sizeof mask);
      _mm512_store_si512(out + row * kLine, _mm512_mask_blend_epi8(_cvtu64_mask64(mask), minus_i8x64, plus_i8x64));
    }
    masks += kMaskBytes;
    out += kTileBytes;
  }
}

// --- micro-kernels

// Steps of one micro-kernel call: bytes from a cell to its activations, and from the strip's first weight tile.
struct StepList {
  int64_t count;
  int64_t activation[kMaxSteps];
  int64_t weight[kMaxSteps];
};

// The tile intrinsics do not tell the compiler which memory they read.
inline void memory_barrier() { __asm__ volatile("" ::: "memory"); }

// acc[pixel tile][filter tile] (+)= sum over the steps. Accumulators are tiles 0 to 3, activations 4 and 5, weights 6
// and 7.
template <int kPixelTiles, int kFilterTiles>
inline void multiply_tiles(const StepList& steps, const int8_t* const* pixels, const int8_t* weight, bool accumulate,
                           uint8_t* acc) {
  uint8_t* const lower = acc + kTileRows * kAccRow;
  if (accumulate) {
    _tile_loadd(0, acc, kAccRow);
    if constexpr (kFilterTiles > 1) _tile_loadd(1, acc + kLine, kAccRow);
    if constexpr (kPixelTiles > 1) _tile_loadd(2, lower, kAccRow);
    if constexpr (kPixelTiles > 1 && kFilterTiles > 1) _tile_loadd(3, lower + kLine, kAccRow);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  const int8_t* const pixel_0 = pixels[0];
  const int8_t* const pixel_1 = pixels[kPixelTiles - 1];
  for (int64_t i = 0; i < steps.count; ++i) {
    const int64_t offset = steps.activation[i];
    const int8_t* const step_weight = weight + steps.weight[i];
    _tile_loadd(4, pixel_0 + offset, kLine);
    _tile_loadd(6, step_weight, kLine);
    _tile_dpbssd(0, 4, 6);
    if constexpr (kPixelTiles > 1) {
      _tile_loadd(5, pixel_1 + offset, kLine);
      _tile_dpbssd(2, 5, 6);
    }
    if constexpr (kFilterTiles > 1) {
      _tile_loadd(7, step_weight + kTileBytes, kLine);
      _tile_dpbssd(1, 4, 7);
    }
    if constexpr (kPixelTiles > 1 && kFilterTiles > 1) _tile_dpbssd(3, 5, 7);
  }
  _tile_stored(0, acc, kAccRow);
  if constexpr (kFilterTiles > 1) _tile_stored(1, acc + kLine, kAccRow);
  if constexpr (kPixelTiles > 1) _tile_stored(2, lower, kAccRow);
  if constexpr (kPixelTiles > 1 && kFilterTiles > 1) _tile_stored(3, lower + kLine, kAccRow);
}

// --- work

class Worker {
 public:
  Worker(const BinaryConv2dArgs& args, const Plan& plan, void* workspace)
      : args_(args),
        plan_(plan),
        layout_(args.shape),
        weight_(static_cast<const uint8_t*>(args.weight) + layout_.avx512_bytes),
        block_(largest_block(plan)) {
    const WorkspaceLayout parts(plan);
    uint8_t* base = static_cast<uint8_t*>(workspace);
    band_ = reinterpret_cast<int8_t*>(base);
    acc_ = base + parts.accumulators;
    expanded_ = reinterpret_cast<int8_t*>(base + parts.weights);
    offsets_ = reinterpret_cast<int64_t*>(base + parts.offsets);
  }

  void enter_block(int64_t index) {
    const int64_t image_block = index / plan_.row_blocks, row_block = index % plan_.row_blocks;
    const ConvShape& shape = plan_.shape;
    image_ = part_begin(shape.batch, plan_.image_blocks, image_block);
    row_ = part_begin(shape.out_height, plan_.row_blocks, row_block);
    block_ = BlockGeometry(plan_, part_begin(shape.batch, plan_.image_blocks, image_block + 1) - image_,
                           part_begin(shape.out_height, plan_.row_blocks, row_block + 1) - row_);
    band_group_ = -1;
    int64_t* offset = offsets_;
    for (int64_t word = 0; word < plan_.words; ++word) {
      for (int64_t y = 0; y < shape.kernel_height; ++y) {
        for (int64_t x = 0; x < shape.kernel_width; ++x) {
          *offset++ =
              word * block_.plane_bytes() +
              row_cell(tap_phase(plan_.vertical, y), tap_phase(plan_.horizontal, x), tap_shift(plan_.vertical, y)) *
                  kLine +
              tap_shift(plan_.horizontal, x) * block_.images * kLine;
        }
      }
    }
  }

  int64_t groups() const { return block_.groups; }

  // Zeroes the output words of groups [begin, end).
  void clear(int64_t begin, int64_t end) const {
    int64_t pixels[kTileRows];
    const int32_t* acc[kTileRows];
    for (int64_t tile = block_.group_begin(begin); tile < block_.group_begin(end); ++tile) {
      const int64_t count = tile_pixels(tile, nullptr, pixels, acc);
      clear_words(args_, pixels, count);
    }
  }

  // All of one filter block for groups of tiles [begin, end).
  void run(int64_t filter_block, int64_t begin, int64_t end) {
    const int64_t group = filter_block / plan_.filter_blocks;
    const int64_t filter = filter_block % plan_.filter_blocks * kFilterBlock;  // in its convolution group
    const int64_t filters = min(kFilterBlock, plan_.filters - filter);
    const int64_t first_tile = block_.group_begin(begin), last_tile = block_.group_begin(end);
    fill_band(group, block_.first_row(first_tile), block_.end_row(last_tile) + plan_.vertical.reach);

    for (int64_t i = 0; i < filters; i += kStripFilters) {
      const int64_t filter_tiles = filters - i > kTileRows ? 2 : 1;
      const uint8_t* masks = weight_ + group * layout_.group_bytes + (filter + i) / kTileRows * layout_.tile_bytes;
      const int64_t chunks = ceil_div(plan_.steps, kMaxSteps);
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t first = part_begin(plan_.steps, chunks, chunk);
        const int64_t count = part_begin(plan_.steps, chunks, chunk + 1) - first;
        expand_weight(masks, count * filter_tiles, expanded_);
        masks += count * filter_tiles * kMaskBytes;
        memory_barrier();
        StepList steps;
        steps.count = 0;
        TapWindow listed = {-1, -1, -1, -1};
        for (int64_t j = begin; j < end; ++j) {
          const int64_t tile = block_.group_begin(j), tiles = block_.group_begin(j + 1) - tile;
          const TapWindow window = needed_taps(tile, tiles);
          if (!(window == listed)) list_steps(first, count, window, filter_tiles, &steps);
          listed = window;
          multiply(steps, tile, tiles, filter_tiles, chunk > 0,
                   acc_ + (tile - first_tile) * kTileRows * kAccRow + i * static_cast<int64_t>(sizeof(int32_t)));
        }
      }
    }
    store(first_tile, last_tile, group * plan_.filters + filter, filters);
  }

 private:
  struct TapWindow {
    int64_t top, bottom, left, right;
    bool operator==(const TapWindow& other) const {
      return top == other.top && bottom == other.bottom && left == other.left && right == other.right;
    }
  };

  int64_t row_cell(int64_t phase_y, int64_t phase_x, int64_t row) const {
    return ((phase_y * plan_.horizontal.phases + phase_x) * block_.band_rows + row) * block_.pitch * block_.images;
  }

  // Under padding of 0, the taps that are inside the image for some output of the tiles; else all.
  TapWindow needed_taps(int64_t tile, int64_t tiles) const {
    const ConvShape& shape = plan_.shape;
    TapWindow window = {0, shape.kernel_height, 0, shape.kernel_width};
    if (args_.padding_value != 0) return window;
    const int64_t first_row = block_.first_row(tile), last_row = block_.end_row(tile + tiles) - 1;
    // The first and the last valid tap both go down as the output goes on.
    window.top = valid_taps(plan_.vertical, row_ + last_row).begin;
    window.bottom = valid_taps(plan_.vertical, row_ + first_row).end;
    if (first_row == last_row) {
      const int64_t row_start = first_row * block_.pitch * block_.images;
      const int64_t first = (block_.first_cell(tile) - row_start) / block_.images;
      const int64_t last = (block_.first_cell(tile + tiles - 1) + kTileRows - 1 - row_start) / block_.images;
      window.left = valid_taps(plan_.horizontal, min(last, shape.out_width - 1)).begin;
      window.right = valid_taps(plan_.horizontal, first).end;
    }
    return window;
  }

  // Of steps [first, first + count), those under the window's taps.
  void list_steps(int64_t first, int64_t count, const TapWindow& window, int64_t filter_tiles, StepList* list) const {
    const int64_t width = plan_.shape.kernel_width, height = plan_.shape.kernel_height;
    int64_t x = first % width, y = first / width % height;
    list->count = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (y >= window.top && y < window.bottom && x >= window.left && x < window.right) {
        list->activation[list->count] = offsets_[first + i];
        list->weight[list->count] = i * filter_tiles * kTileBytes;
        ++list->count;
      }
      if (++x < width) continue;
      x = 0;
      if (++y == height) y = 0;
    }
  }

  void multiply(const StepList& steps, int64_t tile, int64_t tiles, int64_t filter_tiles, bool accumulate,
                uint8_t* acc) const {
    const int8_t* const pixels[2] = {band_ + block_.first_cell(tile) * kLine,
                                     band_ + block_.first_cell(tile + tiles - 1) * kLine};
    if (tiles == 1) {
      if (filter_tiles == 1) return multiply_tiles<1, 1>(steps, pixels, expanded_, accumulate, acc);
      return multiply_tiles<1, 2>(steps, pixels, expanded_, accumulate, acc);
    }
    if (filter_tiles == 1) return multiply_tiles<2, 1>(steps, pixels, expanded_, accumulate, acc);
    return multiply_tiles<2, 2>(steps, pixels, expanded_, accumulate, acc);
  }

  // The epilogue of tiles [begin, end). Interleaved with the products, int32 output took 4 to 6 % less time at one
  // image and 6 % more at 8.
  void store(int64_t begin, int64_t end, int64_t filter, int64_t filters) const {
    memory_barrier();
    for (int64_t tile = begin; tile < end; ++tile) {
      int64_t pixels[kTileRows];
      const int32_t* acc[kTileRows];
      const int64_t count = tile_pixels(tile, acc_ + (tile - begin) * kTileRows * kAccRow, pixels, acc);
      store_tile<Avx512Epilogue>(args_, acc, pixels, count, filter, filters);
    }
  }

  // Output pixels of a tile's cells and where their accumulators are; cells between rows are left out.
  int64_t tile_pixels(int64_t tile, const uint8_t* tile_acc, int64_t* pixels, const int32_t** acc) const {
    const ConvShape& shape = plan_.shape;
    const int64_t cell = block_.first_cell(tile);
    const int64_t cells = block_.tile_cells(tile);
    int64_t image = cell % block_.images;
    int64_t x = cell / block_.images % block_.pitch;
    int64_t y = cell / block_.images / block_.pitch;
    int64_t count = 0;
    for (int64_t i = 0; i < cells; ++i) {
      if (x < shape.out_width) {
        pixels[count] = ((image_ + image) * shape.out_height + row_ + y) * shape.out_width + x;
        acc[count++] = reinterpret_cast<const int32_t*>(tile_acc + i * kAccRow);
      }
      if (++image < block_.images) continue;
      image = 0;
      if (++x < block_.pitch) continue;
      x = 0;
      ++y;
    }
    return count;
  }

  // Makes band rows [begin, end) of a convolution group valid. The valid rows stay one interval.
  void fill_band(int64_t group, int64_t begin, int64_t end) {
    if (band_group_ != group) {
      band_group_ = group;
      band_begin_ = band_end_ = begin;
    }
    for (; band_begin_ > begin; --band_begin_) fill_row(band_begin_ - 1);
    for (; band_end_ < end; ++band_end_) fill_row(band_end_);
  }

  void fill_row(int64_t row) const {
    const ConvShape& shape = plan_.shape;
    const PhasedAxis &vertical = plan_.vertical, &horizontal = plan_.horizontal;
    const int64_t pixel_words = shape.groups * plan_.words;
    const int64_t image_words = shape.height * shape.width * pixel_words;
    const int64_t last_channels = channels_per_group(shape) - (plan_.words - 1) * kWordBits;
    for (int64_t word = 0; word < plan_.words; ++word) {
      const __mmask64 valid = _cvtu64_mask64(word + 1 < plan_.words ? ~uint64_t{0} : low_mask(last_channels));
      const __m512i set_i8x64 = _mm512_maskz_set1_epi8(valid, 1);
      const __m512i clear_i8x64 = _mm512_maskz_set1_epi8(valid, args_.encoding == Encoding::sign ? -1 : 0);
      const __m512i padding_i8x64 = _mm512_maskz_set1_epi8(valid, static_cast<char>(args_.padding_value));
      for (int64_t phase_y = 0; phase_y < vertical.phases; ++phase_y) {
        const int64_t y = input_index(vertical, row_ + row, phase_y);
        const bool inside = y >= 0 && y < shape.height;
        for (int64_t phase_x = 0; phase_x < horizontal.phases; ++phase_x) {
          int8_t* out = band_ + word * block_.plane_bytes() + row_cell(phase_y, phase_x, row) * kLine;
          for (int64_t column = 0; column < block_.pitch; ++column) {
            const int64_t x = input_index(horizontal, column, phase_x);
            if (!inside || x < 0 || x >= shape.width) {
              for (int64_t i = 0; i < block_.images; ++i, out += kLine) _mm512_store_si512(out, padding_i8x64);
              continue;
            }
            const uint64_t* input = args_.input + image_ * image_words + (y * shape.width + x) * pixel_words +
                                    band_group_ * plan_.words + word;
            for (int64_t i = 0; i < block_.images; ++i, out += kLine, input += image_words) {
              uint64_t bits;
              memcpy(&bits, input, sizeof bits);
              _mm512_store_si512(out, _mm512_mask_blend_epi8(_cvtu64_mask64(bits), clear_i8x64, set_i8x64));
            }
          }
        }
      }
    }
  }

  const BinaryConv2dArgs& args_;
  const Plan& plan_;
  const WeightLayout layout_;
  const uint8_t* weight_;
  int8_t* band_;
  uint8_t* acc_;
  int8_t* expanded_;
  int64_t* offsets_;
  BlockGeometry block_;
  int64_t image_ = 0, row_ = 0;  // first of the block
  int64_t band_group_ = -1, band_begin_ = 0, band_end_ = 0;
};

}  // namespace

int64_t binary_conv2d_weight_bytes(const ConvShape& shape) noexcept { return WeightLayout(shape).bytes; }

void binary_conv2d_block_weight(const ConvShape& shape, const uint64_t* words, void* blocked) noexcept {
  avx512::binary_conv2d_block_weight(shape, words, blocked);
  if (!weight_suits_tiles(shape)) return;
  const WeightLayout layout(shape);
  const int64_t all_taps = taps(shape), words_per_tap = words_per_group(shape), filters = filters_per_group(shape);
  uint8_t* out = static_cast<uint8_t*>(blocked) + layout.avx512_bytes;
  for (int64_t group = 0; group < shape.groups; ++group) {
    for (int64_t strip = 0; strip < filters; strip += kStripFilters) {
      const int64_t strip_end = min(strip + kStripFilters, filters);
      for (int64_t word = 0; word < words_per_tap; ++word) {
        for (int64_t tap = 0; tap < all_taps; ++tap) {
          for (int64_t first = strip; first < strip_end; first += kTileRows) {
            const int64_t count = min(kTileRows, strip_end - first);
            uint64_t masks[kTileRows] = {};
            for (int64_t i = 0; i < count; ++i) {
              const int64_t filter = group * filters + first + i;
              const uint64_t bits = words[(filter * all_taps + tap) * words_per_tap + word];
              for (int64_t row = 0; row < kTileRows; ++row) masks[row] |= ((bits >> (4 * row)) & 15) << (4 * i);
            }
            memcpy(out, masks, sizeof masks);
            out += sizeof masks;
          }
        }
      }
    }
  }
}

BinaryConv2dPlan binary_conv2d_plan(const BinaryConv2dArgs& args) noexcept {
  if (suits_tiles(args.shape)) {
    const BinaryConv2dPlan plan = plan_of_tiles(args);
    if (is_faster(plan.tiles)) return plan;
  }
  return avx512::binary_conv2d_plan(args);
}

void binary_conv2d(const BinaryConv2dArgs& args, const BinaryConv2dPlan& plan, int64_t begin, int64_t end,
                   void* workspace) noexcept {
  if (!plan.tiled) return avx512::binary_conv2d(args, plan, begin, end, workspace);
  const Plan& tiles = plan.tiles;
  const bool shared = conv_blocks_share_words(args);
  const int64_t groups = tiles.groups_per_block;
  const int64_t block_items = shared ? groups : groups * all_filter_blocks(tiles);
  Worker worker(args, tiles, workspace);
  _tile_loadconfig(&kTileConfig);
  while (begin < end) {
    const int64_t block = begin / block_items;
    worker.enter_block(block);
    const int64_t block_end = min(end, (block + 1) * block_items);
    while (begin < block_end) {
      const int64_t item = begin - block * block_items;
      const int64_t first = item % groups;
      const int64_t last = min(groups, first + block_end - begin);
      begin += last - first;
      const int64_t real_last = min(last, worker.groups());  // a smaller block has fewer groups
      if (first >= real_last) continue;
      if (shared) {
        worker.clear(first, real_last);
        for (int64_t i = 0; i < all_filter_blocks(tiles); ++i) worker.run(i, first, real_last);
      } else {
        worker.run(item / groups, first, real_last);
      }
    }
  }
  _tile_release();
}

}  // namespace lowbit::amx
