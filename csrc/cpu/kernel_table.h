// One table of function pointers per instruction-set level. To add an op: one row here, one wrapper in launch.cpp.
#pragma once

#include "cpu/align_groups/align_groups.h"
#include "cpu/antithetic_gradient/antithetic_gradient.h"
#include "cpu/antithetic_sample/antithetic_sample.h"
#include "cpu/batch_norm_relu_backward/batch_norm_relu_backward.h"
#include "cpu/batch_norm_relu_quantize/batch_norm_relu_quantize.h"
#include "cpu/binarize/binarize.h"
#include "cpu/binary_avg_pool2d/binary_avg_pool2d.h"
#include "cpu/binary_conv2d/binary_conv2d.h"
#include "cpu/binary_conv2d_input_grad/binary_conv2d_input_grad.h"
#include "cpu/binary_conv2d_weight_grad/binary_conv2d_weight_grad.h"
#include "cpu/binary_matmul/binary_matmul.h"
#include "cpu/binary_max_pool2d/binary_max_pool2d.h"
#include "cpu/channel_dequantize/channel_dequantize.h"
#include "cpu/group_dequantize/group_dequantize.h"
#include "cpu/group_quantize/group_quantize.h"
#include "cpu/isa.h"
#include "cpu/masked_gradient/masked_gradient.h"
#include "cpu/pointwise/pointwise.h"
#include "cpu/popcount_peak/popcount_peak.h"
#include "cpu/quantized_activation/quantized_activation.h"
#include "cpu/unpack/unpack.h"

// clang-format off
// Which implementation serves each level.
//  entry                                      level: scalar  avx2    avx512  amx
#define LOWBIT_KERNEL_ROWS(ROW)                                              \
  ROW(align_groups,                                   scalar, scalar, scalar, scalar) \
  ROW(binarize,                                       scalar, avx2,   avx512, avx512) \
  ROW(unpack,                                         scalar, avx2,   avx512, avx512) \
  ROW(binary_max_pool2d,                              scalar, avx2,   avx512, avx512) \
  ROW(binary_avg_pool2d,                              scalar, avx2,   avx512, avx512) \
  ROW(binary_conv2d_weight_bytes,                     scalar, avx2,   avx512, amx)    \
  ROW(binary_conv2d_block_weight,                     scalar, avx2,   avx512, amx)    \
  ROW(binary_conv2d_plan,                             scalar, avx2,   avx512, amx)    \
  ROW(binary_conv2d,                                  scalar, avx2,   avx512, amx)    \
  ROW(binary_conv2d_input_grad_workspace_bytes,       scalar, avx2,   avx512, avx512) \
  ROW(binary_conv2d_input_grad_items,                 scalar, avx2,   avx512, avx512) \
  ROW(binary_conv2d_input_grad,                       scalar, avx2,   avx512, avx512) \
  ROW(binary_conv2d_weight_grad_workspace_bytes,      scalar, avx2,   avx512, avx512) \
  ROW(binary_conv2d_weight_grad_items,                scalar, avx2,   avx512, avx512) \
  ROW(binary_conv2d_weight_grad,                      scalar, avx2,   avx512, avx512) \
  ROW(binary_matmul_halve,                            scalar, avx2,   avx512, avx512) \
  ROW(antithetic_sample,                              scalar, avx2,   avx512, avx512) \
  ROW(antithetic_gradient,                            scalar, avx2,   avx512, avx512) \
  ROW(pointwise,                                      scalar, avx2,   avx512, avx512) \
  ROW(quantized_activation,                           scalar, avx2,   avx512, avx512) \
  ROW(masked_gradient,                                scalar, avx2,   avx512, avx512) \
  ROW(batch_norm_relu_quantize,                       scalar, avx2,   avx512, avx512) \
  ROW(batch_norm_relu_sums,                           scalar, avx2,   avx512, avx512) \
  ROW(batch_norm_relu_backward,                       scalar, avx2,   avx512, avx512) \
  ROW(channel_dequantize,                             scalar, avx2,   avx512, avx512) \
  ROW(group_quantize,                                 scalar, avx2,   avx512, avx512) \
  ROW(group_dequantize,                               scalar, avx2,   avx512, avx512) \
  ROW(popcount_peak,                                  scalar, avx2,   avx512, amx)
// clang-format on

namespace lowbit {

struct KernelTable {
#define LOWBIT_MEMBER(entry, s, a2, a512, amx_level) decltype(&scalar::entry) entry;
  LOWBIT_KERNEL_ROWS(LOWBIT_MEMBER)
#undef LOWBIT_MEMBER
};

// The table of the active level: the best this machine runs until select_isa chooses another.
const KernelTable& kernels();
const KernelTable& kernels(Isa level);  // of any level up to the best

Isa best_isa();  // by cpuid, XCR0 and, for amx, the kernel's permission
Isa active_isa();
bool select_isa(Isa level);  // false, and no change, where the machine cannot run it
const char* isa_name(Isa level);

}  // namespace lowbit
