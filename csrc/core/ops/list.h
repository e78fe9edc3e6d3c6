// The ops: what the launchers of both devices declare and both Python modules bind. A row is an op's name and its
// arguments; binary_conv2d and popcount_peak, which choose an engine on a GPU, are written out beside the lists.
#pragma once

#include "core/ops/align_groups.h"
#include "core/ops/antithetic_gradient.h"
#include "core/ops/antithetic_sample.h"
#include "core/ops/batch_norm_relu_backward.h"
#include "core/ops/batch_norm_relu_quantize.h"
#include "core/ops/binarize.h"
#include "core/ops/binary_avg_pool2d.h"
#include "core/ops/binary_conv2d.h"
#include "core/ops/binary_conv2d_input_grad.h"
#include "core/ops/binary_conv2d_weight_grad.h"
#include "core/ops/binary_matmul.h"
#include "core/ops/binary_max_pool2d.h"
#include "core/ops/channel_dequantize.h"
#include "core/ops/group_dequantize.h"
#include "core/ops/group_quantize.h"
#include "core/ops/masked_gradient.h"
#include "core/ops/pointwise.h"
#include "core/ops/popcount_peak.h"
#include "core/ops/quantized_activation.h"
#include "core/ops/unpack.h"

// clang-format off
// Status op(args)
#define LOWBIT_OPS(OP)                              \
  OP(align_groups,         AlignGroupsArgs)         \
  OP(antithetic_gradient,  AntitheticGradientArgs)  \
  OP(antithetic_sample,    AntitheticSampleArgs)    \
  OP(binarize,             BinarizeArgs)            \
  OP(binary_avg_pool2d,    BinaryAvgPool2dArgs)     \
  OP(binary_max_pool2d,    BinaryMaxPool2dArgs)     \
  OP(group_dequantize,     GroupDequantizeArgs)     \
  OP(group_quantize,       GroupQuantizeArgs)       \
  OP(masked_gradient,      MaskedGradientArgs)      \
  OP(pointwise,            PointwiseArgs)           \
  OP(quantized_activation, QuantizedActivationArgs) \
  OP(unpack,               UnpackArgs)

// int64_t op_workspace_bytes(args) and Status op(args, workspace_bytes)
#define LOWBIT_WORKSPACE_OPS(OP)                          \
  OP(batch_norm_relu_backward, BatchNormReluBackwardArgs) \
  OP(batch_norm_relu_quantize, BatchNormReluQuantizeArgs) \
  OP(binary_matmul,            BinaryMatmulArgs)          \
  OP(channel_dequantize,       ChannelDequantizeArgs)

// The same, of the CPU alone: a GPU's tensor cores make the gradients of expanded bits faster than any kernel that has
// the bits one by one.
#define LOWBIT_CPU_WORKSPACE_OPS(OP)                       \
  OP(binary_conv2d_input_grad,  BinaryConv2dInputGradArgs) \
  OP(binary_conv2d_weight_grad, BinaryConv2dWeightGradArgs)
// clang-format on
