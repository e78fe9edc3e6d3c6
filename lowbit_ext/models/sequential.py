"""VGG-7 and AlexNet: sequential networks of convolutions and linear layers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from lowbit_ext import _arguments
from lowbit_ext.models.layers import STAGES, activation, choose_widths, conv, initialise, linear


class _Builder:
    """Adds layers in the order convolution, pooling, batch norm, activation, numbered as in the papers."""

    def __init__(self, stage: str, surrogate: str, in_channels: int, image_size: int) -> None:
        self.stage, self.surrogate = stage, surrogate
        self.channels, self.size = in_channels, image_size
        self.layers: OrderedDict[str, nn.Module] = OrderedDict()
        self.count = 0

    def _behind(self, norm: nn.Module, last: bool) -> None:
        self.layers[f"bn{self.count}"] = norm
        self.layers[f"act{self.count}"] = nn.ReLU() if last else activation(self.stage, self.surrogate)

    def conv(
        self, width: int, kernel: int = 3, pool: tuple[int, int] | None = None, *, stride: int = 1,
        padding: int | None = None,
    ) -> None:
        """A convolution, float if it is the first, with max-pooling of a (window, stride)."""
        self.count += 1
        padding = kernel // 2 if padding is None else padding
        if self.count == 1:
            layer: nn.Module = nn.Conv2d(self.channels, width, kernel, stride, padding, bias=False)
        else:
            layer = conv(self.stage, self.channels, width, kernel, stride)
        self.layers[f"conv{self.count}"] = layer
        self.size = (self.size + 2 * padding - kernel) // stride + 1
        if pool is not None:
            self.layers[f"pool{self.count}"] = nn.MaxPool2d(*pool)
            self.size = (self.size - pool[0]) // pool[1] + 1
        self._behind(nn.BatchNorm2d(width), last=False)
        self.channels = width

    def flatten(self) -> None:
        """Pixels and channels become features."""
        self.layers["flatten"] = nn.Flatten()
        self.channels *= self.size**2

    def linear(self, width: int, dropout: float = 0.0, last: bool = False) -> None:
        """A hidden linear layer; the last one's batch norm meets a ReLU in every stage."""
        self.count += 1
        if dropout:
            self.layers[f"dropout{self.count}"] = nn.Dropout(dropout)
        self.layers[f"fc{self.count}"] = linear(self.stage, self.channels, width, dropout)
        self._behind(nn.BatchNorm1d(width), last)
        self.channels = width

    def finish(self, num_classes: int) -> nn.Sequential:
        """The network with its float classifier."""
        self.layers[f"fc{self.count + 1}"] = nn.Linear(self.channels, num_classes)
        model = nn.Sequential(self.layers)
        initialise(model)
        return model


def _check_image_size(model: str, image_size: int, least: int) -> None:
    if image_size < least:
        raise ValueError(f"{model}: image_size must be at least {least}, got {image_size}")


def vgg7(
    stage: str = "binary",
    *,
    in_channels: int = 3,
    num_classes: int = 10,
    image_size: int = 32,
    widths: Sequence[int] | None = None,
    surrogate: str = "clip",
) -> nn.Sequential:
    """VGG-7: four 3x3 convolutions, two hidden linear layers and a classifier.

    Max-pooling halves the image behind every convolution but the first; 32x32 images end in 4x4 pixels.

    Args:
        stage: "float" (clip activations and float weights), "binary" (step activations, binary weights) or "coupled"
            (ternary activations, binary weights; for lowbit_ext.duo.decouple).
        in_channels: of the images.
        num_classes: classes.
        image_size: height and width of the images.
        widths: of the six hidden layers; default 64-64-128-128-512-512, coupled 45-45-90-90-336-512.
        surrogate: of the step and ternary activations.

    Returns:
        (N, in_channels, image_size, image_size) -> (N, num_classes). Layers are named conv1, bn1, act1, ..., fc7.

    Raises:
        ValueError: unknown stage or surrogate, widths of another number, or images too small.

    Source:
        Kim et al., "BinaryDuo", ICLR 2020, section 5.
    """
    _arguments.choice("vgg7", "stage", stage, STAGES)
    full, coupled = (64, 64, 128, 128, 512, 512), (45, 45, 90, 90, 336, 512)
    chosen = choose_widths("vgg7", widths, coupled if stage == "coupled" else full)
    _check_image_size("vgg7", image_size, 8)
    builder = _Builder(stage, surrogate, in_channels, image_size)
    builder.conv(chosen[0])
    for width in chosen[1:4]:
        builder.conv(width, pool=(2, 2))
    builder.flatten()
    builder.linear(chosen[4])
    builder.linear(chosen[5], last=True)
    return builder.finish(num_classes)


def alexnet(
    stage: str = "binary",
    *,
    in_channels: int = 3,
    num_classes: int = 1000,
    image_size: int = 224,
    widths: Sequence[int] | None = None,
    dropout: float = 0.1,
    surrogate: str = "clip",
) -> nn.Sequential:
    """AlexNet with batch norm: five convolutions, two hidden linear layers and a classifier.

    Args:
        stage, in_channels, num_classes, surrogate: as vgg7.
        image_size: height and width of the images. Below 64 the first convolution is 5x5 with stride 1 instead of 11x11
            with stride 4.
        widths: of the seven hidden layers; default 96-256-384-384-256-4096-4096, coupled 88-192-256-256-192-2400-4096.
        dropout: share of inputs that the two hidden linear layers drop in training.

    Returns:
        (N, in_channels, image_size, image_size) -> (N, num_classes). Layers are named conv1, pool1, ..., fc8.

    Raises:
        ValueError: as vgg7.

    Source:
        Krizhevsky et al., NeurIPS 2012; in this form Rastegari et al., "XNOR-Net", ECCV 2016, and Kim et al.,
        "BinaryDuo", ICLR 2020, section 5.
    """
    _arguments.choice("alexnet", "stage", stage, STAGES)
    full, coupled = (96, 256, 384, 384, 256, 4096, 4096), (88, 192, 256, 256, 192, 2400, 4096)
    chosen = choose_widths("alexnet", widths, coupled if stage == "coupled" else full)
    _check_image_size("alexnet", image_size, 15)
    builder = _Builder(stage, surrogate, in_channels, image_size)
    pool = (3, 2)
    if image_size < 64:
        builder.conv(chosen[0], 5, pool)
    else:
        builder.conv(chosen[0], 11, pool, stride=4, padding=2)
    builder.conv(chosen[1], 5, pool)
    builder.conv(chosen[2])
    builder.conv(chosen[3])
    builder.conv(chosen[4], pool=pool)
    builder.flatten()
    builder.linear(chosen[5], dropout)
    builder.linear(chosen[6], dropout, last=True)
    return builder.finish(num_classes)
