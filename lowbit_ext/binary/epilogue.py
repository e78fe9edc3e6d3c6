"""What follows the accumulator of a convolution: scale, bias and thresholds as the operators take them."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit_ext import _arguments
from lowbit_ext.binary.activation import check_real, holds_nan


def channel_vector(
    name: str, value: float | Tensor, filters: int, like: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """A scale or bias as a contiguous vector of one or `filters` values."""
    if isinstance(value, Tensor):
        check_real("binary_conv2d", name, value, like)
    else:
        value = torch.tensor([_arguments.number("binary_conv2d", name, value)], dtype=dtype, device=like.device)
    if value.dtype != dtype or value.dim() != 1 or not value.is_contiguous():
        value = value.to(dtype).reshape(-1).contiguous()
    if value.numel() not in (1, filters):
        raise ValueError(
            f"binary_conv2d: {name} must be a number or have one value a filter ({filters}), got {value.numel()}"
        )
    return value.expand(filters).contiguous() if name == "bias" and value.numel() != filters else value


def integer_threshold(threshold: Tensor, flip: Tensor | None) -> Tensor:
    """Threshold on an integer accumulator equal to a real one: ceil for acc >= t, floor for acc <= t, int32.

    Args:
        threshold: float or integer tensor; infinities become the ends of int32, always or never met. NaN is never met.
        flip: bool of the same shape, or None.
    """
    if threshold.dtype == torch.int32:
        return threshold
    rounded = threshold.to(torch.float64).ceil()
    if flip is not None:
        rounded = torch.where(flip, threshold.to(torch.float64).floor(), rounded)
    if threshold.is_floating_point():
        never = torch.inf if flip is None else torch.where(flip, -torch.inf, torch.inf)
        rounded = torch.where(threshold.isnan(), never, rounded)
    limits = torch.iinfo(torch.int32)
    return rounded.clamp(limits.min, limits.max).to(torch.int32)


def thresholds_of(
    threshold: float | Tensor, flip: Tensor | None, filters: int, exact: bool, like: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Threshold (T, O), int32 for exact accumulators and float32 else, and flip (T, O)."""
    if isinstance(threshold, Tensor):
        check_real("binary_conv2d", "threshold", threshold, like)
    else:
        value = _arguments.number("binary_conv2d", "threshold", threshold)
        threshold = torch.tensor(value, dtype=torch.float64, device=like.device)
    if flip is not None and (not isinstance(flip, Tensor) or flip.dtype != torch.bool):
        came = flip.dtype if isinstance(flip, Tensor) else type(flip).__name__
        raise TypeError(f"binary_conv2d: flip must be a bool tensor, got {came}")
    if flip is not None:
        _arguments.tensor_like("binary_conv2d", "flip", flip, like)
    rows = threshold.shape[0] if threshold.dim() == 2 else 1
    if threshold.dim() > 2 or rows not in (1, 2) or (threshold.dim() > 0 and threshold.shape[-1] not in (1, filters)):
        raise ValueError(
            f"binary_conv2d: threshold must be a number or have shape ({filters},), (1, {filters}) or (2, {filters}), "
            f"got {tuple(threshold.shape)}"
        )
    if flip is not None and (flip.dim() > 2 or any(
        size not in (1, wanted) for size, wanted in zip(reversed(flip.shape), (filters, rows), strict=False)
    )):
        raise ValueError(
            f"binary_conv2d: flip must have shape ({filters},) or that of threshold, got {tuple(flip.shape)}"
        )
    if threshold.is_floating_point() and holds_nan(threshold):
        raise ValueError("binary_conv2d: threshold holds NaN, which no value can be compared with")
    threshold = threshold.detach().expand(rows, filters)
    if flip is not None:
        flip = flip.expand(rows, filters).contiguous()
    threshold = integer_threshold(threshold, flip) if exact else threshold.to(torch.float32)
    return threshold.contiguous(), flip


def scaled(factor: Tensor, scale: Tensor | None) -> Tensor:
    """A scale times that of a packed input."""
    if factor.numel() != 1:
        raise ValueError(
            "binary_conv2d: a packed input's scale must be one number; values scaled per channel cannot be summed as "
            f"bits, got {tuple(factor.shape)}"
        )
    factor = factor.to(torch.float32).reshape(1)
    return factor if scale is None else factor * scale
