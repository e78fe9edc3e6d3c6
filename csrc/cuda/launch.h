// The CUDA launchers, one function per op, with the arguments of csrc/core/ops; pointers are memory of the stream's
// device. Each refuses inconsistent sizes, enqueues its kernels on the stream and returns: the results are there when
// the stream has reached them. The caller's current device stays what it was. No torch, no Python, no allocation.
#pragma once

#include "core/ops/list.h"

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

#define LOWBIT_DECLARE(op, Args) Status op(const Args& args, Stream stream) noexcept;
LOWBIT_OPS(LOWBIT_DECLARE)
#undef LOWBIT_DECLARE

// The workspace inside the arguments holds workspace_bytes, at least what *_workspace_bytes says.
#define LOWBIT_DECLARE(op, Args)                           \
  int64_t op##_workspace_bytes(const Args& args) noexcept; \
  Status op(const Args& args, int64_t workspace_bytes, Stream stream) noexcept;
LOWBIT_WORKSPACE_OPS(LOWBIT_DECLARE)
#undef LOWBIT_DECLARE

// Status::unsupported_isa for an engine that the device does not have.
Status binary_conv2d(const BinaryConv2dArgs& args, int64_t workspace_bytes, ConvEngine engine, Stream stream) noexcept;
int64_t binary_conv2d_workspace_bytes(const BinaryConv2dArgs& args) noexcept;
// Writes the private weight copy from words [filters, kernel_height, kernel_width, words_per_group], tail bits 0.
Status binary_conv2d_block_weight(const ConvShape& shape, const uint64_t* words, void* blocked, Stream stream) noexcept;
int64_t binary_conv2d_weight_bytes(const ConvShape& shape) noexcept;  // of that copy, the same for every engine
ConvEngine binary_conv2d_default_engine(int device) noexcept;
bool binary_conv2d_has_engine(ConvEngine engine, int device) noexcept;

// The rate of an engine's matrix instruction. Status::unsupported_isa for one that the device does not have, and for
// popcount, which has none.
Status popcount_peak(const PopcountPeakArgs& args, ConvEngine engine, Stream stream) noexcept;
int64_t popcount_peak_bytes(int device) noexcept;  // of its counts
// 2 for each multiply-add of two bits.
int64_t popcount_peak_operations(int64_t iterations, ConvEngine engine, int device) noexcept;

// What CUDA said to this thread's last call that returned Status::cuda_error.
const char* last_error_text() noexcept;

// 10 * major + minor of the compute capability, 90 for 9.0; -1 where CUDA cannot say: see last_error_text().
int architecture(int device) noexcept;

}  // namespace lowbit::cuda
