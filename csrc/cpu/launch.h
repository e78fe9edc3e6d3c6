// What the binding calls, one function per op: refuses inconsistent sizes, splits the work over torch's threads, runs
// the active level's kernel. Still no torch, no Python, no allocation.
#pragma once

#include "cpu/kernel_table.h"

namespace lowbit::launch {

Status binarize(const BinarizeArgs& args) noexcept;
Status unpack(const UnpackArgs& args) noexcept;
Status align_groups(const AlignGroupsArgs& args) noexcept;
Status binary_max_pool2d(const BinaryMaxPool2dArgs& args) noexcept;
Status binary_avg_pool2d(const BinaryAvgPool2dArgs& args) noexcept;

// `workspace` inside the arguments holds workspace_bytes; the *_workspace_bytes functions say how many are needed for
// the threads that would run now.
int64_t binary_conv2d_workspace_bytes(const BinaryConv2dArgs& args) noexcept;
Status binary_conv2d(const BinaryConv2dArgs& args, int64_t workspace_bytes) noexcept;

int64_t binary_conv2d_input_grad_workspace_bytes(const BinaryConv2dInputGradArgs& args) noexcept;
Status binary_conv2d_input_grad(const BinaryConv2dInputGradArgs& args, int64_t workspace_bytes) noexcept;

int64_t binary_conv2d_weight_grad_workspace_bytes(const BinaryConv2dWeightGradArgs& args) noexcept;
Status binary_conv2d_weight_grad(const BinaryConv2dWeightGradArgs& args, int64_t workspace_bytes) noexcept;

Status quantized_activation(const QuantizedActivationArgs& args) noexcept;
Status masked_gradient(const MaskedGradientArgs& args) noexcept;

Status batch_norm_relu_quantize(const BatchNormReluQuantizeArgs& args) noexcept;
Status channel_dequantize(const ChannelDequantizeArgs& args) noexcept;
Status batch_norm_relu_backward(const BatchNormReluBackwardArgs& args) noexcept;
Status group_quantize(const GroupQuantizeArgs& args) noexcept;
Status group_dequantize(const GroupDequantizeArgs& args) noexcept;
Status antithetic_sample(const AntitheticSampleArgs& args) noexcept;
Status antithetic_gradient(const AntitheticGradientArgs& args) noexcept;

// Runs the loop of `level` on every thread of torch's pool at once and returns the operations of all; 0 where the
// machine cannot run the level. For measurements: while it runs, `level` is the active level of the whole process.
int64_t popcount_peak(Isa level, int64_t iterations) noexcept;

}  // namespace lowbit::launch
