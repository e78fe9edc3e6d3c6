#include "cpu/binary_conv2d_input_grad/driver.h"
#include "cpu/lookup/lookup_avx512.h"

namespace lowbit::avx512 {
namespace {
using Gradient = InputGrad<Avx512Lookup<Encoding::sign>>;
}  // namespace

int64_t binary_conv2d_input_grad_workspace_bytes(const BinaryConv2dInputGradArgs& args) noexcept {
  return Gradient(args, nullptr).workspace_bytes();
}

int64_t binary_conv2d_input_grad_items(const BinaryConv2dInputGradArgs& args) noexcept {
  return Gradient(args, nullptr).items();
}

void binary_conv2d_input_grad(const BinaryConv2dInputGradArgs& args, int64_t begin, int64_t end,
                              void* workspace) noexcept {
  Gradient(args, workspace).run(begin, end);
}

}  // namespace lowbit::avx512
