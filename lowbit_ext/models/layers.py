"""What the networks share: the hidden layers of each stage, and how weights start.

The stages differ in the hidden layers alone, whose activation and weight are

=========  ==================================  =====================================================
stage      activation                          weight
=========  ==================================  =====================================================
float      clip(y, 0, 1)                       float
binary     step: 1 where y >= 1/2, else 0      mean |w| over the layer times sign(w)
coupled    ternary: 0, 1/2 or 1                the same
=========  ==================================  =====================================================

The first convolution, the last linear layer and 1x1 convolutions in shortcuts are float in every stage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from lowbit_ext.binary import BinaryConv2d, BinaryLinear
from lowbit_ext.duo import CoupledConv2d, CoupledLinear, StepActivation, TernaryActivation

STAGES = ("float", "binary", "coupled")

# The step activation in front hands on zeros and ones and has the straight-through mask; the layer takes them as bits.
BITS: dict[str, Any] = {"encoding": "step", "surrogate": "identity", "weight_scale": "layer"}


def check_stage(model: str, stage: str) -> None:
    """Raises ValueError for an unknown stage."""
    if stage not in STAGES:
        raise ValueError(f"{model}: stage must be one of {', '.join(map(repr, STAGES))}, got {stage!r}")


def choose_widths(
    model: str, stage: str, widths: Sequence[int] | None, full: Sequence[int], coupled: Sequence[int]
) -> tuple[int, ...]:
    """The user's widths, checked, or the paper's for the stage."""
    check_stage(model, stage)
    if widths is None:
        return tuple(coupled if stage == "coupled" else full)
    if len(widths) != len(full) or not all(isinstance(width, int) and width > 0 for width in widths):
        raise ValueError(f"{model}: widths must be {len(full)} positive integers, got {widths!r}")
    return tuple(widths)


def activation(stage: str, surrogate: str) -> nn.Module:
    """Activation of a hidden layer."""
    if stage == "float":
        return nn.Hardtanh(0.0, 1.0)
    return StepActivation(surrogate) if stage == "binary" else TernaryActivation(surrogate)


def conv(stage: str, in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """Convolution of a hidden layer, without bias, padded so that stride 1 keeps the image's size."""
    arguments = (in_channels, out_channels, kernel, stride, kernel // 2)
    if stage == "float":
        return nn.Conv2d(*arguments, bias=False)
    if stage == "binary":
        return BinaryConv2d(*arguments, bias=False, **BITS)
    return CoupledConv2d(*arguments, bias=False)


def linear(stage: str, in_features: int, out_features: int, dropout: float = 0.0) -> nn.Linear:
    """Linear layer between hidden layers, without bias, behind dropout of this probability."""
    if stage == "float":
        return nn.Linear(in_features, out_features, bias=False)
    # Dropout scales what it leaves; a layer that takes its input as bits would miss that.
    if stage == "binary" and dropout == 0:
        return BinaryLinear(in_features, out_features, bias=False, **BITS)
    return CoupledLinear(in_features, out_features, bias=False)


def initialise(model: nn.Module) -> None:
    """Weights from N(0, 4 / (k^2 Cin + ceil(k / stride)^2 Cout)), k = stride = 1 for linear layers; biases 0."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            into, out = math.prod(module.kernel_size) * module.in_channels, module.out_channels
            for kernel, stride in zip(module.kernel_size, module.stride, strict=True):
                out *= math.ceil(kernel / stride)
        elif isinstance(module, nn.Linear):
            into, out = module.in_features, module.out_features
        else:
            continue
        nn.init.normal_(module.weight, std=math.sqrt(4 / (into + out)))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
