// The module lowbit_ext._cpu: integers in, status out, interpreter lock released. Pointers and sizes are checked in
// Python, in the launchers of lowbit_ext/<method>/ops.py. A pointer of 0 is an absent optional argument.
#include <pybind11/pybind11.h>

#include <omp.h>

#include <string>

#include "core/checks.h"
#include "cpu/launch.h"

namespace py = pybind11;
using namespace lowbit;

namespace {

template <class T>
T* as(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

int code(Status status) { return static_cast<int>(status); }

BinaryConv2dArgs conv2d_args(const ConvShape& shape, int encoding, int padding_value, int output_kind) {
  BinaryConv2dArgs args{};
  args.shape = shape;
  args.encoding = static_cast<Encoding>(encoding);
  args.padding_value = padding_value;
  args.output_kind = static_cast<ConvOutput>(output_kind);
  return args;
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of lowbit_ext. Private: lowbit_ext/_native.py is the way in.";

  m.def("best_isa", [] { return std::string(isa_name(best_isa())); });
  m.def("active_isa", [] { return std::string(isa_name(active_isa())); });
  m.def("select_isa", [](int level) { return level < kIsaCount && select_isa(static_cast<Isa>(level)); });
  m.def("threads", [] { return omp_get_max_threads(); });

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
      }));

  const auto unlocked = py::call_guard<py::gil_scoped_release>();

  m.def(
      "binarize",
      [](uintptr_t input, int input_type, bool channels_last, int64_t outer, int64_t channels, int64_t spatial,
         uintptr_t threshold, float common_threshold, uintptr_t flip, int encoding, uintptr_t words, uintptr_t mask) {
        return code(
            launch::binarize({as<const void>(input), static_cast<FloatType>(input_type), channels_last, outer, channels,
                              spatial, as<const float>(threshold), common_threshold, as<const uint8_t>(flip),
                              static_cast<Encoding>(encoding), as<uint64_t>(words), as<uint64_t>(mask)}));
      },
      unlocked);

  m.def(
      "unpack",
      [](uintptr_t words, int64_t pixels, int64_t channels, float low, float high, uintptr_t output, int output_type) {
        return code(launch::unpack({as<const uint64_t>(words), pixels, channels, low, high, as<void>(output),
                                    static_cast<FloatType>(output_type)}));
      },
      unlocked);

  m.def(
      "align_groups",
      [](uintptr_t words, int64_t pixels, int64_t groups, int64_t channels_per_group, uintptr_t output) {
        return code(launch::align_groups(
            {as<const uint64_t>(words), pixels, groups, channels_per_group, as<uint64_t>(output)}));
      },
      unlocked);

  m.def(
      "binary_max_pool2d",
      [](const PoolShape& shape, uintptr_t input, uintptr_t invert, uintptr_t output) {
        return code(launch::binary_max_pool2d(
            {shape, as<const uint64_t>(input), as<const uint64_t>(invert), as<uint64_t>(output)}));
      },
      unlocked);

  m.def(
      "binary_avg_pool2d",
      [](const PoolShape& shape, int encoding, bool count_include_pad, int64_t divisor_override, uintptr_t input,
         uintptr_t output) {
        return code(launch::binary_avg_pool2d({shape, static_cast<Encoding>(encoding), count_include_pad,
                                               divisor_override, as<const uint64_t>(input), as<float>(output)}));
      },
      unlocked);

  m.def("binary_conv2d_weight_bytes",
        [](const ConvShape& shape) { return kernels().binary_conv2d_weight_bytes(shape); });

  m.def(
      "binary_conv2d_block_weight",
      [](const ConvShape& shape, uintptr_t words, uintptr_t blocked) {
        if (!valid(shape)) return code(Status::bad_shape);
        kernels().binary_conv2d_block_weight(shape, as<const uint64_t>(words), as<void>(blocked));
        return code(Status::ok);
      },
      unlocked);

  m.def("binary_conv2d_workspace_bytes",
        [](const ConvShape& shape, int encoding, int padding_value, int output_kind, int64_t thresholds) {
          BinaryConv2dArgs args = conv2d_args(shape, encoding, padding_value, output_kind);
          args.thresholds = thresholds;
          return launch::binary_conv2d_workspace_bytes(args);
        });

  m.def(
      "binary_conv2d",
      [](const ConvShape& shape, int encoding, int padding_value, int output_kind, uintptr_t input, uintptr_t weight,
         uintptr_t scale, int64_t scale_stride, uintptr_t bias, uintptr_t residual, int residual_type,
         uintptr_t threshold, uintptr_t flip, int64_t thresholds, uintptr_t output, uintptr_t workspace,
         int64_t workspace_bytes) {
        BinaryConv2dArgs args = conv2d_args(shape, encoding, padding_value, output_kind);
        args.input = as<const uint64_t>(input);
        args.weight = as<const void>(weight);
        args.scale = as<const float>(scale);
        args.scale_stride = scale_stride;
        args.bias = as<const float>(bias);
        args.residual = as<const void>(residual);
        args.residual_type = static_cast<FloatType>(residual_type);
        args.threshold = as<const void>(threshold);
        args.flip = as<const uint8_t>(flip);
        args.thresholds = thresholds;
        args.output = as<void>(output);
        args.workspace = as<void>(workspace);
        return code(launch::binary_conv2d(args, workspace_bytes));
      },
      unlocked);

  m.def("binary_conv2d_input_grad_workspace_bytes", [](const ConvShape& shape) {
    BinaryConv2dInputGradArgs args{};
    args.shape = shape;
    return launch::binary_conv2d_input_grad_workspace_bytes(args);
  });

  m.def(
      "binary_conv2d_input_grad",
      [](const ConvShape& shape, uintptr_t grad_output, uintptr_t weight, uintptr_t scale, int64_t scale_stride,
         uintptr_t mask, uintptr_t grad_input, uintptr_t workspace, int64_t workspace_bytes) {
        return code(launch::binary_conv2d_input_grad(
            {shape, as<const float>(grad_output), as<const uint64_t>(weight), as<const float>(scale), scale_stride,
             as<const uint64_t>(mask), as<float>(grad_input), as<void>(workspace)},
            workspace_bytes));
      },
      unlocked);

  m.def("binary_conv2d_weight_grad_workspace_bytes", [](const ConvShape& shape) {
    BinaryConv2dWeightGradArgs args{};
    args.shape = shape;
    return launch::binary_conv2d_weight_grad_workspace_bytes(args);
  });

  m.def(
      "binary_conv2d_weight_grad",
      [](const ConvShape& shape, int encoding, int padding_value, uintptr_t grad_output, uintptr_t input,
         uintptr_t grad_weight, uintptr_t workspace, int64_t workspace_bytes) {
        return code(launch::binary_conv2d_weight_grad(
            {shape, static_cast<Encoding>(encoding), padding_value, as<const float>(grad_output),
             as<const uint64_t>(input), as<float>(grad_weight), as<void>(workspace)},
            workspace_bytes));
      },
      unlocked);

  m.def(
      "popcount_peak",
      [](int level, int64_t iterations) { return launch::popcount_peak(static_cast<Isa>(level), iterations); },
      unlocked);
}
