"""Surrogate derivatives of the binary activation (straight-through estimators).

The binary activation has derivative 0 almost everywhere; training puts one of these in its place. For the step encoding
b(y) = (1 + sign(2y - 1)) / 2, so its surrogate at y is the sign's at u = 2y - 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

# clipped: 1 where |u| <= 1 (Hubara et al. 2016); step: 1 where 0 < y < 1 (BinaryDuo). The only one that is a bit.
# identity: 1 everywhere (Bengio et al. 2013).
# approx_sign: 2 - 2|u| inside |u| < 1 (Bi-Real Net, Liu et al. 2018, eq. 6). polynomial: the name BinaryDuo has for it.
# swish_sign: derivative of 2 s(bu) (1 + bu (1 - s(bu))) - 1 with s the logistic function and b = 5 (BNN+, Darabi et al.
# 2018, eq. 4).
SURROGATES = ("clipped", "identity", "approx_sign", "polynomial", "swish_sign")

_SWISH_BETA = 5.0


def derivative(x: Tensor, surrogate: str, encoding: str) -> Tensor:
    """Surrogate derivative at x, elementwise, in x's dtype.

    Args:
        x: pre-activations.
        surrogate: a name of SURROGATES.
        encoding: "sign" or "step".
    """
    if surrogate == "identity":
        return torch.ones_like(x)
    if surrogate == "clipped":
        inside = x.abs() <= 1 if encoding == "sign" else (x > 0) & (x < 1)
        return inside.to(x.dtype)
    u = x if encoding == "sign" else 2 * x - 1
    if surrogate == "swish_sign":
        bu = _SWISH_BETA * u.to(torch.float32)  # the products below cancel in half precision
        # (2 - bu tanh(bu/2)) / (1 + cosh(bu)), with 1 + cosh(z) = 2 cosh(z/2)^2 = 1 / (2 s(z) (1 - s(z))).
        logistic = torch.sigmoid(bu)
        return (_SWISH_BETA * (2 - bu * torch.tanh(bu / 2)) * 2 * logistic * (1 - logistic)).to(x.dtype)
    return (2 - 2 * u.abs()).clamp_min(0)
