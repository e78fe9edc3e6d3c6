"""Float64 definitions of low-memory back-propagation, from the paper's formulas, without the kernels.

A channel normalised by its own statistics has the standard deviation 1: one fixed `span` fits every channel and no scale
is stored. The code of an element is that of u = sign(gamma) xhat, on a grid of n = 2^bits cells that has an edge at y = 0,
so that the sign of y, which is ReLU's mask, is exact.

Source: Chakrabarti and Moseley, "Backprop with approximate activations for memory-efficient network training",
NeurIPS 2019, section 3.
"""

import torch
import torch.nn.functional as F


def _per_channel(values, x):
    return values.double().reshape((1, -1) + (1,) * (x.dim() - 2))


def _grid(gamma, beta, bits, span):
    """Cells n, edge f of the grid within a cell, and shift: codes from shift on are positive elements."""
    n = 2**bits
    gamma, beta = gamma.double(), beta.double()
    edge = torch.where(gamma == 0, 0.0, beta / gamma.abs().where(gamma != 0, torch.ones_like(gamma))) * (n / span)
    shift = (n // 2 - edge.floor()).clamp(1, n - 1)
    # A channel without gain is beta everywhere: all codes are positive elements, or none is.
    shift = torch.where(gamma == 0, torch.where(beta > 0, 0.0, float(n)), shift)
    return n, edge - edge.floor(), shift


def channel_codes(xhat, y, gamma, beta, bits, span):
    """Codes of normalised elements xhat (N, C, ...) whose scaled ones are y = gamma xhat + beta; y decides the sign."""
    n, edge, shift = (value if isinstance(value, int) else _per_channel(value, xhat)
                      for value in _grid(gamma, beta, bits, span))  # fmt: skip
    sign = torch.where(_per_channel(gamma, xhat) < 0, -1.0, 1.0)
    code = (torch.floor(sign * xhat.double() * (n / span) + edge) + n // 2).clamp(0, n - 1)
    code = torch.where(y > 0, torch.maximum(code, shift), torch.minimum(code, shift - 1))
    return code.clamp(0, n - 1).long()


def channel_decode(codes, gamma, beta, bits, span):
    """(xhat~, mask, relu~) of codes (N, C, ...)."""
    n, edge, shift = (value if isinstance(value, int) else _per_channel(value, codes)
                      for value in _grid(gamma, beta, bits, span))  # fmt: skip
    gamma, beta = _per_channel(gamma, codes), _per_channel(beta, codes)
    u = (codes.double() + 0.5 - n // 2 - edge) * (span / n)
    mask = codes >= shift
    relu = torch.where(mask, (gamma.abs() * u + beta).clamp(min=0), 0.0)
    return torch.where(gamma < 0, -1.0, 1.0) * u, mask, relu


def batch_norm_relu_backward(grad, codes, gamma, beta, invstd, bits, span, training=True):
    """(grad of x, of gamma, of beta) of relu(batch_norm(x)) for the grad of its output, from the codes."""
    xhat, mask, _ = channel_decode(codes, gamma, beta, bits, span)
    grad = torch.where(mask, grad.double(), 0.0)
    others = [dim for dim in range(grad.dim()) if dim != 1]
    count = grad.numel() / max(grad.shape[1], 1)
    grad_beta, grad_gamma = grad.sum(others), (grad * xhat).sum(others)
    if training:
        grad = grad - _per_channel(grad_beta, grad) / count - xhat * _per_channel(grad_gamma, grad) / count
    return grad * _per_channel(gamma.double() * invstd.double(), grad), grad_gamma, grad_beta


def block(x, gamma, beta, weight, grad, eps, bits, span, **conv):
    """A block relu(batch_norm(x)) -> conv2d and its approximate gradients, all in float64.

    Returns:
        (output, grad of x, of gamma, of beta, of weight): the weight's gradient reads relu~, the input's passes the
        exact weights.
    """
    x, weight = x.double(), weight.double()
    others = [dim for dim in range(x.dim()) if dim != 1]
    mean, variance = x.mean(others), x.var(others, correction=0)
    invstd = (variance + eps).rsqrt()
    xhat = (x - _per_channel(mean, x)) * _per_channel(invstd, x)
    y = _per_channel(gamma, x) * xhat + _per_channel(beta, x)
    codes = channel_codes(xhat, y, gamma, beta, bits, span)
    relu = channel_decode(codes, gamma, beta, bits, span)[2]
    out = F.conv2d(y.relu(), weight, **conv)
    grad_relu = torch.nn.grad.conv2d_input(x.shape, weight, grad.double(), **conv)
    grad_weight = torch.nn.grad.conv2d_weight(relu, weight.shape, grad.double(), **conv)
    return out, *batch_norm_relu_backward(grad_relu, codes, gamma, beta, invstd, bits, span), grad_weight


def group_codes(x, bits, group=256, uniform=None):
    """(codes, scale, minimum) of a flat tensor in groups: scale and minimum in bfloat16, the scale rounded up.

    Args:
        uniform: numbers in [0, 1) for stochastic rounding, floor(t + uniform); None rounds to nearest, halves up.
    """
    flat = F.pad(x.double().reshape(-1), (0, -x.numel() % group))
    groups = flat.reshape(-1, group)
    valid = (torch.arange(groups.numel()) < x.numel()).reshape(groups.shape)
    low = torch.where(valid, groups, torch.inf).amin(1).float().bfloat16().double()
    high = torch.where(valid, groups, -torch.inf).amax(1)
    scale = ((high - low) / (2**bits - 1)).float().bfloat16().double()
    offset = 0.5 if uniform is None else F.pad(uniform.double().reshape(-1), (0, -x.numel() % group)).reshape(-1, group)
    steps = (groups - low[:, None]) / scale.where(scale > 0, torch.ones_like(scale))[:, None]
    return torch.floor(steps + offset).clamp(0, 2**bits - 1).reshape(-1)[: x.numel()].long(), scale, low
