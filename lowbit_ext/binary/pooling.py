"""Pooling of packed bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowbit_ext import _arguments, _oplib
from lowbit_ext.binary import ops
from lowbit_ext.binary.ops import Window
from lowbit_ext.binary.ops.geometry import Pair
from lowbit_ext.packed import (
    PackedTensor,
    clear_tail,
    packed_words,
    words_for,
)


def _check_packed(op: str, value: Any) -> None:
    if not isinstance(value, PackedTensor):
        raise TypeError(f"{op}: input must be a PackedTensor, got {type(value).__name__}")
    if value.dim() != 4:
        raise ValueError(f"{op}: input must be (N, C, H, W), got {tuple(value.shape)}")
    if value.scale is None:
        return
    _arguments.tensor(op, "input's scale", value.scale)
    if value.scale.device != value.device:
        raise ValueError(f"{op}: input's scale must be on {value.device} like its words, got {value.scale.device}")
    if any(size != 1 for size in value.scale.shape[-2:]):
        raise ValueError(
            f"{op}: input's scale must be the same for all pixels, got shape {tuple(value.scale.shape)}"
        )


def _window(
    op: str, kernel_size: Pair, stride: Pair | None, padding: Pair, dilation: Pair, ceil_mode: bool
) -> Window:
    kernel = _arguments.pair(op, "kernel_size", kernel_size)
    strides = kernel if stride is None else _arguments.pair(op, "stride", stride)
    paddings, dilations = _arguments.pair(op, "padding", padding), _arguments.pair(op, "dilation", dilation)
    return Window(*kernel, *strides, *paddings, *dilations, int(_arguments.flag(op, "ceil_mode", ceil_mode)))


@_arguments.overridable
def max_pool2d(
    input: PackedTensor,
    kernel_size: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    dilation: Pair = 1,
    ceil_mode: bool = False,
    *,
    invert: Tensor | None = None,
) -> PackedTensor:
    """Maximum over windows of a packed tensor, as torch.nn.functional.max_pool2d on its values; stays packed.

    Args:
        input: PackedTensor (N, C, H, W); its scale, if any, the same for all pixels and not negative.
        kernel_size, stride, padding, dilation, ceil_mode: as torch.nn.functional.max_pool2d.
        invert: words (ceil(C / 64),): channels whose bit is set take the minimum instead.

    Raises:
        TypeError, ValueError: not a four-dimensional PackedTensor, a geometry torch refuses, or one with a window that
            a wide dilation leaves without a pixel: torch gives -inf there, which no bit stands for.
    """
    op = "binary_max_pool2d"
    _check_packed(op, input)
    if input.scale is not None and _oplib.may_read(input.scale) and bool((input.scale < 0).any()):
        raise ValueError(f"{op}: input's scale must not be negative, which makes a maximum of bits a minimum of values")
    if invert is not None:
        _arguments.tensor_like(op, "invert", invert, input.words)
        if invert.shape == (words_for(input.channels),) and invert.dtype == torch.int64:
            invert = clear_tail(invert, input.channels)
    window = _window(op, kernel_size, stride, padding, dilation, ceil_mode)
    words = ops.binary_max_pool2d(input.words, invert, input.channels, window)
    for axis in (0, 1):
        size, dilations = input.words.shape[1 + axis], window.dilation
        geometry = (window.stride[axis], window.padding[axis], dilations[axis])
        if dilations[axis] > size and _misses_image(size, words.shape[1 + axis], *geometry):
            raise ValueError(
                f"{op}: dilation {list(dilations)} leaves a window without a pixel of the image "
                f"{tuple(input.words.shape[1:3])}: torch gives -inf there, which no bit stands for"
            )
    return packed_words(words, input.channels, input.encoding, input.scale)


def _misses_image(size: int, windows: int, stride: int, padding: int, dilation: int) -> bool:
    """Whether taps `dilation` apart step over the whole image in one of the windows that begin in the padding.

    By the pigeonhole principle it is one of the first size + 1 of them, or none.
    """
    starts = range(-padding, 0, stride)[: min(windows, size + 1)]
    return any(start % dilation >= size for start in starts)


@_arguments.overridable
def avg_pool2d(
    input: PackedTensor,
    kernel_size: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Mean over windows of a packed tensor, as torch.nn.functional.avg_pool2d on its values.

    Args:
        input: PackedTensor (N, C, H, W); its scale, if any, the same for all pixels.
        kernel_size, stride, padding, ceil_mode, count_include_pad: as torch.nn.functional.avg_pool2d.
        divisor_override: divides the sums in place of the number of pixels; at least 1.

    Returns:
        float32 (N, C, H', W'), channels-last in memory.

    Raises:
        TypeError, ValueError: not a four-dimensional PackedTensor, or a geometry torch refuses.
    """
    op = "binary_avg_pool2d"
    _check_packed(op, input)
    divisor = 0  # none
    if divisor_override is not None:
        divisor = _arguments.integer(op, "divisor_override", divisor_override, 1, 2**63 - 1)
    window = _window(op, kernel_size, stride, padding, 1, ceil_mode)
    include = _arguments.flag(op, "count_include_pad", count_include_pad)
    output = ops.binary_avg_pool2d(input.words, input.channels, window, include, divisor, input.encoding)
    return output if input.scale is None else output * input.scale


@_arguments.overridable
def global_avg_pool(input: PackedTensor) -> Tensor:
    """Mean over all pixels of a packed tensor (N, C, H, W) of at least one pixel: float32 (N, C, 1, 1)."""
    _check_packed("global_avg_pool", input)
    height, width = input.words.shape[1:3]
    if height == 0 or width == 0:
        raise ValueError(f"global_avg_pool: input must have pixels, got {tuple(input.shape)}")
    whole = Window(height, width, height, width, 0, 0, 1, 1, 0)
    output = ops.binary_avg_pool2d(input.words, input.channels, whole, True, 0, input.encoding)
    return output if input.scale is None else output * input.scale
