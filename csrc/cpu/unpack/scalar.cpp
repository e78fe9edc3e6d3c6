#include "core/half.h"
#include "cpu/unpack/unpack.h"

namespace lowbit::scalar {
namespace {

template <class Value>
void unpack_range(const UnpackArgs& args, Value low, Value high, int64_t begin, int64_t end) {
  const int64_t row_words = words_for(args.channels);
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    const uint64_t* words = args.words + pixel * row_words;
    Value* output = static_cast<Value*>(args.output) + pixel * args.channels;
    for (int64_t channel = 0; channel < args.channels; ++channel) {
      output[channel] = words[channel / kWordBits] >> (channel % kWordBits) & 1 ? high : low;
    }
  }
}

}  // namespace

void unpack(const UnpackArgs& args, int64_t begin, int64_t end) noexcept {
  switch (args.output_type) {
    case FloatType::float32:
      return unpack_range(args, float_to_bits(args.low), float_to_bits(args.high), begin, end);
    case FloatType::bfloat16:
      return unpack_range(args, float_to_bfloat16(args.low), float_to_bfloat16(args.high), begin, end);
    case FloatType::float16:
      return unpack_range(args, float_to_float16(args.low), float_to_float16(args.high), begin, end);
  }
}

}  // namespace lowbit::scalar
