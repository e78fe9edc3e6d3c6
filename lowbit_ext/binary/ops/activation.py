"""Activations of few levels on dense floats, their mask of a bit an element, and the gradient through the mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowbit_ext import _native, _oplib
from lowbit_ext._native import pointer
from lowbit_ext.packed import FLOAT_TYPES, words_for

LEVELS: dict[str, int] = _native.cpu.ACTIVATIONS


def _in_order_of(x: Tensor, output: Tensor) -> Tensor:
    """x in the memory order of the dense tensor `output`."""
    return x if x.stride() == output.stride() else torch.empty_like(output).copy_(x)


def _outputs(x: Tensor, levels: str) -> Tensor:
    if x.dtype not in FLOAT_TYPES:
        raise TypeError(f"quantized_activation: input must be float32, bfloat16 or float16, got {x.dtype}")
    if levels not in LEVELS:
        raise ValueError(f"quantized_activation: levels must be 'sign', 'step' or 'ternary', got {levels!r}")
    return torch.empty_like(x)  # dense: x's memory order where x is dense


def _launch(
    x: Tensor, levels: str, low: float, high: float, closed: bool, output: Tensor, mask: Tensor | None
) -> None:
    x = _in_order_of(x, output)
    status = _native.kernels(x).quantized_activation(
        pointer(x, x, "quantized_activation: x"), FLOAT_TYPES[x.dtype], x.numel(), LEVELS[levels], low, high, closed,
        output.data_ptr(), 0 if mask is None else mask.data_ptr(),
    )
    _native.check("quantized_activation", status)


def _activation(x: Tensor, levels: str) -> Tensor:
    output = _outputs(x, levels)
    _launch(x, levels, 0.0, 1.0, False, output, None)
    return output


# Elementwise levels in x's dtype and memory order.
quantized_activation = _oplib.define(
    "quantized_activation(Tensor x, str levels) -> Tensor", outputs=_outputs, launcher=_activation
)


@torch.library.register_vmap("lowbit::quantized_activation")
def _activation_vmap(info: Any, axes: tuple[int, None], x: Tensor, levels: str) -> tuple[Tensor, int]:
    return torch.ops.lowbit.quantized_activation.default(x, levels), axes[0]


def _outputs_with_mask(x: Tensor, levels: str, low: float, high: float, closed: bool) -> tuple[Tensor, Tensor]:
    return _outputs(x, levels), x.new_empty(words_for(x.numel()), dtype=torch.int64)


def _activation_with_mask(x: Tensor, levels: str, low: float, high: float, closed: bool) -> tuple[Tensor, Tensor]:
    output, mask = _outputs_with_mask(x, levels, low, high, closed)
    _launch(x, levels, low, high, closed, output, mask)
    return output, mask


# The same and, in the same pass, a bit an element in the result's memory order: low < x < high, or with the ends.
quantized_activation_with_mask = _oplib.define(
    "quantized_activation_with_mask(Tensor x, str levels, float low, float high, bool closed) -> (Tensor, Tensor)",
    outputs=_outputs_with_mask,
    launcher=_activation_with_mask,
)


def _masked_gradient_outputs(gradient: Tensor, mask: Tensor) -> Tensor:
    if gradient.dtype not in FLOAT_TYPES:
        raise TypeError(f"masked_gradient: gradient must be float32, bfloat16 or float16, got {gradient.dtype}")
    if mask.dtype != torch.int64 or mask.shape != (words_for(gradient.numel()),):
        raise ValueError(
            f"masked_gradient: mask must be int64 words ({words_for(gradient.numel())},) for {gradient.numel()} "
            f"elements, got {mask.dtype} {tuple(mask.shape)}"
        )
    return torch.empty_like(gradient)


def _masked_gradient(gradient: Tensor, mask: Tensor) -> Tensor:
    output = _masked_gradient_outputs(gradient, mask)
    gradient = _in_order_of(gradient, output)
    mask = mask.contiguous()
    status = _native.kernels(gradient).masked_gradient(
        pointer(gradient, gradient, "masked_gradient: gradient"), FLOAT_TYPES[gradient.dtype], gradient.numel(),
        pointer(mask, gradient, "masked_gradient: mask"), output.data_ptr(),
    )
    _native.check("masked_gradient", status)
    return output


# gradient where the bit of mask is 1, else 0; bits in the gradient's memory order.
masked_gradient = _oplib.define(
    "masked_gradient(Tensor gradient, Tensor mask) -> Tensor",
    outputs=_masked_gradient_outputs,
    launcher=_masked_gradient,
)
