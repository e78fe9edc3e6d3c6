// What the two modules share: the arguments of each op as they come from Python, integers and addresses, made into the
// structs of csrc/core/ops by <op>_args, and those that its workspace's size depends on by <op>_plan_args. A pointer of
// 0 is an absent optional argument. Pointers and sizes were checked in Python, in the launchers of
// lowbit_ext/<method>/ops.py.
#pragma once

#include <pybind11/pybind11.h>

#include "core/ops/list.h"

namespace lowbit::bind {

template <class T>
T* as(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline int code(Status status) { return static_cast<int>(status); }

inline BinarizeArgs binarize_args(uintptr_t input, int input_type, bool channels_last, int64_t outer, int64_t channels,
                                  int64_t spatial, uintptr_t threshold, float common_threshold, uintptr_t flip,
                                  int encoding, uintptr_t words, uintptr_t mask, int64_t thresholds) {
  return {as<const void>(input),
          static_cast<FloatType>(input_type),
          channels_last,
          outer,
          channels,
          spatial,
          as<const float>(threshold),
          common_threshold,
          as<const uint8_t>(flip),
          static_cast<Encoding>(encoding),
          as<uint64_t>(words),
          as<uint64_t>(mask),
          thresholds};
}

inline UnpackArgs unpack_args(uintptr_t words, int64_t pixels, int64_t channels, float low, float high,
                              uintptr_t output, int output_type) {
  return {as<const uint64_t>(words),          pixels, channels, low, high, as<void>(output),
          static_cast<FloatType>(output_type)};
}

inline QuantizedActivationArgs quantized_activation_args(uintptr_t input, int type, int64_t count, int activation,
                                                         float low, float high, bool closed, uintptr_t output,
                                                         uintptr_t mask) {
  return {as<const void>(input),
          static_cast<FloatType>(type),
          count,
          static_cast<Activation>(activation),
          low,
          high,
          closed,
          as<void>(output),
          as<uint64_t>(mask)};
}

inline MaskedGradientArgs masked_gradient_args(uintptr_t gradient, int type, int64_t count, uintptr_t mask,
                                               uintptr_t output) {
  return {as<const void>(gradient), static_cast<FloatType>(type), count, as<const uint64_t>(mask), as<void>(output)};
}

inline BatchNormReluQuantizeArgs batch_norm_relu_quantize_args(uintptr_t input, int type, int64_t outer,
                                                               int64_t channels, int64_t spatial, bool channels_last,
                                                               uintptr_t mean, uintptr_t invstd, uintptr_t gamma,
                                                               uintptr_t beta, int bits, float span, bool relu,
                                                               uintptr_t output, uintptr_t codes, uintptr_t workspace) {
  return {as<const void>(input),
          static_cast<FloatType>(type),
          {outer, channels, spatial, channels_last},
          as<const float>(mean),
          as<const float>(invstd),
          as<const float>(gamma),
          as<const float>(beta),
          bits,
          span,
          relu,
          as<void>(output),
          as<uint8_t>(codes),
          as<float>(workspace)};
}

inline ChannelDequantizeArgs channel_dequantize_args(uintptr_t codes, int64_t outer, int64_t channels, int64_t spatial,
                                                     bool channels_last, uintptr_t gamma, uintptr_t beta, int bits,
                                                     float span, bool relu, uintptr_t output, int type,
                                                     uintptr_t workspace) {
  return {as<const uint8_t>(codes),
          {outer, channels, spatial, channels_last},
          as<const float>(gamma),
          as<const float>(beta),
          bits,
          span,
          relu,
          as<void>(output),
          static_cast<FloatType>(type),
          as<float>(workspace)};
}

inline BatchNormReluBackwardArgs batch_norm_relu_backward_args(
    uintptr_t grad_output, int type, int64_t outer, int64_t channels, int64_t spatial, bool channels_last,
    uintptr_t codes, uintptr_t gamma, uintptr_t beta, uintptr_t invstd, int bits, float span, bool relu, bool training,
    uintptr_t grad_input, uintptr_t grad_gamma, uintptr_t grad_beta, uintptr_t workspace) {
  BatchNormReluBackwardArgs args{as<const void>(grad_output),
                                 static_cast<FloatType>(type),
                                 {outer, channels, spatial, channels_last},
                                 as<const uint8_t>(codes),
                                 as<const float>(gamma),
                                 as<const float>(beta),
                                 as<const float>(invstd),
                                 bits,
                                 span,
                                 relu,
                                 training,
                                 as<void>(grad_input),
                                 as<float>(grad_gamma),
                                 as<float>(grad_beta),
                                 nullptr,
                                 nullptr};
  set_workspace(args, as<void>(workspace));
  return args;
}

template <class Args>
Args channels_plan_args(int64_t outer, int64_t channels, int64_t spatial, bool channels_last) {
  Args args{};
  args.shape = {outer, channels, spatial, channels_last};
  return args;
}
constexpr auto batch_norm_relu_quantize_plan_args = channels_plan_args<BatchNormReluQuantizeArgs>;
constexpr auto batch_norm_relu_backward_plan_args = channels_plan_args<BatchNormReluBackwardArgs>;
constexpr auto channel_dequantize_plan_args = channels_plan_args<ChannelDequantizeArgs>;

inline GroupQuantizeArgs group_quantize_args(uintptr_t input, int type, int64_t count, int bits, bool positive,
                                             bool stochastic, uint64_t seed, uint64_t offset, uintptr_t codes,
                                             uintptr_t scale_minimum) {
  return {as<const void>(input), static_cast<FloatType>(type), count, bits, positive, stochastic, seed, offset,
          as<uint8_t>(codes),    as<uint16_t>(scale_minimum)};
}

inline GroupDequantizeArgs group_dequantize_args(uintptr_t codes, uintptr_t scale_minimum, int64_t count, int bits,
                                                 uintptr_t output, int type) {
  return {as<const uint8_t>(codes), as<const uint16_t>(scale_minimum), count, bits,
          as<void>(output),         static_cast<FloatType>(type)};
}

inline AntitheticSampleArgs antithetic_sample_args(uintptr_t logits, uintptr_t quantile, int64_t rows,
                                                   int64_t dimensions, int64_t samples, int coupling, int layout,
                                                   uint64_t seed, uint64_t offset, uintptr_t bits, uintptr_t ratio) {
  return {as<const float>(logits),
          as<const float>(quantile),
          rows,
          dimensions,
          samples,
          static_cast<Coupling>(coupling),
          static_cast<SampleLayout>(layout),
          seed,
          offset,
          as<void>(bits),
          as<float>(ratio)};
}

inline AntitheticGradientArgs antithetic_gradient_args(uintptr_t bits, int layout, int64_t rows, int64_t dimensions,
                                                       int64_t samples, uintptr_t weight, uintptr_t ratio,
                                                       uintptr_t gradient) {
  return {as<const void>(bits),
          static_cast<SampleLayout>(layout),
          rows,
          dimensions,
          samples,
          as<const float>(weight),
          as<const float>(ratio),
          as<float>(gradient)};
}

inline AlignGroupsArgs align_groups_args(uintptr_t words, int64_t pixels, int64_t groups, int64_t channels_per_group,
                                         uintptr_t output) {
  return {as<const uint64_t>(words), pixels, groups, channels_per_group, as<uint64_t>(output)};
}

inline BinaryMaxPool2dArgs binary_max_pool2d_args(const PoolShape& shape, uintptr_t input, uintptr_t invert,
                                                  uintptr_t output) {
  return {shape, as<const uint64_t>(input), as<const uint64_t>(invert), as<uint64_t>(output)};
}

inline BinaryAvgPool2dArgs binary_avg_pool2d_args(const PoolShape& shape, int encoding, bool count_include_pad,
                                                  int64_t divisor_override, uintptr_t input, uintptr_t output) {
  return {shape,
          static_cast<Encoding>(encoding),
          count_include_pad,
          divisor_override,
          as<const uint64_t>(input),
          as<float>(output)};
}

inline BinaryConv2dArgs binary_conv2d_plan_args(const ConvShape& shape, int encoding, int padding_value,
                                                int output_kind, int64_t thresholds) {
  BinaryConv2dArgs args{};
  args.shape = shape;
  args.encoding = static_cast<Encoding>(encoding);
  args.padding_value = padding_value;
  args.output_kind = static_cast<ConvOutput>(output_kind);
  args.thresholds = thresholds;
  return args;
}

inline BinaryConv2dArgs binary_conv2d_args(const ConvShape& shape, int encoding, int padding_value, int output_kind,
                                           uintptr_t input, uintptr_t weight, uintptr_t scale, int64_t scale_stride,
                                           uintptr_t bias, uintptr_t residual, int residual_type, uintptr_t threshold,
                                           uintptr_t flip, int64_t thresholds, uintptr_t output, uintptr_t workspace) {
  BinaryConv2dArgs args = binary_conv2d_plan_args(shape, encoding, padding_value, output_kind, thresholds);
  args.input = as<const uint64_t>(input);
  args.weight = as<const void>(weight);
  args.scale = as<const float>(scale);
  args.scale_stride = scale_stride;
  args.bias = as<const float>(bias);
  args.residual = as<const void>(residual);
  args.residual_type = static_cast<FloatType>(residual_type);
  args.threshold = as<const void>(threshold);
  args.flip = as<const uint8_t>(flip);
  args.output = as<void>(output);
  args.workspace = as<void>(workspace);
  return args;
}

inline EpilogueProgram program_of(uintptr_t steps, int64_t count) { return {as<const EpilogueStep>(steps), count}; }

// binary_conv2d with a program of steps.
inline BinaryConv2dArgs binary_conv2d_epilogue_plan_args(const ConvShape& shape, int encoding, int padding_value,
                                                         uintptr_t steps, int64_t step_count) {
  BinaryConv2dArgs args =
      binary_conv2d_plan_args(shape, encoding, padding_value, static_cast<int>(ConvOutput::program), 0);
  args.program = program_of(steps, step_count);
  return args;
}

inline BinaryConv2dArgs binary_conv2d_epilogue_args(const ConvShape& shape, int encoding, int padding_value,
                                                    uintptr_t input, uintptr_t weight, uintptr_t steps,
                                                    int64_t step_count, uintptr_t workspace) {
  BinaryConv2dArgs args = binary_conv2d_epilogue_plan_args(shape, encoding, padding_value, steps, step_count);
  args.input = as<const uint64_t>(input);
  args.weight = as<const void>(weight);
  args.workspace = as<void>(workspace);
  return args;
}

// `steps` are those of both programs, the first `before` of them in front of the window.
inline PointwiseArgs pointwise_args(const PoolShape& shape, int reduction, bool count_include_pad,
                                    int64_t divisor_override, uintptr_t input, int input_type, bool channels_last,
                                    int64_t stride, uintptr_t steps, int64_t before, int64_t after) {
  const EpilogueProgram all = program_of(steps, before);
  return {shape,
          static_cast<Reduction>(reduction),
          count_include_pad,
          divisor_override,
          as<const void>(input),
          static_cast<FloatType>(input_type),
          channels_last,
          stride,
          all,
          {all.steps + before, after}};
}

inline BinaryConv2dInputGradArgs binary_conv2d_input_grad_args(const ConvShape& shape, uintptr_t grad_output,
                                                               uintptr_t weight, uintptr_t scale, int64_t scale_stride,
                                                               uintptr_t mask, uintptr_t grad_input,
                                                               uintptr_t workspace) {
  return {shape,        as<const float>(grad_output), as<const uint64_t>(weight), as<const float>(scale),
          scale_stride, as<const uint64_t>(mask),     as<float>(grad_input),      as<void>(workspace)};
}

inline BinaryConv2dWeightGradArgs binary_conv2d_weight_grad_args(const ConvShape& shape, int encoding,
                                                                 int padding_value, uintptr_t grad_output,
                                                                 uintptr_t input, uintptr_t grad_weight,
                                                                 uintptr_t workspace) {
  return {shape,
          static_cast<Encoding>(encoding),
          padding_value,
          as<const float>(grad_output),
          as<const uint64_t>(input),
          as<float>(grad_weight),
          as<void>(workspace)};
}

template <class Args>
Args conv_plan_args(const ConvShape& shape) {
  Args args{};
  args.shape = shape;
  return args;
}
constexpr auto binary_conv2d_input_grad_plan_args = conv_plan_args<BinaryConv2dInputGradArgs>;
constexpr auto binary_conv2d_weight_grad_plan_args = conv_plan_args<BinaryConv2dWeightGradArgs>;

inline BinaryMatmulArgs binary_matmul_plan_args(int64_t batch, int64_t rows, int64_t columns, int64_t depth,
                                                int a_encoding, int b_encoding, int output_kind) {
  BinaryMatmulArgs args{};
  args.batch = batch;
  args.rows = rows;
  args.columns = columns;
  args.depth = depth;
  args.a_encoding = static_cast<Encoding>(a_encoding);
  args.b_encoding = static_cast<Encoding>(b_encoding);
  args.output_kind = static_cast<ConvOutput>(output_kind);
  return args;
}

inline BinaryMatmulArgs binary_matmul_args(int64_t batch, int64_t rows, int64_t columns, int64_t depth, int a_encoding,
                                           int b_encoding, int output_kind, uintptr_t a, uintptr_t b, uintptr_t scale,
                                           uintptr_t output, uintptr_t workspace) {
  BinaryMatmulArgs args = binary_matmul_plan_args(batch, rows, columns, depth, a_encoding, b_encoding, output_kind);
  args.a = as<const uint64_t>(a);
  args.b = as<const uint64_t>(b);
  args.scale = as<const float>(scale);
  args.output = as<void>(output);
  args.workspace = as<void>(workspace);
  return args;
}

inline PopcountPeakArgs popcount_peak_args(int64_t iterations, uintptr_t counts) {
  return {iterations, as<uint32_t>(counts)};
}

}  // namespace lowbit::bind
