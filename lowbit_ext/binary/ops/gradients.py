"""Gradients of the binary convolution, from the bits it kept.

On the CPU our kernels make them, of float32. A GPU expands the bits in the gradient's own type and leaves the products
to torch's convolution, that is to its tensor cores: half-precision products are there as fast as a kernel could count
bits against them, and only bits lie in memory between the two passes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowbit_ext import _native, _oplib
from lowbit_ext._native import pointer
from lowbit_ext.binary.ops.convolution import aligned_groups, check_factors, check_weight_words, contiguous
from lowbit_ext.binary.ops.geometry import ENCODINGS, Geometry, Size, as_geometry, conv_plan
from lowbit_ext.packed import ENCODING_VALUES, FLOAT_TYPES, unpack_op, words_for


def gradient_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The type in which the operators take, on a device, a gradient that comes as `dtype`."""
    return dtype if device.type == "cuda" else torch.float32


def _check_grad_output(grad_output: Tensor, size: Size) -> None:
    kinds = FLOAT_TYPES if grad_output.is_cuda else (torch.float32,)
    if grad_output.dtype not in kinds or grad_output.shape != size:
        raise ValueError(
            f"binary_conv2d: grad_output must be {', '.join(str(kind)[6:] for kind in kinds)} of shape {size}, got "
            f"{grad_output.dtype} {tuple(grad_output.shape)}"
        )


def _empty(grad_output: Tensor, size: Sequence[int]) -> Tensor:
    return torch.empty(size, dtype=grad_output.dtype, device=grad_output.device, memory_format=torch.channels_last)


def _expanded(words: Tensor, channels: int, low: float, high: float, dtype: torch.dtype) -> Tensor:
    """The values of words (..., W), channels-last."""
    return unpack_op(words, channels, low, high, dtype).movedim(-1, 1)


def _by_torch(
    grad_output: Tensor, input: Tensor, weight: Tensor, geometry: Geometry, padding: tuple[int, int], of_input: bool
) -> Tensor:
    """The gradient of the input, or of the weight, of torch's convolution."""
    gradients = torch.ops.aten.convolution_backward(
        grad_output, input, weight, None, geometry.stride, padding, geometry.dilation, False, (0, 0), geometry.groups,
        (of_input, not of_input, False),
    )
    return gradients[0 if of_input else 1]


def _sides(geometry: Geometry, value: int) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    """The padding that torch's convolution makes, zeros on both sides; and what is put round the input instead."""
    top, left, bottom, right = geometry.padding
    return ((top, left), (0,) * 4) if value == 0 and (top, left) == (bottom, right) else ((0, 0), geometry.padding)


def _input_grad_by_torch(
    grad_output: Tensor, weight: Tensor, scale: Tensor | None, mask: Tensor | None, input_size: Sequence[int],
    geometry: Geometry,
) -> Tensor:
    batch, channels, height, width = input_size
    padding, (top, left, bottom, right) = _sides(geometry, 0)
    values = _expanded(weight, channels // geometry.groups, -1.0, 1.0, grad_output.dtype)
    if scale is not None:
        values = values * scale.to(values.dtype).reshape(-1, 1, 1, 1)
    padded = grad_output.new_empty(1).expand(batch, channels, height + top + bottom, width + left + right)
    grad_input = _by_torch(grad_output, padded, values, geometry, padding, True)
    inside = grad_input[:, :, top : top + height, left : left + width]
    grad_input = inside.contiguous(memory_format=torch.channels_last)
    if mask is not None:
        grad_input.masked_fill_(_expanded(mask, channels, 1.0, 0.0, grad_output.dtype).bool(), 0.0)
    return grad_input


def _weight_grad_by_torch(
    grad_output: Tensor, input: Tensor, channels: int, filters: int, geometry: Geometry, encoding: str,
    padding_value: int,
) -> Tensor:
    padding, (top, left, bottom, right) = _sides(geometry, padding_value)
    values = _expanded(input, channels, *ENCODING_VALUES[encoding], grad_output.dtype)
    if top or left or bottom or right:
        values = torch.nn.functional.pad(values, (left, right, top, bottom), value=float(padding_value))
    weight = grad_output.new_empty(1).expand(filters, channels // geometry.groups, *geometry.kernel)
    grad_weight = _by_torch(grad_output, values, weight, geometry, padding, False)
    return grad_weight.contiguous(memory_format=torch.channels_last)


def _input_grad_outputs(
    grad_output: Tensor, weight: Tensor, scale: Tensor | None, mask: Tensor | None, input_size: Sequence[int],
    filters: int, geometry: Sequence[int],
) -> Tensor:
    return _empty(grad_output, tuple(input_size))


def _input_grad(
    grad_output: Tensor, weight: Tensor, scale: Tensor | None, mask: Tensor | None, input_size: Sequence[int],
    filters: int, geometry: Sequence[int],
) -> Tensor:
    op = "binary_conv2d_input_grad"
    batch, channels, height, width = input_size
    native = _native.kernels(grad_output)
    words_size = (batch, height, width, words_for(channels))
    plan = conv_plan(native, words_size, channels, filters, geometry, "sign", 0)
    _check_grad_output(grad_output, plan.out_size)
    check_weight_words(weight, channels, geometry[-1])
    if weight.shape[:3] != (filters, *geometry[:2]):
        raise ValueError(
            f"{op}: weight must be words of {filters} filters and kernel {list(geometry[:2])}, got "
            f"{tuple(weight.shape)}"
        )
    check_factors(op, filters, scale=scale)
    if mask is not None and (mask.dtype != torch.int64 or mask.shape != words_size):
        raise ValueError(f"{op}: mask must be int64 words {words_size}, got {mask.dtype} {tuple(mask.shape)}")
    if not hasattr(native, op):
        return _input_grad_by_torch(grad_output, weight, scale, mask, input_size, as_geometry(geometry))
    grad_input = _empty(grad_output, tuple(input_size))
    grad_output = grad_output.contiguous(memory_format=torch.channels_last)
    weight = weight.contiguous()
    scale, mask = contiguous(scale), contiguous(mask)
    size = native.binary_conv2d_input_grad_workspace_bytes(plan.shape)
    workspace = _native.workspace(size, grad_output)
    status = native.binary_conv2d_input_grad(
        plan.shape, pointer(grad_output, grad_output, f"{op}: grad_output"),
        pointer(weight, grad_output, f"{op}: weight"), pointer(scale, grad_output, f"{op}: scale"),
        0 if scale is None or scale.numel() == 1 else 1, pointer(mask, grad_output, f"{op}: mask"),
        grad_input.data_ptr(), workspace.data_ptr(), size,
    )
    _native.check(op, status)
    return grad_input


# Gradient of the input from weight words (O, kh, kw, W), zeroed where the mask's bit is 0.
binary_conv2d_input_grad = _oplib.define(
    "binary_conv2d_input_grad(Tensor grad_output, Tensor weight, Tensor? scale, Tensor? mask, SymInt[] input_size, "
    "int filters, int[] geometry) -> Tensor",
    outputs=_input_grad_outputs,
    launcher=_input_grad,
)


def _weight_grad_outputs(
    grad_output: Tensor, input: Tensor, channels: int, filters: int, geometry: Sequence[int], encoding: str,
    padding_value: int,
) -> Tensor:
    shape = as_geometry(geometry)
    return _empty(grad_output, (filters, channels // shape.groups, *shape.kernel))


def _weight_grad(
    grad_output: Tensor, input: Tensor, channels: int, filters: int, geometry: Sequence[int], encoding: str,
    padding_value: int,
) -> Tensor:
    op = "binary_conv2d_weight_grad"
    native = _native.kernels(grad_output)
    plan = conv_plan(native, input.shape, channels, filters, geometry, encoding, padding_value)
    _check_grad_output(grad_output, plan.out_size)
    if input.dtype != torch.int64:
        raise TypeError(f"{op}: input must be int64 words, got {input.dtype}")
    if not hasattr(native, op):
        pointer(input, grad_output, f"{op}: input")
        return _weight_grad_by_torch(
            grad_output, input, channels, filters, as_geometry(geometry), encoding, padding_value
        )
    grad_weight = _weight_grad_outputs(grad_output, input, channels, filters, geometry, encoding, padding_value)
    grad_output = grad_output.contiguous(memory_format=torch.channels_last)
    input = aligned_groups(input, channels, geometry[-1])
    size = native.binary_conv2d_weight_grad_workspace_bytes(plan.shape)
    workspace = _native.workspace(size, grad_output)
    status = native.binary_conv2d_weight_grad(
        plan.shape, ENCODINGS[encoding], padding_value, pointer(grad_output, grad_output, f"{op}: grad_output"),
        pointer(input, grad_output, f"{op}: input"), grad_weight.data_ptr(), workspace.data_ptr(), size,
    )
    _native.check(op, status)
    return grad_weight


# Gradient of the binarized weight from activation words, (O, C / groups, kh, kw) channels-last.
binary_conv2d_weight_grad = _oplib.define(
    "binary_conv2d_weight_grad(Tensor grad_output, Tensor input, int channels, int filters, int[] geometry, "
    "str encoding, int padding_value) -> Tensor",
    outputs=_weight_grad_outputs,
    launcher=_weight_grad,
)
