// TDPBSSD on bits widened to bytes: 16 x 16 sums of 64 products an instruction; 4 tiles of sums share 2 + 2 operands.
#include <immintrin.h>

#include "cpu/popcount_peak/popcount_peak.h"

namespace lowbit::amx {
namespace {

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
// In static storage: g++ 12 takes _tile_loadconfig to read 8 bytes only and drops stores to the rest of a local object.
constexpr TileConfig kTileConfig;

}  // namespace

int64_t popcount_peak(int64_t iterations) noexcept {
  _tile_loadconfig(&kTileConfig);
  // The values do not matter to the time: no tile instruction looks at them.
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  for (int64_t i = 0; i < iterations; ++i) {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  _tile_release();
  return iterations * 4 * 16 * 16 * 64 * 2;
}

}  // namespace lowbit::amx
