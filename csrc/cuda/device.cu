// What is asked of the device rather than computed on it.
#include <cstdio>

#include "cuda/platform.cuh"

namespace lowbit::cuda {
namespace {

thread_local char error_text[256];

int attribute(int device, cudaDeviceAttr which) {
  int value = -1;
  return status_of(cudaDeviceGetAttribute(&value, which, device)) == Status::ok ? value : -1;
}

}  // namespace

Status status_of(cudaError_t error) noexcept {
  if (error == cudaSuccess) return Status::ok;
  int written = snprintf(error_text, sizeof error_text, "%s (%s)", cudaGetErrorString(error), cudaGetErrorName(error));
  cudaGetLastError();           // or the next call would return it again
  int driver = 0, runtime = 0;  // 1000 * major + 10 * minor
  if (error == cudaErrorInsufficientDriver && cudaDriverGetVersion(&driver) == cudaSuccess &&
      cudaRuntimeGetVersion(&runtime) == cudaSuccess) {
    char* end = error_text + written;
    const size_t room = sizeof error_text - static_cast<size_t>(written);
    if (driver == 0) {
      snprintf(end, room, ": no driver was found");
    } else {
      snprintf(end, room, ": the driver is for CUDA %d.%d, this module needs one for %d.%d or later", driver / 1000,
               driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
    }
  }
  return Status::cuda_error;
}

const char* last_error_text() noexcept { return error_text; }

int architecture(int device) noexcept {
  const int major = attribute(device, cudaDevAttrComputeCapabilityMajor);
  if (major < 0) return -1;
  return 10 * major + attribute(device, cudaDevAttrComputeCapabilityMinor);
}

int multiprocessors(int device) noexcept { return attribute(device, cudaDevAttrMultiProcessorCount); }

}  // namespace lowbit::cuda
