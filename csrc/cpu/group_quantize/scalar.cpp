#include "cpu/group_quantize/driver.h"

namespace lowbit::scalar {
namespace {

struct Coder {
  static Extremes extremes(const float* x) {
    Extremes found{__builtin_inff(), -__builtin_inff()};
    for (int64_t i = 0; i < kGroup; ++i) {
      found.low = x[i] < found.low ? x[i] : found.low;
      found.high = x[i] > found.high ? x[i] : found.high;
    }
    return found;
  }
  static void encode(const float* x, const GroupCoding& coding, const float* thresholds, uint8_t* codes) {
    for (int64_t i = 0; i < kGroup; ++i) {
      const float threshold = thresholds == nullptr ? 0.5f : thresholds[i];
      const float code = group_code(x[i], coding.minimum, coding.inverse, threshold, coding.last, coding.positive);
      codes[i] = static_cast<uint8_t>(static_cast<int32_t>(code));
    }
  }
};

}  // namespace

void group_quantize(const GroupQuantizeArgs& args, int64_t begin, int64_t end) noexcept {
  run_group_quantize<Coder>(args, begin, end);
}

}  // namespace lowbit::scalar
