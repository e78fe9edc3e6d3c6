// Every output kind of every engine, equal to the scalar kernel's.
#include "cpu/binary_conv2d/binary_conv2d.h"

#include "../cpp/conv_shapes.h"
#include "host_cuda.h"
#include "tests.h"

namespace lowbit::test {
namespace {

constexpr int64_t kMostProducts = 400000;
constexpr std::initializer_list<cuda::ConvEngine> kEngines = {cuda::ConvEngine::popcount, cuda::ConvEngine::mma,
                                                              cuda::ConvEngine::wgmma};

template <class Output>
void check_output(BinaryConv2dArgs args, const void* scalar_weight, const void* weight, Random& random,
                  std::initializer_list<cuda::ConvEngine> engines) {
  const ConvShape& s = args.shape;
  const bool bits = args.thresholds > 0;
  const int64_t row = bits ? words_for(args.thresholds * s.filters) : s.filters;
  Buffer<Output> expected(out_pixels(s) * row), got(out_pixels(s) * row, random_alignment(random));
  args.weight = scalar_weight;
  args.output = expected.data();
  Workspace workspace(scalar::binary_conv2d_workspace_bytes(args));
  scalar::binary_conv2d(args, 0, scalar::binary_conv2d_items(args), workspace.data());

  for (const cuda::ConvEngine engine : engines) {
    const std::string what = "engine " + std::to_string(static_cast<int>(engine)) + ": " + describe(s) + ", encoding " +
                             std::to_string(static_cast<int>(args.encoding)) + ", padding " +
                             std::to_string(args.padding_value) + ", output " +
                             std::to_string(static_cast<int>(args.output_kind)) + ", thresholds " +
                             std::to_string(args.thresholds);
    memset(got.data(), 0xa5, static_cast<size_t>(got.bytes()));
    args.weight = weight;
    args.output = got.data();
    Buffer<int32_t> accumulators(cuda::binary_conv2d_workspace_bytes(args) / 4);
    args.workspace = accumulators.data();
    if (accumulators.size() > 0 &&
        cuda::binary_conv2d(args, accumulators.bytes() - 1, engine, kStream) != Status::small_workspace) {
      fail(what + ": a small workspace is taken");
    }
    expect_ok(what, cuda::binary_conv2d(args, accumulators.bytes(), engine, kStream));
    expect_same(what, got, expected);
  }
}

void check(Random& random) {
  const ConvShape s = random_conv_shape(random, kMostProducts);
  const int64_t channels = channels_per_group(s), outputs = out_pixels(s) * s.filters;
  BinaryConv2dArgs args{};
  args.shape = s;
  args.encoding = random.pick({Encoding::sign, Encoding::step});
  args.padding_value = args.encoding == Encoding::sign ? random.pick({0, 1, -1}) : random.pick({0, 1});

  Buffer<uint64_t> input(s.batch * s.height * s.width * s.groups * words_for(channels), random_alignment(random));
  Buffer<uint64_t> words(s.filters * taps(s) * words_for(channels), random_alignment(random));
  fill_bits(input, channels, random);
  fill_bits(words, channels, random);
  args.input = input.data();
  Buffer<uint64_t> scalar_weight(ceil_div(scalar::binary_conv2d_weight_bytes(s), 8));
  scalar::binary_conv2d_block_weight(s, words.data(), scalar_weight.data());
  Buffer<uint64_t> weight(ceil_div(cuda::binary_conv2d_weight_bytes(s), 8), random_alignment(random));
  expect_ok(describe(s), cuda::binary_conv2d_block_weight(s, words.data(), weight.data(), kStream));

  Buffer<float> scale(s.filters), bias(s.filters), float_threshold(2 * s.filters), residual32(outputs);
  Buffer<uint16_t> residual16(outputs);
  Buffer<int32_t> integer_threshold(2 * s.filters);
  Buffer<uint8_t> flip(2 * s.filters);
  for (int64_t o = 0; o < s.filters; ++o) {
    scale[o] = random.normal();
    bias[o] = 10 * random.normal();
  }
  args.scale_stride = random.between(0, 1);
  args.scale = random.coin() ? scale.data() : nullptr;
  args.bias = random.coin() ? bias.data() : nullptr;
  args.residual_type = random.pick({FloatType::float32, FloatType::bfloat16, FloatType::float16});
  for (int64_t i = 0; i < outputs; ++i) {
    residual32[i] = 10 * random.normal();
    residual16[i] = static_cast<uint16_t>(rounded_bits(residual32[i], args.residual_type));
  }
  if (random.coin()) {
    args.residual = args.residual_type == FloatType::float32 ? static_cast<const void*>(residual32.data())
                                                             : static_cast<const void*>(residual16.data());
  }
  // Small integers, and so near the sums that equality is met.
  for (int64_t i = 0; i < 2 * s.filters; ++i) {
    integer_threshold[i] = static_cast<int32_t>(random.between(-6, 6));
    float_threshold[i] = random.coin() ? 5 * random.normal() : static_cast<float>(integer_threshold[i]);
    flip[i] = static_cast<uint8_t>(random.between(0, 1));
  }
  args.flip = random.coin() ? flip.data() : nullptr;

  args.output_kind = ConvOutput::int32;
  check_output<uint32_t>(args, scalar_weight.data(), weight.data(), random, kEngines);
  args.output_kind = ConvOutput::float32;
  check_output<uint32_t>(args, scalar_weight.data(), weight.data(), random, {random.pick(kEngines)});
  args.output_kind = random.pick({ConvOutput::bfloat16, ConvOutput::float16});
  check_output<uint16_t>(args, scalar_weight.data(), weight.data(), random, {random.pick(kEngines)});
  for (int64_t thresholds = 1; thresholds <= 2; ++thresholds) {
    args.thresholds = thresholds;
    args.output_kind = ConvOutput::bits_by_integer;
    args.threshold = integer_threshold.data();
    check_output<uint64_t>(args, scalar_weight.data(), weight.data(), random, {random.pick(kEngines)});
    args.output_kind = ConvOutput::bits_by_float;
    args.threshold = float_threshold.data();
    check_output<uint64_t>(args, scalar_weight.data(), weight.data(), random, {random.pick(kEngines)});
  }
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

void test_binary_conv2d(Random& random, int cases) {
  check_engines();
  for (int i = 0; i < cases; i += 2) check(random);  // slow: half the cases
}

}  // namespace lowbit::test
