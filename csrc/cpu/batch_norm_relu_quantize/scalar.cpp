#include "cpu/batch_norm_relu_quantize/driver.h"

namespace lowbit::scalar {

void batch_norm_relu_quantize(const BatchNormReluQuantizeArgs& args, int64_t begin, int64_t end) noexcept {
  run_batch_norm_relu_quantize(args, begin, end);
}

}  // namespace lowbit::scalar
