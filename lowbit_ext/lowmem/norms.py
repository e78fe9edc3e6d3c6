"""Layer, RMS, group and instance norm that keep codes of the normalised value, from which the next layer reads as well.

The normalised value has deviation 1 in every row, so that groups of 256 may span rows of any scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit_ext._torch import InstanceNorm, batch_norm_impl_index, fused_rms_norm
from lowbit_ext.lowmem import _ledger, ops
from lowbit_ext.lowmem._stored import Affine, Stored, attach, refuse_second_order, shared_attributes, version_of

_Codes = tuple[Tensor, Tensor, Tensor]


def _kept(
    ctx: Any, x: Tensor, normalised: Tensor, rstd: Tensor, mean: Tensor | None, bits: int, *others: Any
) -> _Codes:
    """Codes of the normalised value, kept with the deviation alone."""
    codes, scale_minimum = ops.group_quantize(normalised.contiguous(), bits, False, None, 0)
    codes_and_scales = codes, scale_minimum.view(torch.uint8)  # as bytes: saved_tensors() codes floats
    _ledger.stands_for(codes, x, rstd, *(() if mean is None else (mean,)))
    _ledger.stands_for(codes_and_scales[1])
    ctx.save_for_backward(*codes_and_scales, rstd.view(torch.uint8), *others)
    ctx.bits, ctx.shape, ctx.statistics = bits, tuple(x.shape), rstd.dtype
    ctx.mark_non_differentiable(*codes_and_scales)
    return *codes_and_scales, rstd


def _normalised(ctx: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    codes, scale_minimum, rstd, *others = ctx.saved_tensors
    value = ops.group_dequantize(codes, scale_minimum.view(torch.bfloat16), ctx.shape, False, dtype, ctx.bits)
    return value, rstd.view(ctx.statistics), tuple(others)


class _LayerNorm(torch.autograd.Function):
    """(layer_norm(x), codes and groups of the normalised x)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: list[int], eps: float, bits: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        out, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        codes, scales, _ = _kept(ctx, x, ((x - mean) * rstd).to(x.dtype), rstd, mean, bits, weight, bias)
        ctx.normalized = shape
        return out, codes, scales

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
        refuse_second_order("layer norm")
        value, rstd, (weight, bias) = _normalised(ctx, grad.dtype)
        grad_input, *grads = torch.ops.aten.native_layer_norm_backward(
            grad.contiguous(), value, ctx.normalized, torch.zeros_like(rstd), torch.ones_like(rstd), weight, bias,
            list(ctx.needs_input_grad[:3]),
        )
        grad_input = (grad_input * rstd).to(grad.dtype) if ctx.needs_input_grad[0] else None
        return grad_input, *grads, None, None, None


class _RMSNorm(torch.autograd.Function):
    """(rms_norm(x), codes and groups of x over its root mean square)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, shape: list[int], eps: float | None, bits: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        if weight is None or weight.dtype == x.dtype:
            out, rstd = fused_rms_norm(x, shape, weight, eps)
        else:  # torch's has another implementation for two types
            out, rstd = F.rms_norm(x, shape, weight, eps), fused_rms_norm(x, shape, None, eps)[1]
        codes, scales, _ = _kept(ctx, x, (x * rstd).to(x.dtype), rstd, None, bits, weight)
        ctx.normalized = shape
        return out, codes, scales

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
        refuse_second_order("RMS norm")
        value, rstd, (weight,) = _normalised(ctx, torch.promote_types(grad.dtype, torch.float32))
        need, dims = ctx.needs_input_grad, tuple(range(-len(ctx.normalized), 0))
        grad_input = grad_weight = None
        if need[0]:
            scaled = grad if weight is None else grad * weight
            grad_input = ((scaled - value * (scaled * value).mean(dims, keepdim=True)) * rstd).to(grad.dtype)
        if need[1]:
            grad_weight = (grad * value).sum_to_size(ctx.normalized).to(weight.dtype)
        return grad_input, grad_weight, None, None, None


class _GroupNorm(torch.autograd.Function):
    """(group_norm(x), codes and groups of the normalised x)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float, bits: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.sizes = x.shape[0], x.shape[1], x[0, 0].numel(), groups
        out, mean, rstd = torch.ops.aten.native_group_norm(x, weight, bias, *ctx.sizes, eps)
        value = ((x.reshape(x.shape[0], groups, -1) - mean[..., None]) * rstd[..., None]).to(x.dtype)
        codes, scales, _ = _kept(ctx, x, value, rstd, mean, bits, weight)
        return out, codes, scales

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
        refuse_second_order("group norm")
        return *_group_norm_gradients(ctx, grad), None, None, None


class _InstanceNorm(torch.autograd.Function):
    """(instance_norm(x), codes and groups of the normalised x): a group norm of groups of one channel."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, running: tuple[Tensor | None, Tensor | None],
        momentum: float, eps: float, bits: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        images, channels = x.shape[:2]
        ctx.sizes = images, channels, x[0, 0].numel(), channels
        # What torch.instance_norm does: a batch norm of as many channels as there are images with theirs.
        rows = x.contiguous().view(1, images * channels, *x.shape[2:])
        gamma, beta, *repeated_running = (
            None if tensor is None else tensor.repeat(images) for tensor in (weight, bias, *running)
        )
        out, mean, rstd, _, _ = batch_norm_impl_index(
            rows, gamma, beta, repeated_running[0], repeated_running[1], True, momentum, eps,
            torch.backends.cudnn.enabled,
        )
        for tensor, repeated in zip(running, repeated_running, strict=True):
            if tensor is not None and repeated is not None:
                tensor.copy_(repeated.view(images, channels).mean(0))
        column = (-1, *(1,) * (x.dim() - 2))
        value = ((rows - mean.view(column)) * rstd.view(column)).to(x.dtype)
        codes, scales, _ = _kept(ctx, x, value, rstd.view(images, channels), mean, bits, weight)
        return out.view(x.shape), codes, scales

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
        refuse_second_order("instance norm")
        return *_group_norm_gradients(ctx, grad), None, None, None, None


def _group_norm_gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Of input, weight and bias."""
    value, rstd, (weight,) = _normalised(ctx, grad.dtype)
    grad_input, *grads = torch.ops.aten.native_group_norm_backward(
        grad.contiguous(), value, torch.zeros_like(rstd), torch.ones_like(rstd), weight, *ctx.sizes,
        list(ctx.needs_input_grad[:3]),
    )
    if ctx.needs_input_grad[0]:
        scaled = grad_input.reshape(*rstd.shape, -1) * rstd[..., None]
        grad_input = scaled.reshape(grad.shape).to(grad.dtype)
    return grad_input, *grads


def _stored(out: Tensor, codes: Tensor, scales: Tensor, bits: int, *affine: Tensor | None) -> Stored:
    stored = Stored(
        (codes, scales), "group", bits, 0.0, False, tuple(out.shape), False, out.dtype, version_of(out)
    )
    factor, summand = affine
    given = [tensor.detach() for tensor in affine if tensor is not None]
    return stored.after(out, Affine(factor is not None, summand is not None), *given)


def _is_recorded(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    learns = any(parameter is not None and parameter.requires_grad for parameter in (weight, bias))
    return torch.is_grad_enabled() and (x.requires_grad or learns) and x.dtype in ops.FLOAT_TYPES and x.numel() > 0


def layer_norm(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5, bits: int = 4,
) -> tuple[Tensor, Stored | None]:
    """F.layer_norm and the codes of its result; none where no gradient is recorded."""
    if not _is_recorded(x, weight, bias):
        return F.layer_norm(x, normalized_shape, weight, bias, eps), None
    out, codes, scales = _LayerNorm.apply(x, weight, bias, list(normalized_shape), eps, bits)
    return out, _stored(out, codes, scales, bits, weight, bias)


def group_norm(
    x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5,
    bits: int = 4,
) -> tuple[Tensor, Stored | None]:
    """F.group_norm and the codes of its result; none where no gradient is recorded."""
    if not _is_recorded(x, weight, bias) or x.dim() < 2:
        return F.group_norm(x, num_groups, weight, bias, eps), None
    out, codes, scales = _GroupNorm.apply(x, weight, bias, num_groups, eps, bits)
    columns = [None if p is None else p.view(-1, *(1,) * (x.dim() - 2)) for p in (weight, bias)]
    return out, _stored(out, codes, scales, bits, *columns)


def rms_norm(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None, bits: int = 4,
) -> tuple[Tensor, Stored | None]:
    """F.rms_norm and the codes of its result; none where no gradient is recorded."""
    if not _is_recorded(x, weight, None):
        return F.rms_norm(x, normalized_shape, weight, eps), None
    out, codes, scales = _RMSNorm.apply(x, weight, list(normalized_shape), eps, bits)
    return out, _stored(out, codes, scales, bits, weight, None)


def instance_norm(
    x: Tensor, running_mean: Tensor | None = None, running_var: Tensor | None = None, weight: Tensor | None = None,
    bias: Tensor | None = None, use_input_stats: bool = True, momentum: float = 0.1, eps: float = 1e-5, bits: int = 4,
) -> tuple[Tensor, Stored | None]:
    """F.instance_norm and the codes of its result; none where no gradient is recorded or statistics are constants."""
    if not (_is_recorded(x, weight, bias) and use_input_stats and x.dim() > 2 and x[0, 0].numel() > 1):
        return F.instance_norm(x, running_mean, running_var, weight, bias, use_input_stats, momentum, eps), None
    running = running_mean, running_var
    out, codes, scales = _InstanceNorm.apply(x, weight, bias, running, momentum, eps, bits)
    columns = [None if p is None else p.view(-1, *(1,) * (x.dim() - 2)) for p in (weight, bias)]
    return out, _stored(out, codes, scales, bits, *columns)


class _NormCodes(nn.Module):
    """What the layers below share: forward(x) -> (result, codes or None), or `alone` the result."""

    bits: int
    alone: bool

    @classmethod
    def like(cls, module: nn.Module, bits: int, alone: bool = False) -> Any:
        """The same layer with codes: the same parameters and hooks."""
        made = cls.__new__(cls)
        made.__dict__.update(shared_attributes(module))
        made.bits, made.alone = bits, alone
        return made

    def _result(self, out: Tensor, stored: Stored | None) -> Any:
        if not self.alone:
            return out, stored
        attach(out, stored)
        return out


class LayerNorm(_NormCodes, nn.LayerNorm):
    """nn.LayerNorm with codes."""

    def forward(self, x: Tensor) -> Any:
        """The exact result, and its codes where a gradient is recorded."""
        return self._result(*layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps, self.bits))


class GroupNorm(_NormCodes, nn.GroupNorm):
    """nn.GroupNorm with codes."""

    def forward(self, x: Tensor) -> Any:
        """The exact result, and its codes where a gradient is recorded."""
        return self._result(*group_norm(x, self.num_groups, self.weight, self.bias, self.eps, self.bits))


class RMSNorm(_NormCodes, nn.RMSNorm):
    """nn.RMSNorm with codes."""

    def forward(self, x: Tensor) -> Any:
        """The exact result, and its codes where a gradient is recorded."""
        return self._result(*rms_norm(x, self.normalized_shape, self.weight, self.eps, self.bits))


class _InstanceNormCodes(_NormCodes, InstanceNorm):
    """What the instance norms below share."""

    def forward(self, x: Tensor) -> Any:
        """The exact result, and its codes where a gradient is recorded."""
        if x.dim() != self._get_no_batch_dim() + 1 or x.shape[1] != self.num_features:
            return self._result(super().forward(x), None)  # without a batch, or torch says what is wrong
        return self._result(*instance_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias,
            self.training or not self.track_running_stats, 0.0 if self.momentum is None else self.momentum, self.eps,
            self.bits,
        ))


class InstanceNorm1d(_InstanceNormCodes, nn.InstanceNorm1d):
    """nn.InstanceNorm1d with codes."""


class InstanceNorm2d(_InstanceNormCodes, nn.InstanceNorm2d):
    """nn.InstanceNorm2d with codes."""


class InstanceNorm3d(_InstanceNormCodes, nn.InstanceNorm3d):
    """nn.InstanceNorm3d with codes."""


NORMS: dict[type[nn.Module], Any] = {
    nn.LayerNorm: LayerNorm, nn.RMSNorm: RMSNorm, nn.GroupNorm: GroupNorm, nn.InstanceNorm1d: InstanceNorm1d,
    nn.InstanceNorm2d: InstanceNorm2d, nn.InstanceNorm3d: InstanceNorm3d,
}
FUNCTIONS: dict[Any, Any] = {
    F.layer_norm: layer_norm, F.rms_norm: rms_norm, F.group_norm: group_norm, F.instance_norm: instance_norm,
}
