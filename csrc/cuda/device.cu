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
  snprintf(error_text, sizeof error_text, "%s (%s)", cudaGetErrorString(error), cudaGetErrorName(error));
  cudaGetLastError();  // or the next call would return it again
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
