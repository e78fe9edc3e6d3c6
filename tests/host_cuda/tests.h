// What the tests of the CUDA kernels share beside tests/cpp, and their list. Each draws random cases and compares a
// CUDA launcher, run on the host, with the scalar CPU kernel.
#pragma once

#include "../cpp/common.h"
#include "cuda/launch.h"

namespace lowbit::test {

constexpr cuda::Stream kStream{1, nullptr};  // not the current device, which a launch must leave as it is

// Operands come from torch's allocator, or are slices that begin anywhere.
inline Alignment random_alignment(Random& random) {
  return random.between(0, 3) == 0 ? Alignment::value : Alignment::allocator;
}

void test_align_groups(Random& random, int cases);
void test_antithetic_gradient(Random& random, int cases);
void test_antithetic_sample(Random& random, int cases);
void test_batch_norm_relu_backward(Random& random, int cases);
void test_batch_norm_relu_quantize(Random& random, int cases);
void test_binarize(Random& random, int cases);
void test_binary_avg_pool2d(Random& random, int cases);
void test_binary_conv2d(Random& random, int cases);
void test_binary_conv2d_input_grad(Random& random, int cases);
void test_binary_conv2d_weight_grad(Random& random, int cases);
void test_binary_max_pool2d(Random& random, int cases);
void test_channel_dequantize(Random& random, int cases);
void test_device(Random& random, int cases);
void test_divisor(Random& random, int cases);
void test_group_dequantize(Random& random, int cases);
void test_group_quantize(Random& random, int cases);
void test_masked_gradient(Random& random, int cases);
void test_popcount_peak(Random& random, int cases);
void test_quantized_activation(Random& random, int cases);
void test_unpack(Random& random, int cases);

}  // namespace lowbit::test
