#include "cpu/binary_max_pool2d/binary_max_pool2d.h"
#include "cpu/binary_max_pool2d/or_windows.h"

namespace lowbit::avx512 {

void binary_max_pool2d(const BinaryMaxPool2dArgs& args, int64_t begin, int64_t end) noexcept {
  for (int64_t item = begin; item < end; ++item) max_pool_row(args, item);
}

}  // namespace lowbit::avx512
