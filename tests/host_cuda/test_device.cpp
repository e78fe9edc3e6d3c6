// What CUDA refuses comes back as a status with a text, and the current device stays.
#include "cuda/platform.cuh"
#include "tests.h"

namespace lowbit::test {

LOWBIT_TEST(device) {
  host_cuda::set_architecture(86);
  if (cuda::architecture(1) != 86) fail("architecture(1) is " + std::to_string(cuda::architecture(1)));
  host_cuda::set_architecture(90);
  if (cuda::architecture(7) != -1) fail("device 7 has an architecture");
  if (strcmp(cuda::last_error_text(), "invalid device ordinal (cudaErrorInvalidDevice)") != 0) {
    fail(std::string("the error's text is ") + cuda::last_error_text());
  }

  const auto expect_text = [](int driver, const char* text) {
    host_cuda::set_driver(driver);
    if (cuda::status_of(cudaErrorInsufficientDriver) != Status::cuda_error) fail("an old driver is no error");
    if (strcmp(cuda::last_error_text(), text) != 0) fail(std::string("the error's text is ") + cuda::last_error_text());
  };
  expect_text(0,
              "CUDA driver version is insufficient for CUDA runtime version (cudaErrorInsufficientDriver): no driver "
              "was found");
  expect_text(12040,
              "CUDA driver version is insufficient for CUDA runtime version (cudaErrorInsufficientDriver): the "
              "driver is for CUDA 12.4, this module needs one for 13.0 or later");

  uint64_t word = 1;
  float value = 0;
  UnpackArgs args{&word, 1, 1, 0, 1, &value, FloatType::float32};
  if (cuda::unpack(args, {7, nullptr}) != Status::cuda_error) fail("a launch on device 7 was not refused");
  args.pixels = -1;
  if (cuda::unpack(args, kStream) != Status::bad_shape) fail("-1 pixels were not refused");
}

}  // namespace lowbit::test
