"""BinaryDuo: networks trained with coupled ternary activations, decoupled into binary ones of the same function.

Source: Kim, Kim, Kim and Kim, "BinaryDuo: reducing gradient mismatch in binary activation network by coupling binary
activations", ICLR 2020.
"""

from lowbit_ext.duo._decouple import decouple
from lowbit_ext.duo._gradient_mismatch import GradientMismatch, LayerMismatch, gradient_mismatch
from lowbit_ext.duo.functional import step_activation, ternary_activation
from lowbit_ext.duo.layers import CoupledConv2d, CoupledLinear, StepActivation, TernaryActivation

__all__ = [
    "CoupledConv2d",
    "CoupledLinear",
    "GradientMismatch",
    "LayerMismatch",
    "StepActivation",
    "TernaryActivation",
    "decouple",
    "gradient_mismatch",
    "step_activation",
    "ternary_activation",
]
