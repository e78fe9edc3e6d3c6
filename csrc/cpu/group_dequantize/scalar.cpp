#include "cpu/group_dequantize/driver.h"

namespace lowbit::scalar {

void group_dequantize(const GroupDequantizeArgs& args, int64_t begin, int64_t end) noexcept {
  run_group_dequantize(args, begin, end);
}

}  // namespace lowbit::scalar
