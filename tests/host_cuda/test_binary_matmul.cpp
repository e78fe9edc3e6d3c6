// Every output, bit for bit.
#include "../cpp/matmul_case.h"
#include "tests.h"

namespace lowbit::test {

LOWBIT_TEST(binary_matmul) {
  for (int i = 0; i < cases; ++i) {
    MatmulCase operands(random, 60000, random_alignment(random));
    BinaryMatmulArgs& args = operands.args;
    operands.for_each_output([&](auto element) {
      Buffer<decltype(element)> got(args.batch * args.rows * args.columns, random_alignment(random));
      Workspace workspace(cuda::binary_matmul_workspace_bytes(args));
      args.output = got.data();
      args.workspace = workspace.data();
      expect_workspace(operands.describe(), workspace.bytes(),
                       [&](int64_t bytes) { return cuda::binary_matmul(args, bytes, kStream); });
      expect_same(operands.describe(), got, operands.expected<decltype(element)>());
    });
  }
}

}  // namespace lowbit::test
