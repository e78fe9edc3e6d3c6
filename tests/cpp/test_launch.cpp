// Launchers refuse inconsistent sizes before any kernel sees them.
#include "common.h"
#include "core/checks.h"

namespace lowbit::test {
namespace {

ConvShape ordinary_conv() {
  ConvShape s{};
  s.batch = 1;
  s.channels = 8;
  s.filters = s.height = s.width = 4;
  s.kernel_height = s.kernel_width = 3;
  s.out_height = s.out_width = 2;
  s.stride_height = s.stride_width = s.dilation_height = s.dilation_width = s.groups = 1;
  return s;
}

PoolShape ordinary_pool() {
  PoolShape s{};
  s.batch = 1;
  s.channels = 8;
  s.height = s.width = 4;
  s.kernel_height = s.kernel_width = s.stride_height = s.stride_width = s.out_height = s.out_width = 2;
  s.dilation_height = s.dilation_width = 1;
  return s;
}

void expect_refused(const char* what, Status status) {
  if (status != Status::bad_shape) fail(std::string(what) + " was not refused");
}

// Must be refused by every launcher that takes it.
void refuse(const char* what, const ConvShape& shape) {
  if (valid(shape)) fail(std::string(what) + " counts as valid");
  BinaryConv2dArgs conv{};
  BinaryConv2dInputGradArgs input_grad{};
  BinaryConv2dWeightGradArgs weight_grad{};
  conv.shape = input_grad.shape = weight_grad.shape = shape;
  expect_refused(what, launch::binary_conv2d(conv, 0));
  expect_refused(what, launch::binary_conv2d_input_grad(input_grad, 0));
  expect_refused(what, launch::binary_conv2d_weight_grad(weight_grad, 0));
}

void refuse(const char* what, const PoolShape& shape) {
  if (valid(shape)) fail(std::string(what) + " counts as valid");
  BinaryMaxPool2dArgs max_pool{};
  BinaryAvgPool2dArgs avg_pool{};
  PointwiseArgs pointwise{};
  max_pool.shape = avg_pool.shape = pointwise.shape = shape;
  pointwise.reduction = Reduction::maximum;
  expect_refused(what, launch::binary_max_pool2d(max_pool));
  expect_refused(what, launch::binary_avg_pool2d(avg_pool));
  expect_refused(what, launch::pointwise(pointwise));
}

// An ordinary shape with one member set to `value`.
void refuse(const char* what, int64_t ConvShape::* member, int64_t value) {
  ConvShape shape = ordinary_conv();
  shape.*member = value;
  refuse(what, shape);
}
void refuse(const char* what, int64_t PoolShape::* member, int64_t value) {
  PoolShape shape = ordinary_pool();
  shape.*member = value;
  refuse(what, shape);
}

// Windows that lie far apart, reach far or are framed by much padding, in one dimension or in both: whatever the
// launchers ask for stays within int64, and workspaces that no machine has are refused before they are sized.
void refuse_far_windows() {
  for (int shift = 30; shift < 63; ++shift) {
    const int64_t far = int64_t{1} << shift;
    ConvShape conv = ordinary_conv();
    conv.out_height = conv.out_width = 1;
    if (shift >= 31) {
      refuse("a far stride", [&] {
        ConvShape s = conv;
        s.stride_height = far;
        return s;
      }());
      refuse("a far dilation", [&] {
        ConvShape s = conv;
        s.dilation_width = far;
        return s;
      }());
    }
    conv.stride_height = conv.stride_width = far;
    conv.dilation_height = conv.dilation_width = far;
    conv.pad_top = conv.pad_left = far;
    conv.out_height = conv.out_width = 3;
    refuse("far windows in a frame", conv);
  }
}

// The most that passes: the sizes of all workspaces are numbers, and the pools stay inside their image.
void accept_far_windows() {
  constexpr int64_t kFar = int64_t{1} << 19;
  ConvShape conv = ordinary_conv();
  conv.dilation_height = conv.dilation_width = kFar;
  conv.pad_top = conv.pad_left = kFar;
  conv.stride_height = conv.stride_width = (int64_t{1} << 31) - 1;
  conv.out_height = conv.out_width = 1;
  if (!valid(conv)) fail("a far stride of a single window is refused");
  BinaryConv2dArgs args{};
  BinaryConv2dInputGradArgs input_grad{};
  BinaryConv2dWeightGradArgs weight_grad{};
  args.shape = input_grad.shape = weight_grad.shape = conv;
  for (const int64_t bytes :
       {launch::binary_conv2d_workspace_bytes(args), launch::binary_conv2d_input_grad_workspace_bytes(input_grad),
        launch::binary_conv2d_weight_grad_workspace_bytes(weight_grad)}) {
    if (bytes < 0 || bytes > kMostBytes) fail("a workspace of " + std::to_string(bytes) + " bytes");
  }

  PoolShape pool = ordinary_pool();
  pool.channels = 1;
  pool.kernel_height = pool.kernel_width = pool.stride_height = pool.stride_width = (int64_t{1} << 31) - 1;
  pool.pad_top = pool.pad_left = int64_t{1} << 30;
  pool.out_height = pool.out_width = 1;
  Buffer<uint64_t> input(16), words(1);
  Buffer<float> average(1);
  for (int64_t i = 0; i < 16; ++i) input[i] = i == 9;
  if (launch::binary_max_pool2d({pool, input.data(), nullptr, words.data()}) != Status::ok || words[0] != 1) {
    fail("maximum over a window of 2^62");
  }
  const BinaryAvgPool2dArgs avg_pool{pool, Encoding::step, false, 0, input.data(), average.data()};
  if (launch::binary_avg_pool2d(avg_pool) != Status::ok || average[0] != 0.0625f) fail("mean over a window of 2^62");

  Buffer<float> image(16);
  for (int64_t i = 0; i < 16; ++i) image[i] = static_cast<float>(input[i]);
  average[0] = 0;
  const EpilogueStep store{static_cast<int64_t>(StepKind::store),
                           static_cast<int64_t>(FloatType::float32),
                           0,
                           0,
                           static_cast<int64_t>(reinterpret_cast<uintptr_t>(average.data())),
                           1};
  const PointwiseArgs pointwise{pool, Reduction::average, false,      0, image.data(), FloatType::float32, true,
                                1,    {nullptr, 0},       {&store, 1}};
  if (launch::pointwise(pointwise) != Status::ok || average[0] != 0.0625f) fail("float mean over a window of 2^62");
}

}  // namespace

LOWBIT_TEST(launch) {
  constexpr int64_t kHuge = int64_t{1} << 62;
  if (!valid(ordinary_conv())) fail("an ordinary convolution is refused");
  refuse("batch -1", &ConvShape::batch, -1);
  refuse("batch 2^62", &ConvShape::batch, kHuge);
  refuse("height -1", &ConvShape::height, -1);
  refuse("width 2^62", &ConvShape::width, kHuge);
  refuse("channels 0", &ConvShape::channels, 0);
  refuse("2^31 products", &ConvShape::channels, int64_t{1} << 28);
  refuse("filters -1", &ConvShape::filters, -1);
  refuse("filters 2^62", &ConvShape::filters, kHuge);
  refuse("kernel_height 0", &ConvShape::kernel_height, 0);
  refuse("kernel_width 2^62", &ConvShape::kernel_width, kHuge);
  refuse("out_height -1", &ConvShape::out_height, -1);
  refuse("out_width 2^62", &ConvShape::out_width, kHuge);
  refuse("stride_height 0", &ConvShape::stride_height, 0);
  refuse("stride_width -1", &ConvShape::stride_width, -1);
  refuse("stride_width 2^31", &ConvShape::stride_width, int64_t{1} << 31);
  refuse("stride_height 2^61", &ConvShape::stride_height, int64_t{1} << 61);
  refuse("dilation_width 2^62", &ConvShape::dilation_width, kHuge);
  refuse("pad_top 2^62", &ConvShape::pad_top, kHuge);
  refuse("pad_top -1", &ConvShape::pad_top, -1);
  refuse("pad_left -1", &ConvShape::pad_left, -1);
  refuse("dilation_height 0", &ConvShape::dilation_height, 0);
  refuse("dilation_width -1", &ConvShape::dilation_width, -1);
  refuse("groups 0", &ConvShape::groups, 0);
  refuse("groups 3 of 8 channels", &ConvShape::groups, 3);
  refuse("groups 8 of 4 filters", &ConvShape::groups, 8);

  refuse("pool batch -1", &PoolShape::batch, -1);
  refuse("pool batch 2^62", &PoolShape::batch, kHuge);
  refuse("pool channels -1", &PoolShape::channels, -1);
  refuse("pool kernel_height 0", &PoolShape::kernel_height, 0);
  refuse("pool out_width 2^62", &PoolShape::out_width, kHuge);
  refuse("pool stride_width 0", &PoolShape::stride_width, 0);
  refuse("pool stride_width 2^31", &PoolShape::stride_width, int64_t{1} << 31);
  refuse("pool dilation_height 2^62", &PoolShape::dilation_height, kHuge);
  refuse("pool pad_top -1", &PoolShape::pad_top, -1);
  refuse("pool pad_left 2^62", &PoolShape::pad_left, kHuge);
  refuse("pool out_height 2^60, whose windows end past 2^63", &PoolShape::out_height, int64_t{1} << 60);
  PoolShape large = ordinary_pool();  // sums of 2^30 bits past int32
  large.channels = 1;
  large.kernel_height = large.kernel_width = large.height = large.width = int64_t{1} << 15;
  large.out_height = large.out_width = 1;
  refuse("pool of 2^30 pixels", large);
  refuse_far_windows();
  accept_far_windows();

  BinarizeArgs binarize{};
  binarize.outer = binarize.channels = binarize.spatial = int64_t{1} << 30;
  expect_refused("binarize of 2^90 elements", launch::binarize(binarize));
  binarize.outer = binarize.channels = binarize.spatial = 1;
  binarize.thresholds = 2;
  if (launch::binarize(binarize) != Status::bad_argument)
    fail("binarize by two thresholds, one given, was not refused");
  UnpackArgs unpack{};
  unpack.pixels = -1;
  expect_refused("unpack of -1 pixels", launch::unpack(unpack));
  unpack.pixels = 1;
  unpack.output_type = static_cast<FloatType>(3);
  if (launch::unpack(unpack) != Status::bad_argument) fail("unpack to type 3 was not refused");
  AlignGroupsArgs align{};
  align.pixels = align.groups = align.channels_per_group = int64_t{1} << 30;
  expect_refused("align_groups of 2^90 channels", launch::align_groups(align));
  align.pixels = align.groups = 1;
  align.channels_per_group = 0;
  expect_refused("align_groups of no channels", launch::align_groups(align));

  ChannelDequantizeArgs dequantize{};
  dequantize.bits = 4;
  dequantize.span = 6;
  dequantize.shape = {kHuge, kHuge, 0, false};
  expect_refused("channel_dequantize of 2^124 rows", launch::channel_dequantize(dequantize, 0));
}

}  // namespace lowbit::test
