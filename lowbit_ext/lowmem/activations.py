"""Activation functions, dropout and products whose backward pass reads codes of a few bits.

A function of one element is exact in its forward pass. Its derivative is that of what the codes of its argument say,
which are those of the batch norm in front where there is one: the error enters this factor of the gradient alone. The
result has the same codes, with the function as a step. Where a derivative has two values it is a bit an element, exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit_ext.lowmem import _ledger, ops
from lowbit_ext.lowmem._forms import FINE_BITS, pack_bits, unpack_bits
from lowbit_ext.lowmem._stored import (
    Affine,
    Curve,
    Stored,
    attach,
    attached,
    coded,
    concatenated,
    read_codes,
    refuse_second_order,
    shared_attributes,
    version_of,
)

# Derivatives times a gradient, from the argument.
_BACKWARD: dict[str, Callable[..., Tensor]] = {
    "silu": torch.ops.aten.silu_backward, "mish": torch.ops.aten.mish_backward,
    "hardswish": torch.ops.aten.hardswish_backward, "gelu": torch.ops.aten.gelu_backward,
}


class _ReLU(torch.autograd.Function):
    """(relu(x), codes and groups): code 0 is exactly where the result is 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
        out = x.relu()
        codes, scale_minimum = ops.group_quantize(out, bits, True, None, 0)
        scale_minimum = scale_minimum.view(torch.uint8)  # as bytes: saved_tensors() codes floats
        _ledger.stands_for(codes, out)
        _ledger.stands_for(scale_minimum)
        ctx.save_for_backward(codes, scale_minimum)
        ctx.settings = tuple(x.shape), ops.is_channels_last(out), bits
        ctx.mark_non_differentiable(codes, scale_minimum)
        return out, codes, scale_minimum

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
        refuse_second_order("ReLU")
        shape, channels_last, bits = ctx.settings
        codes, scale_minimum = ctx.saved_tensors
        scale_minimum = scale_minimum.view(torch.bfloat16)
        value = ops.group_dequantize(codes, scale_minimum, shape, channels_last, grad.dtype, bits)
        return torch.ops.aten.threshold_backward(grad, value, 0), None


def relu(x: Tensor, bits: int) -> tuple[Tensor, Stored | None]:
    """ReLU and its codes in groups of 256; no codes where no gradient is recorded."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return F.relu(x), None
    out, *tensors = _ReLU.apply(x, bits)
    shape, channels_last = tuple(x.shape), ops.is_channels_last(out)
    return out, Stored(tuple(tensors), "group", bits, 0.0, True, shape, channels_last, out.dtype, version_of(out))


class _Curve(torch.autograd.Function):
    """A curve whose derivative reads codes of the argument."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, curve: Curve | nn.Module, meta: Stored, *tensors: Tensor) -> Tensor:
        out = curve(x)
        _ledger.stands_for(tensors[0], x)
        ctx.save_for_backward(*tensors)
        ctx.curve, ctx.meta = curve, meta
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        curve = ctx.curve
        refuse_second_order(curve.name if isinstance(curve, Curve) else type(curve).__name__)
        x = read_codes(ctx.meta, ctx.saved_tensors, grad.dtype)
        if isinstance(curve, Curve):
            grad_input = _BACKWARD[curve.name](grad, x, **dict(curve.words))
        else:
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                (grad_input,) = torch.autograd.grad(curve(x), x, grad)
        return (grad_input, None, None, *(None for _ in ctx.saved_tensors))


class _Steps(torch.autograd.Function):
    """A function of two slopes, whose derivative is a bit an element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, curve: Curve) -> Tensor:
        low, high, *ctx.slopes = _slopes(curve)
        mask = ((x > low) & (x < high)).flatten() if math.isfinite(high) else (x > low).flatten()
        words = pack_bits(mask)
        _ledger.stands_for(words, x)
        ctx.save_for_backward(words)
        ctx.curve = curve
        return curve(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        refuse_second_order(ctx.curve.name)
        (words,) = ctx.saved_tensors
        inner, outer = ctx.slopes
        mask = unpack_bits(words, grad.numel()).view(grad.shape)
        return torch.where(mask, grad * inner, grad * outer if outer else 0.0), None


def _slopes(curve: Curve) -> tuple[float, float, float, float]:
    """(low, high, slope in between, slope outside)."""
    if curve.name == "hardsigmoid":
        return -3.0, 3.0, 1 / 6, 0.0
    if curve.name == "leaky_relu":
        return 0.0, math.inf, 1.0, curve.numbers[0]
    return (*curve.numbers, 1.0, 0.0)  # type: ignore[return-value]


def is_bent(curve: Curve | nn.Module) -> bool:
    """Whether its derivative changes between thresholds, and so wants more than a bit of its argument."""
    return not isinstance(curve, Curve) or curve.name in _BACKWARD


def activation(x: Tensor, stored: Stored | None, curve: Curve | nn.Module) -> tuple[Tensor, Stored | None]:
    """The exact result, and its codes: those of the argument, with a further step."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return curve(x), None
    if stored is not None and version_of(x) != stored.version:
        stored = None
    if isinstance(curve, Curve) and not is_bent(curve):
        out = _Steps.apply(x, curve)
        return out, None if stored is None else stored.after(out, curve)
    stored = coded(x, FINE_BITS) if stored is None else stored
    out = _Curve.apply(x, curve, stored._replace(tensors=()), *stored.tensors)
    return out, stored.after(out, curve)


# --- dropout, products, concatenation ---------------------------------------------------------------------------------


class _Dropout(torch.autograd.Function):
    """Dropout that keeps a bit an element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, probability: float) -> Tensor:
        # What torch does on this device: the same numbers from the same generator.
        if x.is_cpu:
            noise = torch.empty_like(x).bernoulli_(1 - probability).div_(1 - probability)
            out, mask = x * noise, noise != 0
        else:
            out, mask = torch.native_dropout(x, probability, True)
            noise = mask
        words = pack_bits(mask.flatten())
        _ledger.stands_for(words, noise)
        ctx.save_for_backward(words)
        ctx.scale = 1 / (1 - probability)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (words,) = ctx.saved_tensors
        return grad * ctx.scale * unpack_bits(words, grad.numel()).view(grad.shape), None


def dropout(x: Tensor, stored: Stored | None, probability: float, training: bool) -> tuple[Tensor, Stored | None]:
    """F.dropout, whose result is the argument itself where nothing is dropped."""
    if not training or probability in (0.0, 1.0) or not (torch.is_grad_enabled() and x.requires_grad):
        out = F.dropout(x, probability, training)
        return out, stored if out is x else None
    return _Dropout.apply(x, probability), None


class _Product(torch.autograd.Function):
    """A product of a coded value with a smaller one, as that of squeeze and excitation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor, meta: Stored, *tensors: Tensor) -> Tensor:
        _ledger.stands_for(tensors[0], x)
        ctx.save_for_backward(factor, *tensors)
        ctx.meta = meta
        return x * factor

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        refuse_second_order("product")
        factor, *tensors = ctx.saved_tensors
        need = ctx.needs_input_grad
        grad_factor = None
        if need[1]:
            x = read_codes(ctx.meta, tuple(tensors), grad.dtype)
            grad_factor = (grad * x).sum_to_size(factor.shape).to(factor.dtype)
        return grad * factor if need[0] else None, grad_factor, None, *(None for _ in tensors)


def product(
    x: Any, factor: Any, stored: Stored | None, stored_factor: Stored | None
) -> tuple[Tensor, Stored | None]:
    """x * factor, and the codes of the larger one with a further step, if it is the result's size and has some."""
    if isinstance(x, Tensor) and isinstance(factor, Tensor) and torch.is_grad_enabled():
        if factor.numel() > x.numel():
            x, factor, stored = factor, x, stored_factor
        suited = stored is not None and version_of(x) == stored.version and x.requires_grad and factor.dtype == x.dtype
        if suited and factor.numel() * 8 <= x.numel() and torch.broadcast_shapes(x.shape, factor.shape) == x.shape:
            assert stored is not None
            out = _Product.apply(x, factor, stored._replace(tensors=()), *stored.tensors)
            return out, stored.after(out, Affine(True, False), factor.detach())
    return x * factor, None


def concatenate(values: list[Tensor], codes: list[Stored | None], dim: int) -> tuple[Tensor, Stored | None]:
    """torch.cat, and the codes of all parts."""
    out = torch.cat(values, dim)
    for value, stored in zip(values, codes, strict=True):
        if stored is None or version_of(value) != stored.version or value.dtype != out.dtype:
            return out, None
    return out, concatenated(out, dim, codes)  # type: ignore[arg-type]


# --- layers whose neighbours are unknown ------------------------------------------------------------------------------


class Activation(nn.Module):
    """An activation function: its codes, and those of its input, go with the values."""

    def __init__(self, curve: Curve | nn.Module, module: nn.Module) -> None:
        super().__init__()
        self.__dict__.update(shared_attributes(module))
        self.curve = (curve,)  # in a tuple, as a module of another library is not to be a layer within

    def forward(self, x: Tensor) -> Tensor:
        """The exact result."""
        out, stored = activation(x, attached(x), self.curve[0])
        attach(out, stored)
        return out


class ReLU(nn.Module):
    """nn.ReLU that keeps codes."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def forward(self, x: Tensor) -> Tensor:
        """The exact result."""
        out, stored = relu(x, self.bits)
        attach(out, stored)
        return out


class Dropout(nn.Dropout):
    """nn.Dropout that keeps a bit an element."""

    @classmethod
    def like(cls, module: nn.Module) -> Dropout:
        """The same layer."""
        made = cls.__new__(cls)
        made.__dict__.update(shared_attributes(module))
        return made

    def forward(self, x: Tensor) -> Tensor:
        """The exact result."""
        out, stored = dropout(x, attached(x), self.p, self.training)
        attach(out, stored)
        return out
