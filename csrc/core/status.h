// The one result type of the native core: kernels return a Status, lowbit_ext/_native.py turns it into an exception.
#pragma once

namespace lowbit {

enum class Status : int {
  ok = 0,
  bad_shape = 1,        // a size is negative, inconsistent or its product overflows
  bad_argument = 2,     // an enumerator or flag outside its documented values
  unsupported_isa = 3,  // a level this CPU or operating system cannot run
  small_workspace = 4,  // the workspace is smaller than the kernel's own *_workspace_bytes() says
  not_finite = 5,       // a value that must be finite is NaN or infinite
  cuda_error = 6,       // CUDA refused a call or a launch; cuda::last_error_text() says what it said
};

static inline const char* status_text(Status status) {
  switch (status) {
    case Status::ok:
      return "ok";
    case Status::bad_shape:
      return "the native core refused the sizes: negative, inconsistent, or their product overflows";
    case Status::bad_argument:
      return "the native core refused an argument outside its documented values";
    case Status::unsupported_isa:
      return "this machine cannot run the requested instruction set";
    case Status::small_workspace:
      return "the workspace is smaller than the kernel asked for; was the thread count changed during the call?";
    case Status::not_finite:
      return "a value that must be finite is NaN or infinite";
    case Status::cuda_error:
      return "CUDA refused a call or a launch";
  }
  return "a status that csrc/core/status.h does not know";
}

}  // namespace lowbit
