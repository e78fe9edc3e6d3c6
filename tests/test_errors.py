"""Wrong calls: each message names the operation, the argument, what came and what was expected."""

import pytest
import torch

from lowbit_ext import PackedTensor, _native
from lowbit_ext.binary import (
    avg_pool2d,
    binarize,
    binary_activation,
    conv1d,
    conv2d,
    global_avg_pool,
    linear,
    matmul,
    max_pool2d,
    ops,
    pack_weight,
)
from lowbit_ext.duo import step_activation, ternary_activation

NAN = float("nan")
X = torch.ones(2, 6, 5, 5)
W = torch.ones(4, 6, 3, 3)
P = binarize(X)
WORDS = P.words
PW = pack_weight(W)
FLIP = torch.zeros(4, dtype=torch.bool)


def at(name, call, error, message):
    return pytest.param(call, error, message, id=name)


POINT = ops.Geometry(1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1)
HALVES = [2, 2, 2, 2, 0, 0, 1, 1, 0]


def epilogue(steps, *operands):
    """A program on the convolution of P by PW, of result (2, 4, 3, 3)."""
    geometry = ops.Geometry(3, 3, 1, 1, 0, 0, 0, 0, 1, 1, 1)
    return ops.binary_conv2d_epilogue(WORDS, PW.blocked, 6, 4, geometry, "sign", 0, steps, list(operands))


def pointwise(x, window=(), reduction="none", before=0):
    return ops.pointwise(x, list(window), reduction, False, 0, [7, 0], before, [])


WRONG_CALLS = [
    at("binarize dtype", lambda: binarize(X.double()), TypeError,
       "binarize: input must be float32, bfloat16 or float16, got torch.float64"),
    at("binarize not a tensor", lambda: binarize([1.0]), TypeError, "binarize: input must be a tensor, got list"),
    at("binarize one dimension", lambda: binarize(X[0, 0, 0]), ValueError,
       "binarize: input must have shape (N, C, ...), got (5,)"),
    at("binarize encoding", lambda: binarize(X, "ternary"), ValueError,
       "binarize: encoding must be 'sign' or 'step', got 'ternary'"),
    at("binarize threshold count", lambda: binarize(X, threshold=torch.zeros(5)), ValueError,
       "binarize: threshold must be float32 with one value a channel (6) or two (2, 6), got torch.float32 (5,)"),
    at("binarize threshold NaN", lambda: binarize(X, threshold=NAN), ValueError,
       "binarize: threshold is NaN, which no value can be compared with"),
    at("binarize thresholds NaN", lambda: binarize(X, threshold=torch.full((6,), NAN)), ValueError,
       "binarize: threshold holds NaN, which no value can be compared with"),
    at("binarize flip dtype", lambda: binarize(X, flip=torch.zeros(6)), ValueError,
       "binarize: flip must be bool with one value a threshold (6), got torch.float32 (6,)"),
    at("binarize flip count", lambda: binarize(X, flip=FLIP), ValueError,
       "binarize: flip must be bool with one value a threshold (6), got torch.bool (4,)"),
    at("PackedTensor dtype", lambda: PackedTensor(WORDS.int(), 6), TypeError,
       "PackedTensor: words must be int64, got torch.int32"),
    at("PackedTensor words", lambda: PackedTensor(WORDS, 65), ValueError,
       "PackedTensor: 65 channels need words of shape (N, ..., 2), got (2, 5, 5, 1)"),
    at("PackedTensor encoding", lambda: PackedTensor(WORDS, 6, "gray"), ValueError,
       "PackedTensor: encoding must be one of 'sign', 'step', got 'gray'"),
    at("unpack dtype", lambda: P.unpack(torch.float64), TypeError,
       "unpack: dtype must be float32, bfloat16 or float16, got torch.float64"),
    at("pack_weight dtype", lambda: pack_weight(W.int()), TypeError,
       "pack_weight: weight must be float32, bfloat16 or float16, got torch.int32"),
    at("pack_weight dimensions", lambda: pack_weight(torch.ones(5)), ValueError,
       "pack_weight: weight must be (O, C), (O, C, k) or (O, C, kh, kw), got (5,)"),
    at("pack_weight groups", lambda: pack_weight(W, 3), ValueError,
       "pack_weight: groups must divide the 4 filters, got 3"),
    at("pack_weight groups zero", lambda: pack_weight(W, 0), ValueError,
       "pack_weight: groups must divide the 4 filters, got 0"),
    at("conv2d input dtype", lambda: conv2d(X.int(), W), TypeError,
       "binary_conv2d: input must be float32, bfloat16 or float16, got torch.int32"),
    at("conv2d float64 threshold", lambda: conv2d(X.double(), W, threshold=0), TypeError,
       "binary_conv2d: float64 input is convolved by torch's operators, for comparisons, and takes neither a packed "
       "weight nor threshold nor another out_dtype"),
    at("conv2d input type", lambda: conv2d("x", W), TypeError, "binary_conv2d: input must be a tensor, got str"),
    at("conv2d weight type", lambda: conv2d(X, None), TypeError,
       "binary_conv2d: weight must be a tensor, got NoneType"),
    at("conv2d weight dtype", lambda: conv2d(X, W.long()), TypeError,
       "binary_conv2d: weight must be float32, bfloat16 or float16, got torch.int64"),
    at("conv2d input dimensions", lambda: conv2d(X[0], W), ValueError,
       "binary_conv2d: input must be (N, C, H, W), got (6, 5, 5)"),
    at("conv2d weight dimensions", lambda: conv2d(X, W[0]), ValueError,
       "binary_conv2d: weight must be (O, C / groups, kh, kw), got (6, 3, 3)"),
    at("conv2d channels", lambda: conv2d(torch.ones(2, 96, 5, 5), torch.ones(4, 64, 3, 3), groups=2), ValueError,
       "binary_conv2d: weight has 64 input channels per group, input has 96 with groups=2 (48 per group)"),
    at("conv2d packed channels", lambda: conv2d(P, pack_weight(torch.ones(4, 7, 3, 3))), ValueError,
       "binary_conv2d: weight has 7 input channels per group, input has 6 with groups=1 (6 per group)"),
    at("conv2d groups", lambda: conv2d(X, torch.ones(4, 2, 3, 3), groups=3), ValueError,
       "binary_conv2d: groups must divide the 6 input channels and the 4 filters, got 3"),
    at("conv2d groups zero", lambda: conv2d(X, W, groups=0), ValueError,
       "binary_conv2d: weight has 6 input channels per group, input has 6 with groups=0 (0 per group)"),
    at("conv2d encoding", lambda: conv2d(X, W, encoding="relu"), ValueError,
       "binary_conv2d: encoding must be 'sign' or 'step', got 'relu'"),
    at("conv2d surrogate", lambda: conv2d(X, W, surrogate="tanh"), ValueError,
       "binary_conv2d: surrogate must be one of clip, steep, identity, approx_sign, polynomial, swish_sign, "
       "got 'tanh'"),
    at("conv2d stride zero", lambda: conv2d(X, W, stride=0), ValueError,
       "binary_conv2d: kernel, stride and dilation must be at least 1 and padding at least 0, got kernel=[3, 3], "
       "stride=[0, 0], dilation=[1, 1], padding=[0, 0, 0, 0]"),
    at("conv2d padding negative", lambda: conv2d(X, W, padding=-1), ValueError,
       "binary_conv2d: kernel, stride and dilation must be at least 1 and padding at least 0, got kernel=[3, 3], "
       "stride=[1, 1], dilation=[1, 1], padding=[-1, -1, -1, -1]"),
    at("conv2d stride triple", lambda: conv2d(X, W, stride=(1, 1, 1)), TypeError,
       "binary_conv2d: stride must be an int or a pair of ints, got (1, 1, 1)"),
    at("conv2d padding of three sides", lambda: conv2d(X, W, padding=((1, 1, 1), 0)), TypeError,
       "binary_conv2d: padding must be an int or a pair of ints, got (1, 1, 1)"),
    at("conv2d padding negative side", lambda: conv2d(X, W, padding=((1, -1), 0)), ValueError,
       "binary_conv2d: kernel, stride and dilation must be at least 1 and padding at least 0, got kernel=[3, 3], "
       "stride=[1, 1], dilation=[1, 1], padding=[1, 0, -1, 0]"),
    at("conv2d stride float", lambda: conv2d(X, W, stride=(1.0, 2.0)), TypeError,
       "binary_conv2d: stride must be an int or a pair of ints, got (1.0, 2.0)"),
    at("conv2d padding name", lambda: conv2d(X, W, padding="full"), ValueError,
       "binary_conv2d: padding must be ints, 'same' or 'valid', got 'full'"),
    at("conv2d same with stride", lambda: conv2d(X, W, padding="same", stride=2), ValueError,
       "binary_conv2d: padding 'same' needs stride 1, got stride=(2, 2)"),
    at("conv2d image too small", lambda: conv2d(X, W, dilation=3), ValueError,
       "binary_conv2d: input (5, 5) with padding [0, 0, 0, 0] is smaller than the kernel [3, 3] with dilation [3, 3]"),
    at("conv2d padding value", lambda: conv2d(X, W, padding_value=2), ValueError,
       "binary_conv2d: padding_value must be 0, 1 or -1 for sign input, got 2"),
    at("conv2d step padding value", lambda: conv2d(X, W, encoding="step", padding_value=-1), ValueError,
       "binary_conv2d: padding_value must be 0 or 1 for step input, got -1"),
    at("conv2d scale count", lambda: conv2d(X, W, scale=torch.ones(3)), ValueError,
       "binary_conv2d: scale must be a number or have one value a filter (4), got 3"),
    at("conv2d bias count", lambda: conv2d(X, W, bias=torch.ones(5)), ValueError,
       "binary_conv2d: bias must be a number or have one value a filter (4), got 5"),
    at("conv2d residual shape", lambda: conv2d(X, W, residual=torch.ones(2, 4, 5, 5)), ValueError,
       "binary_conv2d: residual must be a float tensor of the output's shape (2, 4, 3, 3), "
       "got torch.float32 (2, 4, 5, 5)"),
    at("conv2d residual dtype", lambda: conv2d(X, W, residual=torch.ones(2, 4, 3, 3).int()), ValueError,
       "binary_conv2d: residual must be a float tensor of the output's shape (2, 4, 3, 3), "
       "got torch.int32 (2, 4, 3, 3)"),
    at("conv2d out_dtype", lambda: conv2d(P, PW, out_dtype=torch.int8), TypeError,
       "binary_conv2d: out_dtype must be int32, float32, bfloat16 or float16, got torch.int8"),
    at("conv2d scaled int32", lambda: conv2d(P, PW, scale=2.0, out_dtype=torch.int32), TypeError,
       "binary_conv2d: out_dtype int32 takes no scale, bias or residual; ask for a float dtype"),
    at("conv2d flip alone", lambda: conv2d(P, PW, flip=FLIP), ValueError, "binary_conv2d: flip needs a threshold"),
    at("conv2d flip dtype", lambda: conv2d(P, PW, threshold=0.0, flip=FLIP.int()), TypeError,
       "binary_conv2d: flip must be a bool tensor, got torch.int32"),
    at("conv2d flip type", lambda: conv2d(P, PW, threshold=0.0, flip=True), TypeError,
       "binary_conv2d: flip must be a bool tensor, got bool"),
    at("conv2d flip shape", lambda: conv2d(P, PW, threshold=0.0, flip=FLIP[:3]), ValueError,
       "binary_conv2d: flip must have shape (4,) or that of threshold, got (3,)"),
    at("conv2d threshold shape", lambda: conv2d(P, PW, threshold=torch.zeros(3, 4)), ValueError,
       "binary_conv2d: threshold must be a number or have shape (4,), (1, 4) or (2, 4), got (3, 4)"),
    at("conv2d threshold NaN", lambda: conv2d(P, PW, threshold=NAN), ValueError,
       "binary_conv2d: threshold holds NaN, which no value can be compared with"),
    at("conv2d scaled per channel", lambda: conv2d(PackedTensor(WORDS, 6, "sign", torch.ones(6, 1, 1)), PW), ValueError,
       "binary_conv2d: a packed input's scale must be one number; values scaled per channel cannot be summed as bits, "
       "got (6, 1, 1)"),
    at("conv1d input", lambda: conv1d(X, torch.ones(4, 6, 3)), ValueError,
       "binary_conv1d: input must be (N, C, L), got (2, 6, 5, 5)"),
    at("conv1d weight", lambda: conv1d(X[0], W), ValueError,
       "binary_conv1d: weight must be (O, C / groups, k), got (4, 6, 3, 3)"),
    at("linear weight", lambda: linear(X, W), ValueError, "binary_linear: weight must be (O, C), got (4, 6, 3, 3)"),
    at("linear features", lambda: linear(X, torch.ones(4, 6)), ValueError,
       "binary_linear: weight has 6 input features, input has shape (2, 6, 5, 5)"),
    at("linear packed image", lambda: linear(P, torch.ones(4, 6)), ValueError,
       "binary_linear: packed input must be (N, C), got (2, 6, 5, 5)"),
    at("linear dtype", lambda: linear(X.int(), torch.ones(4, 5)), TypeError,
       "binary_linear: input must be float32, bfloat16 or float16, got torch.int32"),
    at("matmul type", lambda: matmul(X.int(), X), TypeError,
       "binary_matmul: a must be float32, bfloat16, float16 or float64, got torch.int32"),
    at("matmul dimensions", lambda: matmul(X, X[0, 0, 0]), ValueError,
       "binary_matmul: b must have at least two dimensions, got (5,)"),
    at("matmul encoding", lambda: matmul(X, X, b_encoding="bits"), ValueError,
       "binary_matmul: encoding must be 'sign' or 'step', got 'bits'"),
    at("matmul depth", lambda: matmul(X, X[..., :4, :]), ValueError,
       "binary_matmul: a and b must have the same number of products in a sum, at least 1 and below 2^30, got 5 and 4 "
       "for a of shape (2, 6, 5, 5) and b of shape (2, 6, 4, 5)"),
    at("matmul batches", lambda: matmul(X, X[:, :4]), ValueError,
       "binary_matmul: batches of a and b must broadcast, got (2, 6) and (2, 4)"),
    at("matmul int32 with a scale", lambda: matmul(X, X, scale=2, out_dtype=torch.int32), TypeError,
       "binary_matmul: out_dtype int32 takes no scale; ask for a float dtype"),
    at("matmul out_dtype", lambda: matmul(X, X, out_dtype=torch.int64), TypeError,
       "binary_matmul: out_dtype must be int32, float32, bfloat16 or float16, got torch.int64"),
    at("matmul scales", lambda: matmul(X, X, scale=torch.ones(5)), ValueError,
       "binary_matmul: scale must be one number, got (5,)"),
    at("matmul packed scales", lambda: matmul(PackedTensor(WORDS, 6, "sign", torch.ones(6, 1, 1)), X), ValueError,
       "binary_matmul: a's scale must be one number; values scaled one by one cannot be summed as bits, got (6, 1, 1)"),
    at("matmul float64", lambda: matmul(X.double(), X), TypeError,
       "binary_matmul: float64 operands are multiplied by torch's operators, for comparisons, both of them and to "
       "float64, got torch.float64, torch.float32 and out_dtype None"),
    at("max_pool2d float", lambda: max_pool2d(X, 2), TypeError,
       "binary_max_pool2d: input must be a PackedTensor, got Tensor"),
    at("max_pool2d dimensions", lambda: max_pool2d(binarize(X[:, :, 0, 0]), 2), ValueError,
       "binary_max_pool2d: input must be (N, C, H, W), got (2, 6)"),
    at("max_pool2d padding", lambda: max_pool2d(P, 2, padding=2), ValueError,
       "binary_max_pool2d: padding must be between 0 and half the kernel [2, 2], got [2, 2]"),
    at("max_pool2d window", lambda: max_pool2d(P, 6), ValueError,
       "binary_max_pool2d: input (5, 5) is smaller than the window [6, 6] with padding [0, 0] and dilation [1, 1]"),
    at("max_pool2d stride", lambda: max_pool2d(P, 2, 0), ValueError,
       "binary_max_pool2d: kernel, stride and dilation must be at least 1, got kernel=[2, 2], stride=[0, 0], "
       "dilation=[1, 1]"),
    at("max_pool2d invert", lambda: max_pool2d(P, 2, invert=torch.zeros(2, dtype=torch.int64)), ValueError,
       "binary_max_pool2d: invert must be int64 words (1,), got torch.int64 (2,)"),
    at("avg_pool2d float", lambda: avg_pool2d(X, 2), TypeError,
       "binary_avg_pool2d: input must be a PackedTensor, got Tensor"),
    at("avg_pool2d divisor", lambda: avg_pool2d(P, 2, divisor_override=0), ValueError,
       "binary_avg_pool2d: divisor_override must be at least 1, got 0"),
    at("global_avg_pool float", lambda: global_avg_pool(X), TypeError,
       "global_avg_pool: input must be a PackedTensor, got Tensor"),
    at("activation surrogate", lambda: binary_activation(X, surrogate="cubic"), ValueError,
       "binary_activation: surrogate must be one of clip, steep, identity, approx_sign, polynomial, "
       "swish_sign, got 'cubic'"),
    at("activation dtype", lambda: binary_activation(X.int()), TypeError,
       "binary_activation: input must be float32, bfloat16, float16 or float64, got torch.int32"),
    at("ternary activation dtype", lambda: ternary_activation(X.int()), TypeError,
       "ternary_activation: input must be float32, bfloat16, float16 or float64, got torch.int32"),
    at("ternary activation surrogate", lambda: ternary_activation(X, "relu"), ValueError,
       "ternary_activation: surrogate must be one of clip, steep, identity, approx_sign, polynomial, swish_sign, "
       "got 'relu'"),
    at("step activation list", lambda: step_activation([1.0]), TypeError,
       "step_activation: input must be a tensor, got list"),
    at("quantized_activation levels", lambda: ops.quantized_activation(X, "quaternary"), ValueError,
       "quantized_activation: levels must be 'sign', 'step' or 'ternary', got 'quaternary'"),
    at("masked_gradient mask", lambda: ops.masked_gradient(X, torch.zeros(3, dtype=torch.int64)), ValueError,
       "masked_gradient: mask must be int64 words (5,) for 300 elements, got torch.int64 (3,)"),
    at("masked_gradient dtype", lambda: ops.masked_gradient(X.int(), torch.zeros(5, dtype=torch.int64)), TypeError,
       "masked_gradient: gradient must be float32, bfloat16 or float16, got torch.int32"),
    at("conv2d bias elsewhere", lambda: conv2d(P, PW, bias=torch.ones(4, device="meta")), ValueError,
       "binary_conv2d: bias must be on the CPU like the input, got meta"),
    at("conv2d weight elsewhere", lambda: conv2d(X, W.to("meta")), ValueError,
       "binary_conv2d: weight must be on the CPU like the input, got meta"),
    at("binarize flip elsewhere", lambda: binarize(X, flip=torch.ones(6, dtype=torch.bool, device="meta")), ValueError,
       "binarize: flip must be on the CPU like the input, got meta"),
    at("max_pool2d invert elsewhere",
       lambda: max_pool2d(P, 2, invert=torch.zeros(1, dtype=torch.int64, device="meta")), ValueError,
       "binary_max_pool2d: invert must be on the CPU like the input, got meta"),
    at("epilogue odd steps", lambda: epilogue([0]), ValueError,
       "binary_conv2d_epilogue: steps must be kind and option of at most 16 steps, got 1 numbers"),
    at("epilogue kind", lambda: epilogue([9, 0]), ValueError,
       f"binary_conv2d_epilogue: steps must have kinds of STEP_KINDS {ops.STEP_KINDS}, got 9 in step 0"),
    at("epilogue operand", lambda: epilogue([0, 0], torch.ones(5)), ValueError,
       "binary_conv2d_epilogue: step 0 (multiply) must be float32 of shape (4,), got torch.float32 (5,)"),
    at("epilogue operands", lambda: epilogue([2, 0], torch.ones(4)), ValueError,
       "binary_conv2d_epilogue: the steps read 2 operands, got 1"),
    at("epilogue residual", lambda: epilogue([4, 0], torch.ones(2, 4, 3, 4)), ValueError,
       "binary_conv2d_epilogue: step 0 (add_tensor) must be float32, bfloat16 or float16 of the result's shape "
       "(2, 4, 3, 3), got torch.float32 (2, 4, 3, 4)"),
    at("epilogue gate", lambda: epilogue([3, 0], torch.ones(4)), ValueError,
       "binary_conv2d_epilogue: step 0 (multiply_image) must be float32 of shape (2, 4), got torch.float32 (4,)"),
    at("epilogue store", lambda: epilogue([7, 3]), ValueError,
       "binary_conv2d_epilogue: step 0 (store) must have an option of FLOAT_TYPES (0, 1, 2), got 3"),
    at("epilogue thresholds", lambda: epilogue([8, 3], torch.ones(3, 4), None), ValueError,
       "binary_conv2d_epilogue: step 0 (bits) must have option 1 or 2, its thresholds a channel, got 3"),
    at("epilogue threshold", lambda: epilogue([8, 1], None, None), ValueError,
       "binary_conv2d_epilogue: step 0 (bits), threshold must be float32 of shape (1, 4), got None"),
    at("epilogue flip", lambda: epilogue([8, 1], torch.ones(1, 4), FLIP), ValueError,
       "binary_conv2d_epilogue: step 0 (bits), flip must be bool of shape (1, 4) or None, got torch.bool (4,)"),
    at("epilogue operand elsewhere", lambda: epilogue([0, 0], torch.ones(4, device="meta")), ValueError,
       "binary_conv2d_epilogue: operands must be on the CPU like the input, got one on meta"),
    at("step table strides", lambda: ops.step_table("plan", [ops.Step("store", 0, (X,))], X), ValueError,
       "plan: step 0 (store) must have each pixel's channels together and its pixels evenly apart, got strides "
       "(150, 25, 5, 1) for shape (2, 6, 5, 5)"),
    at("pointwise dtype", lambda: pointwise(X.int()), TypeError,
       "pointwise: input must be float32, bfloat16 or float16, got torch.int32"),
    at("pointwise dimensions", lambda: pointwise(X[0, 0, 0]), ValueError,
       "pointwise: input must be (N, C), (N, T, C) or (N, C, H, W), got (5,)"),
    at("pointwise reduction", lambda: pointwise(X, reduction="sum"), ValueError,
       "pointwise: reduction must be 'none', 'maximum' or 'average', got 'sum'"),
    at("pointwise window without reduction", lambda: pointwise(X, [2] * 9), ValueError,
       f"pointwise: a window and steps before it need a reduction, got window={[2] * 9} and before=0"),
    at("pointwise window of rows", lambda: pointwise(X[0], HALVES, "maximum"), ValueError,
       "pointwise: a window needs an input (N, C, H, W), got (6, 5, 5)"),
    at("pointwise window length", lambda: pointwise(X, [2, 2], "maximum"), ValueError,
       "pointwise: window must be 9 integers (Window), got 2"),
    at("pointwise dilated average", lambda: pointwise(X, [*HALVES[:6], 2, 2, 0], "average"), ValueError,
       "pointwise: dilation of an average must be 1, got [2, 2]"),
    at("pointwise before", lambda: pointwise(X, HALVES, "maximum", before=1), ValueError,
       "pointwise: before must count steps in front of the window, of kinds multiply, add, multiply_add, "
       "multiply_image, prelu, clamp; got 1 of ['store']"),
    at("isa name", lambda: _native.select_isa("sse9"), ValueError,
       "LOWBIT_ISA: expected one of scalar, avx2, avx512, amx, got 'sse9'"),
    at("sums past int32", lambda: ops.conv_shape(1, 1, 1, 2**31, 1, (1, 1), POINT), ValueError,
       "binary_conv2d: sizes (batch, height, width, channels, filters, kernel height and width, out height and width, "
       "stride, padding, dilation, groups) are inconsistent, or too large for exact int32 sums or for memory: "
       "(1, 1, 1, 2147483648, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1)"),
]


@pytest.mark.parametrize(("call", "error", "message"), WRONG_CALLS)
def test_message(call, error, message):
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value) == message


def test_weight_of_other_sizes_is_refused():
    """A private weight copy that does not fit is refused before the kernel reads it."""
    other = pack_weight(torch.ones(4, 6, 5, 5))
    with pytest.raises(ValueError, match="weight was not packed for 4 filters"):
        ops.binary_conv2d(
            WORDS, other.blocked, None, None, None, None, None, 6, 4,
            ops.Geometry(3, 3, 1, 1, 0, 0, 0, 0, 1, 1, 1), "sign", 0, torch.int32,
        )
