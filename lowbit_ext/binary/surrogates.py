"""Surrogate derivatives of quantised activations (straight-through estimators).

A quantised activation has derivative 0 almost everywhere; training puts one of these in its place. For the step
b(y) = (1 + sign(2y - 1)) / 2 the surrogate at y is the sign's at u = 2y - 1. The ternary activation is the mean of two
steps, t(y) = (b(y - 1/4) + b(y + 1/4)) / 2, and its surrogate the mean of theirs; clip is as BinaryDuo defines it.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

# clip: 1 where |u| <= 1 (Hubara et al. 2016); step and ternary: 1 where 0 < y < 1 (BinaryDuo).
# steep: 2 where |u| <= 1/2: the clip of half the width and the same area.
# identity: 1 everywhere (Bengio et al. 2013).
# approx_sign: 2 - 2|u| inside |u| < 1 (Bi-Real Net, Liu et al. 2018, eq. 6). polynomial: the name BinaryDuo has for it.
# swish_sign: derivative of 2 s(bu) (1 + bu (1 - s(bu))) - 1 with s the logistic function and b = 5 (BNN+, Darabi et al.
# 2018, eq. 4).
SURROGATES = ("clip", "steep", "identity", "approx_sign", "polynomial", "swish_sign")

_SWISH_BETA = 5.0


@dataclasses.dataclass(frozen=True)
class Interval:
    """A surrogate that is a constant `slope` inside an interval and 0 outside: one bit an element says which."""

    low: float
    high: float
    closed: bool
    slope: float = 1.0


INTERVALS = {
    ("clip", "sign"): Interval(-1.0, 1.0, True),
    ("clip", "step"): Interval(0.0, 1.0, False),
    ("clip", "ternary"): Interval(0.0, 1.0, False),
    ("steep", "sign"): Interval(-0.5, 0.5, True, 2.0),
    ("steep", "step"): Interval(0.25, 0.75, False, 2.0),
    ("steep", "ternary"): Interval(0.0, 1.0, False),
}


def keeps_bits(surrogate: str, levels: str) -> bool:
    """Whether an activation keeps one bit an element for this derivative, or nothing, in place of its input."""
    return surrogate == "identity" or (surrogate, levels) in INTERVALS


def derivative(x: Tensor, surrogate: str, levels: str) -> Tensor:
    """Surrogate derivative at x, elementwise, in x's dtype.

    Args:
        x: pre-activations.
        surrogate: a name of SURROGATES.
        levels: "sign", "step" or "ternary".
    """
    if surrogate == "identity":
        return torch.ones_like(x)
    interval = INTERVALS.get((surrogate, levels))
    if interval is not None:
        low, high = interval.low, interval.high
        inside = (x >= low) & (x <= high) if interval.closed else (x > low) & (x < high)
        return inside.to(x.dtype) * interval.slope
    if surrogate == "swish_sign" and x.dtype.itemsize < 4:  # it changes by up to 70 per unit of x
        return derivative(x.to(torch.float32), surrogate, levels).to(x.dtype)
    if levels == "ternary":
        return (derivative(x - 0.25, surrogate, "step") + derivative(x + 0.25, surrogate, "step")) / 2
    u = x if levels == "sign" else 2 * x - 1
    if surrogate == "swish_sign":
        # b (2 - bu tanh(bu/2)) / (1 + cosh(bu)) by e = exp(-|bu|). By logistic functions, whose 1 - s(bu) cancels, the
        # error is 146 units of 2^-24 instead of 23, and 2^18 elements take a core of Zen 4 1.04 ms instead of 0.64.
        size = _SWISH_BETA * u.abs()
        e = torch.exp(-size)
        inverse = 1 / (1 + e)
        return 2 * _SWISH_BETA * (2 - size * (1 - e) * inverse) * e * inverse * inverse
    return (2 - 2 * u.abs()).clamp_min(0)
