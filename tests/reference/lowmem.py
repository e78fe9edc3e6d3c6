"""Float64 definitions of low-memory back-propagation, from the paper's formulas, without the kernels.

A channel normalised by its own statistics has the standard deviation 1: one fixed `span` fits every channel and no
scale is stored. The code of an element is that of u = sign(gamma) xhat, on a grid of n = 2^bits cells that has an edge
at y = 0, so that the sign of y, which is ReLU's mask, is exact.

Source: Chakrabarti and Moseley, "Backprop with approximate activations for memory-efficient network training",
NeurIPS 2019, section 3.
"""

import numpy as np
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
    """Codes of normalised elements xhat (N, C, ...) whose scaled ones are y = gamma xhat + beta; y decides the sign.

    A NaN counts as far below. y None: without ReLU, nothing decides the sign but the code.
    """
    n, edge, shift = (value if isinstance(value, int) else _per_channel(value, xhat)
                      for value in _grid(gamma, beta, bits, span))
    sign = torch.where(_per_channel(gamma, xhat) < 0, -1.0, 1.0)
    code = (torch.floor(sign * xhat.double() * (n / span) + edge) + n // 2).nan_to_num(0.0).clamp(0, n - 1)
    if y is None:
        return code.long()
    code = torch.where(y > 0, torch.maximum(code, shift), torch.minimum(code, shift - 1))
    return code.clamp(0, n - 1).long()


def channel_decode(codes, gamma, beta, bits, span):
    """(xhat~, mask, relu~) of codes (N, C, ...)."""
    n, edge, shift = (value if isinstance(value, int) else _per_channel(value, codes)
                      for value in _grid(gamma, beta, bits, span))
    gamma, beta = _per_channel(gamma, codes), _per_channel(beta, codes)
    u = (codes.double() + 0.5 - n // 2 - edge) * (span / n)
    mask = codes >= shift
    relu = torch.where(mask, (gamma.abs() * u + beta).clamp(min=0), 0.0)
    return torch.where(gamma < 0, -1.0, 1.0) * u, mask, relu


def channel_values(codes, gamma, beta, bits, span, relu, dtype):
    """What codes (N, C, ...) stand for in a type: |gamma| u + beta, negative ones 0 with ReLU, as finite numbers.

    A distance from the mean beyond float32 is infinite and counts as the last number of the type on its side. A channel
    whose gamma or beta is not finite is NaN.
    """
    n, edge, shift = (value if isinstance(value, int) else _per_channel(value, codes)
                      for value in _grid(gamma, beta, bits, span))
    gamma, beta = _per_channel(gamma, codes), _per_channel(beta, codes)
    greatest = torch.finfo(torch.float32).max
    distance = (codes.double() + 0.5 - n // 2 - edge) * (gamma.abs() * (span / n)).clamp(max=greatest)
    value = torch.where(distance.abs() > greatest, distance.sign() * torch.inf, distance) + beta
    if relu:
        value = torch.where(codes >= shift, value.clamp(min=0), 0.0)
    value = value.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    return torch.where(gamma.isfinite() & beta.isfinite(), value, torch.nan)


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


def norm_backward(grad, xhat, rstd, dims, centred, weight=None):
    """(grad of x, of weight and bias before their sums) of xhat * weight + bias, xhat = (x - mean) * rstd over `dims`.

    A norm that is not `centred` has no mean, as RMS norm.
    """
    grad, xhat = grad.double(), xhat.double()
    scaled = grad if weight is None else grad * weight.double()
    mean = scaled.mean(dims, keepdim=True) if centred else 0.0
    return (scaled - mean - xhat * (scaled * xhat).mean(dims, keepdim=True)) * rstd.double(), grad * xhat, grad


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


def _bfloat16(values, up):
    """The nearest bfloat16 above, or below: eight bits from the leading one on."""
    _, exponent = torch.frexp(values)
    spacing = torch.ldexp(torch.ones_like(values), (exponent - 8).clamp(min=-133))
    greatest = 255.0 * 2.0**120
    if up:
        return ((values / spacing).ceil() * spacing).clamp(max=greatest)
    below = (values / spacing).floor() * spacing
    return torch.where(below < -greatest, -torch.inf, below)


def _overflows(values, dtype):
    """Whether values are infinite in the type that they are rounded to, from float32."""
    return values.float().to(dtype).isinf()


def group_codes(x, bits, positive=False, thresholds=0.5, error=0.0):
    """(codes, scale, minimum) of a flat tensor in groups of 256: code = floor((x - minimum) / scale + threshold).

    Scale and minimum are bfloat16, the scale rounded up and the minimum down, so that the codes cover the group, but
    the other way where a finite minimum, or the last code of a finite maximum, would be infinite in x's type. They do
    not see a NaN, whose code is 0.

    Args:
        positive: the minimum is 0, and the code 0 for x <= 0 alone.
        thresholds: 1/2, to the nearest and halves up, or one in (0, 1) an element: stochastic rounding.
        error: what the scale is too small by, relative, before it is rounded up.
    """
    last = 2**bits - 1
    padding = (0, -x.numel() % 256)
    groups = F.pad(x.double().reshape(-1), padding, value=torch.nan).reshape(-1, 256)
    low = torch.where(groups.isnan(), torch.inf, groups).amin(1)
    high = torch.where(groups.isnan(), -torch.inf, groups).amax(1)
    minimum = _bfloat16(low, up=False) + 0.0
    minimum = torch.where(_overflows(minimum, x.dtype) & low.isfinite(), _bfloat16(low, up=True), minimum)
    minimum = torch.where((low > high) | positive, 0.0, minimum)
    extent = high - minimum
    scale = torch.where(extent > 0, _bfloat16(extent / last * (1 - error), up=True), 0.0)
    too_far = _overflows(minimum + last * scale, x.dtype) & high.isfinite() & minimum.isfinite()
    scale = torch.where(too_far, _bfloat16(scale * (1 - 2.0**-12), up=False), scale)
    if isinstance(thresholds, torch.Tensor):
        thresholds = F.pad(thresholds.double(), padding).reshape(-1, 256)
    steps = torch.where(scale > 0, 1 / scale, 0.0)[:, None] * (groups - minimum[:, None])
    codes = (steps + thresholds).floor().nan_to_num(0.0).clamp(0, last)
    if positive:
        codes = torch.where(groups > 0, codes.clamp(min=1), 0.0)
    return codes.reshape(-1)[: x.numel()].long(), scale, minimum


def rounding_thresholds(count, seed, offset):
    """Thresholds of stochastic rounding, sixteen bits an element: (bits + 1/2) / 65536.

    Of Philox4x32-10 with the key `seed` a group takes sixteen blocks, numbered from `offset` on. Element e of the group
    has the lower half of word e // 64 of block e % 16, rotated right by 8 (e // 16 % 4) bits.
    """
    element = np.arange(count, dtype=np.uint64)
    block = element // 256 * 16 + element % 16 + np.uint64(offset)  # modulo 2^64
    mask = np.uint64(0xFFFFFFFF)
    words = [block & mask, block >> np.uint64(32), np.zeros_like(block), np.zeros_like(block)]
    keys = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    for _ in range(10):
        first, second = words[0] * np.uint64(0xD2511F53), words[2] * np.uint64(0xCD9E8D57)
        words = [
            second >> np.uint64(32) ^ words[1] ^ np.uint64(keys[0]), second & mask,
            first >> np.uint64(32) ^ words[3] ^ np.uint64(keys[1]), first & mask,
        ]
        keys = [(keys[0] + 0x9E3779B9) & 0xFFFFFFFF, (keys[1] + 0xBB67AE85) & 0xFFFFFFFF]
    slot = element % np.uint64(256) // np.uint64(16)
    word = np.choose((slot // np.uint64(4)).astype(int), words)
    turned = (word << np.uint64(32) | word) >> (slot % np.uint64(4) * np.uint64(8))
    return torch.from_numpy(((turned & np.uint64(0xFFFF)).astype(float) + 0.5) / 65536)
