"""Gradients of the binary convolution, from the bits it kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowbit_ext import _native, _oplib
from lowbit_ext._native import pointer
from lowbit_ext.binary.ops.convolution import aligned_groups, check_factors, check_weight_words, contiguous
from lowbit_ext.binary.ops.geometry import ENCODINGS, Size, as_geometry, conv_plan
from lowbit_ext.packed import words_for


def _check_grad_output(grad_output: Tensor, size: Size) -> None:
    if grad_output.dtype != torch.float32 or grad_output.shape != size:
        raise ValueError(
            f"binary_conv2d: grad_output must be float32 of shape {size}, got {grad_output.dtype} "
            f"{tuple(grad_output.shape)}"
        )


def _empty(grad_output: Tensor, size: Sequence[int]) -> Tensor:
    return torch.empty(size, dtype=torch.float32, device=grad_output.device, memory_format=torch.channels_last)


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
    grad_weight = _weight_grad_outputs(grad_output, input, channels, filters, geometry, encoding, padding_value)
    if input.dtype != torch.int64:
        raise TypeError(f"{op}: input must be int64 words, got {input.dtype}")
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
