"""Layers whose backward pass reads codes of a few bits: batch norm, ReLU, pooling, convolution and linear layers.

A batch norm, with the ReLU behind it, gives its exact result and the codes of it. Convolutions and linear layers that
read the result, through pooling or not, keep no input: the gradient of their weight reads the same codes. What passes
backward between layers is exact but for the variance term of the batch norm: errors do not build up with depth.

Source: Chakrabarti and Moseley, "Backprop with approximate activations for memory-efficient network training", NeurIPS
2019, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit_ext._graph import Pool, pool_of
from lowbit_ext._torch import BatchNorm, Convolution, batch_norm_impl_index
from lowbit_ext.lowmem import _ledger, ops
from lowbit_ext.lowmem._stored import (
    Stored,
    apply_pool,
    attach,
    attached,
    coded,
    read_codes,
    refuse_second_order,
    shared_attributes,
    version_of,
)
from lowbit_ext.lowmem.codes import check_settings

# --- batch norm and ReLU ----------------------------------------------------------------------------------------------


class _BatchNorm(torch.autograd.Function):
    """(relu(batch_norm(x)) or batch_norm(x), codes)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Tensor | None, beta: Tensor | None, mean: Tensor | None, variance: Tensor | None,
        training: bool, momentum: float, eps: float, relu: bool, bits: int, span: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # torch's own batch norm: its statistics to the bit, whichever backend it takes, and the buffer of the result.
        y, batch_mean, invstd, _, _ = batch_norm_impl_index(
            x, gamma, beta, mean, variance, training, momentum, eps, torch.backends.cudnn.enabled
        )
        if not training:
            assert mean is not None
            assert variance is not None
            batch_mean, invstd = mean, (variance.float() + eps).rsqrt()
        ones = torch.ones_like(invstd) if gamma is None else gamma.detach()
        zeros = torch.zeros_like(invstd) if beta is None else beta.detach()
        arguments = (x, batch_mean, invstd, ones, zeros, bits, span)
        codes = ops.batch_norm_relu_quantize(*arguments, y) if relu else ops.batch_norm_quantize(*arguments)
        # torch keeps the input, the batch's statistics, and the ReLU's result.
        _ledger.stands_for(codes, x, *((batch_mean, invstd) if training else ()), *((y,) if relu else ()))
        for extra in (invstd, ones, zeros):
            _ledger.stands_for(extra)
        ctx.save_for_backward(codes, invstd.view(torch.uint8), ones, zeros)  # as bytes: saved_tensors() codes floats
        ctx.settings, ctx.statistics = (bits, span, relu, training), invstd.dtype
        ctx.mark_non_differentiable(codes, ones, zeros)
        return y, codes, ones, zeros

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
        refuse_second_order("batch norm")
        codes, invstd, gamma, beta = ctx.saved_tensors
        grad_input, grad_gamma, grad_beta = ops.batch_norm_relu_backward(
            grad, codes, gamma, beta, invstd.view(ctx.statistics), *ctx.settings
        )
        need = ctx.needs_input_grad
        return (
            grad_input if need[0] else None,
            grad_gamma if need[1] else None,
            grad_beta if need[2] else None,
            *(None,) * 8,
        )


class BatchNormCodes(BatchNorm):
    """What the batch norms below share: forward(x, relu) -> (result, codes or None), or `alone` the result."""

    bits: int
    ratio: tuple[int, int]  # span: torch.compile takes float attributes for variables, out of reach of a backward pass
    alone: bool

    @classmethod
    def like(cls, module: nn.Module, bits: int, span: float, alone: bool = False) -> BatchNormCodes:
        """The same layer with codes: the same parameters, buffers and hooks."""
        made = cls.__new__(cls)
        made.__dict__.update(shared_attributes(module))
        made.bits, made.ratio, made.alone = bits, span.as_integer_ratio(), alone
        return made

    def forward(self, x: Tensor, relu: bool = False) -> Any:
        """The exact result, and its codes where a gradient is recorded."""
        out, stored = self._forward(x, relu)
        if not self.alone:
            return out, stored
        attach(out, stored)
        return out

    def _forward(self, x: Tensor, relu: bool) -> tuple[Tensor, Stored | None]:
        if not isinstance(x, Tensor):
            raise TypeError(f"{type(self).__name__}: input must be a torch.Tensor, got {type(x).__name__}")
        needed = x.requires_grad or (self.affine and (self.weight.requires_grad or self.bias.requires_grad))
        if not (torch.is_grad_enabled() and needed):
            y = super().forward(x)
            return F.relu(y) if relu else y, None
        self._check_input_dim(x)
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        training = self.training or (self.running_mean is None and self.running_var is None)
        tracked = not self.training or self.track_running_stats
        span = self.ratio[0] / self.ratio[1]
        out, *tensors = self._apply_norm(
            x, self.weight, self.bias, self.running_mean if tracked else None, self.running_var if tracked else None,
            training, momentum, self.eps, relu, self.bits, span,
        )
        shape, channels_last = tuple(x.shape), ops.is_channels_last(out)
        return out, Stored(
            tuple(tensors), "channel", self.bits, span, relu, shape, channels_last, out.dtype, version_of(out)
        )

    def _apply_norm(self, x: Tensor, *arguments: Any) -> Any:
        """_BatchNorm's results; `arguments` are those of its forward behind x."""
        if arguments[4] and x.numel() == x.shape[1]:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.size()}")
        return _BatchNorm.apply(x, *arguments)


class BatchNorm1d(BatchNormCodes, nn.BatchNorm1d):
    """nn.BatchNorm1d with codes."""


class BatchNorm2d(BatchNormCodes, nn.BatchNorm2d):
    """nn.BatchNorm2d with codes."""


class BatchNorm3d(BatchNormCodes, nn.BatchNorm3d):
    """nn.BatchNorm3d with codes."""


# --- pooling ----------------------------------------------------------------------------------------------------------


class _MaxPool(torch.autograd.Function):
    """F.max_pool2d that keeps, for every result, its place within the window in one byte."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pool: Pool) -> Tensor:
        out, indices = torch.ops.aten.max_pool2d_with_indices(
            x, pool.kernel, pool.stride, pool.padding, (1, 1), pool.ceil_mode
        )
        ctx.pool, ctx.shape, ctx.channels_last = pool, tuple(x.shape), ops.is_channels_last(x)
        step = indices - _corners(pool, x.shape[-1], out)
        place = _in_lines(step, x.shape[-1], pool.kernel[1], pool).to(torch.uint8)
        _ledger.stands_for(place, x, indices)
        ctx.save_for_backward(place)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        refuse_second_order("max-pooling")
        (place,) = ctx.saved_tensors
        pool, width = ctx.pool, ctx.shape[-1]
        indices = _corners(pool, width, grad) + _in_lines(place, pool.kernel[1], width, pool)
        # Only shape and layout of the input matter to the derivative.
        layout = torch.channels_last if ctx.channels_last else torch.contiguous_format
        like = torch.empty(ctx.shape, dtype=grad.dtype, device=grad.device, memory_format=layout)
        return torch.ops.aten.max_pool2d_with_indices_backward(
            grad, like, pool.kernel, pool.stride, pool.padding, (1, 1), pool.ceil_mode,
            indices.contiguous(memory_format=layout),
        ), None


def _corners(pool: Pool, width: int, out: Tensor) -> Tensor:
    """Index within the input's plane of each window's first element, which may lie in the padding."""
    rows = torch.arange(out.shape[-2], device=out.device) * pool.stride[0] - pool.padding[0]
    columns = torch.arange(out.shape[-1], device=out.device) * pool.stride[1] - pool.padding[1]
    return rows[:, None] * width + columns


def _in_lines(step: Tensor, old: int, new: int, pool: Pool) -> Tensor:
    """Steps within a window, in lines of `new` elements instead of `old` where the image's do not fit a byte."""
    if max(old, new) * (pool.kernel[0] - 1) + pool.kernel[1] <= 256:
        return step
    step = step.to(torch.int64)
    return step + torch.div(step, old, rounding_mode="floor") * (new - old)


class _AvgPool(torch.autograd.Function):
    """F.avg_pool2d that keeps nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pool: Pool) -> Tensor:
        ctx.pool, ctx.shape, ctx.channels_last = pool, tuple(x.shape), ops.is_channels_last(x)
        _ledger.stands_for(None, x)
        return apply_pool(pool, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        refuse_second_order("average pooling")
        pool = ctx.pool
        layout = torch.channels_last if ctx.channels_last else torch.contiguous_format
        like = torch.empty(ctx.shape, dtype=grad.dtype, device=grad.device, memory_format=layout)
        return torch.ops.aten.avg_pool2d_backward(
            grad, like, pool.kernel, pool.stride, pool.padding, pool.ceil_mode, pool.count_pad, pool.divisor
        ), None


def pool(x: Tensor, stored: Stored | None, spec: Pool) -> tuple[Tensor, Stored | None]:
    """Pooling of an activation and, where it has some, of its codes: a reader of the codes pools what they say."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return apply_pool(spec, x), None
    out = (_MaxPool if spec.kind == "max" else _AvgPool).apply(x, spec)
    if stored is None or version_of(x) != stored.version:
        return out, None
    return out, stored.after(out, spec)


# --- convolution and linear layers ------------------------------------------------------------------------------------


class _Conv(torch.autograd.Function):
    """A convolution whose weight gradient reads codes; the gradient of its input is exact."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, call: Callable[..., Tensor],
        geometry: tuple[Any, ...], meta: Stored, *tensors: Tensor,
    ) -> Tensor:
        _ledger.stands_for(tensors[0], x)
        stride, padding, dilation, groups = geometry
        out = call(x, weight, bias, stride, padding, dilation, groups)
        ctx.save_for_backward(weight, *tensors)
        ctx.geometry, ctx.meta, ctx.shape, ctx.dtype = geometry, meta, x.shape, x.dtype
        ctx.bias_sizes = None if bias is None else list(bias.shape)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        refuse_second_order("convolution")
        weight, *tensors = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        need = list(ctx.needs_input_grad[:3])
        # Without a gradient of the weight only the sizes of the input matter.
        x = read_codes(ctx.meta, tuple(tensors), grad.dtype) if need[1] else grad.new_empty(1).expand(ctx.shape)
        grads = torch.ops.aten.convolution_backward(
            grad, x, weight.to(grad.dtype), ctx.bias_sizes, stride, padding, dilation, False,
            [0] * len(stride), groups, need,
        )
        dtypes = (ctx.dtype, weight.dtype, ctx.bias_dtype)
        found = (g.to(dtype) if wanted else None for g, dtype, wanted in zip(grads, dtypes, need, strict=True))
        return (*found, None, None, None, *(None for _ in tensors))


class _Linear(torch.autograd.Function):
    """A linear layer whose weight gradient reads codes; the gradient of its input is exact.

    The weight is (outputs, inputs), or `transposed`.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool, meta: Stored, *tensors: Tensor
    ) -> Tensor:
        _ledger.stands_for(tensors[0], x)
        ctx.save_for_backward(weight, *tensors)
        ctx.meta, ctx.dtype, ctx.bias_dtype = meta, x.dtype, None if bias is None else bias.dtype
        ctx.features, ctx.transposed = x.shape[-1], transposed
        if not transposed:
            return F.linear(x, weight, bias)
        assert bias is not None
        return torch.addmm(bias, x.view(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        refuse_second_order("linear layer")
        weight, *tensors = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        need = ctx.needs_input_grad
        matrix = weight.t() if ctx.transposed else weight
        grad_input = (grad @ matrix.to(grad.dtype)).to(ctx.dtype) if need[0] else None
        grad_weight = None
        if need[1]:
            # Codes of an image stand for the flattened one; contiguous, so that its order is the flattened order.
            x = read_codes(ctx.meta, tuple(tensors), grad.dtype).contiguous().reshape(-1, ctx.features)
            grad_weight = (x.t() @ rows if ctx.transposed else rows.t() @ x).to(weight.dtype)
        grad_bias = rows.sum(0).to(ctx.bias_dtype) if need[2] else None
        return grad_input, grad_weight, grad_bias, None, None, *(None for _ in tensors)


def _of_input(layer: nn.Module, x: Tensor, stored: Stored | None, bits: int) -> Stored | None:
    """The codes that the layer's gradient reads: those given, or its own; None: the plain layer."""
    if not torch.is_grad_enabled():
        return None
    if stored is not None and version_of(x) == stored.version:
        return stored if layer.weight.requires_grad or x.requires_grad else None
    # What nobody computed, as a batch of images, is there anyway.
    is_result = x.requires_grad and (torch.compiler.is_compiling() or x.grad_fn is not None)
    if not (is_result and layer.weight.requires_grad and x.dtype in ops.FLOAT_TYPES and x.numel()):
        return None
    found = attached(x)
    if found is None:
        found = coded(x, bits)
        attach(x, found)
    return found


class _Reader(nn.Module):
    """What the layers below share: forward(x, codes of x or None)."""

    bits: int

    @classmethod
    def like(cls, module: nn.Module, bits: int) -> Any:
        """The same layer that reads codes: the same parameters and hooks."""
        made = cls.__new__(cls)
        made.__dict__.update(shared_attributes(module))
        made.bits = bits
        return made


class _ConvCodes(_Reader, Convolution):
    """What the convolutions below share."""

    _call: Callable[..., Tensor]

    def forward(self, x: Tensor, stored: Stored | None = None) -> Tensor:
        """The exact result; codes None: those of the layer's own making."""
        stored = _of_input(self, x, stored, self.bits) if isinstance(x, Tensor) else None
        if stored is None or x.dim() != self.weight.dim():
            return super().forward(x)
        geometry = (self.stride, _padding(self), self.dilation, self.groups)
        meta = stored._replace(tensors=())
        return _Conv.apply(x, self.weight, self.bias, type(self)._call, geometry, meta, *stored.tensors)


class Conv1d(_ConvCodes, nn.Conv1d):
    """nn.Conv1d that reads codes."""

    _call = staticmethod(F.conv1d)


class Conv2d(_ConvCodes, nn.Conv2d):
    """nn.Conv2d that reads codes."""

    _call = staticmethod(F.conv2d)


class Conv3d(_ConvCodes, nn.Conv3d):
    """nn.Conv3d that reads codes."""

    _call = staticmethod(F.conv3d)


class Linear(_Reader, nn.Linear):
    """nn.Linear that reads codes."""

    def forward(self, x: Tensor, stored: Stored | None = None) -> Tensor:
        """The exact result; codes None: those of the layer's own making."""
        stored = _of_input(self, x, stored, self.bits) if isinstance(x, Tensor) else None
        if stored is None:
            return super().forward(x)
        return _Linear.apply(x, self.weight, self.bias, False, stored._replace(tensors=()), *stored.tensors)


class TransposedLinear(_Reader):
    """The linear layer of GPT-2 in transformers, which calls it Conv1D: its weight is (inputs, outputs)."""

    weight: nn.Parameter
    bias: nn.Parameter

    def forward(self, x: Tensor, stored: Stored | None = None) -> Tensor:
        """The exact result; codes None: those of the layer's own making."""
        stored = _of_input(self, x, stored, self.bits)
        if stored is None:
            return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)
        return _Linear.apply(x, self.weight, self.bias, True, stored._replace(tensors=()), *stored.tensors)


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether TransposedLinear can take its place."""
    return (type(module).__module__, type(module).__name__) == ("transformers.pytorch_utils", "Conv1D")


BATCH_NORMS: dict[type[nn.Module], Any] = {
    nn.BatchNorm1d: BatchNorm1d, nn.BatchNorm2d: BatchNorm2d, nn.BatchNorm3d: BatchNorm3d,
}
READERS: dict[type[nn.Module], Any] = {
    nn.Conv1d: Conv1d, nn.Conv2d: Conv2d, nn.Conv3d: Conv3d, nn.Linear: Linear,
}


def _padding(conv: Convolution) -> tuple[int, ...]:
    """Padding in numbers; "same" is symmetric here, see unreadable()."""
    if conv.padding == "valid":
        return (0,) * len(conv.kernel_size)
    if conv.padding == "same":
        return tuple(step * (size - 1) // 2 for size, step in zip(conv.kernel_size, conv.dilation, strict=True))
    return tuple(conv.padding)  # type: ignore[arg-type]


def unreadable(layer: nn.Module) -> str | None:
    """Why a convolution or linear layer cannot read codes, or None."""
    if type(layer) not in READERS:
        return f"{type(layer).__name__} keeps its input"
    if isinstance(layer, Convolution):
        if layer.padding_mode != "zeros":
            return f"padding_mode {layer.padding_mode!r} keeps the padded input"
        if layer.padding == "same" and any(
            step * (size - 1) % 2 for size, step in zip(layer.kernel_size, layer.dilation, strict=True)
        ):
            return "padding 'same' of an even kernel is not symmetric"
    return None


class LowMemBlock(nn.Module):
    """Batch norm, ReLU, pooling or none, and a convolution or linear layer, as one module that keeps codes alone.

    The forward pass is exact. Kept for the backward pass are `bits` bits an element of the batch norm's result and five
    numbers a channel, in place of two float tensors.

    Args:
        norm: nn.BatchNorm1d, 2d or 3d.
        layer: nn.Conv1d, 2d, 3d or nn.Linear, which reads the result.
        pool: nn.MaxPool2d or nn.AvgPool2d in between.
        bits: 2, 4 or 8.
        range: standard deviations that the codes span; None: 8 for 4 bits, 9 for 8, 6 for 2.

    Shape:
        those of `norm`'s input to `layer`'s output.

    Gradient:
        of the input: exact but for the batch norm's variance term; of weight and gamma: from the codes; of biases:
        exact. There is no second derivative.

    Raises:
        TypeError, ValueError: another kind of layer, bits or range.

    Source:
        Chakrabarti and Moseley, NeurIPS 2019, section 3.
    """

    def __init__(
        self, norm: nn.Module, layer: nn.Module, pool: nn.Module | None = None, *, bits: int = 4,
        range: float | None = None,
    ) -> None:
        super().__init__()
        bits, span = check_settings("LowMemBlock", bits, range)
        if type(norm) not in BATCH_NORMS:
            raise TypeError(f"LowMemBlock: norm must be an nn.BatchNorm1d, 2d or 3d, got {type(norm).__name__}")
        reason = unreadable(layer)
        if reason is not None:
            raise TypeError(f"LowMemBlock: layer must be an nn.Conv1d, 2d, 3d or nn.Linear: {reason}")
        self.norm = BATCH_NORMS[type(norm)].like(norm, bits, span)
        self.layer = READERS[type(layer)].like(layer, bits)
        self.pool = pool_of(type(pool), vars(pool)) if isinstance(pool, nn.Module) else None
        if pool is not None and not is_poolable(self.pool):
            raise TypeError(f"LowMemBlock: pool must be an nn.MaxPool2d or nn.AvgPool2d, got {pool!r}")

    def forward(self, x: Tensor) -> Tensor:
        """layer(pool(relu(norm(x))))."""
        out, stored = self.norm(x, True)
        if self.pool is not None:
            out, stored = pool(out, stored, self.pool)
        if isinstance(self.layer, nn.Linear):
            out = out.flatten(1)
        return self.layer(out, stored)


def is_poolable(pool: Pool | None) -> bool:
    """Whether it is a two-dimensional pooling of known windows whose derivative needs no more than codes."""
    if pool is None or not pool.is_known or len(pool.kernel) != 2:
        return False
    return pool.kind == "average" or (pool.dilation == (1, 1) and math.prod(pool.kernel) <= 256)
