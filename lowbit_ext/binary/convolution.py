"""Binary convolution and linear map as functions. Bits in, bits or numbers out."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lowbit_ext import _arguments, _native
from lowbit_ext.binary import ops
from lowbit_ext.binary.activation import (
    DEFAULT_THRESHOLDS,
    binary_activation,
    check_encoding,
    check_float,
    check_surrogate,
    wants_grad,
)
from lowbit_ext.binary.epilogue import channel_vector, scaled, thresholds_of
from lowbit_ext.binary.ops.geometry import Geometry, Pair, Sides
from lowbit_ext.binary.surrogates import derivative
from lowbit_ext.binary.weights import PackedWeight, pack_words, sign_words, straight_through_weight
from lowbit_ext.packed import (
    PackedTensor,
    packed_words,
    unchecked,
    words_for,
)


def _check_input(op: str, input: Any) -> None:
    """A PackedTensor, a float tensor, or one of float64."""
    if not isinstance(input, PackedTensor):
        _check_float_or_double(op, "input", input)


def _check_float_or_double(op: str, name: str, value: Any) -> None:
    if isinstance(value, Tensor) and value.dtype == torch.float64:
        _arguments.tensor(op, name, value)
    else:
        check_float(op, name, value)


def _check_weight(op: str, weight: Any, shape: str) -> None:
    """A PackedWeight or a float tensor of the dimensions that `shape` names."""
    if not isinstance(weight, PackedWeight):
        _arguments.tensor(op, "weight", weight)
    if len(weight.shape) != shape.count(",") + 1:
        raise ValueError(f"{op}: weight must be {shape}, got {tuple(weight.shape)}")


@functools.lru_cache(maxsize=4096)
def _cached_geometry(
    weight_shape: Sequence[int], stride: Pair, padding: Sides | str, dilation: Pair, groups: int
) -> Geometry:
    kernel = (weight_shape[2], weight_shape[3])
    stride = _arguments.pair("binary_conv2d", "stride", stride)
    dilation = _arguments.pair("binary_conv2d", "dilation", dilation)
    if padding == "valid":
        sides = (0, 0, 0, 0)
    elif padding == "same":
        if stride != (1, 1):
            raise ValueError(f"binary_conv2d: padding 'same' needs stride 1, got stride={stride}")
        # As torch: where the total is odd, the extra row or column goes to the bottom or right.
        total = [dilation[axis] * (kernel[axis] - 1) for axis in (0, 1)]
        top, left = total[0] // 2, total[1] // 2
        sides = (top, left, total[0] - top, total[1] - left)
    elif isinstance(padding, str):
        raise ValueError(f"binary_conv2d: padding must be ints, 'same' or 'valid', got {padding!r}")
    else:
        (top, bottom), (left, right) = (
            side if isinstance(side, tuple) else (side, side)
            for side in _arguments.sides("binary_conv2d", "padding", padding)
        )
        sides = (top, left, bottom, right)
    return Geometry(*kernel, *stride, *sides, *dilation, groups)


def geometry_of(
    weight_shape: Sequence[int], stride: Pair, padding: Sides | str, dilation: Pair, groups: int
) -> Geometry:
    """Checked and completed geometry of a call."""
    # The cache would take True and 1.0 for 1.
    if not type(stride) is type(padding) is type(dilation) is int:
        stride = _arguments.pair("binary_conv2d", "stride", stride)
        dilation = _arguments.pair("binary_conv2d", "dilation", dilation)
        if not isinstance(padding, str):
            padding = _arguments.sides("binary_conv2d", "padding", padding)
    if torch.compiler.is_compiling():
        return _cached_geometry.__wrapped__(weight_shape, stride, padding, dilation, groups)
    return _cached_geometry(weight_shape, stride, padding, dilation, groups)


def _conv2d_float64(
    input: Tensor, weight: Tensor, geometry: Geometry, padding_value: int, encoding: str, surrogate: str,
    scale: float | Tensor | None, bias: Tensor | None, residual: Tensor | None,
) -> Tensor:
    """conv2d by torch's operators in float64, in which networks are compared."""
    batch, channels, height, width = input.shape
    filters = weight.shape[0]
    _arguments.tensor_like("binary_conv2d", "weight", weight, input)
    size = (batch, height, width, words_for(channels))
    out_size = ops.conv_size(size, channels, filters, geometry, encoding, padding_value)
    factor = None if scale is None else channel_vector("scale", scale, filters, input, torch.float64)
    offset = None if bias is None else channel_vector("bias", bias, filters, input, torch.float64)
    if residual is not None:
        ops.check_residual(residual, out_size, _arguments.FLOATS_AND_DOUBLE)
    # Sums of +-1 are exact, scaled ones are not; the gradient of a latent weight does not have the scale.
    late = wants_grad(scale) or not wants_grad(weight)
    top, left, bottom, right = geometry.padding
    values = F.pad(binary_activation(input, encoding, surrogate), (left, right, top, bottom), value=padding_value)
    effective = straight_through_weight(weight.to(torch.float64), None if late else factor)
    output = F.conv2d(values, effective, None, geometry.stride, 0, geometry.dilation, geometry.groups)
    if late and factor is not None:
        output = output * factor.reshape(-1, 1, 1)
    if offset is not None:
        output = output + offset.reshape(-1, 1, 1)
    return output if residual is None else output + residual


class _BinaryConv2d(torch.autograd.Function):
    """Convolution of binarized values; saves the activation's bits, its mask bits and the weight's bits.

    The input's gradient is straight-through with `surrogate`; the latent weight's is the gradient of its sign. Only a
    surrogate that is neither "clip" nor "identity" keeps the float input.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        packed_weight: PackedWeight | None,
        scale: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        channels: int,
        geometry: Geometry,
        encoding: str,
        surrogate: str,
        padding_value: int,
        out_dtype: torch.dtype,
    ) -> Tensor:
        mask = None
        if input.dtype == torch.int64:
            words = input
        elif surrogate == "clip" and ctx.needs_input_grad[0]:
            words, mask = ops.binarize_with_mask(input, DEFAULT_THRESHOLDS[encoding], encoding)
        else:
            words = ops.binarize(input, None, None, DEFAULT_THRESHOLDS[encoding], encoding)
        if packed_weight is not None:
            weight_words, kernel_weight = packed_weight.words, packed_weight.blocked
        else:
            assert weight is not None
            weight_words = kernel_weight = sign_words(weight)
        output = ops.binary_conv2d(
            words, kernel_weight, scale, bias, residual, None, None, channels, weight_words.shape[0], geometry,
            encoding, padding_value, out_dtype,
        )
        keeps_input = surrogate not in ("clip", "identity") and ctx.needs_input_grad[0]
        ctx.save_for_backward(words, mask, weight_words, scale, input if keeps_input else None)
        ctx.call = (channels, geometry, encoding, surrogate, padding_value)
        ctx.input_dtype = input.dtype
        ctx.weight_like = None if weight is None else (weight.dtype, weight.shape)
        ctx.residual_dtype = None if residual is None else residual.dtype
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        words, mask, weight_words, scale, kept_input = ctx.saved_tensors
        channels, geometry, encoding, surrogate, padding_value = ctx.call
        filters = weight_words.shape[0]
        grad = grad_output.to(ops.gradient_dtype(grad_output.device, grad_output.dtype))
        grad_input = grad_weight = grad_bias = grad_residual = None
        if ctx.needs_input_grad[0]:
            size = (words.shape[0], channels, words.shape[1], words.shape[2])
            grad_input = ops.binary_conv2d_input_grad(grad, weight_words, scale, mask, size, filters, geometry)
            if kept_input is not None:
                grad_input = grad_input * derivative(kept_input, surrogate, encoding)
            grad_input = grad_input.to(ctx.input_dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = ops.binary_conv2d_weight_grad(
                grad, words, channels, filters, geometry, encoding, padding_value
            )
            dtype, weight_shape = ctx.weight_like
            grad_weight = grad_weight.to(dtype).reshape(weight_shape)
        if ctx.needs_input_grad[4]:
            grad_bias = grad.sum((0, 2, 3), dtype=torch.float32)
        if ctx.needs_input_grad[5]:
            grad_residual = grad_output.to(ctx.residual_dtype)
        return (grad_input, grad_weight, None, None, grad_bias, grad_residual, *(None,) * 6)


def _default_dtype(input: Tensor | PackedTensor, plain: bool) -> torch.dtype:
    if isinstance(input, PackedTensor):
        return torch.int32 if plain else torch.float32
    return autocast_dtype(input.device, input.dtype)


def autocast_dtype(device: torch.device, otherwise: torch.dtype) -> torch.dtype:
    """Autocast's dtype inside autocast, which does not know meta."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return otherwise
    return torch.get_autocast_dtype(device.type)


def _check_operands(input: Any, weight: Any, encoding: str, surrogate: str) -> tuple[str, Tensor | None]:
    """Checks input and weight; returns the encoding of the input's bits, and a packed input's scale."""
    op = "binary_conv2d"
    own_scale = None
    if isinstance(input, PackedTensor):
        check_surrogate(op, surrogate)
        encoding, own_scale = input.encoding, input.scale
    else:
        _check_input(op, input)
        check_encoding(op, encoding)
        check_surrogate(op, surrogate)
    if input.dim() != 4:
        raise ValueError(f"{op}: input must be (N, C, H, W), got {tuple(input.shape)}")
    if not isinstance(weight, PackedWeight):
        precise = isinstance(input, Tensor) and input.dtype == torch.float64
        (_check_float_or_double if precise else check_float)(op, "weight", weight)
    if len(weight.shape) != 4:
        raise ValueError(f"{op}: weight must be (O, C / groups, kh, kw), got {tuple(weight.shape)}")
    return encoding, own_scale


def _check_channels(channels: int, weight_shape: Sequence[int], groups: int) -> int:
    """Checks the channels of input and weight against each other; returns the number of filters."""
    filters = weight_shape[0]
    if filters < 1:
        raise ValueError(f"binary_conv2d: weight must have filters, got shape {tuple(weight_shape)}")
    if groups < 1 or channels != weight_shape[1] * groups:
        raise ValueError(
            f"binary_conv2d: weight has {weight_shape[1]} input channels per group, input has {channels} with "
            f"groups={groups} ({channels / groups if groups else 0:g} per group)"
        )
    if groups > 1 and filters % groups:
        raise ValueError(
            f"binary_conv2d: groups must divide the {channels} input channels and the {filters} filters, got {groups}"
        )
    return filters


def _check_result(words: Tensor, residual: Any, threshold: Any, flip: Any, out_dtype: Any) -> None:
    """Checks what makes the result of the accumulator, but for what the operator checks itself."""
    if residual is not None:
        _arguments.tensor_like("binary_conv2d", "residual", residual, words)
    if flip is not None and threshold is None:
        raise ValueError("binary_conv2d: flip needs a threshold")
    if out_dtype is not None and not isinstance(out_dtype, torch.dtype):
        raise TypeError(f"binary_conv2d: out_dtype must be int32, float32, bfloat16 or float16, got {out_dtype!r}")


def _check_precise(weight: Any, threshold: Any, out_dtype: torch.dtype | None) -> None:
    if isinstance(weight, PackedWeight) or threshold is not None or out_dtype not in (None, torch.float64):
        raise TypeError(
            "binary_conv2d: float64 input is convolved by torch's operators, for comparisons, and takes neither a "
            "packed weight nor threshold nor another out_dtype"
        )


def _differentiable(
    words: Tensor, weight: Tensor | PackedWeight, scale: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    channels: int, geometry: Geometry, encoding: str, surrogate: str, padding_value: int, out_dtype: torch.dtype,
) -> Tensor:
    """conv2d to numbers where something wants a gradient; `words` or the float input."""
    latent, packed = (None, weight) if isinstance(weight, PackedWeight) else (weight, None)
    call = (channels, geometry, encoding, surrogate, padding_value)
    if not wants_grad(scale):
        return _BinaryConv2d.apply(words, latent, packed, scale, bias, residual, *call, out_dtype)
    # A scale that learns needs the accumulator in its gradient: multiply outside, where autograd sees it.
    output = _BinaryConv2d.apply(words, latent, packed, None, None, None, *call, torch.float32)
    ops.output_kind(weight.shape[0], scale, bias, residual, None, None, out_dtype, output.shape)
    output = output * scale.reshape(-1, 1, 1)  # type: ignore[union-attr]
    output = output if bias is None else output + bias.reshape(-1, 1, 1)
    output = output if residual is None else output + residual
    return output.to(out_dtype)


@_arguments.overridable
def conv2d(
    input: Tensor | PackedTensor,
    weight: Tensor | PackedWeight,
    *,
    stride: Pair = 1,
    padding: Sides | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
    padding_value: int = 0,
    encoding: str = "sign",
    surrogate: str = "clip",
    scale: float | Tensor | None = None,
    bias: Tensor | None = None,
    threshold: float | Tensor | None = None,
    flip: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor | PackedTensor:
    """Two-dimensional convolution of binary values with binary weights.

    The values are those of torch.nn.functional.conv2d on the +-1 (or 0/1) activations and +-1 weights, exactly.

    Args:
        input: (N, C, H, W): a PackedTensor, or float32, bfloat16 or float16, binarized on the fly.
        weight: (O, C / groups, kh, kw) float, of which the signs count, or a PackedWeight.
        stride, padding, dilation, groups: as torch.nn.functional.conv2d; padding also "same", "valid", or with sides of
            their own ((top, bottom), (left, right)), as padding "same" of TensorFlow and Larq has them with a stride.
        padding_value: value of the activations in the padding: 0 (these taps add nothing), +1, or -1 (sign only).
        encoding, surrogate: of a float input: its bits ("sign" or "step") and its straight-through estimator
            (lowbit_ext.binary.surrogates). A PackedTensor brings its own encoding.
        scale: number or (O,): factor of the accumulator. A PackedTensor's own scale, one number, multiplies it.
        bias: (O,), added after scale.
        residual: (N, O, H', W') float, added last.
        threshold: number, (O,), (1, O) or (2, O): gives bits, value >= threshold. Two rows give two bits from one
            value: channels o and O + o of the result.
        flip: bool like threshold: compare with <= there.
        out_dtype: int32, float32, bfloat16 or float16. Default: a float input's dtype (autocast's inside autocast);
            for a PackedTensor int32, or float32 with scale, bias or residual.

    Returns:
        (N, O, H', W') channels-last in memory, or with threshold a PackedTensor of encoding `encoding` (a packed
        input's own) and O or 2 O channels. Float results are round(round(round(scale * acc) + bias) + residual) in
        float32, then rounded once to out_dtype.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.

    Gradient:
        input: straight-through (`surrogate`). Float weight: that of the effective weight scale * sign(weight), taken
        as it is (BinaryDuo); with a scale that itself wants a gradient, that of sign(weight). Scale, bias, residual:
        exact. Packed inputs, packed weights and packed results carry none. Float64, in which networks are compared, has
        the scale within the sums where the weight wants a gradient: rounded there, and NaN where they overflow.
    """
    op = "binary_conv2d"
    encoding, own_scale = _check_operands(input, weight, encoding, surrogate)
    words, channels = (input.words, input.channels) if isinstance(input, PackedTensor) else (input, input.shape[1])
    groups = _arguments.integer(op, "groups", groups)
    padding_value = _arguments.integer(op, "padding_value", padding_value)
    filters = _check_channels(channels, weight.shape, groups)
    if isinstance(weight, PackedWeight) and (weight.groups != groups or weight.isa != _native.kernels(words).level):
        weight = pack_words(weight.words, weight.shape, groups)
    geometry = geometry_of(weight.shape, stride, padding, dilation, groups)
    if residual is not None or flip is not None or out_dtype is not None:
        _check_result(words, residual, threshold, flip, out_dtype)
    if words.dtype == torch.float64:
        _check_precise(weight, threshold, out_dtype)
        assert isinstance(weight, Tensor)
        return _conv2d_float64(words, weight, geometry, padding_value, encoding, surrogate, scale, bias, residual)
    if out_dtype is None:
        out_dtype = _default_dtype(input, scale is own_scale is bias is residual is None)
    scale = None if scale is None else channel_vector("scale", scale, filters, words)
    bias = None if bias is None else channel_vector("bias", bias, filters, words)
    if own_scale is not None:
        scale = scaled(own_scale, scale)

    if threshold is None and wants_grad(input, weight, scale, bias, residual):
        return _differentiable(
            words, weight, scale, bias, residual, channels, geometry, encoding, surrogate, padding_value, out_dtype
        )
    if threshold is not None:
        exact = scale is None and bias is None and residual is None
        threshold, flip = thresholds_of(threshold, flip, filters, exact, words)
    kernel_weight = weight.blocked if isinstance(weight, PackedWeight) else sign_words(weight)
    if not isinstance(input, PackedTensor):
        words = ops.binarize(words, None, None, DEFAULT_THRESHOLDS[encoding], encoding)
    output = ops.binary_conv2d(
        words, kernel_weight, scale, bias, residual, threshold, flip, channels, filters, geometry, encoding,
        padding_value, out_dtype,
    )
    return output if threshold is None else packed_words(output, threshold.shape[0] * filters, encoding)


@_arguments.overridable
def conv1d(
    input: Tensor | PackedTensor,
    weight: Tensor | PackedWeight,
    *,
    stride: int = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int = 1,
    residual: Tensor | None = None,
    **options: Any,
) -> Tensor | PackedTensor:
    """One-dimensional conv2d: input (N, C, L), weight (O, C / groups, k), result (N, O, L').

    Takes conv2d's arguments with one number in place of each pair, and padding also as a pair (left, right); the same
    exactness, gradients and errors.
    """
    _check_input("binary_conv1d", input)
    _check_weight("binary_conv1d", weight, "(O, C / groups, k)")
    if input.dim() != 3:
        raise ValueError(f"binary_conv1d: input must be (N, C, L), got {tuple(input.shape)}")
    if residual is not None and _arguments.tensor("binary_conv1d", "residual", residual).dim() != 3:
        raise ValueError(f"binary_conv1d: residual must be (N, O, L'), got {tuple(residual.shape)}")
    sides: Any = padding
    if isinstance(padding, (tuple, list)):
        sides = (0, _arguments.pair("binary_conv1d", "padding", padding))
    elif not isinstance(padding, str):
        sides = (0, _arguments.integer("binary_conv1d", "padding", padding))
    output = conv2d(
        _insert_axes(input, 1),
        _insert_axes(weight, 1),
        stride=(1, _arguments.integer("binary_conv1d", "stride", stride)),
        padding=sides,
        dilation=(1, _arguments.integer("binary_conv1d", "dilation", dilation)),
        residual=None if residual is None else residual.unsqueeze(2),
        **options,
    )
    if isinstance(output, PackedTensor):
        return packed_words(output.words.squeeze(1), output.channels, output.encoding)
    return output.squeeze(2)


@_arguments.overridable
def linear(
    input: Tensor | PackedTensor,
    weight: Tensor | PackedWeight,
    *,
    encoding: str = "sign",
    surrogate: str = "clip",
    scale: float | Tensor | None = None,
    bias: Tensor | None = None,
    threshold: float | Tensor | None = None,
    flip: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor | PackedTensor:
    """Matrix product of binary values with binary weights: input (*, C) float or PackedTensor (N, C), weight (O, C).

    The other arguments, the result (*, O), gradients and errors are conv2d's; bits by a threshold are packed rows, all
    of * one after the other.
    """
    _check_input("binary_linear", input)
    _check_weight("binary_linear", weight, "(O, C)")
    if isinstance(input, PackedTensor):
        if input.dim() != 2:
            raise ValueError(f"binary_linear: packed input must be (N, C), got {tuple(input.shape)}")
        leading = tuple(input.shape[:1])
    else:
        if input.dim() < 1 or input.shape[-1] != weight.shape[1]:
            raise ValueError(
                f"binary_linear: weight has {weight.shape[1]} input features, input has shape {tuple(input.shape)}"
            )
        leading = tuple(input.shape[:-1])
        if input.dim() != 2:
            input = input.reshape(math.prod(leading), input.shape[-1])
    if residual is not None:
        wanted = (*leading, weight.shape[0])
        if _arguments.tensor("binary_linear", "residual", residual).shape != wanted:
            raise ValueError(f"binary_linear: residual must have shape {wanted}, got {tuple(residual.shape)}")
        residual = residual.reshape(math.prod(leading), weight.shape[0], 1, 1)
    output = conv2d(
        _insert_axes(input, 2), _insert_axes(weight, 2), encoding=encoding, surrogate=surrogate, scale=scale,
        bias=bias, threshold=threshold, flip=flip, residual=residual, out_dtype=out_dtype,
    )
    if isinstance(output, PackedTensor):
        return packed_words(output.words.flatten(0, 2), output.channels, output.encoding)
    return output.reshape(*leading, weight.shape[0])


def _insert_axes(value: Any, count: int) -> Any:
    """Adds `count` spatial axes of size 1 before the last ones: what makes a 1-D or 0-D convolution a 2-D one."""
    if isinstance(value, PackedTensor):
        words = value.words.reshape(value.words.shape[0], *(1,) * count, *value.words.shape[1:])
        return packed_words(words, value.channels, value.encoding, value.scale)
    if isinstance(value, PackedWeight):
        shape = (*value.shape[:2], *(1,) * count, *value.shape[2:])
        return unchecked(
            PackedWeight, words=value.words, blocked=value.blocked, shape=shape, groups=value.groups, isa=value.isa
        )
    return value.reshape(*value.shape[:2], *(1,) * count, *value.shape[2:])
