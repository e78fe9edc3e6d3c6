// Every output kind of every engine, equal to the scalar kernel's.
#include "cpu/binary_conv2d/binary_conv2d.h"
#include "cpu/align_groups/align_groups.h"

#include "../cpp/conv_case.h"
#include "../cpp/epilogue_case.h"
#include "host_cuda.h"
#include "tests.h"

namespace lowbit::test {
namespace {

constexpr int64_t kMostProducts = 400000;
constexpr std::initializer_list<cuda::ConvEngine> kEngines = {cuda::ConvEngine::popcount, cuda::ConvEngine::mma,
                                                              cuda::ConvEngine::wgmma};

// What a device reads its own form of.
struct Operands {
  const uint64_t* input;
  const void* weight;

  void put_into(BinaryConv2dArgs& args) const {
    args.input = input;
    args.weight = weight;
  }
};

template <class Output>
void check_output(BinaryConv2dArgs args, const Operands& host, const Operands& device, Random& random) {
  const ConvShape& s = args.shape;
  const int64_t row = args.thresholds > 0 ? words_for(args.thresholds * s.filters) : s.filters;
  Buffer<Output> expected(out_pixels(s) * row), got(out_pixels(s) * row, random_alignment(random));
  host.put_into(args);
  args.output = expected.data();
  const BinaryConv2dPlan plan = scalar::binary_conv2d_plan(args);
  Workspace workspace(plan.workspace_bytes);
  scalar::binary_conv2d(args, plan, 0, plan.items, workspace.data());

  const cuda::ConvEngine one = random.pick(kEngines);
  for (const cuda::ConvEngine engine : kEngines) {
    if (args.output_kind != ConvOutput::int32 && engine != one) continue;
    const std::string what = "engine " + std::to_string(static_cast<int>(engine)) + ": " + describe(args);
    memset(got.data(), 0xa5, static_cast<size_t>(got.bytes()));
    device.put_into(args);
    args.output = got.data();
    Buffer<int32_t> accumulators(cuda::binary_conv2d_workspace_bytes(args) / 4);
    args.workspace = accumulators.data();
    expect_workspace(what, accumulators.bytes(),
                     [&](int64_t bytes) { return cuda::binary_conv2d(args, bytes, engine, kStream); });
    expect_same(what, got, expected);
  }
}

// Accumulators of the scalar level.
std::vector<float> accumulators(BinaryConv2dArgs args, const Operands& host) {
  Buffer<int32_t> acc(out_pixels(args.shape) * args.shape.filters);
  host.put_into(args);
  args.output_kind = ConvOutput::int32;
  args.output = acc.data();
  const BinaryConv2dPlan plan = scalar::binary_conv2d_plan(args);
  Workspace workspace(plan.workspace_bytes);
  scalar::binary_conv2d(args, plan, 0, plan.items, workspace.data());
  return std::vector<float>(acc.data(), acc.data() + acc.size());
}

void check_program(BinaryConv2dArgs args, const Operands& host, const Operands& device, Random& random) {
  EpilogueCase epilogue(random, accumulators(args, host), args.shape.filters, args.shape.batch, true);
  device.put_into(args);
  args.output_kind = ConvOutput::program;
  args.program = epilogue.program();
  Buffer<int32_t> workspace(cuda::binary_conv2d_workspace_bytes(args) / 4);
  args.workspace = workspace.data();
  const cuda::ConvEngine engine = random.pick(kEngines);
  const std::string what = "engine " + std::to_string(static_cast<int>(engine)) + ": " + describe(args);
  expect_workspace(what, workspace.bytes(),
                   [&](int64_t bytes) { return cuda::binary_conv2d(args, bytes, engine, kStream); });
  epilogue.expect(what);
}

void check(Random& random) {
  const ConvShape s = random_conv_shape(random, kMostProducts);
  ConvCase operands(random, s, random_alignment(random));
  Buffer<uint64_t> scalar_weight(ceil_div(scalar::binary_conv2d_weight_bytes(s), 8));
  scalar::binary_conv2d_block_weight(s, operands.words.data(), scalar_weight.data());
  Buffer<uint64_t> weight(ceil_div(cuda::binary_conv2d_weight_bytes(s), 8), random_alignment(random));
  expect_ok(describe(s), cuda::binary_conv2d_block_weight(s, operands.words.data(), weight.data(), kStream));
  Buffer<uint64_t> aligned(s.batch * s.height * s.width * s.groups * words_per_group(s), random_alignment(random));
  Operands host = {operands.input.data(), scalar_weight.data()}, device = {operands.input.data(), weight.data()};
  if (has_narrow_groups(s)) {
    scalar::align_groups({host.input, s.batch * s.height * s.width, s.groups, channels_per_group(s), aligned.data()}, 0,
                         s.batch * s.height * s.width);
    device.input = aligned.data();
  }
  // Small integers, and so near the sums that equality is met.
  for (int64_t i = 0; i < 2 * s.filters; ++i) {
    operands.integer_threshold[i] = static_cast<int32_t>(random.between(-6, 6));
    operands.float_threshold[i] =
        random.coin() ? 5 * random.normal() : static_cast<float>(operands.integer_threshold[i]);
  }
  operands.for_each_output(random, [&](const BinaryConv2dArgs& of_kind, auto element) {
    check_output<decltype(element)>(of_kind, host, device, random);
  });
  check_program(operands.args, host, device, random);
}

// Which architecture has which engines, and what becomes of a wish for another.
void check_engines() {
  struct {
    int architecture;
    cuda::ConvEngine by_default;
    bool mma, wgmma;
  } const expected[] = {
      {75, cuda::ConvEngine::popcount, false, false},  {80, cuda::ConvEngine::mma, true, false},
      {90, cuda::ConvEngine::mma, true, true},         {100, cuda::ConvEngine::popcount, false, false},
      {120, cuda::ConvEngine::popcount, false, false},
  };
  BinaryConv2dArgs args{};
  args.shape = {0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1};
  for (const auto& device : expected) {
    host_cuda::set_architecture(device.architecture);
    const std::string what = "sm_" + std::to_string(device.architecture);
    const auto runs = [&](cuda::ConvEngine engine) {
      const bool has = cuda::binary_conv2d_has_engine(engine, kStream.device);
      const Status status = cuda::binary_conv2d(args, 0, engine, kStream);
      if (status != (has ? Status::ok : Status::unsupported_isa))
        fail(what + ": an engine is not what it is said to be");
      return has;
    };
    if (cuda::binary_conv2d_default_engine(kStream.device) != device.by_default) fail(what + ": default engine");
    if (!runs(cuda::ConvEngine::popcount)) fail(what + ": engine popcount");
    if (runs(cuda::ConvEngine::mma) != device.mma) fail(what + ": engine mma");
    if (runs(cuda::ConvEngine::wgmma) != device.wgmma) fail(what + ": engine wgmma");
  }
  host_cuda::set_architecture(90);
  if (cuda::binary_conv2d(args, 0, cuda::ConvEngine::mma, {7, nullptr}) != Status::cuda_error)
    fail("device 7 is taken");
}

}  // namespace

LOWBIT_TEST(binary_conv2d) {
  check_engines();
  for (int i = 0; i < cases; i += 2) check(random);  // slow: half the cases
}

}  // namespace lowbit::test
