// A row at a time, in place.
#include "cpu/binary_matmul/binary_matmul.h"

#include <cstring>

namespace lowbit::LOWBIT_LEVEL {

void binary_matmul_halve(const BinaryMatmulArgs& args, int64_t begin, int64_t end) noexcept {
  const int64_t words = words_for(args.depth);
  const float scale = args.scale == nullptr ? 1.0f : *args.scale;
  for (int64_t row = begin; row < end; ++row) {
    int64_t ones = 0;
    for (int64_t i = 0; i < words; ++i) ones += __builtin_popcountll(args.a[row * words + i]);
    const int32_t of_a = row_sum(args, ones);
    int32_t* sums = static_cast<int32_t*>(args.output) + row * args.columns;
    if (args.output_kind == ConvOutput::int32) {
      for (int64_t n = 0; n < args.columns; ++n) sums[n] = (sums[n] + of_a) >> 1;
    } else {
      for (int64_t n = 0; n < args.columns; ++n) {
        const float value = static_cast<float>((sums[n] + of_a) >> 1) * scale;
        memcpy(sums + n, &value, sizeof value);
      }
    }
  }
}

}  // namespace lowbit::LOWBIT_LEVEL
