"""Activations of BinaryDuo as functions."""

from __future__ import annotations

from torch import Tensor

from lowbit_ext.binary.functional import quantized_activation


def ternary_activation(x: Tensor, surrogate: str = "clip") -> Tensor:
    """0, 1/2 or 1 by the thresholds 1/4 and 3/4: the mean of two step activations of x - 1/4 and x + 1/4, exactly.

    Args:
        x: any shape, float32, bfloat16, float16, or float64 (by torch's operators, for comparisons).
        surrogate: derivative that stands for the activation's (lowbit_ext.binary.surrogates).

    Returns:
        Tensor of x's shape, dtype and, where x is dense, memory order. A NaN gives 0.

    Gradient:
        straight-through: for "clip" 1 where 0 < x < 1, else 0. "clip" and "steep" keep one bit an element for it.

    Raises:
        TypeError: wrong dtype. ValueError: unknown surrogate.

    Source:
        Kim et al., "BinaryDuo", ICLR 2020, section 5.
    """
    return quantized_activation("ternary_activation", x, "ternary", surrogate)


def step_activation(x: Tensor, surrogate: str = "clip") -> Tensor:
    """1 where x >= 1/2, else 0; arguments, gradient and errors as ternary_activation.

    Source:
        Kim et al., "BinaryDuo", ICLR 2020, section 3.
    """
    return quantized_activation("step_activation", x, "step", surrogate)
