// The loop counts what it says it does, and an architecture without the instruction is refused.
#include "host_cuda.h"
#include "tests.h"

namespace lowbit::test {

void test_popcount_peak(Random& random, int) {
  const int device = kStream.device;
  const cuda::ConvEngine engine = cuda::ConvEngine::mma;
  const int64_t iterations = random.between(0, 3), threads = cuda::popcount_peak_bytes(device) / 4;
  Buffer<uint32_t> counts(threads);
  const PopcountPeakArgs args{iterations, counts.data()};
  host_cuda::set_architecture(75);
  if (cuda::popcount_peak(args, engine, kStream) != Status::unsupported_isa) fail("popcount_peak runs on sm_75");
  host_cuda::set_architecture(90);
  expect_ok("popcount_peak", cuda::popcount_peak(args, engine, kStream));
  int64_t counted = 0;
  for (int64_t i = 0; i < threads; ++i) counted += counts[i];
  // A quarter of the bit pairs meets, and a pair is two operations.
  if (counted * 4 * 2 != cuda::popcount_peak_operations(iterations, engine, device)) {
    fail("popcount_peak counts " + std::to_string(counted));
  }
}

}  // namespace lowbit::test
