"""ResNet-18 with the activation at the entry of each convolution, behind a batch norm."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lowbit_ext import _arguments
from lowbit_ext.models.layers import (
    STAGES,
    STEMS,
    activation,
    choose_widths,
    conv,
    initialise,
    shortcut,
)

SHORTCUTS = ("standard", "every_conv")


class BasicBlock(nn.Module):
    """Two hidden layers, each activation, 3x3 convolution, batch norm; a shortcut round both, or round each."""

    def __init__(self, stage: str, surrogate: str, widths: tuple[int, int, int], stride: int, every_conv: bool) -> None:
        super().__init__()
        into, middle, out = widths
        self.act1, self.act2 = activation(stage, surrogate), activation(stage, surrogate)
        self.conv1, self.bn1 = conv(stage, into, middle, 3, stride), nn.BatchNorm2d(middle)
        self.conv2, self.bn2 = conv(stage, middle, out, 3), nn.BatchNorm2d(out)
        self.every_conv = every_conv
        if every_conv:
            self.shortcut1, self.shortcut2 = shortcut(into, middle, stride), shortcut(middle, out, 1)
        else:
            self.shortcut = shortcut(into, out, stride)

    def forward(self, x: Tensor) -> Tensor:
        """The stream behind the block."""
        y = self.bn1(self.conv1(self.act1(x)))
        if self.every_conv:
            y = y + self.shortcut1(x)
            return self.bn2(self.conv2(self.act2(y))) + self.shortcut2(y)
        return self.bn2(self.conv2(self.act2(y))) + self.shortcut(x)


class ResNet(nn.Module):
    """ResNet of two-layer blocks: see resnet18."""

    def __init__(
        self, stage: str, blocks: Sequence[int], widths: Sequence[int], *, in_channels: int, num_classes: int,
        stem: str, shortcuts: str, surrogate: str,
    ) -> None:
        super().__init__()
        _arguments.choice("resnet18", "stage", stage, STAGES)
        _arguments.choice("resnet18", "stem", stem, STEMS)
        _arguments.choice("resnet18", "shortcuts", shortcuts, SHORTCUTS)
        first, *_, last = widths
        layers: dict[str, nn.Module] = {}
        if stem == "imagenet":
            layers["conv"] = nn.Conv2d(in_channels, first, 7, 2, 3, bias=False)
            layers["bn"] = nn.BatchNorm2d(first)
            layers["relu"] = nn.ReLU()
            layers["pool"] = nn.MaxPool2d(3, 2, 1)
            layers["pool_bn"] = nn.BatchNorm2d(first)
        else:
            layers["conv"] = nn.Conv2d(in_channels, first, 3, padding=1, bias=False)
            layers["bn"] = nn.BatchNorm2d(first)
        self.stem = nn.Sequential(OrderedDict(layers))
        body: list[Any] = []
        before = first
        for index, count in enumerate(blocks):
            width = widths[index]
            for position in range(count):
                end = last if index == len(blocks) - 1 and position == count - 1 else width
                stride = 2 if index > 0 and position == 0 else 1
                body.append(BasicBlock(stage, surrogate, (before, width, end), stride, shortcuts == "every_conv"))
                before = end
        self.blocks = nn.Sequential(*body)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(last, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, in_channels, H, W)."""
        return self.fc(self.flatten(self.pool(self.relu(self.blocks(self.stem(x))))))


def resnet18(
    stage: str = "binary",
    *,
    in_channels: int = 3,
    num_classes: int = 1000,
    stem: str = "imagenet",
    shortcuts: str = "standard",
    widths: Sequence[int] | None = None,
    surrogate: str = "clip",
) -> ResNet:
    """ResNet-18 for images of any size.

    The stream between blocks is a sum of batch norms; each block starts with the activation. Where a shortcut changes
    size or channels it is a 2x2 average, a float 1x1 convolution and a batch norm.

    Args:
        stage, in_channels, num_classes, surrogate: as vgg7.
        stem: "imagenet" (7x7 with stride 2, batch norm, ReLU, max-pooling and another batch norm) or "cifar" (3x3 and
            batch norm).
        shortcuts: "standard", round each block of two convolutions, or "every_conv", round each convolution (Bi-Real
            Net).
        widths: of the four groups of blocks and of the last convolution; default 64-128-256-512-512, coupled
            64-90-180-360-512.

    Returns:
        (N, in_channels, H, W) -> (N, num_classes).

    Raises:
        ValueError: unknown stage, stem, shortcuts or surrogate, or widths of another number.

    Source:
        He et al., "Deep Residual Learning", CVPR 2016; Liu et al., "Bi-Real Net", ECCV 2018; Kim et al., "BinaryDuo",
        ICLR 2020, section 5.
    """
    full, coupled = (64, 128, 256, 512, 512), (64, 90, 180, 360, 512)
    chosen = choose_widths("resnet18", widths, coupled if stage == "coupled" else full)
    return ResNet(
        stage, (2, 2, 2, 2), chosen, in_channels=in_channels, num_classes=num_classes, stem=stem, shortcuts=shortcuts,
        surrogate=surrogate,
    )
