#include "cpu/batch_norm_relu_backward/driver.h"

namespace lowbit::avx512 {

void batch_norm_relu_sums(const BatchNormReluBackwardArgs& args, int64_t begin, int64_t end) noexcept {
  run_batch_norm_relu_sums(args, begin, end);
}

void batch_norm_relu_backward(const BatchNormReluBackwardArgs& args, int64_t begin, int64_t end) noexcept {
  run_batch_norm_relu_backward(args, begin, end);
}

}  // namespace lowbit::avx512
