// The module lowbit_ext._cuda: as _cpu, with the stream's device and its handle behind the arguments of each function.
// It loads without a driver.
#include <pybind11/pybind11.h>

#include <string>

#include "bind/arguments.h"
#include "cuda/launch.h"

namespace py = pybind11;
using namespace lowbit;
using namespace lowbit::bind;

namespace {

// The Python function of a launcher: the parameters of `arguments`, then the device and the stream.
template <class Args, class... Parameters>
auto on_stream(Args (*arguments)(Parameters...), Status (*launch)(const Args&, cuda::Stream)) {
  return [=](Parameters... parameters, int device, uintptr_t stream) {
    return code(launch(arguments(parameters...), {device, as<void>(stream)}));
  };
}

// The same with the size of a workspace before them.
template <class Args, class... Parameters>
auto on_stream(Args (*arguments)(Parameters...), Status (*launch)(const Args&, int64_t, cuda::Stream)) {
  return [=](Parameters... parameters, int64_t workspace_bytes, int device, uintptr_t stream) {
    return code(launch(arguments(parameters...), workspace_bytes, {device, as<void>(stream)}));
  };
}

// The same with the choice of an engine between the two.
template <class Args, class... Parameters>
auto on_stream(Args (*arguments)(Parameters...),
               Status (*launch)(const Args&, int64_t, cuda::ConvEngine, cuda::Stream)) {
  return [=](Parameters... parameters, int64_t workspace_bytes, int engine, int device, uintptr_t stream) {
    return code(launch(arguments(parameters...), workspace_bytes, static_cast<cuda::ConvEngine>(engine),
                       {device, as<void>(stream)}));
  };
}

// That of a question: the parameters of `arguments`, then the device, on which no answer depends.
template <class Args, class... Parameters>
auto asks(Args (*arguments)(Parameters...), int64_t (*answer)(const Args&)) {
  return [=](Parameters... parameters, int /*device*/) { return answer(arguments(parameters...)); };
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of lowbit_ext. Private: lowbit_ext/_native.py is the way in.";

  m.def("architecture", &cuda::architecture);
  m.def("last_error_text", [] { return std::string(cuda::last_error_text()); });
  // As the compiler was given them, such as "80 90a 120".
  m.def("architectures", [] { return std::string(LOWBIT_CUDA_ARCHS); });
  m.def("virtual_architectures", [] { return std::string(LOWBIT_CUDA_PTX); });  // those with PTX

  const auto unlocked = py::call_guard<py::gil_scoped_release>();

#define LOWBIT_BIND(op, Args) m.def(#op, on_stream(op##_args, cuda::op), unlocked);
  LOWBIT_OPS(LOWBIT_BIND)
#undef LOWBIT_BIND
#define LOWBIT_BIND(op, Args)                           \
  m.def(#op, on_stream(op##_args, cuda::op), unlocked); \
  m.def(#op "_workspace_bytes", asks(op##_plan_args, cuda::op##_workspace_bytes));
  LOWBIT_WORKSPACE_OPS(LOWBIT_BIND)
  LOWBIT_BIND(binary_conv2d, BinaryConv2dArgs)
#undef LOWBIT_BIND

  m.def("binary_conv2d_epilogue", on_stream(binary_conv2d_epilogue_args, cuda::binary_conv2d), unlocked);
  m.def("binary_conv2d_epilogue_workspace_bytes",
        asks(binary_conv2d_epilogue_plan_args, cuda::binary_conv2d_workspace_bytes));

  m.def("binary_conv2d_default_engine",
        [](int device) { return static_cast<int>(cuda::binary_conv2d_default_engine(device)); });
  m.def(
      "binary_conv2d_block_weight",
      [](const ConvShape& shape, uintptr_t words, uintptr_t blocked, int device, uintptr_t stream) {
        return code(cuda::binary_conv2d_block_weight(shape, as<const uint64_t>(words), as<void>(blocked),
                                                     {device, as<void>(stream)}));
      },
      unlocked);
  m.def("binary_conv2d_has_engine", [](int engine, int device) {
    return cuda::binary_conv2d_has_engine(static_cast<cuda::ConvEngine>(engine), device);
  });
  m.def("binary_conv2d_reads_aligned",
        [](const ConvShape& shape, int /*device*/) { return !groups_are_aligned(shape); });
  m.def("binary_conv2d_weight_bytes",
        [](const ConvShape& shape, int /*device*/) { return cuda::binary_conv2d_weight_bytes(shape); });
  m.def(
      "popcount_peak",
      [](int64_t iterations, uintptr_t counts, int engine, int device, uintptr_t stream) {
        return code(cuda::popcount_peak(popcount_peak_args(iterations, counts), static_cast<cuda::ConvEngine>(engine),
                                        {device, as<void>(stream)}));
      },
      unlocked);
  m.def("popcount_peak_bytes", &cuda::popcount_peak_bytes);
  m.def("popcount_peak_operations", [](int64_t iterations, int engine, int device) {
    return cuda::popcount_peak_operations(iterations, static_cast<cuda::ConvEngine>(engine), device);
  });
}
