"""Batch norm with the statistics of all processes, whose backward pass reads codes of a few bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowbit_ext._torch import synchronised_batch_norm
from lowbit_ext.lowmem import _ledger, ops
from lowbit_ext.lowmem._stored import refuse_second_order
from lowbit_ext.lowmem.blocks import BatchNormCodes


class _Kept:
    """Stands in for the context of torch's function, and has what it keeps."""

    tensors: tuple[Tensor, ...]
    process_group: Any

    def save_for_backward(self, *tensors: Tensor) -> None:
        self.tensors = tensors


class SyncBatchNormFunction(torch.autograd.Function):
    """(relu(batch_norm(x)) or batch_norm(x), codes, gamma, beta), of x (N, C, ...) and what other processes have."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Tensor | None, beta: Tensor | None, mean: Tensor | None, variance: Tensor | None,
        momentum: float, eps: float, relu: bool, bits: int, span: float, group: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        kept = _Kept()
        size = torch.distributed.get_world_size(group)
        y = synchronised_batch_norm.forward(kept, x, gamma, beta, mean, variance, eps, momentum, group, size)
        x, _, batch_mean, invstd, counts = kept.tensors
        ones = torch.ones_like(invstd) if gamma is None else gamma.detach()
        zeros = torch.zeros_like(invstd) if beta is None else beta.detach()
        arguments = (x, batch_mean, invstd, ones, zeros, bits, span)
        codes = ops.batch_norm_relu_quantize(*arguments, y) if relu else ops.batch_norm_quantize(*arguments)
        _ledger.stands_for(codes, x, batch_mean, invstd, *((y,) if relu else ()))
        for extra in (invstd, ones, zeros):
            _ledger.stands_for(extra)
        ctx.save_for_backward(codes, invstd.view(torch.uint8), ones, zeros, counts)  # saved_tensors() codes floats
        ctx.settings, ctx.statistics, ctx.group = (bits, span, relu), invstd.dtype, group
        ctx.mark_non_differentiable(codes, ones, zeros)
        return y, codes, ones, zeros

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
        refuse_second_order("batch norm")
        codes, invstd, gamma, beta, counts = ctx.saved_tensors
        bits, span, relu = ctx.settings
        invstd, need = invstd.view(ctx.statistics).float(), ctx.needs_input_grad
        # As if the statistics were constants, and the sums that their gradients need.
        grad_input, grad_gamma, grad_beta = ops.batch_norm_relu_backward(
            grad, codes, gamma, beta, invstd, bits, span, relu, False
        )
        if not grad.numel():  # of a process without elements, whose sums others wait for
            grad_gamma.zero_(), grad_beta.zero_()
        if need[0]:
            sums = torch.stack((grad_beta, grad_gamma))
            torch.distributed.all_reduce(sums, group=ctx.group)
            mean_grad, mean_product = sums / counts.sum()
            value = ops.channel_dequantize(  # gamma xhat + beta
                codes, gamma, beta, tuple(grad.shape), ops.is_channels_last(grad_input), torch.float32, bits, span,
                False,
            )
            column = (-1, *(1,) * (grad.dim() - 2))
            factor = invstd * mean_product
            summand = invstd * gamma.float() * mean_grad - factor * beta.float()
            statistics = value.mul_(factor.view(column)).add_(summand.view(column))
            grad_input = (grad_input - statistics).to(grad.dtype)
        return (
            grad_input if need[0] else None,
            grad_gamma if need[1] else None,
            grad_beta if need[2] else None,
            *(None,) * 8,
        )


class SyncBatchNorm(BatchNormCodes, nn.SyncBatchNorm):
    """nn.SyncBatchNorm with codes."""

    def _apply_norm(self, x: Tensor, *arguments: Any) -> Any:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not (self.training and distributed):
            return super()._apply_norm(x, *arguments)
        if not x.is_cuda:
            raise ValueError(f"SyncBatchNorm: in a process group input must be on a GPU, got {x.device}")
        group = self.process_group or torch.distributed.group.WORLD
        if torch.distributed.get_world_size(group) == 1:
            return super()._apply_norm(x, *arguments)
        *parameters, _, momentum, eps, relu, bits, span = arguments
        return SyncBatchNormFunction.apply(x, *parameters, momentum, eps, relu, bits, span, group)
