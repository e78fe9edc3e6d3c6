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

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of lowbit_ext. Private: lowbit_ext/_native.py is the way in.";

  m.def("architecture", &cuda::architecture);
  m.def("last_error_text", [] { return std::string(cuda::last_error_text()); });
  // As the compiler was given them, such as "80 90a 120".
  m.def("architectures", [] { return std::string(LOWBIT_CUDA_ARCHS); });

  const auto unlocked = py::call_guard<py::gil_scoped_release>();

  m.def("align_groups", on_stream(align_groups_args, cuda::align_groups), unlocked);
  m.def("antithetic_gradient", on_stream(antithetic_gradient_args, cuda::antithetic_gradient), unlocked);
  m.def("antithetic_sample", on_stream(antithetic_sample_args, cuda::antithetic_sample), unlocked);
  m.def("batch_norm_relu_backward", on_stream(batch_norm_relu_backward_args, cuda::batch_norm_relu_backward), unlocked);
  m.def("batch_norm_relu_quantize", on_stream(batch_norm_relu_quantize_args, cuda::batch_norm_relu_quantize), unlocked);
  m.def("binarize", on_stream(binarize_args, cuda::binarize), unlocked);
  m.def("binary_avg_pool2d", on_stream(binary_avg_pool2d_args, cuda::binary_avg_pool2d), unlocked);
  m.def("binary_conv2d", on_stream(binary_conv2d_args, cuda::binary_conv2d), unlocked);
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
  m.def("binary_conv2d_input_grad", on_stream(binary_conv2d_input_grad_args, cuda::binary_conv2d_input_grad), unlocked);
  m.def("binary_conv2d_input_grad_workspace_bytes", [](const ConvShape& shape, int /*device*/) {
    BinaryConv2dInputGradArgs args{};
    args.shape = shape;
    return cuda::binary_conv2d_input_grad_workspace_bytes(args);
  });
  m.def("binary_conv2d_weight_bytes",
        [](const ConvShape& shape, int /*device*/) { return cuda::binary_conv2d_weight_bytes(shape); });
  m.def("binary_conv2d_weight_grad", on_stream(binary_conv2d_weight_grad_args, cuda::binary_conv2d_weight_grad),
        unlocked);
  m.def("binary_conv2d_weight_grad_workspace_bytes", [](const ConvShape& shape, int /*device*/) {
    BinaryConv2dWeightGradArgs args{};
    args.shape = shape;
    return cuda::binary_conv2d_weight_grad_workspace_bytes(args);
  });
  m.def("binary_conv2d_workspace_bytes", [](const ConvShape& shape, int encoding, int padding_value, int output_kind,
                                            int64_t thresholds, int /*device*/) {
    return cuda::binary_conv2d_workspace_bytes(
        binary_conv2d_plan_args(shape, encoding, padding_value, output_kind, thresholds));
  });
  m.def("binary_max_pool2d", on_stream(binary_max_pool2d_args, cuda::binary_max_pool2d), unlocked);
  m.def("channel_dequantize", on_stream(channel_dequantize_args, cuda::channel_dequantize), unlocked);
  m.def("group_dequantize", on_stream(group_dequantize_args, cuda::group_dequantize), unlocked);
  m.def("group_quantize", on_stream(group_quantize_args, cuda::group_quantize), unlocked);
  m.def("masked_gradient", on_stream(masked_gradient_args, cuda::masked_gradient), unlocked);
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
  m.def("quantized_activation", on_stream(quantized_activation_args, cuda::quantized_activation), unlocked);
  m.def("unpack", on_stream(unpack_args, cuda::unpack), unlocked);
}
