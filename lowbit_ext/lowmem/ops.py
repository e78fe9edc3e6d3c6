"""Operators of low-memory back-propagation: schema, outputs and launcher of each. Raw: the package calls them.

Codes are uint8 of `bits` bits each, the lowest bits of a byte first. Channel codes have a padded row for every run of
memory: (N, C, bytes of the spatial elements), or (N, *spatial, bytes of C) of a channels_last tensor. Group codes are
flat, in memory order; scale and minimum are bfloat16 (groups of 256, 2).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lowbit_ext import _native, _oplib
from lowbit_ext.packed import FLOAT_TYPES

BITS: tuple[int, ...] = _native.cpu.CODE_BITS
GROUP: int = _native.cpu.GROUP


def _channels_last_of(dimensions: int) -> torch.memory_format:
    return torch.channels_last if dimensions == 4 else torch.channels_last_3d


def is_channels_last(x: Tensor) -> bool:
    """Whether channels are the fastest dimension of a dense tensor that is not contiguous."""
    return x.dim() in (4, 5) and not x.is_contiguous() and x.is_contiguous(memory_format=_channels_last_of(x.dim()))


def as_layout(x: Tensor, channels_last: bool) -> Tensor:
    """x itself where it is dense in that order, otherwise a copy that is."""
    if not channels_last:
        return x.contiguous()
    return x.contiguous(memory_format=_channels_last_of(x.dim()))


def empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype, channels_last: bool) -> Tensor:
    """A dense tensor of that order."""
    if not channels_last:
        return like.new_empty(shape, dtype=dtype)
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=_channels_last_of(len(shape)))


class _Rows(NamedTuple):
    """A tensor as the kernels see it."""

    outer: int
    channels: int
    spatial: int
    channels_last: bool


def _rows(shape: Sequence[int], channels_last: bool) -> _Rows:
    spatial = math.prod(shape[2:])
    return _Rows(shape[0], shape[1], spatial, channels_last or len(shape) == 2)


def _bytes(count: int, bits: int) -> int:
    return (count * bits + 7) // 8


def _codes_shape(shape: Sequence[int], channels_last: bool, bits: int) -> tuple[int, ...]:
    if channels_last or len(shape) == 2:
        return (shape[0], *shape[2:], _bytes(shape[1], bits))
    return (shape[0], shape[1], _bytes(math.prod(shape[2:]), bits))


def _check_bits(op: str, bits: int) -> None:
    if bits not in BITS:
        raise ValueError(f"{op}: bits must be 2, 4 or 8, got {bits}")


def _check_float(op: str, name: str, x: Tensor) -> None:
    if x.dtype not in FLOAT_TYPES:
        raise TypeError(f"{op}: {name} must be float32, bfloat16 or float16, got {x.dtype}")


def _check_channels(op: str, x: Tensor, bits: int, span: float, **parameters: Tensor) -> None:
    _check_float(op, "input", x)
    if x.dim() < 2:
        raise ValueError(f"{op}: input must be (N, C, ...), got {tuple(x.shape)}")
    _check_settings(op, bits, span)
    _check_parameters(op, x.shape[1], **parameters)


def _check_settings(op: str, bits: int, span: float) -> None:
    _check_bits(op, bits)
    if not 0 < span < math.inf:
        raise ValueError(f"{op}: span must be a positive number of standard deviations, got {span}")


def _check_parameters(op: str, channels: int, **parameters: Tensor) -> None:
    for name, value in parameters.items():
        if value.dtype not in (*FLOAT_TYPES, torch.float64) or value.shape != (channels,):
            raise ValueError(f"{op}: {name} must be floats ({channels},), got {value.dtype} {tuple(value.shape)}")


def _check_codes(op: str, codes: Tensor, shape: Sequence[int], channels_last: bool, bits: int) -> None:
    expected = _codes_shape(shape, channels_last, bits)
    if codes.dtype != torch.uint8 or codes.shape != expected:
        raise ValueError(f"{op}: codes must be uint8 {tuple(expected)}, got {codes.dtype} {tuple(codes.shape)}")


class _Floats:
    """Parameters as contiguous float32 beside the input, alive until the kernel has run."""

    def __init__(self, op: str, like: Tensor, **parameters: Tensor) -> None:
        self.kept = [value.detach().to(torch.float32).contiguous() for value in parameters.values()]
        named = zip(parameters, self.kept, strict=True)
        self.pointers = [_native.pointer(value, like, f"{op}: {name}") for name, value in named]


# --- channel codes ----------------------------------------------------------------------------------------------------


def _quantize_outputs(
    op: str, x: Tensor, mean: Tensor, invstd: Tensor, gamma: Tensor, beta: Tensor, bits: int, span: float,
    y: Tensor | None,
) -> Tensor:
    _check_channels(op, x, bits, span, mean=mean, invstd=invstd, gamma=gamma, beta=beta)
    if y is not None and (y.dtype != x.dtype or y.shape != x.shape):
        raise ValueError(f"{op}: y must be {x.dtype} {tuple(x.shape)} like the input, got {y.dtype} {tuple(y.shape)}")
    return x.new_empty(_codes_shape(x.shape, is_channels_last(x), bits), dtype=torch.uint8)


def _quantize(
    op: str, x: Tensor, mean: Tensor, invstd: Tensor, gamma: Tensor, beta: Tensor, bits: int, span: float,
    y: Tensor | None,
) -> Tensor:
    codes = _quantize_outputs(op, x, mean, invstd, gamma, beta, bits, span, y)
    channels_last = is_channels_last(x)
    x = as_layout(x, channels_last)
    target = None if y is None else as_layout(y, channels_last)
    rows = _rows(x.shape, channels_last)
    floats = _Floats(op, x, mean=mean, invstd=invstd, gamma=gamma, beta=beta)
    native = _native.kernels(x)
    size = native.batch_norm_relu_quantize_workspace_bytes(*rows)
    workspace = _native.workspace(size, x)
    status = native.batch_norm_relu_quantize(
        _native.pointer(x, x, f"{op}: x"), FLOAT_TYPES[x.dtype], *rows, *floats.pointers, bits, span, y is not None,
        _native.pointer(target, x, f"{op}: y"), codes.data_ptr(), workspace.data_ptr(), size,
    )
    _native.check(op, status)
    if y is not None and target is not None and target is not y:
        y.copy_(target)
    return codes


# Two operators on one kernel: of one whose only mutable argument is optional, and None, inductor loses the result.

# Channel codes of a batch norm's input, and y = relu(y) of its result in place.
_relu_quantize = functools.partial(_quantize, "batch_norm_relu_quantize")
batch_norm_relu_quantize = _oplib.define(
    "batch_norm_relu_quantize(Tensor x, Tensor mean, Tensor invstd, Tensor gamma, Tensor beta, int bits, float span, "
    "Tensor(a!) y) -> Tensor",
    outputs=functools.partial(_quantize_outputs, "batch_norm_relu_quantize"),
    launcher=_relu_quantize,
)

# Channel codes without a ReLU.
_plain_quantize = functools.partial(_quantize, "batch_norm_quantize", y=None)
batch_norm_quantize = _oplib.define(
    "batch_norm_quantize(Tensor x, Tensor mean, Tensor invstd, Tensor gamma, Tensor beta, int bits, float span) "
    "-> Tensor",
    outputs=functools.partial(_quantize_outputs, "batch_norm_quantize", y=None),
    launcher=_plain_quantize,
)


def _check_dequantize(
    codes: Tensor, gamma: Tensor, beta: Tensor, shape: Sequence[int], channels_last: bool, dtype: torch.dtype,
    bits: int, span: float,
) -> None:
    op = "channel_dequantize"
    _check_settings(op, bits, span)
    if dtype not in FLOAT_TYPES:
        raise TypeError(f"{op}: dtype must be float32, bfloat16 or float16, got {dtype}")
    if len(shape) < 2:
        raise ValueError(f"{op}: shape must be (N, C, ...), got {tuple(shape)}")
    _check_parameters(op, shape[1], gamma=gamma, beta=beta)
    _check_codes(op, codes, shape, channels_last, bits)


def _dequantize_into_outputs(
    codes: Tensor, gamma: Tensor, beta: Tensor, channels_last: bool, bits: int, span: float, relu: bool,
    output: Tensor,
) -> None:
    _check_dequantize(codes, gamma, beta, output.shape, channels_last, output.dtype, bits, span)


def _dequantize_into(
    codes: Tensor, gamma: Tensor, beta: Tensor, channels_last: bool, bits: int, span: float, relu: bool,
    output: Tensor,
) -> None:
    op = "channel_dequantize"
    _dequantize_into_outputs(codes, gamma, beta, channels_last, bits, span, relu, output)
    if as_layout(output, channels_last) is not output:
        order = "channels_last" if channels_last else "contiguous"
        raise ValueError(f"{op}: out must be {order}, got strides {output.stride()} for {tuple(output.shape)}")
    rows = _rows(output.shape, channels_last)
    codes = codes.contiguous()
    floats = _Floats(op, codes, gamma=gamma, beta=beta)
    native = _native.kernels(codes)
    size = native.channel_dequantize_workspace_bytes(*rows)
    workspace = _native.workspace(size, codes)
    status = native.channel_dequantize(
        _native.pointer(codes, codes, f"{op}: codes"), *rows, *floats.pointers, bits, span, relu,
        _native.pointer(output, codes, f"{op}: output"), FLOAT_TYPES[output.dtype], workspace.data_ptr(), size,
    )
    _native.check(op, status)


# What channel codes stand for, written into `output`: relu(gamma xhat + beta), or without ReLU.
channel_dequantize_into = _oplib.define(
    "channel_dequantize_into(Tensor codes, Tensor gamma, Tensor beta, bool channels_last, int bits, float span, "
    "bool relu, Tensor(a!) output) -> ()",
    outputs=_dequantize_into_outputs,
    launcher=_dequantize_into,
)


def _dequantize_outputs(
    codes: Tensor, gamma: Tensor, beta: Tensor, shape: Sequence[int], channels_last: bool, dtype: torch.dtype,
    bits: int, span: float, relu: bool,
) -> Tensor:
    _check_dequantize(codes, gamma, beta, shape, channels_last, dtype, bits, span)
    return empty(codes, shape, dtype, channels_last)


def _dequantize(
    codes: Tensor, gamma: Tensor, beta: Tensor, shape: Sequence[int], channels_last: bool, dtype: torch.dtype,
    bits: int, span: float, relu: bool,
) -> Tensor:
    output = _dequantize_outputs(codes, gamma, beta, shape, channels_last, dtype, bits, span, relu)
    _dequantize_into(codes, gamma, beta, channels_last, bits, span, relu, output)
    return output


# The same in a new tensor.
channel_dequantize = _oplib.define(
    "channel_dequantize(Tensor codes, Tensor gamma, Tensor beta, SymInt[] shape, bool channels_last, ScalarType dtype, "
    "int bits, float span, bool relu) -> Tensor",
    outputs=_dequantize_outputs,
    launcher=_dequantize,
)


def _channels_last_codes(grad: Tensor, codes: Tensor, bits: int) -> bool:
    """Whether codes are those of a channels_last tensor: what their shape says where the two orders differ."""
    return grad.dim() in (4, 5) and codes.dim() == grad.dim() and codes.shape[1:-1] == grad.shape[2:]


def _backward_outputs(
    grad: Tensor, codes: Tensor, gamma: Tensor, beta: Tensor, invstd: Tensor, bits: int, span: float, relu: bool,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    op = "batch_norm_relu_backward"
    _check_channels(op, grad, bits, span, gamma=gamma, beta=beta, invstd=invstd)
    channels, channels_last = grad.shape[1], _channels_last_codes(grad, codes, bits)
    _check_codes(op, codes, grad.shape, channels_last, bits)
    grad_input = empty(grad, grad.shape, grad.dtype, channels_last)
    return grad_input, grad.new_empty(channels, dtype=torch.float32), grad.new_empty(channels, dtype=torch.float32)


def _backward(
    grad: Tensor, codes: Tensor, gamma: Tensor, beta: Tensor, invstd: Tensor, bits: int, span: float, relu: bool,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    op = "batch_norm_relu_backward"
    grad_input, grad_gamma, grad_beta = _backward_outputs(
        grad, codes, gamma, beta, invstd, bits, span, relu, training
    )
    channels_last = _channels_last_codes(grad, codes, bits)
    grad = as_layout(grad, channels_last)
    rows = _rows(grad.shape, channels_last)
    codes = codes.contiguous()
    floats = _Floats(op, grad, gamma=gamma, beta=beta, invstd=invstd)
    native = _native.kernels(grad)
    size = native.batch_norm_relu_backward_workspace_bytes(*rows)
    workspace = _native.workspace(size, grad)
    status = native.batch_norm_relu_backward(
        _native.pointer(grad, grad, f"{op}: grad"), FLOAT_TYPES[grad.dtype], *rows,
        _native.pointer(codes, grad, f"{op}: codes"), *floats.pointers, bits, span, relu, training,
        grad_input.data_ptr(), grad_gamma.data_ptr(), grad_beta.data_ptr(), workspace.data_ptr(), size,
    )
    _native.check(op, status)
    return grad_input, grad_gamma, grad_beta


# Gradients of relu(batch_norm(x)) for x, gamma and beta, from the codes of x.
batch_norm_relu_backward = _oplib.define(
    "batch_norm_relu_backward(Tensor grad, Tensor codes, Tensor gamma, Tensor beta, Tensor invstd, int bits, "
    "float span, bool relu, bool training) -> (Tensor, Tensor, Tensor)",
    outputs=_backward_outputs,
    launcher=_backward,
)


# --- group codes ------------------------------------------------------------------------------------------------------


def _group_sizes(count: int, bits: int) -> tuple[int, int]:
    return _bytes(count, bits), -(-count // GROUP)


def _group_quantize_outputs(
    x: Tensor, bits: int, positive: bool, seed: Tensor | None, offset: int
) -> tuple[Tensor, Tensor]:
    op = "group_quantize"
    _check_float(op, "input", x)
    _check_bits(op, bits)
    # The number itself goes to the kernel: reading it from a GPU would wait for everything before.
    if seed is not None and (seed.dtype != torch.int64 or seed.dim() != 0 or not seed.is_cpu):
        raise ValueError(
            f"{op}: seed must be an int64 scalar on the CPU, got {seed.dtype} {tuple(seed.shape)} on {seed.device}"
        )
    length, groups = _group_sizes(x.numel(), bits)
    return x.new_empty(length, dtype=torch.uint8), x.new_empty((groups, 2), dtype=torch.bfloat16)


def _group_quantize(x: Tensor, bits: int, positive: bool, seed: Tensor | None, offset: int) -> tuple[Tensor, Tensor]:
    codes, scale_minimum = _group_quantize_outputs(x, bits, positive, seed, offset)
    x = as_layout(x, is_channels_last(x))
    key = 0 if seed is None else int(seed) & (2**64 - 1)
    status = _native.kernels(x).group_quantize(
        _native.pointer(x, x, "group_quantize: x"), FLOAT_TYPES[x.dtype], x.numel(), bits, positive, seed is not None,
        key, offset & (2**64 - 1), codes.data_ptr(), scale_minimum.data_ptr(),
    )
    _native.check("group_quantize", status)
    return codes, scale_minimum


# Codes in memory order, and scale and minimum of each group. `positive`: minimum 0, and code 0 for x <= 0 alone.
# `seed`: stochastic rounding, a function of (seed, offset, element); None: nearest.
group_quantize = _oplib.define(
    "group_quantize(Tensor x, int bits, bool positive, Tensor? seed, int offset) -> (Tensor, Tensor)",
    outputs=_group_quantize_outputs,
    launcher=_group_quantize,
)


def _check_group_dequantize(
    codes: Tensor, scale_minimum: Tensor, shape: Sequence[int], dtype: torch.dtype, bits: int
) -> None:
    op = "group_dequantize"
    _check_bits(op, bits)
    if dtype not in FLOAT_TYPES:
        raise TypeError(f"{op}: dtype must be float32, bfloat16 or float16, got {dtype}")
    length, groups = _group_sizes(math.prod(shape), bits)
    if codes.dtype != torch.uint8 or codes.shape != (length,):
        raise ValueError(f"{op}: codes must be uint8 ({length},), got {codes.dtype} {tuple(codes.shape)}")
    if scale_minimum.dtype != torch.bfloat16 or scale_minimum.shape != (groups, 2):
        raise ValueError(
            f"{op}: scale_minimum must be bfloat16 ({groups}, 2), got {scale_minimum.dtype} "
            f"{tuple(scale_minimum.shape)}"
        )


def _group_dequantize_into_outputs(codes: Tensor, scale_minimum: Tensor, bits: int, output: Tensor) -> None:
    _check_group_dequantize(codes, scale_minimum, output.shape, output.dtype, bits)


def _group_dequantize_into(codes: Tensor, scale_minimum: Tensor, bits: int, output: Tensor) -> None:
    _group_dequantize_into_outputs(codes, scale_minimum, bits, output)
    if not output.is_contiguous() and not is_channels_last(output):
        raise ValueError(
            f"group_dequantize: out must be contiguous or channels_last, got strides {output.stride()} for "
            f"{tuple(output.shape)}"
        )
    codes, scale_minimum = codes.contiguous(), scale_minimum.contiguous()
    status = _native.kernels(codes).group_dequantize(
        _native.pointer(codes, codes, "group_dequantize: codes"),
        _native.pointer(scale_minimum, codes, "group_dequantize: scale_minimum"), output.numel(), bits,
        _native.pointer(output, codes, "group_dequantize: output"), FLOAT_TYPES[output.dtype],
    )
    _native.check("group_dequantize", status)


# What group codes stand for, written into `output`, whose memory order is that of the tensor that was quantised.
group_dequantize_into = _oplib.define(
    "group_dequantize_into(Tensor codes, Tensor scale_minimum, int bits, Tensor(a!) output) -> ()",
    outputs=_group_dequantize_into_outputs,
    launcher=_group_dequantize_into,
)


def _group_dequantize_outputs(
    codes: Tensor, scale_minimum: Tensor, shape: Sequence[int], channels_last: bool, dtype: torch.dtype, bits: int
) -> Tensor:
    _check_group_dequantize(codes, scale_minimum, shape, dtype, bits)
    return empty(codes, shape, dtype, channels_last)


def _group_dequantize(
    codes: Tensor, scale_minimum: Tensor, shape: Sequence[int], channels_last: bool, dtype: torch.dtype, bits: int
) -> Tensor:
    output = _group_dequantize_outputs(codes, scale_minimum, shape, channels_last, dtype, bits)
    _group_dequantize_into(codes, scale_minimum, bits, output)
    return output


# What group codes stand for, in a new tensor.
group_dequantize = _oplib.define(
    "group_dequantize(Tensor codes, Tensor scale_minimum, SymInt[] shape, bool channels_last, ScalarType dtype, "
    "int bits) -> Tensor",
    outputs=_group_dequantize_outputs,
    launcher=_group_dequantize,
)
