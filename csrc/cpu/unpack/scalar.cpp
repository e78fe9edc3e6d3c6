#include "core/float_type.h"
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
  const uint32_t low = float_bits(args.low, args.output_type), high = float_bits(args.high, args.output_type);
  if (args.output_type == FloatType::float32) return unpack_range(args, low, high, begin, end);
  unpack_range(args, static_cast<uint16_t>(low), static_cast<uint16_t>(high), begin, end);
}

}  // namespace lowbit::scalar
