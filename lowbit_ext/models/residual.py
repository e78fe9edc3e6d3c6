"""Networks that add each binary convolution to a float stream: Bi-Real Net, ReActNet, QuickNet, IR-Net's ResNet-20."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit_ext.models.layers import (
    LearnableBias,
    RPReLU,
    before_sign,
    check_multiple,
    check_network,
    choose_widths,
    classifier,
    halve,
    shortcut,
    sign_conv,
)

RESNET18_WIDTHS = (64, 128, 256, 512)


def _stem(stem: str, in_channels: int, width: int) -> nn.Sequential:
    """7x7 with stride 2, batch norm and max-pooling, or for small images 3x3 and batch norm."""
    large = stem == "imagenet"
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["conv"] = nn.Conv2d(in_channels, width, 7 if large else 3, 2 if large else 1, 3 if large else 1, bias=False)
    layers["bn"] = nn.BatchNorm2d(width)
    if large:
        layers["pool"] = nn.MaxPool2d(3, 2, 1)
    return nn.Sequential(layers)


def _strides(widths: Sequence[int], blocks: Sequence[int], before: int) -> list[tuple[int, int, int]]:
    """Input channels, output channels and stride of every block; each group but the first halves the image."""
    result = []
    for group, (width, count) in enumerate(zip(widths, blocks, strict=True)):
        for position in range(count):
            result.append((before, width, 2 if group and not position else 1))
            before = width
    return result


class ResidualConv(nn.Module):
    """One convolution with a shortcut of its own: after(bn(conv(before(x))) + shortcut(x)).

    (N, C, H, W) -> (N, O, H', W').

    Args:
        before: in front of the convolution.
        conv: of O filters.
        shortcut: gives the shape of the convolution's result.
        after: behind the sum.
    """

    def __init__(self, before: nn.Module, conv: nn.Conv2d, shortcut: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.before, self.conv, self.bn = before, conv, nn.BatchNorm2d(conv.out_channels)
        self.shortcut, self.after = shortcut, after

    def forward(self, x: Tensor) -> Tensor:
        """The stream behind the convolution."""
        return self.after(self.bn(self.conv(self.before(x))) + self.shortcut(x))


# --- Bi-Real Net ------------------------------------------------------------------------------------------------------


def birealnet18(
    stage: str = "binary",
    *,
    in_channels: int = 3,
    num_classes: int = 1000,
    stem: str = "imagenet",
    widths: Sequence[int] | None = None,
    surrogate: str = "approx_sign",
) -> nn.Sequential:
    """Bi-Real Net 18: sixteen 3x3 convolutions on signs, each with a shortcut, x' = bn(conv(sign(x))) + x.

    Where a shortcut changes size or channels it is a 2x2 average, a float 1x1 convolution and a batch norm. Weights
    have the scale mean |w| of their filter.

    Args:
        stage: "binary", or "float": the twin with float weights and ReLU in place of the sign.
        in_channels: of the images.
        num_classes: number of logits.
        stem: "imagenet" (7x7 with stride 2, batch norm, max-pooling) or "cifar" (3x3, batch norm).
        widths: of the four groups of convolutions; default 64-128-256-512.
        surrogate: of the sign.

    Returns:
        (N, in_channels, H, W) -> (N, num_classes).

    Raises:
        TypeError, ValueError: unknown stage, stem or surrogate, or widths of another number.

    Source:
        Liu et al., "Bi-Real Net", ECCV 2018.
    """
    check_network("birealnet18", stage, surrogate, stem, in_channels=in_channels, num_classes=num_classes)
    chosen = choose_widths("birealnet18", widths, RESNET18_WIDTHS)
    options = {"surrogate": surrogate, "weight_scale": "channel"}
    blocks = [
        ResidualConv(
            before_sign(stage, twin=nn.ReLU()),
            sign_conv(stage, into, out, 3, stride, options),
            shortcut(into, out, stride),
            nn.Identity(),
        )
        for into, out, stride in _strides(chosen, (4, 4, 4, 4), chosen[0])
    ]
    return classifier(_stem(stem, in_channels, chosen[0]), blocks, chosen[-1], num_classes)


# --- ReActNet ---------------------------------------------------------------------------------------------------------


def _react_conv(
    stage: str, in_channels: int, out_channels: int, kernel: int, stride: int, skip: nn.Module, surrogate: str
) -> ResidualConv:
    """Shift, sign, convolution, batch norm, shortcut and RPReLU; the float twin has no sign and so no shift."""
    options = {"surrogate": surrogate, "weight_scale": "channel"}
    return ResidualConv(
        before_sign(stage, LearnableBias(in_channels)),
        sign_conv(stage, in_channels, out_channels, kernel, stride, options),
        skip,
        RPReLU(out_channels),
    )


def reactnet18(
    stage: str = "binary",
    *,
    in_channels: int = 3,
    num_classes: int = 1000,
    stem: str = "imagenet",
    widths: Sequence[int] | None = None,
    surrogate: str = "approx_sign",
) -> nn.Sequential:
    """ReActNet on ResNet-18: Bi-Real Net with a shift a channel before each sign and RPReLU behind each sum.

    Arguments, result and errors as birealnet18; the float twin has RPReLU and neither sign nor shift.

    Source:
        Liu et al., "ReActNet", ECCV 2020.
    """
    check_network("reactnet18", stage, surrogate, stem, in_channels=in_channels, num_classes=num_classes)
    chosen = choose_widths("reactnet18", widths, RESNET18_WIDTHS)
    blocks = [
        _react_conv(stage, into, out, 3, stride, shortcut(into, out, stride), surrogate)
        for into, out, stride in _strides(chosen, (4, 4, 4, 4), chosen[0])
    ]
    return classifier(_stem(stem, in_channels, chosen[0]), blocks, chosen[-1], num_classes)


class DoublingConv(nn.Module):
    """Two 1x1 convolutions of the same signs, each added to the stream, side by side. (N, C, H, W) -> (N, 2C, H, W)."""

    def __init__(self, stage: str, channels: int, surrogate: str) -> None:
        super().__init__()
        options = {"surrogate": surrogate, "weight_scale": "channel"}
        self.before = before_sign(stage, LearnableBias(channels))
        self.conv1, self.conv2 = (sign_conv(stage, channels, channels, 1, 1, options) for _ in range(2))
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.after = RPReLU(2 * channels)

    def forward(self, x: Tensor) -> Tensor:
        """The stream with twice the channels."""
        signs = self.before(x)
        return self.after(torch.cat([self.bn1(self.conv1(signs)) + x, self.bn2(self.conv2(signs)) + x], 1))


def reactnet_a(
    stage: str = "binary",
    *,
    in_channels: int = 3,
    num_classes: int = 1000,
    stem: str = "imagenet",
    width: int = 32,
    surrogate: str = "approx_sign",
) -> nn.Sequential:
    """ReActNet-A: thirteen blocks of a 3x3 and a 1x1 convolution on signs, after MobileNet.

    Every convolution has a shift a channel before its sign, a shortcut, and RPReLU behind the sum. Channels double by
    two 1x1 convolutions side by side; the image is halved by a strided 3x3 beside a 2x2 average.

    Args:
        stage, in_channels, num_classes, surrogate: as reactnet18.
        stem: a 3x3 convolution and batch norm, with stride 2 ("imagenet") or 1 ("cifar").
        width: channels of the stem; the last block has 32 times as many.

    Returns:
        (N, in_channels, H, W) -> (N, num_classes).

    Raises:
        TypeError, ValueError: unknown stage, stem or surrogate, or a width below 1.

    Source:
        Liu et al., "ReActNet", ECCV 2020. There sign(0) = 0, here +1: of weights that are exactly 0 the results differ.
    """
    check_network("reactnet_a", stage, surrogate, stem, in_channels=in_channels, num_classes=num_classes, width=width)
    layers = {"conv": nn.Conv2d(in_channels, width, 3, 2 if stem == "imagenet" else 1, 1, bias=False)}
    blocks: list[nn.Module] = []
    before = width
    for after in [width * factor for factor in (2, 4, 4, 8, 8, *(16,) * 6, 32, 32)]:
        stride = 2 if after > before and before > width else 1
        skip = halve() if stride == 2 else nn.Identity()
        blocks.append(_react_conv(stage, before, before, 3, stride, skip, surrogate))
        if after > before:
            blocks.append(DoublingConv(stage, before, surrogate))
        else:
            blocks.append(_react_conv(stage, before, after, 1, 1, nn.Identity(), surrogate))
        before = after
    return classifier(nn.Sequential(OrderedDict(layers, bn=nn.BatchNorm2d(width))), blocks, before, num_classes)


# --- QuickNet ---------------------------------------------------------------------------------------------------------


class QuickConv(nn.Module):
    """bn(relu(conv(x))) + x, with a 3x3 convolution of x's signs, padded with +1. (N, C, H, W) -> the same."""

    def __init__(self, stage: str, channels: int, surrogate: str) -> None:
        super().__init__()
        options: dict[str, Any] = {"surrogate": surrogate, "weight_scale": None, "padding_value": 1}
        self.conv, self.relu = sign_conv(stage, channels, channels, 3, 1, options), nn.ReLU()
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """The stream behind the convolution."""
        return self.bn(self.relu(self.conv(x))) + x


class BlurPool(nn.Module):
    """Every second pixel of the image blurred by (1, 2, 1) / 4 in both directions. (N, C, H, W) -> (N, C, H/2, W/2).

    Source:
        Zhang, "Making Convolutional Networks Shift-Invariant Again", ICML 2019.
    """

    weight: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        row = torch.tensor([0.25, 0.5, 0.25])
        self.register_buffer("weight", torch.outer(row, row).expand(channels, 1, 3, 3).contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """The smaller image; an odd size is rounded up."""
        return F.conv2d(x, self.weight, stride=2, padding=1, groups=self.weight.shape[0])


def _quick_stem(stem: str, in_channels: int, width: int) -> nn.Sequential:
    if stem == "cifar":
        return _stem(stem, in_channels, width)
    inner = width // 4
    layers = {
        "conv": nn.Conv2d(in_channels, inner, 3, 2, 1, bias=False), "bn": nn.BatchNorm2d(inner), "relu": nn.ReLU(),
        "depthwise": nn.Conv2d(inner, inner, 3, 2, 1, groups=inner, bias=False),
        "depthwise_bn": nn.BatchNorm2d(inner, affine=False),
        "pointwise": nn.Conv2d(inner, width, 1, bias=False), "pointwise_bn": nn.BatchNorm2d(width),
    }
    return nn.Sequential(OrderedDict(layers))


def quicknet(
    stage: str = "binary",
    *,
    in_channels: int = 3,
    num_classes: int = 1000,
    stem: str = "imagenet",
    widths: Sequence[int] | None = None,
    surrogate: str = "clip",
) -> nn.Sequential:
    """QuickNet: sixteen 3x3 convolutions on signs with x' = bn(relu(conv(sign(x)))) + x.

    Between groups: ReLU, max-pooling 2x2 with stride 1, blur-pooling, a float 1x1 convolution and batch norm. Weights
    have no scale. Padding is +1, in the float twin 0.

    Args:
        stage: "binary", or "float": the twin with float weights, whose only activation is the ReLU behind each
            convolution.
        in_channels, num_classes, surrogate: as birealnet18.
        stem: "imagenet" (3x3 and depthwise 3x3, both with stride 2, and 1x1) or "cifar" (3x3, batch norm).
        widths: of the four groups, the first a multiple of 4; default 64-128-256-512.

    Returns:
        (N, in_channels, H, W) -> (N, num_classes).

    Raises:
        TypeError, ValueError: unknown stage, stem or surrogate, or other widths.

    Source:
        Bannink et al., "Larq Compute Engine", MLSys 2021.
    """
    check_network("quicknet", stage, surrogate, stem, in_channels=in_channels, num_classes=num_classes)
    chosen = choose_widths("quicknet", widths, RESNET18_WIDTHS)
    check_multiple("quicknet", "the first of widths", chosen[0], 4)
    blocks: list[nn.Module] = []
    for index, width in enumerate(chosen):
        if index:
            blocks += [
                nn.ReLU(), nn.MaxPool2d(2, 1), BlurPool(chosen[index - 1]),
                nn.Conv2d(chosen[index - 1], width, 1, bias=False), nn.BatchNorm2d(width),
            ]
        blocks += [QuickConv(stage, width, surrogate) for _ in range(4)]
    return classifier(
        _quick_stem(stem, in_channels, chosen[0]), blocks, chosen[-1], num_classes, before_pool={"relu": nn.ReLU()}
    )


# --- IR-Net's ResNet-20 -----------------------------------------------------------------------------------------------


class ZeroPadShortcut(nn.Module):
    """Every second pixel, with channels of zeros on both sides. (N, C, H, W) -> (N, O, H/2, W/2)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        missing = out_channels - in_channels
        self.padding = (0, 0, 0, 0, missing // 2, missing - missing // 2)

    def forward(self, x: Tensor) -> Tensor:
        """The smaller image; an odd size is rounded up."""
        return F.pad(x[:, :, ::2, ::2], self.padding)


def resnet20(
    stage: str = "binary",
    *,
    in_channels: int = 3,
    num_classes: int = 10,
    widths: Sequence[int] | None = None,
    surrogate: str = "clip",
) -> nn.Sequential:
    """ResNet-20 for images the size of CIFAR's: eighteen 3x3 convolutions with x' = hardtanh(bn(conv(sign(x))) + x).

    Shortcuts that change the shape take every second pixel and add channels of zeros. Weights have the scale mean |w|
    of their filter in place of IR-Net's standardised weights and powers of two.

    Args:
        stage: "binary", or "float": the twin with float weights, whose only activation is the hardtanh of the stream.
        in_channels, num_classes, surrogate: as birealnet18.
        widths: of the three groups, not falling; default 16-32-64.

    Returns:
        (N, in_channels, H, W) -> (N, num_classes).

    Raises:
        TypeError, ValueError: unknown stage or surrogate, widths of another number or falling.

    Source:
        Qin et al., "Forward and Backward Information Retention for Accurate Binary Neural Networks", CVPR 2020.
    """
    check_network("resnet20", stage, surrogate, in_channels=in_channels, num_classes=num_classes)
    chosen = choose_widths("resnet20", widths, (16, 32, 64))
    if list(chosen) != sorted(chosen):
        raise ValueError(f"resnet20: widths must not fall, got {widths!r}")
    options = {"surrogate": surrogate, "weight_scale": "channel"}
    stem = _stem("cifar", in_channels, chosen[0])
    stem.add_module("hardtanh", nn.Hardtanh())
    blocks = [
        ResidualConv(
            nn.Identity(),
            sign_conv(stage, into, out, 3, stride, options),
            nn.Identity() if stride == 1 else ZeroPadShortcut(into, out),
            nn.Hardtanh(),
        )
        for into, out, stride in _strides(chosen, (6, 6, 6), chosen[0])
    ]
    return classifier(stem, blocks, chosen[-1], num_classes, before_fc={"bn": nn.BatchNorm1d(chosen[-1])})
