"""Pre-activation ResNets for small images: batch norm and ReLU in front of each convolution."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)


class PreActBlock(nn.Module):
    """Two 3x3 convolutions, or, with `bottleneck`, 1x1, 3x3 and 1x1 to four times the width.

    Where the shortcut is a convolution it reads the first activation, as the residual branch does.
    """

    def __init__(self, in_channels: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        out = 4 * width if bottleneck else width
        self.bn1, self.relu = nn.BatchNorm2d(in_channels), nn.ReLU()
        if bottleneck:
            self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
            self.bn2, self.conv2 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, stride, 1, bias=False)
            self.bn3, self.conv3 = nn.BatchNorm2d(width), nn.Conv2d(width, out, 1, bias=False)
        else:
            self.conv1 = nn.Conv2d(in_channels, width, 3, stride, 1, bias=False)
            self.bn2, self.conv2 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bottleneck = bottleneck
        self.shortcut = _shortcut(in_channels, out, stride)

    def forward(self, x: Tensor) -> Tensor:
        """The running sum behind the block."""
        y = self.relu(self.bn1(x))
        if self.shortcut is not None:
            x = self.shortcut(y)
        y = self.conv2(self.relu(self.bn2(self.conv1(y))))
        if self.bottleneck:
            y = self.conv3(self.relu(self.bn3(y)))
        return x + y


class PreActResNet(nn.Module):
    """Pre-activation ResNet: see preact_resnet."""

    def __init__(
        self, blocks: int, bottleneck: bool, widths: Sequence[int], in_channels: int, num_classes: int
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        body: list[nn.Module] = []
        channels = widths[0]
        for index, width in enumerate(widths):
            for position in range(blocks):
                body.append(PreActBlock(channels, width, 2 if index > 0 and position == 0 else 1, bottleneck))
                channels = 4 * width if bottleneck else width
        self.blocks = nn.Sequential(*body)
        self.bn, self.relu = nn.BatchNorm2d(channels), nn.ReLU()
        self.pool, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, in_channels, H, W)."""
        return self.fc(self.flatten(self.pool(self.relu(self.bn(self.blocks(self.conv(x)))))))


def preact_resnet(
    depth: int = 164, *, in_channels: int = 3, num_classes: int = 10, widths: Sequence[int] = (16, 32, 64)
) -> PreActResNet:
    """Pre-activation ResNet for images the size of CIFAR's.

    Args:
        depth: 6n + 2 up to 110, of blocks of two 3x3 convolutions (20, 56, 110), or from 164 on 9n + 2, of bottleneck
            blocks (164, 1001).
        in_channels: of the images.
        num_classes: number of logits.
        widths: of the three groups of blocks; the second and third halve the image.

    Returns:
        (N, in_channels, H, W) -> (N, num_classes).

    Raises:
        ValueError: a depth of neither kind, or widths that are not three positive integers.

    Source:
        He et al., "Identity mappings in deep residual networks", ECCV 2016, section 3 and appendix.
    """
    bottleneck = depth >= 164
    layers = 9 if bottleneck else 6
    if depth < 8 or (depth - 2) % layers:
        raise ValueError(f"preact_resnet: depth must be 6n + 2, or from 164 on 9n + 2, got {depth}")
    if len(widths) != 3 or not all(isinstance(width, int) and width > 0 for width in widths):
        raise ValueError(f"preact_resnet: widths must be 3 positive integers, got {widths!r}")
    return PreActResNet((depth - 2) // layers, bottleneck, widths, in_channels, num_classes)
