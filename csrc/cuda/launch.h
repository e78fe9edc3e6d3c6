// The CUDA launchers, one function per op, with the arguments of csrc/core/ops; pointers are memory of the stream's
// device. Each refuses inconsistent sizes, enqueues its kernels on the stream and returns: the results are there when
// the stream has reached them. The caller's current device stays what it was. No torch, no Python, no allocation.
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
#include "core/ops/binary_max_pool2d.h"
#include "core/ops/channel_dequantize.h"
#include "core/ops/group_dequantize.h"
#include "core/ops/group_quantize.h"
#include "core/ops/masked_gradient.h"
#include "core/ops/popcount_peak.h"
#include "core/ops/quantized_activation.h"
#include "core/ops/unpack.h"

namespace lowbit::cuda {

// What makes the inner products of the convolution (binary_conv2d_engines.cuh). All give the same bits.
enum class ConvEngine : int {
  popcount = 0,  // XOR and POPC on the plain cores: every architecture
  mma = 1,       // mma.sync m16n8k256 and.popc: 8.0 to 9.0
  wgmma = 2,     // wgmma m64n144k256 and.popc: 9.0, where the module was built for 9.0a
};

struct Stream {
  int device;
  void* stream;  // cudaStream_t of that device; null: its default stream
};

Status align_groups(const AlignGroupsArgs& args, Stream stream) noexcept;
Status antithetic_gradient(const AntitheticGradientArgs& args, Stream stream) noexcept;
Status antithetic_sample(const AntitheticSampleArgs& args, Stream stream) noexcept;
Status batch_norm_relu_backward(const BatchNormReluBackwardArgs& args, Stream stream) noexcept;
Status batch_norm_relu_quantize(const BatchNormReluQuantizeArgs& args, Stream stream) noexcept;
Status binarize(const BinarizeArgs& args, Stream stream) noexcept;
Status binary_avg_pool2d(const BinaryAvgPool2dArgs& args, Stream stream) noexcept;
// Status::unsupported_isa for an engine that the device does not have.
Status binary_conv2d(const BinaryConv2dArgs& args, int64_t workspace_bytes, ConvEngine engine, Stream stream) noexcept;
// Writes the private weight copy from words [filters, kernel_height, kernel_width, words_per_group], tail bits 0.
Status binary_conv2d_block_weight(const ConvShape& shape, const uint64_t* words, void* blocked, Stream stream) noexcept;
ConvEngine binary_conv2d_default_engine(int device) noexcept;
bool binary_conv2d_has_engine(ConvEngine engine, int device) noexcept;
int64_t binary_conv2d_weight_bytes(const ConvShape& shape) noexcept;  // of that copy, the same for every engine
int64_t binary_conv2d_workspace_bytes(const BinaryConv2dArgs& args) noexcept;
int64_t binary_conv2d_input_grad_workspace_bytes(const BinaryConv2dInputGradArgs& args) noexcept;
Status binary_conv2d_input_grad(const BinaryConv2dInputGradArgs& args, int64_t workspace_bytes, Stream stream) noexcept;
int64_t binary_conv2d_weight_grad_workspace_bytes(const BinaryConv2dWeightGradArgs& args) noexcept;
Status binary_conv2d_weight_grad(const BinaryConv2dWeightGradArgs& args, int64_t workspace_bytes,
                                 Stream stream) noexcept;
Status binary_max_pool2d(const BinaryMaxPool2dArgs& args, Stream stream) noexcept;
Status channel_dequantize(const ChannelDequantizeArgs& args, Stream stream) noexcept;
Status group_dequantize(const GroupDequantizeArgs& args, Stream stream) noexcept;
Status group_quantize(const GroupQuantizeArgs& args, Stream stream) noexcept;
Status masked_gradient(const MaskedGradientArgs& args, Stream stream) noexcept;
// The rate of an engine's matrix instruction. Status::unsupported_isa for one that the device does not have, and for
// popcount, which has none.
Status popcount_peak(const PopcountPeakArgs& args, ConvEngine engine, Stream stream) noexcept;
int64_t popcount_peak_bytes(int device) noexcept;  // of its counts
// 2 for each multiply-add of two bits.
int64_t popcount_peak_operations(int64_t iterations, ConvEngine engine, int device) noexcept;
Status quantized_activation(const QuantizedActivationArgs& args, Stream stream) noexcept;
Status unpack(const UnpackArgs& args, Stream stream) noexcept;

// What CUDA said to this thread's last call that returned Status::cuda_error.
const char* last_error_text() noexcept;

// 10 * major + minor of the compute capability, 90 for 9.0; -1 where CUDA cannot say: see last_error_text().
int architecture(int device) noexcept;

}  // namespace lowbit::cuda
