"""Operators of the binary layers: schema, fake and launcher of each. Raw: functional.py holds what users call.

Tensors here are words (int64, channels-last, packed.py) and dense floats; geometry travels as integers.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lowbit_ext import _native, _oplib
from lowbit_ext._native import pointer as _pointer
from lowbit_ext.packed import FLOAT_TYPES, words_for

ENCODINGS: dict[str, int] = _native.cpu.ENCODINGS

# What the convolution writes: values of a type, or bits by thresholds.
_CONV_OUTPUTS: dict[str, int] = _native.cpu.CONV_OUTPUTS
_OUTPUT_KINDS = {getattr(torch, name): kind for name, kind in _CONV_OUTPUTS.items() if hasattr(torch, name)}


# --- binarize ---------------------------------------------------------------------------------------------------------


def _check_binarize(x: Tensor, threshold: Tensor | None, flip: Tensor | None, encoding: str) -> None:
    if x.dtype not in FLOAT_TYPES:
        raise TypeError(f"binarize: input must be float32, bfloat16 or float16, got {x.dtype}")
    if x.dim() < 2:
        raise ValueError(f"binarize: input must have shape (N, C, ...), got {tuple(x.shape)}")
    if encoding not in ENCODINGS:
        raise ValueError(f"binarize: encoding must be 'sign' or 'step', got {encoding!r}")
    if threshold is None and flip is None:
        return
    channels = x.shape[1]
    if threshold is not None and (
        threshold.dtype != torch.float32 or threshold.shape not in ((channels,), (2, channels))
    ):
        raise ValueError(
            f"binarize: threshold must be float32 with one value a channel ({channels}) or two (2, {channels}), "
            f"got {threshold.dtype} {tuple(threshold.shape)}"
        )
    if flip is not None and (flip.dtype != torch.bool or flip.numel() != _thresholds(threshold) * channels):
        raise ValueError(
            f"binarize: flip must be bool with one value a threshold ({_thresholds(threshold) * channels}), "
            f"got {flip.dtype} {tuple(flip.shape)}"
        )


def _thresholds(threshold: Tensor | None) -> int:
    """Thresholds, and bits, a channel."""
    return 1 if threshold is None else threshold.dim()


def _binarize(
    x: Tensor, threshold: Tensor | None, flip: Tensor | None, common: float, encoding: str, with_mask: bool
) -> tuple[Tensor, Tensor | None]:
    _check_binarize(x, threshold, flip, encoding)
    batch, channels, *space = x.shape
    channels_last = False
    if not x.is_contiguous():
        channels_last = x.movedim(1, -1).is_contiguous()
        if not channels_last:
            x = x.contiguous()
    thresholds = _thresholds(threshold)
    size = (batch, *space, words_for(thresholds * channels))
    words = x.new_empty(size, dtype=torch.int64)
    mask = x.new_empty(size, dtype=torch.int64) if with_mask else None
    threshold = None if threshold is None else threshold.contiguous()
    flip = None if flip is None else flip.contiguous()
    status = _native.kernels(x).binarize(
        x.data_ptr(),
        FLOAT_TYPES[x.dtype],
        channels_last,
        batch,
        channels,
        math.prod(space),
        _pointer(threshold, x, "binarize: threshold"),
        common,
        _pointer(flip, x, "binarize: flip"),
        ENCODINGS[encoding],
        words.data_ptr(),
        0 if mask is None else mask.data_ptr(),
        thresholds,
    )
    _native.check("binarize", status)
    return words, mask


def _binarize_only(x: Tensor, threshold: Tensor | None, flip: Tensor | None, common: float, encoding: str) -> Tensor:
    return _binarize(x, threshold, flip, common, encoding, with_mask=False)[0]


def _binarize_fake(x: Tensor, threshold: Tensor | None, flip: Tensor | None, common: float, encoding: str) -> Tensor:
    _check_binarize(x, threshold, flip, encoding)
    words = words_for(_thresholds(threshold) * x.shape[1])
    return x.new_empty((x.shape[0], *x.shape[2:], words), dtype=torch.int64)


# (N, C, *spatial) -> words (N, *spatial, W). Without `threshold` every channel meets `common`; thresholds (2, C) give
# two bits a channel, c and C + c.
binarize = _oplib.define(
    "binarize(Tensor x, Tensor? threshold, Tensor? flip, float common, str encoding) -> Tensor",
    cpu=_binarize_only,
    cuda=_binarize_only,
    fake=_binarize_fake,
)


def _binarize_with_mask(x: Tensor, common: float, encoding: str) -> tuple[Tensor, Tensor]:
    words, mask = _binarize(x, None, None, common, encoding, with_mask=True)
    assert mask is not None
    return words, mask


def _binarize_with_mask_fake(x: Tensor, common: float, encoding: str) -> tuple[Tensor, Tensor]:
    words = _binarize_fake(x, None, None, common, encoding)
    return words, torch.empty_like(words)


# The same and, in the same pass, the clipped straight-through mask: |x| <= 1 (sign) or 0 < x < 1 (step).
binarize_with_mask = _oplib.define(
    "binarize_with_mask(Tensor x, float common, str encoding) -> (Tensor, Tensor)",
    cpu=_binarize_with_mask,
    cuda=_binarize_with_mask,
    fake=_binarize_with_mask_fake,
)


# --- quantised activations --------------------------------------------------------------------------------------------

LEVELS: dict[str, int] = _native.cpu.ACTIVATIONS


def _check_activation(x: Tensor, levels: str) -> None:
    if x.dtype not in FLOAT_TYPES:
        raise TypeError(f"quantized_activation: input must be float32, bfloat16 or float16, got {x.dtype}")
    if levels not in LEVELS:
        raise ValueError(f"quantized_activation: levels must be 'sign', 'step' or 'ternary', got {levels!r}")


def _activation(
    x: Tensor, levels: str, low: float, high: float, closed: bool, with_mask: bool
) -> tuple[Tensor, Tensor | None]:
    _check_activation(x, levels)
    output = torch.empty_like(x)  # dense: x's memory order where x is dense
    if x.stride() != output.stride():
        x = torch.empty_like(output).copy_(x)
    count = x.numel()
    mask = x.new_empty(words_for(count), dtype=torch.int64) if with_mask else None
    status = _native.kernels(x).quantized_activation(
        x.data_ptr(), FLOAT_TYPES[x.dtype], count, LEVELS[levels], low, high, closed, output.data_ptr(),
        0 if mask is None else mask.data_ptr(),
    )
    _native.check("quantized_activation", status)
    return output, mask


def _activation_only(x: Tensor, levels: str) -> Tensor:
    return _activation(x, levels, 0.0, 1.0, False, with_mask=False)[0]


def _activation_fake(x: Tensor, levels: str) -> Tensor:
    _check_activation(x, levels)
    return torch.empty_like(x)


# Elementwise levels in x's dtype and memory order.
quantized_activation = _oplib.define(
    "quantized_activation(Tensor x, str levels) -> Tensor",
    cpu=_activation_only,
    cuda=_activation_only,
    fake=_activation_fake,
)


@torch.library.register_vmap("lowbit::quantized_activation")
def _activation_vmap(info: Any, axes: tuple[int, None], x: Tensor, levels: str) -> tuple[Tensor, int]:
    return torch.ops.lowbit.quantized_activation.default(x, levels), axes[0]


def _activation_with_mask(
    x: Tensor, levels: str, low: float, high: float, closed: bool
) -> tuple[Tensor, Tensor]:
    output, mask = _activation(x, levels, low, high, closed, with_mask=True)
    assert mask is not None
    return output, mask


def _activation_with_mask_fake(
    x: Tensor, levels: str, low: float, high: float, closed: bool
) -> tuple[Tensor, Tensor]:
    _check_activation(x, levels)
    return torch.empty_like(x), x.new_empty(words_for(x.numel()), dtype=torch.int64)


# The same and, in the same pass, a bit an element in the result's memory order: low < x < high, or with the ends.
quantized_activation_with_mask = _oplib.define(
    "quantized_activation_with_mask(Tensor x, str levels, float low, float high, bool closed) -> (Tensor, Tensor)",
    cpu=_activation_with_mask,
    cuda=_activation_with_mask,
    fake=_activation_with_mask_fake,
)


def _check_masked_gradient(gradient: Tensor, mask: Tensor) -> None:
    if gradient.dtype not in FLOAT_TYPES:
        raise TypeError(f"masked_gradient: gradient must be float32, bfloat16 or float16, got {gradient.dtype}")
    if mask.dtype != torch.int64 or mask.shape != (words_for(gradient.numel()),):
        raise ValueError(
            f"masked_gradient: mask must be int64 words ({words_for(gradient.numel())},) for {gradient.numel()} "
            f"elements, got {mask.dtype} {tuple(mask.shape)}"
        )


def _masked_gradient(gradient: Tensor, mask: Tensor) -> Tensor:
    _check_masked_gradient(gradient, mask)
    output = torch.empty_like(gradient)
    if gradient.stride() != output.stride():
        gradient = torch.empty_like(output).copy_(gradient)
    mask = mask.contiguous()
    status = _native.kernels(gradient).masked_gradient(
        gradient.data_ptr(), FLOAT_TYPES[gradient.dtype], gradient.numel(),
        _pointer(mask, gradient, "masked_gradient: mask"), output.data_ptr(),
    )
    _native.check("masked_gradient", status)
    return output


def _masked_gradient_fake(gradient: Tensor, mask: Tensor) -> Tensor:
    _check_masked_gradient(gradient, mask)
    return torch.empty_like(gradient)


# gradient where the bit of mask is 1, else 0; bits in the gradient's memory order.
masked_gradient = _oplib.define(
    "masked_gradient(Tensor gradient, Tensor mask) -> Tensor",
    cpu=_masked_gradient,
    cuda=_masked_gradient,
    fake=_masked_gradient_fake,
)


# --- convolution ------------------------------------------------------------------------------------------------------


def out_size(size: int, kernel: int, stride: int, padding_total: int, dilation: int) -> int:
    """Output rows (or columns) of a convolution, as torch.nn.Conv2d defines them."""
    return (size + padding_total - dilation * (kernel - 1) - 1) // stride + 1


@functools.lru_cache(maxsize=4096)
def _conv_shape(*sizes: int) -> Any:
    shape = _native.cpu.ConvShape(*sizes)
    if not shape.valid():
        raise ValueError(
            "binary_conv2d: sizes (batch, height, width, channels, filters, kernel height and width, out height and "
            "width, stride, padding, dilation, groups) are inconsistent, or too large for exact int32 sums: "
            f"{sizes}"
        )
    return shape


@dataclasses.dataclass(frozen=True, eq=False)
class _ConvPlan:
    """What a convolution call derives from its sizes alone; made once for each."""

    shape: Any  # csrc/core/conv_shape.h
    out_size: tuple[int, int, int, int]
    out_strides: tuple[int, int, int, int]  # channels-last
    weight_bytes: int  # of the private weight copy


def _check_conv(
    input_size: Sequence[int], channels: int, filters: int, kernel: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], groups: int, encoding: str, padding_value: int,
) -> tuple[int, int]:
    """Checks what every convolution op shares; returns the output's height and width."""
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
    if groups < 1 or channels % groups or filters % groups:
        raise ValueError(
            f"binary_conv2d: groups must divide the {channels} input channels and the {filters} filters, got {groups}"
        )
    if min(stride) < 1 or min(dilation) < 1 or min(padding) < 0 or min(kernel) < 1:
        raise ValueError(
            "binary_conv2d: kernel, stride and dilation must be at least 1 and padding at least 0, "
            f"got kernel={list(kernel)}, stride={list(stride)}, dilation={list(dilation)}, padding={list(padding)}"
        )
    height = out_size(input_size[1], kernel[0], stride[0], padding[0] + padding[2], dilation[0])
    width = out_size(input_size[2], kernel[1], stride[1], padding[1] + padding[3], dilation[1])
    if height < 1 or width < 1:
        raise ValueError(
            f"binary_conv2d: input {tuple(input_size[1:3])} with padding {list(padding)} is smaller than the kernel "
            f"{list(kernel)} with dilation {list(dilation)}"
        )
    return height, width


@functools.lru_cache(maxsize=4096)
def _cached_conv_plan(
    input_size: tuple[int, ...], channels: int, filters: int, kernel: tuple[int, int], stride: tuple[int, int],
    padding: tuple[int, int, int, int], dilation: tuple[int, int], groups: int, encoding: str, padding_value: int,
    native: Any, level: str,
) -> _ConvPlan:
    height, width = _check_conv(
        input_size, channels, filters, kernel, stride, padding, dilation, groups, encoding, padding_value
    )
    shape = _conv_shape(
        *input_size[:3], channels, filters, *kernel, height, width, *stride, *padding[:2], *dilation, groups
    )
    strides = (height * width * filters, 1, width * filters, filters)
    private = weight_bytes(filters, kernel[0], kernel[1], channels, groups, native, level)
    return _ConvPlan(shape, (input_size[0], filters, height, width), strides, private)


def _conv_plan(
    native: Any, input_size: Sequence[int], channels: int, filters: int, kernel: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], groups: int, encoding: str, padding_value: int,
) -> _ConvPlan:
    if type(kernel) is list:  # from the dispatcher; the wrappers' tuples can be looked up as they are
        kernel, stride, padding, dilation = tuple(kernel), tuple(stride), tuple(padding), tuple(dilation)
    return _cached_conv_plan(
        input_size, channels, filters, kernel, stride, padding, dilation, groups, encoding, padding_value,
        native, native.level,
    )


def _aligned_groups(words: Tensor, channels: int, groups: int) -> Tensor:
    """Channels of each group moved to a word boundary: csrc/cpu/align_groups."""
    words = words.contiguous()
    per_group = channels // groups
    if groups == 1 or per_group % 64 == 0:
        return words
    output = words.new_empty((*words.shape[:-1], groups, words_for(per_group)), dtype=torch.int64)
    status = _native.kernels(words).align_groups(
        words.data_ptr(), words.shape[:-1].numel(), groups, per_group, output.data_ptr()
    )
    _native.check("align_groups", status)
    return output


@functools.lru_cache(maxsize=1024)
def weight_bytes(
    filters: int, kernel_height: int, kernel_width: int, channels: int, groups: int, native: Any, level: str
) -> int:
    """Size of the private copy of a weight that the kernels `native` read at `level`, the active one of them."""
    return native.binary_conv2d_weight_bytes(_weight_shape(filters, kernel_height, kernel_width, channels, groups))


def _weight_shape(filters: int, kernel_height: int, kernel_width: int, channels: int, groups: int) -> Any:
    return _conv_shape(1, 1, 1, channels, filters, kernel_height, kernel_width, 1, 1, 1, 1, 0, 0, 1, 1, groups)


def _check_block_weight(words: Tensor, channels: int, groups: int) -> None:
    if words.dtype != torch.int64 or words.dim() != 4 or words.shape[3] != words_for(channels // groups):
        raise ValueError(
            f"binary_conv2d: weight words must be int64 (O, kh, kw, {words_for(channels // groups)}) for "
            f"{channels // groups} channels per group, got {words.dtype} {tuple(words.shape)}"
        )


def _block_weight(words: Tensor, channels: int, groups: int) -> Tensor:
    _check_block_weight(words, channels, groups)
    words = words.contiguous()
    sizes = (*words.shape[:3], channels, groups)
    native = _native.kernels(words)
    size = weight_bytes(*sizes, native, native.level)
    blocked = words.new_zeros(size, dtype=torch.uint8)  # the layout has gaps
    status = native.binary_conv2d_block_weight(_weight_shape(*sizes), words.data_ptr(), blocked.data_ptr())
    _native.check("binary_conv2d_block_weight", status)
    return blocked


def _block_weight_fake(words: Tensor, channels: int, groups: int) -> Tensor:
    _check_block_weight(words, channels, groups)
    native = _native.kernels(words)
    sizes = (int(size) for size in words.shape[:3])
    size = weight_bytes(*sizes, channels, groups, native, native.level)
    return words.new_empty(size, dtype=torch.uint8)


# words (O, kh, kw, W of one group) -> the active level's private copy, opaque bytes.
binary_conv2d_block_weight = _oplib.define(
    "binary_conv2d_block_weight(Tensor words, int channels, int groups) -> Tensor",
    cpu=_block_weight,
    cuda=_block_weight,
    fake=_block_weight_fake,
)

_GEOMETRY = "int filters, int[] kernel, int[] stride, int[] padding, int[] dilation, int groups"


def _check_epilogue(
    filters: int,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    threshold: Tensor | None,
    flip: Tensor | None,
    out_dtype: torch.dtype,
    out_shape: tuple[int, int, int, int],
) -> int:
    """Checks the optional arguments; returns the output kind."""
    exact = scale is None and bias is None and residual is None
    if threshold is None and flip is None and exact and out_dtype in _OUTPUT_KINDS:
        return _OUTPUT_KINDS[out_dtype]
    for name, value in (("scale", scale), ("bias", bias)):
        if value is not None and (
            value.dtype != torch.float32
            or value.dim() != 1
            or not (value.shape[0] == filters or (name == "scale" and value.shape[0] == 1))
        ):
            raise ValueError(
                f"binary_conv2d: {name} must be float32 of shape ({filters},), got {value.dtype} {tuple(value.shape)}"
            )
    if residual is not None and (residual.dtype not in FLOAT_TYPES or residual.shape != out_shape):
        raise ValueError(
            f"binary_conv2d: residual must be a float tensor of the output's shape {tuple(out_shape)}, "
            f"got {residual.dtype} {tuple(residual.shape)}"
        )
    if threshold is None:
        if flip is not None:
            raise ValueError("binary_conv2d: flip needs a threshold")
        if out_dtype not in _OUTPUT_KINDS:
            raise TypeError(
                f"binary_conv2d: out_dtype must be int32, float32, bfloat16 or float16, got {out_dtype}"
            )
        if out_dtype == torch.int32 and not exact:
            raise TypeError("binary_conv2d: out_dtype int32 takes no scale, bias or residual; ask for a float dtype")
        return _OUTPUT_KINDS[out_dtype]
    expected = torch.int32 if exact else torch.float32
    if threshold.dtype != expected or threshold.dim() != 2 or threshold.shape[0] not in (1, 2):
        raise ValueError(
            f"binary_conv2d: threshold must be {expected} of shape (1 or 2, {filters}), "
            f"got {threshold.dtype} {tuple(threshold.shape)}"
        )
    if threshold.shape[1] != filters or (
        flip is not None and (flip.dtype != torch.bool or flip.shape != threshold.shape)
    ):
        raise ValueError(
            f"binary_conv2d: threshold and flip (bool) must have shape (1 or 2, {filters}), got "
            f"{tuple(threshold.shape)} and {None if flip is None else (flip.dtype, tuple(flip.shape))}"
        )
    return _CONV_OUTPUTS["bits_by_integer" if exact else "bits_by_float"]


def _binary_conv2d(
    input: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    threshold: Tensor | None, flip: Tensor | None, channels: int, filters: int, kernel: list[int], stride: list[int],
    padding: list[int], dilation: list[int], groups: int, encoding: str, padding_value: int, out_dtype: torch.dtype,
) -> Tensor:
    native = _native.kernels(input)
    plan = _conv_plan(
        native, input.shape, channels, filters, kernel, stride, padding, dilation, groups, encoding, padding_value
    )
    if input.dtype != torch.int64:
        raise TypeError(f"binary_conv2d: input must be int64 words, got {input.dtype}")
    kind = _check_epilogue(filters, scale, bias, residual, threshold, flip, out_dtype, plan.out_size)
    weight_pointer = _pointer(weight, input, "binary_conv2d: weight")  # before its size, which depends on the device
    if weight.numel() != plan.weight_bytes:
        raise ValueError(
            f"binary_conv2d: weight was not packed for {filters} filters, kernel {list(kernel)}, {channels} input "
            f"channels, groups={groups} and {native.level}"
        )
    if groups > 1 or not input.is_contiguous():
        input = _aligned_groups(input, channels, groups)
    thresholds = 0
    if threshold is None:
        output = input.new_empty_strided(plan.out_size, plan.out_strides, dtype=out_dtype)
    else:
        threshold = threshold.contiguous()
        flip = None if flip is None else flip.contiguous()
        thresholds = threshold.shape[0]
        batch, _, height, width = plan.out_size
        output = input.new_empty((batch, height, width, words_for(thresholds * filters)))
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    code = ENCODINGS[encoding]
    size = native.binary_conv2d_workspace_bytes(plan.shape, code, padding_value, kind, thresholds)
    status = native.binary_conv2d(
        plan.shape, code, padding_value, kind, input.data_ptr(), weight_pointer,
        _pointer(scale, input, "binary_conv2d: scale"), 0 if scale is None or scale.numel() == 1 else 1,
        _pointer(bias, input, "binary_conv2d: bias"), _pointer(residual, input, "binary_conv2d: residual"),
        0 if residual is None else FLOAT_TYPES[residual.dtype], _pointer(threshold, input, "binary_conv2d: threshold"),
        _pointer(flip, input, "binary_conv2d: flip"), thresholds,
        output.data_ptr(), _native.scratch(size, input), size,
    )
    _native.check("binary_conv2d", status)
    return output


def _binary_conv2d_fake(
    input: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    threshold: Tensor | None, flip: Tensor | None, channels: int, filters: int, kernel: list[int], stride: list[int],
    padding: list[int], dilation: list[int], groups: int, encoding: str, padding_value: int, out_dtype: torch.dtype,
) -> Tensor:
    height, width = _check_conv(
        input.shape, channels, filters, kernel, stride, padding, dilation, groups, encoding, padding_value
    )
    batch = input.shape[0]
    _check_epilogue(filters, scale, bias, residual, threshold, flip, out_dtype, (batch, filters, height, width))
    if threshold is None:
        return torch.empty(
            (batch, filters, height, width),
            dtype=out_dtype,
            device=input.device,
            memory_format=torch.channels_last,
        )
    return input.new_empty((batch, height, width, words_for(threshold.shape[0] * filters)))


# Words and a blocked weight -> (N, O, H', W') channels-last int32 or float, or, with thresholds, words (N, H', W', W).
# padding is (top, left, bottom, right). Epilogue and exactness: csrc/core/ops/binary_conv2d.h.
binary_conv2d = _oplib.define(
    "binary_conv2d(Tensor input, Tensor weight, Tensor? scale, Tensor? bias, Tensor? residual, Tensor? threshold, "
    f"Tensor? flip, int channels, {_GEOMETRY}, str encoding, int padding_value, ScalarType out_dtype) -> Tensor",
    cpu=_binary_conv2d,
    cuda=_binary_conv2d,
    fake=_binary_conv2d_fake,
)


# --- gradients of the convolution -------------------------------------------------------------------------------------


def _check_grad_output(grad_output: Tensor, size: tuple[int, int, int, int]) -> None:
    if grad_output.dtype != torch.float32 or grad_output.shape != size:
        raise ValueError(
            f"binary_conv2d: grad_output must be float32 of shape {size}, got {grad_output.dtype} "
            f"{tuple(grad_output.shape)}"
        )


def _input_grad(
    grad_output: Tensor, weight: Tensor, scale: Tensor | None, mask: Tensor | None, input_size: list[int],
    filters: int, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], groups: int,
) -> Tensor:
    batch, channels, height, width = input_size
    native = _native.kernels(grad_output)
    plan = _conv_plan(
        native, (batch, height, width, words_for(channels)), channels, filters, kernel, stride, padding, dilation,
        groups, "sign", 0,
    )
    _check_grad_output(grad_output, plan.out_size)
    _check_block_weight(weight, channels, groups)
    if mask is not None and mask.shape != (batch, height, width, words_for(channels)):
        raise ValueError(
            f"binary_conv2d_input_grad: mask must be words {(batch, height, width, words_for(channels))}, "
            f"got {tuple(mask.shape)}"
        )
    grad_output = grad_output.contiguous(memory_format=torch.channels_last)
    weight = weight.contiguous()
    mask = None if mask is None else mask.contiguous()
    grad_input = torch.empty(
        (batch, channels, height, width),
        dtype=torch.float32,
        device=grad_output.device,
        memory_format=torch.channels_last,
    )
    size = native.binary_conv2d_input_grad_workspace_bytes(plan.shape)
    status = native.binary_conv2d_input_grad(
        plan.shape, grad_output.data_ptr(), _pointer(weight, grad_output, "binary_conv2d_input_grad: weight"),
        _pointer(scale, grad_output, "binary_conv2d_input_grad: scale"),
        0 if scale is None or scale.numel() == 1 else 1,
        _pointer(mask, grad_output, "binary_conv2d_input_grad: mask"), grad_input.data_ptr(),
        _native.scratch(size, grad_output), size,
    )
    _native.check("binary_conv2d_input_grad", status)
    return grad_input


def _input_grad_fake(
    grad_output: Tensor, weight: Tensor, scale: Tensor | None, mask: Tensor | None, input_size: list[int],
    filters: int, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], groups: int,
) -> Tensor:
    return torch.empty(
        tuple(input_size), dtype=torch.float32, device=grad_output.device, memory_format=torch.channels_last
    )


# Gradient of the input from weight words (O, kh, kw, W), zeroed where the mask's bit is 0.
binary_conv2d_input_grad = _oplib.define(
    "binary_conv2d_input_grad(Tensor grad_output, Tensor weight, Tensor? scale, Tensor? mask, SymInt[] input_size, "
    f"{_GEOMETRY}) -> Tensor",
    cpu=_input_grad,
    cuda=_input_grad,
    fake=_input_grad_fake,
)


def _weight_grad(
    grad_output: Tensor, input: Tensor, channels: int, filters: int, kernel: list[int], stride: list[int],
    padding: list[int], dilation: list[int], groups: int, encoding: str, padding_value: int,
) -> Tensor:
    native = _native.kernels(grad_output)
    plan = _conv_plan(
        native, input.shape, channels, filters, kernel, stride, padding, dilation, groups, encoding, padding_value
    )
    _check_grad_output(grad_output, plan.out_size)
    grad_output = grad_output.contiguous(memory_format=torch.channels_last)
    input = _aligned_groups(input, channels, groups)
    grad_weight = torch.empty(
        (filters, channels // groups, kernel[0], kernel[1]),
        dtype=torch.float32,
        device=grad_output.device,
        memory_format=torch.channels_last,
    )
    size = native.binary_conv2d_weight_grad_workspace_bytes(plan.shape)
    status = native.binary_conv2d_weight_grad(
        plan.shape, ENCODINGS[encoding], padding_value, grad_output.data_ptr(),
        _pointer(input, grad_output, "binary_conv2d_weight_grad: input"), grad_weight.data_ptr(),
        _native.scratch(size, grad_output), size,
    )
    _native.check("binary_conv2d_weight_grad", status)
    return grad_weight


def _weight_grad_fake(
    grad_output: Tensor, input: Tensor, channels: int, filters: int, kernel: list[int], stride: list[int],
    padding: list[int], dilation: list[int], groups: int, encoding: str, padding_value: int,
) -> Tensor:
    return torch.empty(
        (filters, channels // groups, kernel[0], kernel[1]),
        dtype=torch.float32,
        device=grad_output.device,
        memory_format=torch.channels_last,
    )


# Gradient of the binarized weight from activation words, (O, C / groups, kh, kw) channels-last.
binary_conv2d_weight_grad = _oplib.define(
    f"binary_conv2d_weight_grad(Tensor grad_output, Tensor input, int channels, {_GEOMETRY}, str encoding, "
    "int padding_value) -> Tensor",
    cpu=_weight_grad,
    cuda=_weight_grad,
    fake=_weight_grad_fake,
)


# --- pooling ----------------------------------------------------------------------------------------------------------


def pool_size(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    """Output rows (or columns) of a pooling, as torch.nn.functional.max_pool2d defines them."""
    span = size + 2 * padding - dilation * (kernel - 1) - 1
    if not ceil_mode:
        return span // stride + 1
    out = -(-span // stride) + 1
    # The last window must start inside the image or its left padding.
    return out - 1 if (out - 1) * stride >= size + padding else out


def _check_pool(
    size: Sequence[int], dtype: torch.dtype, channels: int, kernel: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], ceil_mode: bool, op: str,
) -> tuple[int, int]:
    """Checks a pooling's arguments; returns the output's height and width."""
    if dtype != torch.int64 or len(size) != 4 or size[3] != words_for(channels):
        raise ValueError(
            f"{op}: input must be int64 words (N, H, W, {words_for(channels)}) for {channels} channels, "
            f"got {dtype} {tuple(size)}"
        )
    if min(kernel) < 1 or min(stride) < 1 or min(dilation) < 1:
        raise ValueError(
            f"{op}: kernel, stride and dilation must be at least 1, got kernel={list(kernel)}, "
            f"stride={list(stride)}, dilation={list(dilation)}"
        )
    if any(pad < 0 or 2 * pad > length for pad, length in zip(padding, kernel, strict=True)):
        raise ValueError(
            f"{op}: padding must be between 0 and half the kernel {list(kernel)}, got {list(padding)}"
        )
    height = pool_size(size[1], kernel[0], stride[0], padding[0], dilation[0], ceil_mode)
    width = pool_size(size[2], kernel[1], stride[1], padding[1], dilation[1], ceil_mode)
    if height < 1 or width < 1:
        raise ValueError(
            f"{op}: input {tuple(size[1:3])} is smaller than the window {list(kernel)} with padding "
            f"{list(padding)} and dilation {list(dilation)}"
        )
    return height, width


@functools.lru_cache(maxsize=1024)
def _cached_pool_plan(
    size: tuple[int, ...], dtype: torch.dtype, channels: int, kernel: tuple[int, int], stride: tuple[int, int],
    padding: tuple[int, int], dilation: tuple[int, int], ceil_mode: bool, op: str,
) -> tuple[Any, int, int]:
    height, width = _check_pool(size, dtype, channels, kernel, stride, padding, dilation, ceil_mode, op)
    shape = _native.cpu.PoolShape(
        *size[:3], channels, *kernel, height, width, *stride, *padding, *dilation
    )
    return shape, height, width


def _pool_plan(
    input: Tensor, channels: int, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], ceil_mode: bool, op: str,
) -> tuple[Any, int, int]:
    """The native shape, and the output's height and width; made once for each set of arguments."""
    if type(kernel) is list:  # from the dispatcher; the wrappers' tuples can be looked up as they are
        kernel, stride, padding, dilation = tuple(kernel), tuple(stride), tuple(padding), tuple(dilation)
    return _cached_pool_plan(input.shape, input.dtype, channels, kernel, stride, padding, dilation, ceil_mode, op)


def _max_pool(
    input: Tensor, invert: Tensor | None, channels: int, kernel: list[int], stride: list[int], padding: list[int],
    dilation: list[int], ceil_mode: bool,
) -> Tensor:
    shape, height, width = _pool_plan(
        input, channels, kernel, stride, padding, dilation, ceil_mode, "binary_max_pool2d"
    )
    if invert is not None and (invert.dtype != torch.int64 or invert.shape != (words_for(channels),)):
        raise ValueError(
            f"binary_max_pool2d: invert must be int64 words ({words_for(channels)},), "
            f"got {invert.dtype} {tuple(invert.shape)}"
        )
    input = input.contiguous()
    invert = None if invert is None else invert.contiguous()
    output = input.new_empty((input.shape[0], height, width, input.shape[3]))
    status = _native.kernels(input).binary_max_pool2d(
        shape, input.data_ptr(), _pointer(invert, input, "binary_max_pool2d: invert"), output.data_ptr()
    )
    _native.check("binary_max_pool2d", status)
    return output


def _max_pool_fake(
    input: Tensor, invert: Tensor | None, channels: int, kernel: list[int], stride: list[int], padding: list[int],
    dilation: list[int], ceil_mode: bool,
) -> Tensor:
    height, width = _check_pool(
        input.shape, input.dtype, channels, kernel, stride, padding, dilation, ceil_mode, "binary_max_pool2d"
    )
    return input.new_empty((input.shape[0], height, width, input.shape[3]))


# Words (N, H, W, W') -> words: OR over the window, AND in the channels of `invert`.
binary_max_pool2d = _oplib.define(
    "binary_max_pool2d(Tensor input, Tensor? invert, SymInt channels, int[] kernel, int[] stride, int[] padding, "
    "int[] dilation, bool ceil_mode) -> Tensor",
    cpu=_max_pool,
    cuda=_max_pool,
    fake=_max_pool_fake,
)


def _avg_pool(
    input: Tensor, channels: int, kernel: list[int], stride: list[int], padding: list[int], ceil_mode: bool,
    count_include_pad: bool, divisor_override: int, encoding: str,
) -> Tensor:
    shape, height, width = _pool_plan(
        input, channels, kernel, stride, padding, (1, 1), ceil_mode, "binary_avg_pool2d"
    )
    input = input.contiguous()
    output = torch.empty(
        (input.shape[0], channels, height, width),
        dtype=torch.float32,
        device=input.device,
        memory_format=torch.channels_last,
    )
    status = _native.kernels(input).binary_avg_pool2d(
        shape, ENCODINGS[encoding], count_include_pad, divisor_override, input.data_ptr(), output.data_ptr()
    )
    _native.check("binary_avg_pool2d", status)
    return output


def _avg_pool_fake(
    input: Tensor, channels: int, kernel: list[int], stride: list[int], padding: list[int], ceil_mode: bool,
    count_include_pad: bool, divisor_override: int, encoding: str,
) -> Tensor:
    height, width = _check_pool(
        input.shape, input.dtype, channels, kernel, stride, padding, [1, 1], ceil_mode, "binary_avg_pool2d"
    )
    return torch.empty(
        (input.shape[0], channels, height, width),
        dtype=torch.float32,
        device=input.device,
        memory_format=torch.channels_last,
    )


# Words (N, H, W, W') -> float32 (N, C, H', W') channels-last. divisor_override 0: none.
binary_avg_pool2d = _oplib.define(
    "binary_avg_pool2d(Tensor input, SymInt channels, int[] kernel, int[] stride, int[] padding, bool ceil_mode, "
    "bool count_include_pad, int divisor_override, str encoding) -> Tensor",
    cpu=_avg_pool,
    cuda=_avg_pool,
    fake=_avg_pool_fake,
)
