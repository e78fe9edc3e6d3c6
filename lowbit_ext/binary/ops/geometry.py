"""Geometry of convolutions and poolings as operators take it, checked once for each set of sizes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from lowbit_ext import _native
from lowbit_ext.packed import words_for

ENCODINGS: dict[str, int] = _native.cpu.ENCODINGS
MOST_STEP = 2**31  # csrc/core/checks.h

Pair = int | Sequence[int]
Sides = Pair | Sequence[Pair]  # of both dimensions, where a dimension may have a pair of its own
Size = tuple[int, int, int, int]


class Geometry(NamedTuple):
    """Geometry of a convolution: `int[] geometry` of the operators."""

    kernel_height: int
    kernel_width: int
    stride_height: int
    stride_width: int
    top: int
    left: int
    bottom: int
    right: int
    dilation_height: int
    dilation_width: int
    groups: int

    @property
    def kernel(self) -> tuple[int, int]:
        """Height and width."""
        return self[0], self[1]

    @property
    def stride(self) -> tuple[int, int]:
        """Down and to the right."""
        return self[2], self[3]

    @property
    def padding(self) -> tuple[int, int, int, int]:
        """Top, left, bottom, right."""
        return self[4], self[5], self[6], self[7]

    @property
    def dilation(self) -> tuple[int, int]:
        """Down and to the right."""
        return self[8], self[9]


class Window(NamedTuple):
    """Geometry of a pooling: `int[] window` of the operators. ceil_mode is 0 or 1."""

    kernel_height: int
    kernel_width: int
    stride_height: int
    stride_width: int
    padding_height: int
    padding_width: int
    dilation_height: int
    dilation_width: int
    ceil_mode: int

    @property
    def kernel(self) -> tuple[int, int]:
        """Height and width."""
        return self[0], self[1]

    @property
    def stride(self) -> tuple[int, int]:
        """Down and to the right."""
        return self[2], self[3]

    @property
    def padding(self) -> tuple[int, int]:
        """On both sides: rows, columns."""
        return self[4], self[5]

    @property
    def dilation(self) -> tuple[int, int]:
        """Down and to the right."""
        return self[6], self[7]


def as_geometry(geometry: Sequence[int]) -> Geometry:
    """What comes from the dispatcher is a list; the wrappers' tuples can be looked up as they are."""
    return geometry if type(geometry) is Geometry else Geometry(*geometry)


def as_window(window: Sequence[int]) -> Window:
    """The same for a pooling."""
    return window if type(window) is Window else Window(*window)


# --- convolution ------------------------------------------------------------------------------------------------------


def _conv_rows(size: int, kernel: int, stride: int, padding_total: int, dilation: int) -> int:
    """Output rows (or columns) of a convolution, as torch.nn.Conv2d defines them."""
    return (size + padding_total - dilation * (kernel - 1) - 1) // stride + 1


@functools.lru_cache(maxsize=4096)
def conv_shape(
    batch: int, height: int, width: int, channels: int, filters: int, out: tuple[int, int], g: Geometry
) -> Any:
    """The native core's description of a convolution with results of `out` rows and columns.

    Raises:
        ValueError: the sizes do not fit each other or memory, or sums may pass int32.
    """
    sizes = (
        batch, height, width, channels, filters, *g.kernel, *out, *g.stride, *g.padding[:2], *g.dilation, g.groups,
    )
    shape = _native.cpu.ConvShape(*sizes) if max(sizes) < 2**63 else None
    if shape is None or not shape.valid():
        raise ValueError(
            "binary_conv2d: sizes (batch, height, width, channels, filters, kernel height and width, out height and "
            "width, stride, padding, dilation, groups) are inconsistent, or too large for exact int32 sums or for "
            f"memory: {sizes}"
        )
    return shape


def conv_size(
    input_size: Sequence[int], channels: int, filters: int, g: Geometry, encoding: str, padding_value: int
) -> Size:
    """Checks what every convolution shares; returns the size (N, O, H', W') of its result."""
    if len(input_size) != 4 or input_size[3] != words_for(channels):
        raise ValueError(
            f"binary_conv2d: input must be words (N, H, W, {words_for(channels)}) for {channels} channels, "
            f"got {tuple(input_size)}"
        )
    if encoding not in ENCODINGS:
        raise ValueError(f"binary_conv2d: encoding must be 'sign' or 'step', got {encoding!r}")
    if padding_value not in (0, 1, -1) or (encoding == "step" and padding_value == -1):
        allowed = "0 or 1" if encoding == "step" else "0, 1 or -1"
        raise ValueError(f"binary_conv2d: padding_value must be {allowed} for {encoding} input, got {padding_value}")
    if g.groups < 1 or channels % g.groups or filters % g.groups:
        raise ValueError(
            f"binary_conv2d: groups must divide the {channels} input channels and the {filters} filters, got {g.groups}"
        )
    if min(g.stride) < 1 or min(g.dilation) < 1 or min(g.padding) < 0 or min(g.kernel) < 1:
        raise ValueError(
            "binary_conv2d: kernel, stride and dilation must be at least 1 and padding at least 0, "
            f"got kernel={list(g.kernel)}, stride={list(g.stride)}, dilation={list(g.dilation)}, "
            f"padding={list(g.padding)}"
        )
    if max(*g.stride, *g.dilation, *g.padding) >= MOST_STEP:
        raise ValueError(
            f"binary_conv2d: stride, dilation and padding must be below {MOST_STEP}, got stride={list(g.stride)}, "
            f"dilation={list(g.dilation)}, padding={list(g.padding)}"
        )
    height = _conv_rows(input_size[1], g.kernel_height, g.stride_height, g.top + g.bottom, g.dilation_height)
    width = _conv_rows(input_size[2], g.kernel_width, g.stride_width, g.left + g.right, g.dilation_width)
    if height < 1 or width < 1:
        raise ValueError(
            f"binary_conv2d: input {tuple(input_size[1:3])} with padding {list(g.padding)} is smaller than the kernel "
            f"{list(g.kernel)} with dilation {list(g.dilation)}"
        )
    return input_size[0], filters, height, width


@dataclasses.dataclass(frozen=True, eq=False)
class ConvPlan:
    """What a convolution call derives from its sizes alone; made once for each."""

    shape: Any  # csrc/core/conv_shape.h
    out_size: Size
    weight_bytes: int  # of the private weight copy
    aligned: bool  # whether kernels read the input as align_groups makes it


@functools.lru_cache(maxsize=4096)
def _plan(
    input_size: tuple[int, ...], channels: int, filters: int, geometry: Geometry, encoding: str, padding_value: int,
    native: Any, level: str,
) -> ConvPlan:
    out_size = conv_size(input_size, channels, filters, geometry, encoding, padding_value)
    batch, height, width, _ = input_size
    shape = conv_shape(batch, height, width, channels, filters, out_size[2:], geometry)
    private = weight_bytes(weight_shape(filters, channels, geometry), native, level)
    return ConvPlan(shape, out_size, private, native.binary_conv2d_reads_aligned(shape))


def conv_plan(
    native: Any, input_size: Sequence[int], channels: int, filters: int, geometry: Sequence[int], encoding: str,
    padding_value: int,
) -> ConvPlan:
    """The plan of a call on the kernels `native`. Raises ValueError for arguments that do not fit each other."""
    return _plan(
        input_size, channels, filters, as_geometry(geometry), encoding, padding_value, native, native.level
    )


def weight_shape(filters: int, channels: int, geometry: Geometry) -> Any:
    """Shape of the convolution of one pixel, for questions about the weight alone."""
    one_pixel = Geometry(*geometry.kernel, 1, 1, 0, 0, 0, 0, 1, 1, geometry.groups)
    return conv_shape(1, 1, 1, channels, filters, (1, 1), one_pixel)


@functools.lru_cache(maxsize=1024)
def weight_bytes(shape: Any, native: Any, level: str) -> int:
    """Size of the private copy of a weight that the kernels `native` read at `level`, the active one of them."""
    return native.binary_conv2d_weight_bytes(shape)


# --- pooling ----------------------------------------------------------------------------------------------------------


def _pool_rows(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: int) -> int:
    """Output rows (or columns) of a pooling, as torch.nn.functional.max_pool2d defines them."""
    span = size + 2 * padding - dilation * (kernel - 1) - 1
    if not ceil_mode:
        return span // stride + 1
    out = -(-span // stride) + 1
    # The last window must start inside the image or its left padding.
    return out - 1 if (out - 1) * stride >= size + padding else out


def window_size(op: str, size: Sequence[int], channels: int, window: Window) -> tuple[int, int]:
    """Checks a window over images of `size` rows and columns; returns the output's height and width."""
    if channels < 1 or min(size) < 1:
        raise ValueError(
            f"{op}: input must have channels and pixels, got {channels} channels and {size[0]} x {size[1]} pixels"
        )
    kernel, stride, padding, dilation = window.kernel, window.stride, window.padding, window.dilation
    if min(kernel) < 1 or min(stride) < 1 or min(dilation) < 1:
        raise ValueError(
            f"{op}: kernel, stride and dilation must be at least 1, got kernel={list(kernel)}, "
            f"stride={list(stride)}, dilation={list(dilation)}"
        )
    if any(pad < 0 or 2 * pad > length for pad, length in zip(padding, kernel, strict=True)):
        raise ValueError(
            f"{op}: padding must be between 0 and half the kernel {list(kernel)}, got {list(padding)}"
        )
    if max(*kernel, *stride, *dilation) >= MOST_STEP:
        raise ValueError(
            f"{op}: kernel, stride and dilation must be below {MOST_STEP}, got kernel={list(kernel)}, "
            f"stride={list(stride)}, dilation={list(dilation)}"
        )
    height = _pool_rows(size[0], kernel[0], stride[0], padding[0], dilation[0], window.ceil_mode)
    width = _pool_rows(size[1], kernel[1], stride[1], padding[1], dilation[1], window.ceil_mode)
    if height < 1 or width < 1:
        raise ValueError(
            f"{op}: input {tuple(size)} is smaller than the window {list(kernel)} with padding "
            f"{list(padding)} and dilation {list(dilation)}"
        )
    return height, width


def pool_size(op: str, size: Sequence[int], dtype: torch.dtype, channels: int, window: Window) -> tuple[int, int]:
    """Checks a pooling's arguments; returns the output's height and width."""
    if dtype != torch.int64 or len(size) != 4 or size[3] != words_for(channels):
        raise ValueError(
            f"{op}: input must be int64 words (N, H, W, {words_for(channels)}) for {channels} channels, "
            f"got {dtype} {tuple(size)}"
        )
    return window_size(op, size[1:3], channels, window)


@functools.lru_cache(maxsize=1024)
def pool_plan(
    op: str, size: tuple[int, ...], dtype: torch.dtype, channels: int, window: Window
) -> tuple[Any, tuple[int, int]]:
    """The native shape, and the output's height and width; made once for each set of arguments."""
    out = pool_size(op, size, dtype, channels, window)
    return pool_shape(op, size[:3], channels, out, window), out


@functools.lru_cache(maxsize=1024)
def pool_shape(op: str, size: Sequence[int], channels: int, out: tuple[int, int], window: Window) -> Any:
    """The native core's description of a window over images (batch, height, width).

    Raises:
        ValueError: the sizes do not fit memory, or sums may pass int32.
    """
    sizes = (*size, channels, *window.kernel, *out, *window.stride, *window.padding, *window.dilation)
    shape = _native.cpu.PoolShape(*sizes)
    if not shape.valid():
        raise ValueError(
            f"{op}: sizes (batch, height, width, channels, kernel, out height and width, stride, padding, dilation) "
            f"are too large for exact int32 sums or for memory: {sizes}"
        )
    return shape
