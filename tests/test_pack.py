"""pack(): bit-exactness over architectures, and refusal of damaged states and files."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowbit_ext import _native, binary
from lowbit_ext.binary import BinaryActivation, BinaryConv1d, BinaryConv2d, BinaryLinear
from lowbit_ext.binary.packed_model import (
    PackedAvgPool2d,
    PackedBinarize,
    PackedConv2d,
    PackedMaxPool2d,
    PackedUnpack,
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(20260101)


def shake(model):
    """Batch norms with positive, negative and zero scales, as a trained network may have; evaluation mode."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.normal_(module.weight)
            module.weight.data[::7] = 0
            nn.init.normal_(module.bias)
            module.running_mean.normal_(std=3)
            module.running_var.uniform_(0.1, 30)
    return model.eval()


def vgg(widths=(45, 90, 64), encoding="sign", **options):
    """Float stem and classifier; pooling before, behind and without batch norm; a flatten of many pixels."""
    a, b, c = widths
    options = {"encoding": encoding, **options}
    return shake(
        nn.Sequential(
            nn.Conv2d(3, a, 3, padding=1),
            nn.MaxPool2d(2),
            nn.BatchNorm2d(a),
            BinaryConv2d(a, b, 3, padding=1, **options),
            nn.BatchNorm2d(b),
            nn.Hardtanh(inplace=True),
            BinaryConv2d(b, c, 3, padding=1, stride=2, bias=False, **options),
            nn.MaxPool2d(3, 2, padding=1, ceil_mode=True),
            nn.BatchNorm2d(c),
            nn.Dropout2d(0.5),
            BinaryConv2d(c, c, 3, padding="same", groups=c // 16 if c % 16 == 0 else 1, **options),
            nn.BatchNorm2d(c),
            nn.MaxPool2d(2, 1),
            nn.Flatten(),
            BinaryLinear(c * 4, 70, **options),
            nn.BatchNorm1d(70),
            BinaryActivation(encoding),
            BinaryLinear(70, 33, encoding=encoding, surrogate="identity"),
            nn.BatchNorm1d(33),
            nn.Linear(33, 10),
        )
    )


class Block(nn.Module):
    """A pre-activation block whose float stream meets a binary layer's result, with and without batch norm between."""

    def __init__(self, channels, normed):
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.conv = BinaryConv2d(channels, channels, 3, padding=1)
        self.after = nn.BatchNorm2d(channels) if normed else nn.Identity()

    def forward(self, x):
        y = self.after(self.conv(self.bn(x)))
        y += x
        return y


class Residual(nn.Module):
    """Bi-Real style residual net with a shared value, functional calls and a global average of bits."""

    def __init__(self, channels=45):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.ModuleList([Block(channels, True), Block(channels, False)])
        self.left = BinaryConv2d(channels, 2 * channels, 1, weight_scale=None)
        self.right = BinaryConv2d(channels, 2 * channels, 3, padding=1, padding_value=1, weight_scale="layer")
        self.bn = nn.BatchNorm2d(2 * channels)
        self.sign = BinaryActivation()
        self.head = nn.Linear(2 * channels, 10)

    def forward(self, x):
        x = F.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        x = F.max_pool2d(x, 2)
        x = self.left(x) + self.right(x)
        x = F.adaptive_avg_pool2d(self.sign(self.bn(x)), 1)
        return self.head(x.view(x.size(0), -1))


class Doubled(nn.Module):
    """BinaryDuo's decoupled form: the accumulator twice, each with its own batch norm."""

    def __init__(self):
        super().__init__()
        options = {"encoding": "step", "weight_scale": "layer", "bias": False}
        self.stem = nn.Sequential(nn.Conv2d(3, 90, 3), nn.BatchNorm2d(90))
        self.conv1 = BinaryConv2d(90, 45, 3, padding=1, **options)
        self.bn1 = nn.BatchNorm2d(90)
        self.conv2 = BinaryConv2d(90, 33, 3, **options)
        self.pool = nn.MaxPool2d(2)
        self.bn2 = nn.BatchNorm2d(66)
        self.act = BinaryActivation("step")
        self.head = nn.Linear(66, 10)

    def forward(self, x):
        x = self.conv1(self.stem(x))
        x = self.pool(self.conv2(self.bn1(torch.cat([x, x], 1))))
        x = self.act(self.bn2(torch.cat((x, x), dim=1)))
        return self.head(F.avg_pool2d(x, 2).mean((2, 3)))


def mlp(encoding="sign"):
    sizes = [(50, 90), (90, 129), (129, 64)]
    body = [m for i, o in sizes for m in (BinaryLinear(i, o, encoding=encoding), nn.BatchNorm1d(o))]
    return shake(nn.Sequential(nn.Linear(20, 50), *body, nn.ReLU(), nn.Linear(64, 5)))


def audio():
    return shake(
        nn.Sequential(
            nn.Conv1d(2, 45, 5),
            nn.BatchNorm1d(45),
            BinaryConv1d(45, 90, 3, padding=2, dilation=2),
            nn.MaxPool1d(2),
            nn.BatchNorm1d(90),
            BinaryActivation(),
            BinaryConv1d(90, 33, 3, stride=2, padding_value=-1, padding=1),
            nn.BatchNorm1d(33),
            nn.AdaptiveAvgPool1d(1),
            nn.Flatten(),
            nn.Linear(33, 4),
        )
    )


IMAGE = (3, 17, 16)
MODELS = {
    "vgg": (vgg, IMAGE),
    "vgg_wide_step": (lambda: vgg((64, 128, 64), "step", weight_scale="layer"), IMAGE),
    "vgg_unscaled_padding": (lambda: vgg((33, 64, 48), weight_scale=None, padding_value=-1)[:13], IMAGE),
    "residual": (lambda: shake(Residual()), IMAGE),
    "doubled": (lambda: shake(Doubled()), IMAGE),
    "mlp": (mlp, (20,)),
    "mlp_step": (lambda: mlp("step"), (20,)),
    "audio": (audio, (2, 40)),
}
