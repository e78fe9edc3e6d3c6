"""Random networks of everything that pack folds, fuses and joins: packed, they equal themselves."""

import random

import pytest
import torch
from torch import nn

from lowbit_ext.binary import BinaryActivation, BinaryConv2d, pack
from lowbit_ext.binary.packing import executor
from lowbit_ext.duo import StepActivation
from test_fusion import shake

SIZE = 12


class Constant(nn.Module):
    """A constant a channel, added, subtracted or multiplied."""

    def __init__(self, channels, operation):
        super().__init__()
        self.shift, self.operation = nn.Parameter(torch.randn(1, channels, 1, 1)), operation

    def forward(self, x):
        if self.operation == "multiply":
            return x * self.shift
        return x + self.shift if self.operation == "add" else x - self.shift


class Sum(nn.Module):
    """A sum in one of its spellings."""

    def __init__(self, spelling):
        super().__init__()
        self.spelling = spelling

    def forward(self, a, b):
        if self.spelling == "add":
            return a + b
        result = a * 1.5
        if self.spelling == "+=":
            result += b
            return result
        return result.add_(b)


class Joined(nn.Module):
    """A concatenation along the channels."""

    def forward(self, *values):
        return torch.cat(values, 1)


class Slice(nn.Module):
    """Channels from `begin` on."""

    def __init__(self, begin):
        super().__init__()
        self.begin = begin

    def forward(self, x):
        return x[:, self.begin :]


class Gate(nn.Module):
    """A factor for each image and channel, of the value itself."""

    def __init__(self, channels):
        super().__init__()
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, channels, 1), nn.Sigmoid())

    def forward(self, x):
        return x * self.gate(x)


class RandomNetwork(nn.Module):
    """A float convolution, random steps that read recent values, a binary convolution and a classifier."""

    def __init__(self, seed):
        super().__init__()
        self.draw = random.Random(seed)
        self.layers, self.reads = nn.ModuleList(), []
        self.shapes = [(3, SIZE, SIZE)]
        first = self.draw.choice([8, 40, 64, 128])
        self._add(nn.Conv2d(3, first, 3, padding=1), [0])
        for _ in range(self.draw.randint(4, 14)):
            source = self.draw.randrange(max(1, len(self.shapes) - 4), len(self.shapes))
            self._add(*self._layer(source))
        self.last, self.head = BinaryConv2d(self.shapes[-1][0], 8, 1), nn.Linear(8, 5)
        self.gives_both = self.draw.random() < 0.2

    def _add(self, layer, reads):
        layer.eval()
        with torch.no_grad():
            result = layer(*(torch.zeros(1, *self.shapes[index]) for index in reads))
        self.layers.append(layer)
        self.reads.append(reads)
        self.shapes.append(tuple(result.shape[1:]))

    def _layer(self, source):
        """A layer and what it reads."""
        draw, (channels, height, width) = self.draw, self.shapes[source]
        same = [index for index, shape in enumerate(self.shapes) if index and shape == self.shapes[source]]
        fitting = [index for index, shape in enumerate(self.shapes) if index and shape[1:] == (height, width)]
        others = [draw.choice(fitting) for _ in range(draw.randint(1, 3))]
        kind = draw.choices(
            [
                "convolution", "norm", "activation", "sum", "joined", "slice", "pool", "upsample", "bits", "constant",
                "gate",
            ],
            [30, 20, 10, 12, 8, 4, 4, 3, 4, 4, 4],
        )[0]
        if kind == "convolution":
            return BinaryConv2d(
                channels, draw.choice([channels, 8, 64, 128]), 3, draw.choice([1, 1, 2]), 1, bias=draw.random() < 0.5,
                encoding=draw.choice(["sign", "sign", "step"]), padding_value=draw.choice([0, 1]),
                weight_scale=draw.choice(["channel", "layer", None]),
            ), [source]
        if kind == "sum":
            return Sum(draw.choice(["add", "+=", "add_"])), [source, draw.choice(same)]
        if kind == "joined" and channels + sum(self.shapes[index][0] for index in others) < 400:
            return Joined(), [source, *others]
        if kind == "slice" and channels > 8:
            return Slice(draw.choice([channels // 2, 64 if channels > 64 else channels // 4])), [source]
        if kind == "pool" and height >= 4:
            return draw.choice([
                nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2), nn.AvgPool2d(3, 2, 1, count_include_pad=False),
            ]), [source]
        if kind == "upsample" and height <= 8:
            return nn.Upsample(scale_factor=draw.choice([2, (1, 2), (3, 1)])), [source]
        if kind == "bits":
            return draw.choice([BinaryActivation(), StepActivation()]), [source]
        if kind == "constant":
            return Constant(channels, draw.choice(["add", "subtract", "multiply"])), [source]
        if kind == "gate":
            return Gate(channels), [source]
        if kind == "activation":
            return draw.choice([
                nn.PReLU(), nn.PReLU(channels), nn.ReLU(inplace=True), nn.Hardtanh(), nn.ReLU6(), nn.LeakyReLU(0.1),
                nn.Identity(), nn.Dropout(0.3), nn.SiLU(),
            ]), [source]
        return nn.BatchNorm2d(channels, affine=draw.random() < 0.8), [source]

    def forward(self, x):
        values = [x]
        for layer, reads in zip(self.layers, self.reads, strict=True):
            values.append(layer(*(values[index] for index in reads)))
        logits = self.head(self.last(values[-1]).mean((2, 3)))
        return (logits, values[-1]) if self.gives_both else logits


@pytest.mark.parametrize("first", range(0, 60, 10))
def test_random_networks(first, monkeypatch):
    """Ten networks a case: the model, its packed graph and its plan in slices of few images agree bit for bit.

    Float results may round otherwise where torch's layers meet another memory format: to 1e-5 of the largest.
    """
    monkeypatch.setattr(executor, "CACHES", 1)
    monkeypatch.setattr(executor, "cache_bytes", lambda: 50_000)
    leaves = torch.utils._pytree.tree_leaves
    for seed in range(first, first + 10):
        torch.manual_seed(seed)
        model = shake(RandomNetwork(seed))
        packed, x = pack(model, torch.randn(2, 3, SIZE, SIZE)), torch.randn(5, 3, SIZE, SIZE)
        with torch.no_grad():
            expected, graph = model(x), packed.body(x)
        for want, plain, got in zip(leaves(expected), leaves(graph), leaves(packed(x)), strict=True):
            assert torch.equal(got, plain), f"seed {seed}: a plan gives other bits than its graph"
            assert float((got - want).abs().max()) <= 1e-5 * float(want.abs().max()), f"seed {seed}"
        half = pack(model, torch.randn(2, 3, SIZE, SIZE), float_dtype=torch.bfloat16)
        assert all(value.dtype == torch.float32 for value in leaves(half(x)))
