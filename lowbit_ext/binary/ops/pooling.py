"""Poolings of packed bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowbit_ext import _native, _oplib
from lowbit_ext._native import pointer
from lowbit_ext.binary.ops.geometry import ENCODINGS, as_window, pool_plan, pool_size
from lowbit_ext.packed import words_for


def _empty_words(input: Tensor, invert: Tensor | None, channels: int, size: tuple[int, int]) -> Tensor:
    if invert is not None and (invert.dtype != torch.int64 or invert.shape != (words_for(channels),)):
        raise ValueError(
            f"binary_max_pool2d: invert must be int64 words ({words_for(channels)},), "
            f"got {invert.dtype} {tuple(invert.shape)}"
        )
    return input.new_empty((input.shape[0], *size, input.shape[3]))


def _max_pool_outputs(input: Tensor, invert: Tensor | None, channels: int, window: Sequence[int]) -> Tensor:
    size = pool_size("binary_max_pool2d", input.shape, input.dtype, channels, as_window(window))
    return _empty_words(input, invert, channels, size)


def _max_pool(input: Tensor, invert: Tensor | None, channels: int, window: Sequence[int]) -> Tensor:
    op = "binary_max_pool2d"
    shape, size = pool_plan(op, input.shape, input.dtype, channels, as_window(window))
    output = _empty_words(input, invert, channels, size)
    input = input.contiguous()
    invert = None if invert is None else invert.contiguous()
    status = _native.kernels(input).binary_max_pool2d(
        shape, pointer(input, input, f"{op}: input"), pointer(invert, input, f"{op}: invert"), output.data_ptr()
    )
    _native.check(op, status)
    return output


# Words (N, H, W, W') -> words: OR over the window, AND in the channels of `invert`.
binary_max_pool2d = _oplib.define(
    "binary_max_pool2d(Tensor input, Tensor? invert, SymInt channels, int[] window) -> Tensor",
    outputs=_max_pool_outputs,
    launcher=_max_pool,
)


def _empty_floats(input: Tensor, channels: int, size: tuple[int, int]) -> Tensor:
    shape = (input.shape[0], channels, *size)
    return torch.empty(shape, dtype=torch.float32, device=input.device, memory_format=torch.channels_last)


def _avg_pool_outputs(
    input: Tensor, channels: int, window: Sequence[int], count_include_pad: bool, divisor_override: int, encoding: str
) -> Tensor:
    size = pool_size("binary_avg_pool2d", input.shape, input.dtype, channels, as_window(window))
    return _empty_floats(input, channels, size)


def _avg_pool(
    input: Tensor, channels: int, window: Sequence[int], count_include_pad: bool, divisor_override: int, encoding: str
) -> Tensor:
    op = "binary_avg_pool2d"
    shape, size = pool_plan(op, input.shape, input.dtype, channels, as_window(window))
    output = _empty_floats(input, channels, size)
    input = input.contiguous()
    status = _native.kernels(input).binary_avg_pool2d(
        shape, ENCODINGS[encoding], count_include_pad, divisor_override, pointer(input, input, f"{op}: input"),
        output.data_ptr(),
    )
    _native.check(op, status)
    return output


# Words (N, H, W, W') -> float32 (N, C, H', W') channels-last; dilation 1. divisor_override 0: none.
binary_avg_pool2d = _oplib.define(
    "binary_avg_pool2d(Tensor input, SymInt channels, int[] window, bool count_include_pad, int divisor_override, "
    "str encoding) -> Tensor",
    outputs=_avg_pool_outputs,
    launcher=_avg_pool,
)
