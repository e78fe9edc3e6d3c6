"""What the networks share: the hidden layers of each stage, shortcuts, stems, and how weights start.

The stages differ in the hidden layers alone. Of BinaryDuo's networks (VGG-7, AlexNet, ResNet-18) these are

=========  ==================================  =====================================================
stage      activation                          weight
=========  ==================================  =====================================================
float      clip(y, 0, 1)                       float
binary     step: 1 where y >= 1/2, else 0      mean |w| over the layer times sign(w)
coupled    ternary: 0, 1/2 or 1                the same
=========  ==================================  =====================================================

and of the networks on signs, which have no coupled stage,

=========  ==================================  =====================================================
stage      activation                          weight
=========  ==================================  =====================================================
float      ReLU (transformer: GELU); none      float
           where the network has another one
binary     sign, taken by the layer itself     sign(w), where the paper has it times mean |w|
=========  ==================================  =====================================================

The first convolution, the last linear layer and 1x1 convolutions in shortcuts and transitions are float in every stage.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_ext import _arguments
from lowbit_ext.binary import BinaryConv2d, BinaryLinear
from lowbit_ext.binary.surrogates import SURROGATES
from lowbit_ext.duo import CoupledConv2d, CoupledLinear, StepActivation, TernaryActivation

STAGES = ("float", "binary", "coupled")
SIGN_STAGES = ("float", "binary")
STEMS = ("imagenet", "cifar")

# The step activation in front hands on zeros and ones and has the straight-through mask; the layer takes them as bits.
BITS: dict[str, Any] = {"encoding": "step", "surrogate": "identity", "weight_scale": "layer"}


# --- arguments --------------------------------------------------------------------------------------------------------


def choose_widths(model: str, widths: Sequence[int] | None, paper: Sequence[int]) -> tuple[int, ...]:
    """The user's widths, checked, or the paper's."""
    if widths is None:
        return tuple(paper)
    fits = isinstance(widths, Sequence) and len(widths) == len(paper)
    if not fits or not all(isinstance(width, int) and width > 0 for width in widths):
        raise ValueError(f"{model}: widths must be {len(paper)} positive integers, got {widths!r}")
    return tuple(widths)


def check_network(model: str, stage: str, surrogate: str, stem: str = STEMS[0], **sizes: int) -> None:
    """Raises ValueError or TypeError for arguments that networks on signs share; every size is an int of at least 1."""
    _arguments.choice(model, "stage", stage, SIGN_STAGES)
    _arguments.choice(model, "surrogate", surrogate, SURROGATES)
    _arguments.choice(model, "stem", stem, STEMS)
    for name, size in sizes.items():
        _arguments.integer(model, name, size, 1)


def check_multiple(model: str, name: str, value: int, factor: int) -> None:
    """Raises ValueError unless the value is a multiple of the factor."""
    if value % factor:
        raise ValueError(f"{model}: {name} must be a multiple of {factor}, got {value}")


# --- hidden layers of BinaryDuo's networks ----------------------------------------------------------------------------


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


# --- hidden layers of the networks on signs ---------------------------------------------------------------------------


def sign_conv(
    stage: str, in_channels: int, out_channels: int, kernel: int, stride: int, options: Mapping[str, Any]
) -> nn.Conv2d:
    """Convolution of an image's signs, or in the float stage of the image, without bias, padded as `conv`."""
    arguments = (in_channels, out_channels, kernel, stride, kernel // 2)
    if stage == "float":
        return nn.Conv2d(*arguments, bias=False)
    return BinaryConv2d(*arguments, bias=False, **options)


def before_sign(stage: str, binary: nn.Module | None = None, twin: nn.Module | None = None) -> nn.Module:
    """What stands in front of a binary layer, which takes the signs itself, and of its float twin."""
    return (twin if stage == "float" else binary) or nn.Identity()


class LearnableBias(nn.Module):
    """x + shift, one shift a channel: in front of a sign ReActNet's RSign. (N, C, H, W) -> the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """The shifted image."""
        return x + self.shift.view(1, -1, 1, 1)


class RPReLU(nn.Module):
    """ReActNet's activation: a shift, PReLU with a slope a channel, a shift. (N, C, H, W) -> the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.before, self.prelu, self.after = LearnableBias(channels), nn.PReLU(channels), LearnableBias(channels)

    def forward(self, x: Tensor) -> Tensor:
        """The activated image."""
        return self.after(self.prelu(self.before(x)))


# --- around them ------------------------------------------------------------------------------------------------------


def halve() -> nn.AvgPool2d:
    """2x2 average. Of an odd image the last row and column stand alone: the size is that of a strided convolution."""
    return nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)


def shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """The value itself, or its average over 2x2 pixels through a float 1x1 convolution and batch norm."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if stride > 1:
        layers["pool"] = halve()
    layers["conv"] = nn.Conv2d(in_channels, out_channels, 1, bias=False)
    layers["bn"] = nn.BatchNorm2d(out_channels)
    return nn.Sequential(layers)


def classifier(
    stem: nn.Module, blocks: Sequence[nn.Module], channels: int, num_classes: int, *,
    before_pool: Mapping[str, nn.Module] | None = None, before_fc: Mapping[str, nn.Module] | None = None,
) -> nn.Sequential:
    """Stem, blocks, average over the image and a linear layer, with what is named in front of the last two.

    (N, C, H, W) -> logits (N, num_classes); the blocks end with `channels`.
    """
    layers = {"stem": stem, "blocks": nn.Sequential(*blocks), **(before_pool or {})}
    layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), **(before_fc or {})}
    layers["fc"] = nn.Linear(channels, num_classes)
    model = nn.Sequential(OrderedDict(layers))
    initialise(model)
    return model


def initialise(model: nn.Module) -> None:
    """Weights from N(0, 4 / (k^2 Cin + ceil(k / stride)^2 Cout)), k = stride = 1 for linear layers; biases 0.

    Cin and Cout are those of a group.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            into = math.prod(module.kernel_size) * module.in_channels // module.groups
            out = module.out_channels // module.groups
            for kernel, stride in zip(module.kernel_size, module.stride, strict=True):
                out *= math.ceil(kernel / stride)
        elif isinstance(module, nn.Linear):
            into, out = module.in_features, module.out_features
        else:
            continue
        nn.init.normal_(module.weight, std=math.sqrt(4 / (into + out)))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
