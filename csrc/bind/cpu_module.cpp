// The module lowbit_ext._cpu: integers in, status out, interpreter lock released.
#include <pybind11/pybind11.h>

#include <omp.h>

#include <string>

#include "bind/arguments.h"
#include "core/checks.h"
#include "bind/constants.h"
#include "cpu/launch.h"

namespace py = pybind11;
using namespace lowbit;
using namespace lowbit::bind;

namespace {

// The Python function of a launcher: the parameters of `arguments`, then a workspace's size where the launcher takes
// one.
template <class Args, class... Parameters, class... Further>
auto on_threads(Args (*arguments)(Parameters...), Status (*launch)(const Args&, Further...)) {
  return
      [=](Parameters... parameters, Further... further) { return code(launch(arguments(parameters...), further...)); };
}

// That of a question: the parameters of `arguments`.
template <class Args, class... Parameters>
auto asks(Args (*arguments)(Parameters...), int64_t (*answer)(const Args&)) {
  return [=](Parameters... parameters) { return answer(arguments(parameters...)); };
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of lowbit_ext. Private: lowbit_ext/_native.py is the way in.";

  define_constants(m);

  m.def("best_isa", [] { return std::string(isa_name(best_isa())); });
  m.def("active_isa", [] { return std::string(isa_name(active_isa())); });
  m.def("select_isa", [](int level) { return level < kIsaCount && select_isa(static_cast<Isa>(level)); });
  m.def("threads", [] { return omp_get_max_threads(); });
  // Of the calling thread alone, unlike torch.set_num_threads.
  m.def("set_threads", [](int threads) { omp_set_num_threads(threads); });

  // The module _cuda takes these two as well.
  py::class_<ConvShape>(m, "ConvShape")
      .def(py::init([](int64_t batch, int64_t height, int64_t width, int64_t channels, int64_t filters,
                       int64_t kernel_height, int64_t kernel_width, int64_t out_height, int64_t out_width,
                       int64_t stride_height, int64_t stride_width, int64_t pad_top, int64_t pad_left,
                       int64_t dilation_height, int64_t dilation_width, int64_t groups) {
        return ConvShape{batch,        height,          width,          channels,      filters,      kernel_height,
                         kernel_width, out_height,      out_width,      stride_height, stride_width, pad_top,
                         pad_left,     dilation_height, dilation_width, groups};
      }))
      .def("valid", [](const ConvShape& shape) { return valid(shape); });

  py::class_<PoolShape>(m, "PoolShape")
      .def(py::init([](int64_t batch, int64_t height, int64_t width, int64_t channels, int64_t kernel_height,
                       int64_t kernel_width, int64_t out_height, int64_t out_width, int64_t stride_height,
                       int64_t stride_width, int64_t pad_top, int64_t pad_left, int64_t dilation_height,
                       int64_t dilation_width) {
        return PoolShape{batch,        height,     width,           channels,      kernel_height,
                         kernel_width, out_height, out_width,       stride_height, stride_width,
                         pad_top,      pad_left,   dilation_height, dilation_width};
      }))
      .def("valid", [](const PoolShape& shape) { return valid(shape); });

  const auto unlocked = py::call_guard<py::gil_scoped_release>();

#define LOWBIT_BIND(op, Args) m.def(#op, on_threads(op##_args, launch::op), unlocked);
  LOWBIT_OPS(LOWBIT_BIND)
#undef LOWBIT_BIND
#define LOWBIT_BIND(op, Args)                              \
  m.def(#op, on_threads(op##_args, launch::op), unlocked); \
  m.def(#op "_workspace_bytes", asks(op##_plan_args, launch::op##_workspace_bytes));
  LOWBIT_WORKSPACE_OPS(LOWBIT_BIND)
  LOWBIT_CPU_WORKSPACE_OPS(LOWBIT_BIND)
  LOWBIT_BIND(binary_conv2d, BinaryConv2dArgs)
#undef LOWBIT_BIND

  m.def("binary_conv2d_epilogue", on_threads(binary_conv2d_epilogue_args, launch::binary_conv2d), unlocked);
  m.def("binary_conv2d_epilogue_workspace_bytes",
        asks(binary_conv2d_epilogue_plan_args, launch::binary_conv2d_workspace_bytes));
  m.def(
      "binary_conv2d_block_weight",
      [](const ConvShape& shape, uintptr_t words, uintptr_t blocked) {
        if (!valid(shape)) return code(Status::bad_shape);
        kernels().binary_conv2d_block_weight(shape, as<const uint64_t>(words), as<void>(blocked));
        return code(Status::ok);
      },
      unlocked);
  // Whether the input's groups must come aligned, by align_groups.
  m.def("binary_conv2d_reads_aligned", [](const ConvShape& shape) { return reads_aligned_groups(shape); });
  m.def("binary_conv2d_weight_bytes",
        [](const ConvShape& shape) { return kernels().binary_conv2d_weight_bytes(shape); });
  m.def(
      "popcount_peak",
      [](int level, int64_t iterations) { return launch::popcount_peak(static_cast<Isa>(level), iterations); },
      unlocked);
}
