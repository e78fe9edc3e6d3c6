#include "code_cases.h"
#include "cpu/batch_norm_relu_backward/batch_norm_relu_backward.h"

namespace lowbit::test {
namespace {

// Terms of a lane: floats, 128 of them at a time, then doubles.
class Lane {
 public:
  void add(float term) {
    part_ += term;
    if (++terms_ % 128 == 0) empty();
  }
  double sum() {
    empty();
    return sum_;
  }

 private:
  void empty() {
    sum_ += static_cast<double>(part_);
    part_ = 0;
  }

  float part_ = 0;
  double sum_ = 0;
  int terms_ = 0;
};

template <class Value>
void check(Random& random, FloatType type) {
  const ChannelShape shape = random_channel_shape(random);
  const int64_t count = elements(shape), channels = shape.channels;
  const int bits = random.pick({2, 4, 8});
  const float span = code_case_span(random);
  const bool relu = random.coin(), training = random.coin();
  const std::string what =
      name_of(shape, type, bits) + (relu ? "" : " without ReLU") + (training ? "" : " in evaluation");
  ChannelParameters channel(random, channels);
  Buffer<uint8_t> codes(channel_code_bytes(shape, bits));
  fill_codes(codes, count, row_length(shape), bits, random);
  Buffer<Value> grad(count), grad_input(count), pieced(count);
  std::vector<float> masked, xhat;
  const CodeRows rows(row_length(shape), bits);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t c = channel_of(shape, i);
    grad[i] = static_cast<Value>(float_bits(random.normal(), type));
    const ChannelGrid g = channel_grid(channel.gamma[c], channel.beta[c], bits, span, relu);
    const float code = static_cast<float>(rows.get(codes.data(), i));
    masked.push_back(code >= g.shift ? load_float(grad.data(), type, i) : 0.0f);
    xhat.push_back(code * code_step(g) + code_origin(g));
  }

  std::vector<float> expected_gamma, expected_beta, mean, slope;
  for (int64_t c = 0; c < channels; ++c) {
    double sum = 0, product = 0;
    // Lane l of a chunk has the chunk's elements of this channel first + l, first + l + lanes, ...
    const auto add_chunk = [&](int64_t first, int64_t length, int64_t stride, int64_t lanes) {
      double chunk_sum = 0, chunk_product = 0;
      for (int64_t l = 0; l < lanes; ++l) {
        Lane of_sum, of_product;
        for (int64_t i = l; i < length; i += lanes) {
          const size_t element = static_cast<size_t>(first + i * stride);
          of_sum.add(masked[element]);
          of_product.add(masked[element] * xhat[element]);
        }
        chunk_sum += of_sum.sum();
        chunk_product += of_product.sum();
      }
      sum += chunk_sum;
      product += chunk_product;
    };
    if (shape.channels_last) {
      const int64_t pixels = shape.outer * shape.spatial;
      for (int64_t first = 0; first < pixels; first += 1024) {
        add_chunk(first * channels + c, std::min<int64_t>(1024, pixels - first), channels, block_pixels(shape, bits));
      }
    } else {
      for (int64_t image = 0; image < shape.outer; ++image) {
        add_chunk((image * channels + c) * shape.spatial, shape.spatial, 1, 16);
      }
    }
    expected_beta.push_back(static_cast<float>(sum));
    expected_gamma.push_back(static_cast<float>(product));
    const double terms = static_cast<double>(shape.outer * shape.spatial);
    mean.push_back(training ? static_cast<float>(sum / terms) : 0.0f);
    slope.push_back(training ? static_cast<float>(product / terms) : 0.0f);
  }
  std::vector<Value> expected;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t c = channel_of(shape, i);
    const size_t channel_index = static_cast<size_t>(c), element = static_cast<size_t>(i);
    const float removed = mean[channel_index] + xhat[element] * slope[channel_index];
    const float number = channel.gamma[c] * channel.invstd[c] * (masked[element] - removed);
    expected.push_back(static_cast<Value>(float_bits(number, type)));
  }

  Buffer<float> grad_gamma(channels), grad_beta(channels);
  BatchNormReluBackwardArgs args{
      grad.data(), type,   shape, codes.data(), channel.gamma.data(), channel.beta.data(), channel.invstd.data(),
      bits,        span,   relu,  training,     grad_input.data(),    grad_gamma.data(),   grad_beta.data(),
      nullptr,     nullptr};
  Buffer<double> workspace(launch::batch_norm_relu_backward_workspace_bytes(args) / 8);
  set_workspace(args, workspace.data());
  expect_workspace(what, workspace.bytes(),
                   [&](int64_t bytes) { return launch::batch_norm_relu_backward(args, bytes); });
  expect_same(what + ", grad of beta", grad_beta, expected_beta);
  expect_same(what + ", grad of gamma", grad_gamma, expected_gamma);
  expect_same(what, grad_input, expected);
  const std::vector<double> sums(args.sums, args.sums + sums_count(shape));
  Buffer<double> pieced_sums(sums_count(shape));
  args.sums = pieced_sums.data();
  args.grad_input = pieced.data();
  in_pieces(chunks(shape), random,
            [&](int64_t begin, int64_t end) { kernels().batch_norm_relu_sums(args, begin, end); });
  expect_same(what + ", sums in pieces", pieced_sums, sums);
  in_pieces(row_count(shape), random,
            [&](int64_t begin, int64_t end) { kernels().batch_norm_relu_backward(args, begin, end); });
  expect_same(what + " in pieces", pieced, expected);
}

}  // namespace

LOWBIT_TEST(batch_norm_relu_backward) {
  for (int i = 0; i < cases / 4 + 1; ++i) {
    check<uint32_t>(random, FloatType::float32);
    check<uint16_t>(random, FloatType::bfloat16);
    check<uint16_t>(random, FloatType::float16);
  }
}

}  // namespace lowbit::test
