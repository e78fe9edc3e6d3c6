"""Activations of few levels, as floats and as packed bits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lowbit_ext import _arguments, _oplib
from lowbit_ext.binary import ops
from lowbit_ext.binary.surrogates import INTERVALS, SURROGATES, derivative
from lowbit_ext.packed import (
    ENCODING_VALUES,
    PackedTensor,
    packed_words,
    words_for,
)

# Where the binary activation switches: sign at 0, BinaryDuo's step at 1/2.
DEFAULT_THRESHOLDS = {"sign": 0.0, "step": 0.5}


def check_encoding(op: str, encoding: str) -> None:
    """Raises ValueError for what is no encoding of bits."""
    if not isinstance(encoding, str) or encoding not in ENCODING_VALUES:
        raise ValueError(f"{op}: encoding must be 'sign' or 'step', got {encoding!r}")


def check_surrogate(op: str, surrogate: str) -> None:
    """Raises ValueError for what is no surrogate of a derivative."""
    if not isinstance(surrogate, str) or surrogate not in SURROGATES:
        raise ValueError(f"{op}: surrogate must be one of {', '.join(SURROGATES)}, got {surrogate!r}")


def check_float(op: str, name: str, value: Any) -> None:
    """Raises TypeError for what is not a dense tensor of a type that the kernels read."""
    _arguments.tensor(op, name, value, _arguments.FLOATS)


def check_real(op: str, name: str, value: Any, like: Tensor) -> None:
    """A tensor of numbers, no bools, on the device of `like`."""
    _arguments.tensor_like(op, name, value, like)
    if value.dtype == torch.bool or value.is_complex():
        raise TypeError(f"{op}: {name} must be real numbers, got {value.dtype}")


def holds_nan(values: Tensor) -> bool:
    """Whether there is a NaN among values that can be looked at; none is ever met where they cannot (_oplib)."""
    return _oplib.may_read(values) and bool(values.isnan().any())


@_arguments.overridable
def binarize(
    x: Tensor,
    encoding: str = "sign",
    threshold: float | Tensor | None = None,
    flip: Tensor | None = None,
) -> PackedTensor:
    """Packs one bit an element: x >= threshold, or x <= threshold in flipped channels.

    Args:
        x: (N, C, *spatial) float32, bfloat16 or float16; contiguous and channels-last tensors are read in place.
        encoding: "sign" (bits stand for -1 and +1) or "step" (0 and 1).
        threshold: a number, a tensor with one value a channel, or (2, C); default 0 for "sign", 1/2 for "step".
        flip: bool, one value a threshold: compare with <= there (a batch norm with negative scale).

    Returns:
        PackedTensor of shape (N, C, *spatial), or with two thresholds a channel (N, 2 C, *spatial), whose bits c and
        C + c come from channel c. A NaN gives bit 0 whatever the comparison.

    Raises:
        TypeError: x, threshold or flip of the wrong type.
        ValueError: unknown encoding, x of fewer than two dimensions, wrong number of thresholds, NaN threshold.

    Gradient:
        none; conv2d, linear and BinaryActivation carry a straight-through estimator.
    """
    check_encoding("binarize", encoding)
    check_float("binarize", "input", x)
    if x.dim() < 2:
        raise ValueError(f"binarize: input must have shape (N, C, ...), got {tuple(x.shape)}")
    if flip is not None:
        _arguments.tensor_like("binarize", "flip", flip, x)
    common = DEFAULT_THRESHOLDS[encoding]
    per_channel = None
    if isinstance(threshold, Tensor):
        check_real("binarize", "threshold", threshold, x)
        per_channel = threshold.detach().to(torch.float32)
        if per_channel.dim() != 2 or per_channel.shape[0] != 2:
            per_channel = per_channel.reshape(-1)
        if per_channel.numel() == 1 and x.shape[1] != 1:
            per_channel = per_channel.expand(x.shape[1])
        if holds_nan(per_channel):
            raise ValueError("binarize: threshold holds NaN, which no value can be compared with")
    elif threshold is not None:
        common = _arguments.number("binarize", "threshold", threshold)
        if math.isnan(common):
            raise ValueError("binarize: threshold is NaN, which no value can be compared with")
    words = ops.binarize(x, per_channel, flip, common, encoding)
    channels = x.shape[1] if per_channel is None else per_channel.numel()
    return packed_words(words, channels, encoding)


@_arguments.overridable
def unpack(packed: PackedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values of a packed tensor: see PackedTensor.unpack."""
    if not isinstance(packed, PackedTensor):
        raise TypeError(f"unpack: packed must be a PackedTensor, got {type(packed).__name__}")
    return packed.unpack(dtype)


def wants_grad(*values: Any) -> bool:
    """Whether gradients are recorded and one of the values, those that are tensors, asks for its own."""
    if not torch.is_grad_enabled():
        return False
    for value in values:  # noqa: SIM110  half the time of any() over a generator
        if isinstance(value, Tensor) and value.requires_grad:
            return True
    return False


class _QuantizedActivation(torch.autograd.Function):
    """Levels in the input's dtype. A surrogate that is an interval saves one bit an element, "identity" nothing."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, levels: str, surrogate: str) -> Tensor:
        interval = INTERVALS.get((surrogate, levels))
        if interval is not None:
            low, high, closed = interval.low, interval.high, interval.closed
            output, mask = ops.quantized_activation_with_mask(input, levels, low, high, closed)
            ctx.save_for_backward(mask)
        else:
            output = ops.quantized_activation(input, levels)
            ctx.save_for_backward(None if surrogate == "identity" else input)
        ctx.call = (levels, surrogate, output.stride())
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (kept,) = ctx.saved_tensors
        levels, surrogate, strides = ctx.call
        interval = INTERVALS.get((surrogate, levels))
        if interval is not None:
            grad_output = ops.masked_gradient(_with_strides(grad_output, strides), kept)
            grad_output = grad_output if interval.slope == 1 else grad_output * interval.slope
        elif kept is not None:
            grad_output = grad_output * derivative(kept, surrogate, levels)
        return grad_output, None, None


def _with_strides(tensor: Tensor, strides: Sequence[int]) -> Tensor:
    """The tensor in the memory order of another: itself where it has it."""
    if tensor.stride() == tuple(strides):
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def quantized_activation(op: str, x: Tensor, levels: str, surrogate: str) -> Tensor:
    """What binary_activation and BinaryDuo's activations share; `op` names the caller in messages."""
    _arguments.tensor(op, "input", x, _arguments.FLOATS_AND_DOUBLE)
    check_surrogate(op, surrogate)
    if x.dtype == torch.float64:
        return _DenseActivation.apply(x, levels, surrogate)
    if wants_grad(x):
        return _QuantizedActivation.apply(x, levels, surrogate)
    return ops.quantized_activation(x, levels)


class _DenseActivation(torch.autograd.Function):
    """The same from torch's operators, for float64, in which networks are compared."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, levels: str, surrogate: str) -> Tensor:
        ctx.save_for_backward(input)
        ctx.call = (surrogate, levels)
        if levels == "sign":
            return torch.where(input >= 0, 1.0, -1.0).to(input.dtype)
        if levels == "step":
            return (input >= 0.5).to(input.dtype)
        return ((input >= 0.25).to(input.dtype) + (input >= 0.75).to(input.dtype)) / 2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (input,) = ctx.saved_tensors
        return grad_output * derivative(input, *ctx.call), None, None


@_arguments.overridable
def binary_activation(x: Tensor, encoding: str = "sign", surrogate: str = "clip") -> Tensor:
    """sign(x) in {-1, +1} (sign(0) = +1) or the step 1[x >= 1/2] in {0, 1}, with a straight-through gradient.

    Args:
        x: any shape, float32, bfloat16, float16, or float64 (by torch's operators, for comparisons).
        encoding: "sign" or "step".
        surrogate: a name of lowbit_ext.binary.surrogates.SURROGATES.

    Returns:
        Tensor of x's shape, dtype and, where x is dense, memory order. A NaN gives -1 or 0.

    Raises:
        TypeError: wrong dtype. ValueError: unknown encoding or surrogate.
    """
    check_encoding("binary_activation", encoding)
    return quantized_activation("binary_activation", x, encoding, surrogate)


def invert_words(flip: Tensor) -> Tensor:
    """Bool (C,) as words (ceil(C / 64),): the `invert` of max_pool2d."""
    return ops.binarize(flip.reshape(1, -1).to(torch.float32), None, None, 0.5, "step").reshape(words_for(flip.numel()))
