// The loops count what they say they do, and an architecture without the instruction is refused.
#include "host_cuda.h"
#include "tests.h"

namespace lowbit::test {
namespace {

void check(cuda::ConvEngine engine, int architecture_without, int64_t iterations) {
  const int device = kStream.device;
  const std::string what = "engine " + std::to_string(static_cast<int>(engine));
  Buffer<uint32_t> counts(cuda::popcount_peak_bytes(device) / 4);
  const PopcountPeakArgs args{iterations, counts.data()};
  host_cuda::set_architecture(architecture_without);
  if (cuda::popcount_peak(args, engine, kStream) != Status::unsupported_isa) fail(what + ": runs where it cannot");
  host_cuda::set_architecture(90);
  expect_ok(what, cuda::popcount_peak(args, engine, kStream));
  int64_t counted = 0;
  for (int64_t i = 0; i < counts.size(); ++i) counted += counts[i];
  // A quarter of the bit pairs meets, and a pair is two operations.
  if (counted * 4 * 2 != cuda::popcount_peak_operations(iterations, engine, device)) {
    fail(what + ": counts " + std::to_string(counted));
  }
}

}  // namespace

LOWBIT_TEST(popcount_peak) {
  check(cuda::ConvEngine::mma, 75, random.between(0, 3));
  check(cuda::ConvEngine::wgmma, 89, random.between(0, 3));
  if (cuda::popcount_peak({}, cuda::ConvEngine::popcount, kStream) != Status::unsupported_isa) {
    fail("the plain cores have no matrix instruction");
  }
}

}  // namespace lowbit::test
