#include "cuda/launch.h"

namespace lowbit::cuda {

Status pointwise(const PointwiseArgs&, Stream) noexcept { return Status::unsupported_isa; }

}  // namespace lowbit::cuda
