// Reads an eighth of `bits` bytes an element and writes 4 or 2: 16 bytes at a time where rows and addresses allow it,
// the loads of a thread's packs under way together.
//
// Instructions of a thread, channels last, 8 packs at 4 bits, with ReLU, on sm_90a, and the share of issue slots (132
// multiprocessors, 1.75 GHz) that they take at 3.0 TB/s; before, with parameters for each pack, about 81 and 121 %:
//   float32    144 bytes    503, 35 %
//   16 bits    160 bytes    842, 53 %
// Of these an element takes 9, and half of one to be rounded to 16 bits; 4 packs would leave 62 % for 16 bits.
#include "core/ops/channel_dequantize.h"

#include "core/checks.h"
#include "cuda/channel_codes.cuh"

namespace lowbit::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 8;  // of a thread, one pack of each

struct DequantizeKernelArgs {
  ChannelDequantizeArgs op;
  ChannelPacks packs;
  int64_t whole_rows;  // the first of them, if channels are last and the addresses allow whole packs
  float limit;         // the greatest value
  uint32_t masks[4];   // the bits of four neighbouring codes in their word
  float to_places[4];  // what codes are multiplied by to be there, and back: powers of two
  float from_places[4];
};

// What the elements of a pack are decoded with. A NaN of beta is one of `most`, which a minimum of two numbers then is.
template <int kCount>
struct Decoder {
  Pack<float, kCount> offset, scale, beta, most;
  Pack<float, kCount> shift;  // in the code's place

  __device__ void load(const DequantizeKernelArgs& args, int64_t column, bool each, int count, bool whole) {
    const auto parameter = [&](int row) {
      return load_parameter<kCount>(args.op.grid + row * args.packs.width, column, each, count, whole);
    };
    offset = parameter(kCodeOffset), scale = parameter(kScale), beta = parameter(kBeta);
    shift = parameter(kDequantizeShift);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      most.values[i] = beta.values[i] == beta.values[i] ? args.limit : beta.values[i];
      shift.values[i] = shift.values[i] * args.to_places[i % 4];
    }
  }

  // channel_value. The code stays in its place of the word: the multiplication that brings it down is exact, and so
  // rounds the sum with the offset once.
  template <bool kRelu>
  __device__ float value(int i, uint32_t word, const DequantizeKernelArgs& args) const {
    const float code = static_cast<float>(word & args.masks[i % 4]);
    const float sum = __fmaf_rn(code, args.from_places[i % 4], offset.values[i]);
    const float value = sum * scale.values[i] + beta.values[i];
    const float within = least_of(value, most.values[i]);
    if (!kRelu) return within < -args.limit ? -args.limit : within;
    return code >= shift.values[i] && !(value < 0) ? within : 0.0f;
  }
};

template <FloatType kType>
__device__ inline Values<kType> decode(const DequantizeKernelArgs& args, const Decoder<Values<kType>::kCount>& decoder,
                                       const PackCodes<Values<kType>::kCount>& codes) {
  float values[Values<kType>::kCount];
  if (args.op.relu) {
#pragma unroll
    for (int i = 0; i < Values<kType>::kCount; ++i) {
      values[i] = decoder.template value<true>(i, codes.fours[i / 4], args);
    }
  } else {
#pragma unroll
    for (int i = 0; i < Values<kType>::kCount; ++i) {
      values[i] = decoder.template value<false>(i, codes.fours[i / 4], args);
    }
  }
  return from_floats<kType>(values);
}

// Of a thread, the packs at one place of neighbouring rows: channels last, they have the same channels.
// Count of channel_dequantize_kernel<0>, ReLU: 8 LDG.E.U16, 8 STG.E.128.STRONG.SM, 32 FSETP.LT.OR; 144 bytes
// Count of channel_dequantize_kernel<1>, ReLU: 8 LDG.E, 8 STG.E.128.STRONG.SM, 64 FSETP.LT.OR; 160 bytes
// SASS of channel_dequantize_kernel: STG.E.128
template <FloatType kType>
__global__ void __launch_bounds__(kThreads) channel_dequantize_kernel(DequantizeKernelArgs args) {
  constexpr int kCount = Values<kType>::kCount;
  const ChannelPacks& packs = args.packs;
  const int bits = args.op.bits;
  const Division at = divide_with_remainder(int64_t{blockIdx.x} * kThreads + threadIdx.x, packs.by_row);
  const int64_t first = at.quotient * kRows, offset = at.remainder * kCount;
  auto* output = static_cast<BitsOf<kType>*>(args.op.output);
  Decoder<kCount> decoder;
  if (first + kRows <= args.whole_rows) {
    decoder.load(args, offset, true, kCount, true);
    const uint8_t* from = args.op.codes + first * packs.row_bytes + offset * bits / 8;
    PackCodes<kCount> codes[kRows];
#pragma unroll
    for (int row = 0; row < kRows; ++row, from += packs.row_bytes) {
      codes[row] = load_codes<kCount>(from, bits, kCount, true);
    }
    output += first * packs.row_length + offset;
#pragma unroll
    for (int row = 0; row < kRows; ++row, output += packs.row_length) {
      store_pack(output, decode<kType>(args, decoder, codes[row]));
    }
    return;
  }
#pragma unroll 1
  for (int row = 0; row < kRows; ++row) {
    const PackPlace place = place_of<kCount>(packs, bits, first + row, offset);
    if (place.count == 0) return;
    decoder.load(args, place.column, packs.channels_last, place.count, place.whole);
    const auto codes = load_codes<kCount>(args.op.codes + place.byte, bits, place.count, place.whole);
    store_values<kType>(output + place.element, decode<kType>(args, decoder, codes), place.count, place.whole);
  }
}

template <FloatType kType>
Status dequantize(const ChannelDequantizeArgs& args, Stream stream) {
  const bool aligned = are_aligned<kType>(args.output, args.codes, args.bits) && is_aligned(args.grid, kPackBytes);
  const ChannelPacks packs = make_channel_packs<kType>(args.shape, args.bits, aligned);
  const int64_t whole_rows = packs.channels_last && packs.vector ? packs.elements / packs.row_length : 0;
  DequantizeKernelArgs kernel_args{args, packs, whole_rows, finite_limit(kType), {}, {}, {}};
  for (int i = 0; i < 4; ++i) {
    const uint32_t place = 1u << (i * args.bits);
    kernel_args.masks[i] = ((1u << args.bits) - 1) * place;
    kernel_args.to_places[i] = static_cast<float>(place);
    kernel_args.from_places[i] = 1.0f / static_cast<float>(place);
  }
  const int64_t row_packs = static_cast<int64_t>(packs.by_row.divisor);
  const int64_t threads = ceil_div(packs.count / row_packs, kRows) * row_packs;
  return launch(channel_dequantize_kernel<kType>, {blocks_for(threads, kThreads), dim3(kThreads)}, stream, kernel_args);
}

}  // namespace

int64_t channel_dequantize_workspace_bytes(const ChannelDequantizeArgs& args) noexcept { return workspace_bytes(args); }

Status channel_dequantize(const ChannelDequantizeArgs& args, int64_t workspace_bytes, Stream stream) noexcept {
  Status status = check_channel_codes(args, workspace_bytes);
  if (status != Status::ok) return status;
  if (args.shape.outer == 0 || args.shape.channels == 0 || args.shape.spatial == 0) return Status::ok;
  status = launch_fill_grid(args, stream);
  if (status != Status::ok) return status;
  return for_type(args.type, [&](auto type) { return dequantize<type.value>(args, stream); });
}

}  // namespace lowbit::cuda
