"""Float64 definitions of BinaryDuo's activations, from the paper."""

import torch


def step(y):
    """b(y) = 1[y >= 1/2], 0 for NaN."""
    return (y.double() >= 0.5).double()


def ternary(y):
    """t(y) in {0, 1/2, 1} with thresholds 1/4 and 3/4, 0 for NaN."""
    y = y.double()
    return torch.where(y >= 0.75, 1.0, torch.where(y >= 0.25, 0.5, 0.0)).double()


def clip_derivative(y):
    """1[0 < y < 1]."""
    y = y.double()
    return ((y > 0) & (y < 1)).double()
