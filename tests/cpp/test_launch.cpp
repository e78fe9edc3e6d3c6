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

// An ordinary shape with one member set to `value` must be refused by every launcher that takes it.
void refuse(const char* what, int64_t ConvShape::* member, int64_t value) {
  ConvShape shape = ordinary_conv();
  shape.*member = value;
  if (valid(shape)) fail(std::string(what) + " counts as valid");
  BinaryConv2dArgs conv{};
  BinaryConv2dInputGradArgs input_grad{};
  BinaryConv2dWeightGradArgs weight_grad{};
  conv.shape = input_grad.shape = weight_grad.shape = shape;
  expect_refused(what, launch::binary_conv2d(conv, 0));
  expect_refused(what, launch::binary_conv2d_input_grad(input_grad, 0));
  expect_refused(what, launch::binary_conv2d_weight_grad(weight_grad, 0));
}

void refuse(const char* what, int64_t PoolShape::* member, int64_t value) {
  BinaryMaxPool2dArgs max_pool{};
  BinaryAvgPool2dArgs avg_pool{};
  max_pool.shape = avg_pool.shape = ordinary_pool();
  max_pool.shape.*member = avg_pool.shape.*member = value;
  expect_refused(what, launch::binary_max_pool2d(max_pool));
  expect_refused(what, launch::binary_avg_pool2d(avg_pool));
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
  refuse("pool pad_top -1", &PoolShape::pad_top, -1);

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

  ChannelDequantizeArgs dequantize{};
  dequantize.bits = 4;
  dequantize.span = 6;
  dequantize.shape = {kHuge, kHuge, 0, false};
  expect_refused("channel_dequantize of 2^124 rows", launch::channel_dequantize(dequantize, 0));
}

}  // namespace lowbit::test
