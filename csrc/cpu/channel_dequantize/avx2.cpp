#include "cpu/channel_dequantize/driver.h"

namespace lowbit::avx2 {

void channel_dequantize(const ChannelDequantizeArgs& args, int64_t begin, int64_t end) noexcept {
  run_channel_dequantize(args, begin, end);
}

}  // namespace lowbit::avx2
