#include "cpu/lookup/lookup_avx512.h"
#include "cpu/binary_conv2d_weight_grad/driver.h"

namespace lowbit::avx512 {
namespace {
using SignGradient = WeightGrad<Avx512Lookup<Encoding::sign>>;
using StepGradient = WeightGrad<Avx512Lookup<Encoding::step>>;
}  // namespace

int64_t binary_conv2d_weight_grad_workspace_bytes(const BinaryConv2dWeightGradArgs& args) noexcept {
  return args.encoding == Encoding::sign ? SignGradient(args, nullptr).workspace_bytes()
                                         : StepGradient(args, nullptr).workspace_bytes();
}

int64_t binary_conv2d_weight_grad_items(const BinaryConv2dWeightGradArgs& args) noexcept {
  return args.encoding == Encoding::sign ? SignGradient(args, nullptr).items() : StepGradient(args, nullptr).items();
}

void binary_conv2d_weight_grad(const BinaryConv2dWeightGradArgs& args, int64_t begin, int64_t end,
                               void* workspace) noexcept {
  if (args.encoding == Encoding::sign) {
    SignGradient(args, workspace).run(begin, end);
  } else {
    StepGradient(args, workspace).run(begin, end);
  }
}

}  // namespace lowbit::avx512
