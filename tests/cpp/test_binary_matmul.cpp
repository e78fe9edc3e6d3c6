// Every output, bit for bit.
#include "cpu/launch.h"
#include "matmul_case.h"

namespace lowbit::test {

LOWBIT_TEST(binary_matmul) {
  for (int i = 0; i < cases; ++i) {
    MatmulCase operands(random, 300000);
    BinaryMatmulArgs& args = operands.args;
    operands.for_each_output([&](auto element) {
      Buffer<decltype(element)> got(args.batch * args.rows * args.columns);
      args.output = got.data();
      Workspace workspace(launch::binary_matmul_workspace_bytes(args));
      args.workspace = workspace.data();
      expect_workspace(operands.describe(), workspace.bytes(),
                       [&](int64_t bytes) { return launch::binary_matmul(args, bytes); });
      expect_same(operands.describe(), got, operands.expected<decltype(element)>());
    });
  }
}

}  // namespace lowbit::test
