// out[i, m, n] = scale * sum over k of a[i, m, k] * b[i, n, k], the sum exact in int32; float outputs are that rounded
// to float32, times scale rounded to float32, then rounded once to the type.
//   a, b in {-1, +1} (sign) or {0, 1} (step), each on its own.
// With b of signs it is binary_conv2d of 1 x 1 images by a 1 x 1 kernel, for each i; with b of steps half of the sum of
// that and of a's row, as b = (1 + its signs) / 2.
#pragma once

#include "core/ops/binary_conv2d.h"

namespace lowbit {

struct BinaryMatmulArgs {
  int64_t batch, rows, columns, depth;  // of depth below 2^31, with b of steps below 2^30
  Encoding a_encoding, b_encoding;
  const uint64_t* a;       // [batch, rows, words_for(depth)]
  const uint64_t* b;       // [batch, columns, words_for(depth)]
  const float* scale;      // one value of a float output, or null
  ConvOutput output_kind;  // int32 or float32; with b of signs also bfloat16 and float16
  void* output;            // [batch, rows, columns]
  void* workspace;         // binary_matmul_workspace_bytes, 64-byte aligned
};

LOWBIT_INLINE int64_t output_bytes(const BinaryMatmulArgs& args) {
  return args.output_kind == ConvOutput::int32 || args.output_kind == ConvOutput::float32 ? 4 : 2;
}

LOWBIT_INLINE ConvShape matmul_shape(const BinaryMatmulArgs& args, int64_t rows) {
  return {1, 1, rows, args.depth, args.columns, 1, 1, 1, rows, 1, 1, 0, 0, 1, 1, 1};
}

// Rows [first, first + rows) of matrix i as a convolution, to which `weight` and a workspace are missing; with b of
// steps, of b's signs and in int32.
LOWBIT_INLINE BinaryConv2dArgs matmul_conv(const BinaryMatmulArgs& args, int64_t i, int64_t first, int64_t rows) {
  BinaryConv2dArgs conv{};
  conv.shape = matmul_shape(args, rows);
  conv.encoding = args.a_encoding;
  conv.input = args.a + (i * args.rows + first) * words_for(args.depth);
  const bool signs = args.b_encoding == Encoding::sign;
  conv.output_kind = signs ? args.output_kind : ConvOutput::int32;
  conv.scale = signs ? args.scale : nullptr;
  conv.output = static_cast<uint8_t*>(args.output) + (i * args.rows + first) * args.columns * output_bytes(args);
  return conv;
}

// Sum of a row of a of so many ones.
LOWBIT_INLINE int32_t row_sum(const BinaryMatmulArgs& args, int64_t ones) {
  return static_cast<int32_t>(args.a_encoding == Encoding::sign ? 2 * ones - args.depth : ones);
}

}  // namespace lowbit
