"""Networks whose stream grows by concatenation: BinaryDenseNet and MeliusNet."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_ext.models.layers import (
    before_sign,
    check_multiple,
    check_network,
    classifier,
    sign_conv,
)


class DenseConv(nn.Module):
    """`growth` channels by batch norm, sign and a 3x3 convolution: behind the stream, or added to its last channels.

    Args:
        channels: of the stream.
        growth: filters of the convolution.
        adds: False gives (N, C, H, W) -> (N, C + growth, H, W); True leaves the shape.
    """

    def __init__(self, stage: str, channels: int, growth: int, surrogate: str, adds: bool = False) -> None:
        super().__init__()
        options: dict[str, Any] = {"surrogate": surrogate, "weight_scale": None}
        self.bn, self.before = nn.BatchNorm2d(channels), before_sign(stage, twin=nn.ReLU())
        self.conv = sign_conv(stage, channels, growth, 3, 1, options)
        self.growth, self.adds = growth, adds

    def forward(self, x: Tensor) -> Tensor:
        """The stream behind the convolution."""
        new = self.conv(self.before(self.bn(x)))
        if self.adds:
            return torch.cat([x[:, : -self.growth], x[:, -self.growth :] + new], 1)
        return torch.cat([x, new], 1)


def _transition(channels: int, out_channels: int) -> nn.Sequential:
    """Batch norm, max-pooling 2x2, ReLU and a float 1x1 convolution."""
    layers = {
        "bn": nn.BatchNorm2d(channels), "pool": nn.MaxPool2d(2), "relu": nn.ReLU(),
        "conv": nn.Conv2d(channels, out_channels, 1, bias=False),
    }
    return nn.Sequential(OrderedDict(layers))


def _end(channels: int) -> dict[str, nn.Module]:
    return {"bn": nn.BatchNorm2d(channels), "relu": nn.ReLU()}


def binary_densenet28(
    stage: str = "binary",
    *,
    in_channels: int = 3,
    num_classes: int = 1000,
    stem: str = "imagenet",
    width: int = 64,
    surrogate: str = "clip",
) -> nn.Sequential:
    """BinaryDenseNet28: 6, 6, 6 and 5 convolutions on signs with x' = concat(x, conv(sign(bn(x)))).

    Between groups: batch norm, max-pooling, ReLU and a float 1x1 convolution to a 2.7th, 2.7th and 2.2th of the
    channels. Weights have no scale.

    Args:
        stage: "binary", or "float": the twin with float weights and ReLU in place of the sign.
        in_channels, num_classes, surrogate: as birealnet18.
        stem: "imagenet" (7x7 with stride 2, batch norm, ReLU, max-pooling) or "cifar" (3x3).
        width: channels of the stem and of each convolution, even.

    Returns:
        (N, in_channels, H, W) -> (N, num_classes).

    Raises:
        TypeError, ValueError: unknown stage, stem or surrogate, or another width.

    Source:
        Bethge et al., "Back to Simplicity: How to Train Accurate BNNs from Scratch?", 2019.
    """
    sizes = {"in_channels": in_channels, "num_classes": num_classes, "width": width}
    check_network("binary_densenet28", stage, surrogate, stem, **sizes)
    check_multiple("binary_densenet28", "width", width, 2)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if stem == "imagenet":
        layers["conv"] = nn.Conv2d(in_channels, width, 7, 2, 3, bias=False)
        layers["bn"], layers["relu"], layers["pool"] = nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    else:
        layers["conv"] = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
    blocks: list[nn.Module] = []
    channels = width
    for count, reduction in ((6, 2.7), (6, 2.7), (6, 2.2), (5, None)):
        blocks += [DenseConv(stage, channels + index * width, width, surrogate) for index in range(count)]
        channels += count * width
        if reduction is not None:
            fewer = round(channels // reduction / (width // 2)) * (width // 2)
            blocks.append(_transition(channels, fewer))
            channels = fewer
    return classifier(nn.Sequential(layers), blocks, channels, num_classes, before_pool=_end(channels))


def meliusnet22(
    stage: str = "binary",
    *,
    in_channels: int = 3,
    num_classes: int = 1000,
    stem: str = "imagenet",
    width: int = 64,
    surrogate: str = "clip",
) -> nn.Sequential:
    """MeliusNet22: 4, 5, 4 and 4 pairs of a convolution whose channels join the stream and one that improves them.

    Both are conv(sign(bn(x))); the second is added to the stream's last channels. Between groups: batch norm,
    max-pooling, ReLU and a float 1x1 convolution to 160, 224 and 256 channels. Weights have no scale.

    Args:
        stage, in_channels, num_classes, surrogate: as binary_densenet28.
        stem: "imagenet" (three 3x3 of 1, 4 and 8 groups, the first with stride 2, and max-pooling) or "cifar" (3x3).
        width: channels of the stem and of each convolution, a multiple of 16; the transitions' are in proportion.

    Returns:
        (N, in_channels, H, W) -> (N, num_classes).

    Raises:
        TypeError, ValueError: unknown stage, stem or surrogate, or another width.

    Source:
        Bethge et al., "MeliusNet: Can Binary Neural Networks Achieve MobileNet-level Accuracy?", 2020.
    """
    check_network("meliusnet22", stage, surrogate, stem, in_channels=in_channels, num_classes=num_classes, width=width)
    check_multiple("meliusnet22", "width", width, 16)
    layers: list[nn.Module] = []
    if stem == "imagenet":
        into = in_channels
        for out, stride, groups in ((width // 2, 2, 1), (width // 2, 1, 4), (width, 1, 8)):
            layers += [nn.Conv2d(into, out, 3, stride, 1, groups=groups, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
            into = out
        layers.append(nn.MaxPool2d(2))
    else:
        layers.append(nn.Conv2d(in_channels, width, 3, padding=1, bias=False))
    blocks: list[nn.Module] = []
    channels = width
    for count, fewer in ((4, 160), (5, 224), (4, 256), (4, None)):
        for _ in range(count):
            blocks.append(DenseConv(stage, channels, width, surrogate))
            channels += width
            blocks.append(DenseConv(stage, channels, width, surrogate, adds=True))
        if fewer is not None:
            blocks.append(_transition(channels, fewer * width // 64))
            channels = fewer * width // 64
    return classifier(nn.Sequential(*layers), blocks, channels, num_classes, before_pool=_end(channels))
