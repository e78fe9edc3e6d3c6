"""Slow float64 definitions of the binary operations, from the papers and torch.nn.functional, without the kernels."""

import torch
import torch.nn.functional as F
from torch import Tensor


def activation(x: Tensor, encoding: str, threshold: Tensor | float, flip: Tensor | None = None) -> Tensor:
    """Binary value of every element in float64: comparisons in float64, NaN gives the low value."""
    x = x.to(torch.float64)
    view = (1, -1) + (1,) * (x.dim() - 2)
    if isinstance(threshold, Tensor):
        threshold = threshold.to(torch.float64).reshape(view)
    bit = x >= threshold
    if flip is not None:
        bit = torch.where(flip.reshape(view), x <= threshold, bit)
    return bit.to(torch.float64) if encoding == "step" else 2 * bit.to(torch.float64) - 1


def sign(w: Tensor) -> Tensor:
    """Sign with sign(0) = +1, in float64."""
    return activation(w, "sign", 0.0)


def conv2d(a: Tensor, w: Tensor, stride, padding, dilation, groups, padding_value: int) -> Tensor:
    """Convolution of given values in float64; padding is (top, left, bottom, right)."""
    top, left, bottom, right = padding
    a = F.pad(a.to(torch.float64), (left, right, top, bottom), value=float(padding_value))
    return F.conv2d(a, w.to(torch.float64), stride=stride, dilation=dilation, groups=groups)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Product of given values in float64, whose integers it holds exactly."""
    return torch.matmul(a.to(torch.float64), b.to(torch.float64))


def pack(values: Tensor) -> Tensor:
    """Words (N, *spatial, W) of values (N, C, *spatial); positive values are bit 1. Built with Python integers."""
    moved = values.movedim(1, -1)
    channels = moved.shape[-1]
    count = (channels + 63) // 64
    rows = moved.reshape(-1, channels).gt(0).tolist()
    words = []
    for row in rows:
        number = sum(1 << c for c, bit in enumerate(row) if bit)
        parts = [(number >> (64 * i)) & (2**64 - 1) for i in range(count)]
        words.append([part - 2**64 if part >= 2**63 else part for part in parts])
    return torch.tensor(words, dtype=torch.int64).reshape(*moved.shape[:-1], count)


def surrogate_derivative(x: Tensor, surrogate: str, encoding: str) -> Tensor:
    """Derivative that stands in for the binary activation's, in float64, from each paper's formula."""
    x = x.to(torch.float64)
    if surrogate == "identity":
        return torch.ones_like(x)
    if surrogate == "clip":
        return ((x.abs() <= 1) if encoding == "sign" else ((x > 0) & (x < 1))).to(torch.float64)
    u = (x if encoding == "sign" else 2 * x - 1).detach().requires_grad_()
    if surrogate == "steep":
        return 2.0 * ((u.abs() <= 0.5) if encoding == "sign" else (u.abs() < 0.5)).to(torch.float64)
    if surrogate == "swish_sign":  # BNN+, equation 4, differentiated by autograd
        beta = 5.0
        value = 2 * torch.sigmoid(beta * u) * (1 + beta * u * (1 - torch.sigmoid(beta * u))) - 1
    else:  # Bi-Real Net, equation 6: piecewise polynomial
        value = torch.where(u < -1, -1.0, torch.where(u < 0, 2 * u + u * u, torch.where(u < 1, 2 * u - u * u, 1.0)))
    return torch.autograd.grad(value.sum(), u)[0]
