// The module lowbit_ext._cpu: integers in, status out, interpreter lock released.
#include <pybind11/pybind11.h>

#include <omp.h>

#include <string>

#include "bind/arguments.h"
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

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of lowbit_ext. Private: lowbit_ext/_native.py is the way in.";

  m.def("best_isa", [] { return std::string(isa_name(best_isa())); });
  m.def("active_isa", [] { return std::string(isa_name(active_isa())); });
  m.def("select_isa", [](int level) { return level < kIsaCount && select_isa(static_cast<Isa>(level)); });
  m.def("threads", [] { return omp_get_max_threads(); });

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

  m.def("align_groups", on_threads(align_groups_args, launch::align_groups), unlocked);
  m.def("antithetic_gradient", on_threads(antithetic_gradient_args, launch::antithetic_gradient), unlocked);
  m.def("antithetic_sample", on_threads(antithetic_sample_args, launch::antithetic_sample), unlocked);
  m.def("batch_norm_relu_backward", on_threads(batch_norm_relu_backward_args, launch::batch_norm_relu_backward),
        unlocked);
  m.def("batch_norm_relu_quantize", on_threads(batch_norm_relu_quantize_args, launch::batch_norm_relu_quantize),
        unlocked);
  m.def("binarize", on_threads(binarize_args, launch::binarize), unlocked);
  m.def("binary_avg_pool2d", on_threads(binary_avg_pool2d_args, launch::binary_avg_pool2d), unlocked);
  m.def("binary_conv2d", on_threads(binary_conv2d_args, launch::binary_conv2d), unlocked);
  m.def(
      "binary_conv2d_block_weight",
      [](const ConvShape& shape, uintptr_t words, uintptr_t blocked) {
        if (!valid(shape)) return code(Status::bad_shape);
        kernels().binary_conv2d_block_weight(shape, as<const uint64_t>(words), as<void>(blocked));
        return code(Status::ok);
      },
      unlocked);
  m.def("binary_conv2d_input_grad", on_threads(binary_conv2d_input_grad_args, launch::binary_conv2d_input_grad),
        unlocked);
  m.def("binary_conv2d_input_grad_workspace_bytes", [](const ConvShape& shape) {
    BinaryConv2dInputGradArgs args{};
    args.shape = shape;
    return launch::binary_conv2d_input_grad_workspace_bytes(args);
  });
  m.def("binary_conv2d_weight_bytes",
        [](const ConvShape& shape) { return kernels().binary_conv2d_weight_bytes(shape); });
  m.def("binary_conv2d_weight_grad", on_threads(binary_conv2d_weight_grad_args, launch::binary_conv2d_weight_grad),
        unlocked);
  m.def("binary_conv2d_weight_grad_workspace_bytes", [](const ConvShape& shape) {
    BinaryConv2dWeightGradArgs args{};
    args.shape = shape;
    return launch::binary_conv2d_weight_grad_workspace_bytes(args);
  });
  m.def("binary_conv2d_workspace_bytes",
        [](const ConvShape& shape, int encoding, int padding_value, int output_kind, int64_t thresholds) {
          return launch::binary_conv2d_workspace_bytes(
              binary_conv2d_plan_args(shape, encoding, padding_value, output_kind, thresholds));
        });
  m.def("binary_max_pool2d", on_threads(binary_max_pool2d_args, launch::binary_max_pool2d), unlocked);
  m.def("channel_dequantize", on_threads(channel_dequantize_args, launch::channel_dequantize), unlocked);
  m.def("group_dequantize", on_threads(group_dequantize_args, launch::group_dequantize), unlocked);
  m.def("group_quantize", on_threads(group_quantize_args, launch::group_quantize), unlocked);
  m.def("masked_gradient", on_threads(masked_gradient_args, launch::masked_gradient), unlocked);
  m.def("quantized_activation", on_threads(quantized_activation_args, launch::quantized_activation), unlocked);
  m.def("unpack", on_threads(unpack_args, launch::unpack), unlocked);

  m.def(
      "popcount_peak",
      [](int level, int64_t iterations) { return launch::popcount_peak(static_cast<Isa>(level), iterations); },
      unlocked);
}
