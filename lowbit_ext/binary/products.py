"""Matrix product of two binary operands, as attention has it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lowbit_ext import _arguments
from lowbit_ext.binary import ops
from lowbit_ext.binary.activation import (
    DEFAULT_THRESHOLDS,
    binary_activation,
    check_encoding,
    check_real,
    check_surrogate,
    wants_grad,
)
from lowbit_ext.binary.convolution import autocast_dtype
from lowbit_ext.packed import ENCODING_VALUES, PackedTensor, unpack_op, words_for

_OP = "binary_matmul"


def _words(columns: Tensor, encoding: str) -> Tensor:
    """Columns (..., K, N) as words (..., N, W)."""
    batch = columns.shape[:-2]
    images = columns.reshape(math.prod(batch), *columns.shape[-2:])
    words = ops.binarize(images, None, None, DEFAULT_THRESHOLDS[encoding], encoding)
    return words.reshape(*batch, *words.shape[1:])


def _words_of(a: Tensor, b: Tensor, encodings: tuple[str, str]) -> tuple[Tensor, Tensor]:
    """The words of both operands, floats or words."""
    return (
        a if a.dtype == torch.int64 else _words(a.mT, encodings[0]),
        b if b.dtype == torch.int64 else _words(b, encodings[1]),
    )


def _product(
    a: Tensor, b: Tensor, scale: Tensor | None, depth: int, encodings: tuple[str, str], out_dtype: torch.dtype
) -> Tensor:
    """Of words (..., M, W) and (..., N, W), whose batches broadcast."""
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    a, b = (words.expand(*batch, -1, -1).reshape(math.prod(batch), *words.shape[-2:]) for words in (a, b))
    output = ops.binary_matmul(a, b, scale, depth, *encodings, out_dtype)
    return output.reshape(*batch, *output.shape[1:])


class _BinaryMatmul(torch.autograd.Function):
    """The product of operands whose floats are binary values already; keeps their bits."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, scale: Tensor | None, depth: int, encodings: tuple[str, str],
        out_dtype: torch.dtype,
    ) -> Tensor:
        a_words, b_words = _words_of(a, b, encodings)
        ctx.save_for_backward(a_words, b_words, scale)
        ctx.call = depth, encodings
        ctx.operands = [(operand.shape, operand.dtype) for operand in (a, b)]
        return _product(a_words, b_words, scale, depth, encodings, out_dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        a_words, b_words, scale = ctx.saved_tensors
        depth, encodings = ctx.call
        (a_shape, a_dtype), (b_shape, b_dtype) = ctx.operands
        dtype = ops.gradient_dtype(grad_output.device, grad_output.dtype)
        grad = (grad_output if scale is None else grad_output * scale).to(dtype)
        grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            b_values = unpack_op(b_words, depth, *ENCODING_VALUES[encodings[1]], dtype)
            grad_a = torch.matmul(grad, b_values).sum_to_size(a_shape).to(a_dtype)
        if ctx.needs_input_grad[1]:
            a_values = unpack_op(a_words, depth, *ENCODING_VALUES[encodings[0]], dtype)
            grad_b = torch.matmul(a_values.mT, grad).sum_to_size(b_shape).to(b_dtype)
        return grad_a, grad_b, None, None, None, None


def _matmul_float64(
    a: Tensor, b: Tensor, encodings: tuple[str, str], surrogate: str, scale: Tensor | None,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """matmul by torch's operators in float64, in which networks are compared."""
    if a.dtype != b.dtype or out_dtype not in (None, torch.float64):
        raise TypeError(
            f"{_OP}: float64 operands are multiplied by torch's operators, for comparisons, both of them and to "
            f"float64, got {a.dtype}, {b.dtype} and out_dtype {out_dtype}"
        )
    output = torch.matmul(
        binary_activation(a, encodings[0], surrogate), binary_activation(b, encodings[1], surrogate)
    )
    return output if scale is None else output * scale


def _check_operand(name: str, value: Any, encoding: str) -> str:
    """Checks an operand; returns the encoding of its bits."""
    if isinstance(value, PackedTensor):
        encoding = value.encoding
        if value.words.dtype != torch.int64 or value.words.dim() < 2 or (
            value.words.shape[-1] != words_for(value.channels)
        ):
            raise ValueError(
                f"{_OP}: {name} must have int64 words (..., {words_for(value.channels)}) of {value.channels} channels, "
                f"got {value.words.dtype} {tuple(value.words.shape)}"
            )
        if value.scale is None:
            return encoding
        _arguments.tensor_like(_OP, f"{name}'s scale", value.scale, value.words, _arguments.FLOATS_AND_DOUBLE)
        if value.scale.numel() != 1:
            raise ValueError(
                f"{_OP}: {name}'s scale must be one number; values scaled one by one cannot be summed as bits, got "
                f"{tuple(value.scale.shape)}"
            )
        return encoding
    _arguments.tensor(_OP, name, value, _arguments.FLOATS_AND_DOUBLE)
    check_encoding(_OP, encoding)
    if value.dim() < 2:
        raise ValueError(f"{_OP}: {name} must have at least two dimensions, got {tuple(value.shape)}")
    return encoding


def _check_sizes(a: Tensor | PackedTensor, b: Tensor | PackedTensor) -> int:
    """Checks the operands against each other; returns K."""
    depths = [
        value.channels if isinstance(value, PackedTensor) else value.shape[axis] for value, axis in ((a, -1), (b, -2))
    ]
    batches = [(value.words if isinstance(value, PackedTensor) else value).shape[:-2] for value in (a, b)]
    if depths[0] != depths[1] or not 1 <= depths[0] < ops.MOST_DEPTH:
        raise ValueError(
            f"{_OP}: a and b must have the same number of products in a sum, at least 1 and below 2^30, got "
            f"{depths[0]} and {depths[1]} for a of shape {tuple(a.shape)} and b of shape {tuple(b.shape)}"
        )
    if any(len({*sizes} - {1}) > 1 for sizes in zip(*(reversed(batch) for batch in batches), strict=False)):
        raise ValueError(f"{_OP}: batches of a and b must broadcast, got {tuple(batches[0])} and {tuple(batches[1])}")
    return depths[0]


def _all_scales(a: Any, b: Any, scale: float | Tensor | None, like: Tensor) -> Tensor | None:
    """The product of the scales that there are, float32 (1,), float64 for operands of float64."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    if isinstance(scale, Tensor):
        check_real(_OP, "scale", scale, like)
        if scale.numel() != 1:
            raise ValueError(f"{_OP}: scale must be one number, got {tuple(scale.shape)}")
    elif scale is not None:
        scale = torch.tensor(_arguments.number(_OP, "scale", scale), dtype=dtype, device=like.device)
    product = None if scale is None else scale.to(dtype).reshape(1)
    for operand in (a, b):
        if isinstance(operand, PackedTensor) and operand.scale is not None:
            own = operand.scale.to(dtype).reshape(1)
            product = own if product is None else product * own
    return product


def _result_dtype(a: Any, b: Any, scale: Tensor | None, like: Tensor) -> torch.dtype:
    floats = [value.dtype for value in (a, b) if isinstance(value, Tensor)]
    if not floats:
        return torch.int32 if scale is None else torch.float32
    return autocast_dtype(like.device, torch.promote_types(floats[0], floats[-1]))


@_arguments.overridable
def matmul(
    a: Tensor | PackedTensor,
    b: Tensor | PackedTensor,
    *,
    a_encoding: str = "sign",
    b_encoding: str = "sign",
    surrogate: str = "clip",
    scale: float | Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Matrix product of binary values: torch.matmul of the -1 and +1, or 0 and 1, of both operands, exactly.

    Attention's scores are ``matmul(q, k.mT)``, and ``matmul(weights, v, a_encoding="step")`` what comes of them.

    Args:
        a: (..., M, K) float32, bfloat16 or float16, binarized on the fly, or a PackedTensor with K channels and words
            (..., M, ceil(K / 64)): binarize(a.mT) of a with three dimensions.
        b: (..., K, N) likewise, or a PackedTensor with words (..., N, ceil(K / 64)): binarize(b) of b with three
            dimensions. It may be a transposed view. The batches (...) broadcast as torch.matmul's.
        a_encoding, b_encoding: of float operands: "sign" or "step", each on its own. A PackedTensor brings its own.
        surrogate: straight-through estimator of float operands (lowbit_ext.binary.surrogates).
        scale: one number: factor of the sums, with a float result. A PackedTensor's own scale, one number, multiplies
            it.
        out_dtype: int32, float32, bfloat16 or float16. Default: that of the float operands (autocast's inside
            autocast); for two PackedTensors int32, or float32 with a scale.

    Returns:
        (..., M, N), contiguous: the sums, or round(scale * sum) in float32, rounded once to out_dtype.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.

    Gradient:
        a and b: straight-through (`surrogate`), of the product with the other's binary values; scale: exact. Packed
        operands and integer results carry none. Operands of float64, in which networks are compared, are multiplied by
        torch's operators.

    Source:
        Qin et al., "BiBERT: Accurate Fully Binarized BERT" (ICLR 2022) and Liu et al., "BiT: Robustly Binarized
        Multi-distilled Transformer" (NeurIPS 2022), whose attention weights are 0 and 1.
    """
    encodings = _check_operand("a", a, a_encoding), _check_operand("b", b, b_encoding)
    check_surrogate(_OP, surrogate)
    depth = _check_sizes(a, b)
    left, right = (value.words if isinstance(value, PackedTensor) else value for value in (a, b))
    _arguments.tensor_like(_OP, "b", right, left)
    factor = _all_scales(a, b, scale, left)
    if out_dtype is not None:
        _arguments.dtype(_OP, "out_dtype", out_dtype)
    if torch.float64 in (left.dtype, right.dtype):
        return _matmul_float64(left, right, encodings, surrogate, factor, out_dtype)
    if out_dtype is None:
        out_dtype = _result_dtype(a, b, factor, left)
    if factor is not None and out_dtype == torch.int32:
        raise TypeError(f"{_OP}: out_dtype int32 takes no scale; ask for a float dtype")
    if not wants_grad(left, right, factor) or out_dtype == torch.int32:
        a_words, b_words = _words_of(left.detach(), right.detach(), encodings)
        return _product(a_words, b_words, factor, depth, encodings, out_dtype)
    left, right = (
        x if x.dtype == torch.int64 else binary_activation(x, encoding, surrogate)
        for x, encoding in zip((left, right), encodings, strict=True)
    )
    if not wants_grad(factor):
        return _BinaryMatmul.apply(left, right, factor, depth, encodings, out_dtype)
    # A scale that learns needs the sums in its gradient: multiply outside, where autograd sees it.
    return (_BinaryMatmul.apply(left, right, None, depth, encodings, torch.float32) * factor).to(out_dtype)
