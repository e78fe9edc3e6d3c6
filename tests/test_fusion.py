"""Passes over floats in packed models: what is folded, what hands bits on, and the call that a model is packed for."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowbit_ext import models
from lowbit_ext.binary import BinaryActivation, BinaryConv2d, BinaryLinear, pack
from lowbit_ext.binary.packing.packed_layers import PackedBinarize, PackedConv2d, PackedPointwise
from lowbit_ext.duo import StepActivation
from lowbit_ext.packed import join_channels


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(20261128)


def shake(model):
    """Parameters and statistics of both signs, as training leaves them."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.running_mean.normal_(0, 0.5)
            module.running_var.uniform_(0.3, 3)
        for name, value in module.named_parameters(recurse=False):
            if value.dim() == 1 or name in ("shift", "bias", "position"):
                nn.init.normal_(value, 0.2, 0.7)
    return model.eval()


class Shift(nn.Module):
    """A constant a channel, as ReActNet's learnable bias."""

    def __init__(self, channels):
        super().__init__()
        self.shift = nn.Parameter(torch.randn(1, channels, 1, 1))

    def forward(self, x):
        return x + self.shift.expand_as(x)


class Stream(nn.Module):
    """A float convolution, blocks x -> then(norm(conv(before(x))) + x), and a classifier."""

    def __init__(self, before, then, channels=24, blocks=3):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.before = nn.ModuleList(before(channels) for _ in range(blocks))
        self.conv = nn.ModuleList(BinaryConv2d(channels, channels, 3, padding=1) for _ in range(blocks))
        self.norm = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(blocks))
        self.then = nn.ModuleList(then(channels) for _ in range(blocks))
        self.head = nn.Linear(channels, 5)

    def forward(self, x):
        x = self.stem(x)
        for before, conv, norm, then in zip(self.before, self.conv, self.norm, self.then, strict=True):
            x = then(norm(conv(before(x))) + x)
        return self.head(x.mean((2, 3)))


class Scaled(nn.Module):
    """A product with a constant a channel of either sign."""

    def __init__(self, channels):
        super().__init__()
        self.shift = nn.Parameter(torch.randn(channels, 1, 1))

    def forward(self, x):
        return (0.5 * x) * self.shift - 0.25


def reactnet_activation(channels):
    return nn.Sequential(Shift(channels), nn.PReLU(channels), Shift(channels))


def identity(_):
    return nn.Identity()


IMAGE = (3, 10, 9)
STREAMS = {
    "bi-real": (identity, identity),
    "pre-activation": (nn.BatchNorm2d, identity),
    "irnet": (identity, lambda _: nn.Hardtanh(inplace=True)),
    "reactnet": (Shift, reactnet_activation),
    "scaled": (Scaled, lambda _: nn.LeakyReLU(0.1, inplace=True)),
    "relu6": (lambda c: nn.Sequential(nn.BatchNorm2d(c), Shift(c)), lambda _: nn.ReLU6()),
    "dropout": (nn.BatchNorm2d, lambda _: nn.Dropout2d(0.4)),
}


def assert_packed(model, x, *others):
    """Packs the model; its results equal the model's bit for bit, alone and in a batch, in a plan and without one."""
    packed = pack(model, (x, *others) if others else x)
    with torch.no_grad():
        expected = model(x, *others)
        assert torch.equal(packed(x, *others), expected)
        tensors = [value for value in (x, *others) if isinstance(value, torch.Tensor)]
        assert torch.equal(packed.body(*tensors), expected), "the graph itself, as compilers see it"
    return packed


@pytest.mark.parametrize("name", STREAMS)
def test_residual_stream_is_one_pass_behind_each_convolution(name, isa):
    model = shake(Stream(*STREAMS[name]))
    packed = assert_packed(model, torch.randn(3, *IMAGE))
    layers = [layer for layer in packed.packed_layers().values() if isinstance(layer, PackedConv2d)]
    assert len(layers) == 3
    for layer in layers[:-1]:
        assert {"bits", "store"} <= set(layer.epilogue.kinds), "stream and next bits at once"
    assert layers[-1].epilogue.kinds.count("bits") == 0
    kinds = [type(layer) for layer in packed.packed_layers().values()]
    assert kinds.count(PackedBinarize) + kinds.count(PackedPointwise) == 1, "the stem's bits alone are made of floats"
    assert {row.how for row in packed.report() if row.kind in ("BatchNorm2d", "add", "PReLU")} <= {"pass", "bits"}


def test_falling_prelu_stays_a_float(isa):
    """A slope below 0 is not monotone: no threshold stands for what follows it."""
    model = shake(Stream(lambda c: nn.Sequential(nn.BatchNorm2d(c), nn.PReLU(c)), identity))
    for before in model.before:
        before[1].weight.data.fill_(-0.3)
    packed = assert_packed(model, torch.randn(2, *IMAGE))
    epilogues = [layer.epilogue for layer in packed.packed_layers().values() if hasattr(layer, "epilogue")]
    assert any("prelu" in epilogue.kinds for epilogue in epilogues)


class InPlace(nn.Module):
    """In-place forms, each of which later readers see."""

    def __init__(self):
        super().__init__()
        self.a, self.b = BinaryConv2d(8, 8, 3, padding=1), BinaryConv2d(8, 8, 3)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        y = self.norm(self.a(x))
        y.add_(x)
        y += x
        y *= 0.5
        F.hardtanh_(y, -2, 2)
        y = F.relu(y, inplace=True)
        return self.b(y) + y.mean()


def test_in_place_forms():
    assert_packed(shake(InPlace()), torch.randn(2, 8, 9, 9))


class IdentityShortcut(nn.Module):
    """A shortcut that is the same tensor, which a ReLU in place then changes."""

    def __init__(self, writes_into_shortcut):
        super().__init__()
        self.a, self.b = BinaryConv2d(8, 8, 3, padding=1), BinaryConv2d(8, 8, 3, padding=1)
        self.shortcut, self.relu = nn.Identity(), nn.ReLU(inplace=True)
        self.writes_into_shortcut = writes_into_shortcut

    def forward(self, x):
        x = self.a(x)
        shortcut = self.shortcut(x)
        written = self.relu(shortcut if self.writes_into_shortcut else x)
        return self.b(written) + shortcut + x


@pytest.mark.parametrize("writes_into_shortcut", [False, True])
def test_in_place_through_identity(writes_into_shortcut):
    assert_packed(shake(IdentityShortcut(writes_into_shortcut)), torch.randn(2, 8, 9, 9))


class TwoNorms(nn.Module):
    """Two batch norms that read one value: bits for each reader, one convolution."""

    def __init__(self):
        super().__init__()
        self.conv = BinaryConv2d(64, 64, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(64) for _ in range(2))
        self.readers = nn.ModuleList(BinaryConv2d(64, 40, 1) for _ in range(2))

    def forward(self, x):
        y = self.conv(x)
        return self.readers[0](self.norms[0](y)) + self.readers[1](self.norms[1](y))


def test_two_readers_of_one_accumulator():
    packed = assert_packed(shake(TwoNorms()), torch.randn(2, 64, 6, 6))
    assert packed.packed_layers()["body.conv"].epilogue.kinds.count("bits") == 2


class Many(nn.Module):
    """More readers, or more steps, than a pass takes."""

    def __init__(self, readers, steps):
        super().__init__()
        self.conv = BinaryConv2d(64, 64, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(64) for _ in range(readers))
        self.readers = nn.ModuleList(BinaryConv2d(64, 64, 1) for _ in range(readers))
        self.steps = nn.ModuleList(nn.Sequential(nn.BatchNorm2d(64), nn.PReLU(64)) for _ in range(steps))

    def forward(self, x):
        y = self.conv(x)
        for step in self.steps:
            y = step(y) + x
        return sum((reader(norm(y)) for norm, reader in zip(self.norms, self.readers, strict=True)), y)


@pytest.mark.parametrize(("readers", "steps"), [(1, 12), (30, 0), (9, 9)])
def test_more_than_a_pass_takes(readers, steps):
    assert_packed(shake(Many(readers, steps)), torch.randn(2, 64, 5, 5))


class Gate(nn.Module):
    """Real-to-Binary: a factor for each image and channel."""

    def __init__(self):
        super().__init__()
        self.a, self.b = BinaryConv2d(16, 16, 3, padding=1), BinaryConv2d(16, 16, 3, padding=1)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 16, 1), nn.Sigmoid())
        self.norm = nn.BatchNorm2d(16)

    def forward(self, x):
        return self.b(self.norm(self.a(x) * self.gate(x)) + x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gates(dtype):
    model, x = shake(Gate()), torch.randn(3, 16, 8, 8)
    packed = pack(model, x, float_dtype=dtype)
    assert "multiply_image" in packed.packed_layers()["body.a"].epilogue.kinds
    with torch.no_grad():
        if dtype == torch.float32:
            assert torch.equal(packed(x), model(x))
        else:
            torch.testing.assert_close(packed.body(x.to(dtype)), packed(x.to(dtype)), rtol=0, atol=0)


class Stem(nn.Module):
    """Batch norm, ReLU, pooling and batch norm between a float and a binary convolution, and a stream."""

    def __init__(self, pool):
        super().__init__()
        self.conv, self.pool = nn.Conv2d(3, 20, 3), pool
        self.norms = nn.ModuleList(nn.BatchNorm2d(20) for _ in range(2))
        self.binary = BinaryConv2d(20, 20, 3, padding=1)

    def forward(self, x):
        x = self.norms[1](self.pool(self.norms[0](self.conv(x)).relu()))
        return self.binary(x) + x


@pytest.mark.parametrize("pool", [
    nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2, ceil_mode=True), nn.AvgPool2d(2), nn.AvgPool2d(3, 2, 1, ceil_mode=True),
    nn.AvgPool2d(2, 2, 1, count_include_pad=False), nn.AvgPool2d(2, divisor_override=3),
    nn.MaxPool2d(2, 1, dilation=2),
], ids=str)
def test_stem_is_one_pass(pool):
    packed = assert_packed(shake(Stem(pool)), torch.randn(2, 3, 14, 13))
    (stem,) = (layer for layer in packed.packed_layers().values() if isinstance(layer, PackedPointwise))
    assert stem.window is not None
    assert sorted(stem.epilogue.kinds) == sorted(("multiply_add", "store", "bits"))


# --- bits through structure -------------------------------------------------------------------------------------------


class Dense(nn.Module):
    """A dense block: x = cat(x, conv(norm(x))), and an improvement of the last channels as MeliusNet's."""

    def __init__(self, channels, growth=64, layers=3, improve=True):
        super().__init__()
        sizes = [channels + index * growth for index in range(layers)]
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.norms = nn.ModuleList(map(nn.BatchNorm2d, sizes))
        self.convs = nn.ModuleList(BinaryConv2d(size, growth, 3, padding=1) for size in sizes)
        total = channels + layers * growth
        self.improve = BinaryConv2d(total, growth, 3, padding=1) if improve else None
        self.norm, self.last = nn.BatchNorm2d(total), BinaryConv2d(total, 7, 1)
        self.growth = growth

    def forward(self, x):
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = torch.cat((x, conv(norm(x))), 1)
        if self.improve is not None:
            kept, improved = x[:, : -self.growth], x[:, -self.growth :]
            x = torch.cat([kept, improved + self.improve(x)], dim=1)
        return self.last(self.norm(x))


@pytest.mark.parametrize(("channels", "growth"), [(64, 64), (100, 64), (128, 64), (9, 12), (63, 65), (130, 40)])
@pytest.mark.parametrize("improve", [False, True])
def test_concatenations_stay_bits(channels, growth, improve):
    packed = assert_packed(shake(Dense(channels, growth, improve=improve)), torch.randn(2, 3, 6, 6))
    joined = []

    class Watch(torch.fx.Interpreter):
        def run_node(self, node):
            value = super().run_node(node)
            joined.extend([value.dtype] if node.target in (torch.cat, join_channels) else [])
            return value

    Watch(packed.body).run(torch.randn(1, 3, 6, 6))
    assert set(joined) == {torch.int64}, "words are joined, floats never"
    for name, layer in packed.packed_layers().items():
        if isinstance(layer, PackedConv2d) and name != "body.last":
            assert layer.epilogue is None or "bits" in layer.epilogue.kinds


@pytest.mark.parametrize("split", [
    lambda x: torch.split(x, 64, 1), lambda x: x.chunk(2, 1), lambda x: (x[:, :64], x[:, 64:]),
    lambda x: (x[:, :64, :, :], x[:, -64:]),
])
def test_slices_of_concatenations(split):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (BinaryConv2d(64, 64, 3, padding=1) for _ in range(2))
            self.c, self.d = (BinaryConv2d(64, 8, 1) for _ in range(2))

        def forward(self, x):
            left, right = split(torch.cat((self.a(x), self.b(x)), 1))
            return self.c(right) + self.d(left)

    packed = assert_packed(shake(Model()), torch.randn(2, 64, 5, 5))
    assert not any(node.target is torch.cat for node in packed.body.graph.nodes)


@pytest.mark.parametrize("upsample", [
    nn.Upsample(scale_factor=2), nn.UpsamplingNearest2d(scale_factor=(1, 3)),
    lambda x: F.interpolate(x, scale_factor=2.0),
])
@pytest.mark.parametrize("order", ["before", "between", "behind", "pooled"])
def test_upsampling_of_bits(upsample, order):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = BinaryConv2d(8, 70, 3, padding=1), BinaryConv2d(70, 8, 3, padding=1)
            self.norm, self.sign = nn.BatchNorm2d(70), BinaryActivation("step")
            self.upsample = upsample

        def forward(self, x):
            x = self.a(x)
            x = self.upsample(x) if order == "before" else x
            x = self.sign(self.upsample(self.norm(x)) if order == "between" else self.norm(x))
            x = F.max_pool2d(self.upsample(x), 2) if order == "pooled" else self.upsample(x) if order == "behind" else x
            return self.b(x * 2 - 1)

    packed = assert_packed(shake(Model()), torch.randn(2, 8, 5, 6))
    assert {row.name: row.note for row in packed.report()}["a"] == "bits to bits"
    larger = torch.randn(3, 8, 9, 4)
    assert torch.equal(packed(larger), packed.body(larger))


@pytest.mark.parametrize("upsample", [
    nn.Upsample(scale_factor=1.5), nn.Upsample(scale_factor=2, mode="bilinear"), nn.Upsample(size=(10, 12)),
])
def test_other_upsampling_is_of_floats(upsample):
    layers = BinaryConv2d(8, 70, 3, padding=1), nn.BatchNorm2d(70), upsample, BinaryConv2d(70, 8, 3, padding=1)
    packed = assert_packed(shake(nn.Sequential(*layers)), torch.randn(2, 8, 5, 6))
    assert {row.name: row.note for row in packed.report()}["0"] == "bits to floats"


def shuffle_by_views(x):
    """As torchvision's ShuffleNet spells it."""
    batch, channels, height, width = x.size()
    return x.view(batch, 4, channels // 4, height, width).transpose(1, 2).contiguous().view(batch, -1, height, width)


@pytest.mark.parametrize(("move", "channels"), [
    (nn.ChannelShuffle(4), 140), (shuffle_by_views, 140), (lambda x: F.channel_shuffle(x, 2), 140),
    (nn.PixelUnshuffle(2), 560), (lambda x: F.pixel_shuffle(x, 2), 35),
])
@pytest.mark.parametrize("groups", [1, 5])
@pytest.mark.parametrize("signs_first", [False, True])
def test_shuffles_of_bits(move, channels, groups, signs_first):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = BinaryConv2d(8, 140, 3, padding=1), BinaryConv2d(channels, 10, 3, padding=1, groups=groups)
            self.norm, self.sign, self.move = nn.BatchNorm2d(140), BinaryActivation(), move

        def forward(self, x):
            x = self.norm(self.a(x))
            return self.b(self.move(self.sign(x) if signs_first else x))

    packed = assert_packed(shake(Model()), torch.randn(2, 8, 6, 4))
    assert {row.name: row.note for row in packed.report()}["a"] == "bits to bits"
    larger = torch.randn(3, 8, 8, 10)
    assert torch.equal(packed(larger), packed.body(larger))


def test_other_views_are_no_shuffle():
    """A transposition of pixels, and views whose middle axes stay."""
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = BinaryConv2d(8, 12, 3, padding=1), BinaryConv2d(12, 10, 3, padding=1)

        def forward(self, x):
            x = self.a(x).transpose(2, 3)
            return self.b(x.reshape(-1, 3, 4, 6, 6).reshape(-1, 12, 6, 6))

    assert_packed(shake(Model()), torch.randn(2, 8, 6, 6))


class Doubling(nn.Module):
    """ReActNet-A's pair: two sums side by side, the RPReLU behind them, whose floats and bits are both read."""

    def __init__(self, channels):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.convs = nn.ModuleList(BinaryConv2d(channels, channels, 1) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(2))
        self.before, self.after = (nn.Parameter(torch.randn(2 * channels, 1, 1)) for _ in range(2))
        self.prelu = nn.PReLU(2 * channels)
        self.last, self.norm = BinaryConv2d(2 * channels, 2 * channels, 3, padding=1), nn.BatchNorm2d(2 * channels)
        self.gain = nn.Parameter(torch.randn(2 * channels, 1, 1))

    def forward(self, x):
        x = self.stem(x)
        x = torch.cat([norm(conv(x)) + x for norm, conv in zip(self.norms, self.convs, strict=True)], 1)
        x = self.prelu(x + self.before) * self.gain - self.after
        return self.norm(self.last(F.hardtanh(x))) + x


@pytest.mark.parametrize("channels", [5, 32, 63, 64, 65, 96])
def test_steps_behind_a_concatenation_run_on_its_parts(channels):
    torch.manual_seed(0)
    packed = assert_packed(shake(Doubling(channels)), torch.randn(2, 3, 6, 6))
    rows = {row.name: row.note for row in packed.report()}
    assert {rows[f"convs.{index}"] for index in range(2)} == {"bits to bits and floats"}


class Tokens(nn.Module):
    """Binary linear layers over (N, T, C) behind layer norms, with a residual."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(48), nn.LayerNorm(48)
        self.a, self.b, self.c = BinaryLinear(48, 130), BinaryLinear(130, 48), BinaryLinear(48, 9)

    def forward(self, x):
        x = x + self.b(self.a(self.norm1(x)))
        return self.c(self.norm2(x))


@pytest.mark.parametrize("shape", [(2, 5, 48), (1, 1, 48), (3, 2, 4, 48), (4, 48)])
def test_linear_layers_over_tokens(shape):
    packed = assert_packed(shake(Tokens()), torch.randn(*shape))
    rows = {row.name: row.note for row in packed.report()}
    assert rows["a"] == "bits to bits"
    assert rows["b"] == "bits to floats"


# --- classes, hooks and parametrizations ------------------------------------------------------------------------------


class Padded(BinaryConv2d):
    """A derived class that only chooses options."""

    def __init__(self, channels):
        super().__init__(channels, channels, 3, padding=1, encoding="step", surrogate="identity", padding_value=1)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight - 0.1


def test_derived_classes_and_parametrizations_are_packed():
    first = BinaryConv2d(8, 8, 3, encoding="step")
    nn.utils.parametrize.register_parametrization(first, "weight", Doubled())
    padded = (nn.BatchNorm2d(8), StepActivation(), Padded(8))
    model = shake(nn.Sequential(*padded, nn.BatchNorm2d(8), StepActivation(), first))
    packed = assert_packed(model, torch.randn(2, 8, 7, 7))
    assert packed.packed_layers()["body.2"].padding_value == 1
    assert torch.equal(packed.packed_layers()["body.5"].words, pack(nn.Sequential(
        copy.deepcopy(model[4]), copy.deepcopy(first)), torch.randn(2, 8, 7, 7)).packed_layers()["body.1"].words)


def test_root_layer_is_packed():
    assert_packed(BinaryConv2d(8, 8, 3), torch.randn(2, 8, 6, 6))


def test_hooks_are_not_lost():
    model = nn.Sequential(BinaryConv2d(8, 8, 3), BinaryConv2d(8, 8, 3))
    model[1].register_forward_hook(lambda module, inputs, output: output + 1)
    with pytest.warns(UserWarning, match=r"1 \(BinaryConv2d\) stays as it is: its class or a hook"):
        assert_packed(model, torch.randn(2, 8, 6, 6))


class LikeOurs(nn.Conv2d):
    """A user's layer with the attributes of ours."""

    weight_scale = "layer"

    def scale(self):
        return None


def test_other_classes_are_never_swapped():
    model = nn.Sequential(BinaryConv2d(8, 8, 3), StepActivation(), LikeOurs(8, 8, 3))
    packed = assert_packed(model.eval(), torch.randn(2, 8, 8, 8))
    assert [(row.kind, row.how) for row in packed.report()][-1] == ("conv2d", "as it was")


# --- the call ---------------------------------------------------------------------------------------------------------


class Domains(nn.Module):
    """An argument that chooses a branch, and one that changes the result's structure."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.conv = nn.BatchNorm2d(8), nn.BatchNorm2d(8), BinaryConv2d(8, 8, 3)

    def forward(self, x, domain=None, mask=None):
        out = self.conv(self.a(x) if domain is None else self.b(x))
        return out if mask is None else (out, out * mask)


def test_the_call_of_the_example_is_packed():
    model, x, mask = shake(Domains()), torch.randn(2, 8, 7, 7), torch.rand(2, 8, 5, 5)
    assert_packed(model, x)
    assert_packed(model, x, 1)
    both = pack(model, {"x": x, "mask": mask})
    with torch.no_grad():
        for got, expected in zip(both(x, mask=mask), model(x, None, mask), strict=True):
            assert torch.equal(got, expected)


def test_other_calls_are_refused():
    model, x = shake(Domains()), torch.randn(2, 8, 7, 7)
    for packed in (pack(model, x), pickle.loads(pickle.dumps(pack(model, x)))):
        assert torch.equal(packed(x, None), packed(x=x))
        with pytest.raises(ValueError, match="packed for a call with domain=None, got 1"):
            packed(x, 1)
        with pytest.raises(ValueError, match="mask=None, got a tensor"):
            packed(x, mask=x)
        with pytest.raises(TypeError, match="missing a required argument: 'x'"):
            packed()


def test_sizes_in_forward():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = BinaryConv2d(8, 8, 3), nn.Linear(8, 4)

        def forward(self, x):
            x = self.conv(x)
            return self.head(F.avg_pool2d(x, x.size()[3]).view(x.size(0), -1))

    assert_packed(shake(Model()), torch.randn(2, 8, 9, 9))


# --- types and devices ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_the_float_parts(dtype):
    model, x = shake(Stream(*STREAMS["reactnet"])), torch.randn(4, *IMAGE)
    packed = pack(model, x, float_dtype=dtype)
    equal, count = packed.agreement
    assert count == 4
    assert 0 <= equal <= 4
    assert packed(x).dtype == torch.float32
    assert packed(x.to(dtype)).dtype == dtype
    assert packed.stem.weight.dtype == dtype if hasattr(packed, "stem") else packed.body.stem.weight.dtype == dtype
    streams = []
    packed.body.head.register_forward_pre_hook(lambda module, inputs: streams.append(inputs[0].dtype))
    packed(x)
    assert streams == [dtype]
    # One convolution in half precision is as good as torch's own.
    one = pack(shake(Stream(identity, identity, blocks=1)), x, float_dtype=dtype)
    assert one(x).isfinite().all()


def test_casts_choose_the_type():
    model, x = shake(Stream(*STREAMS["bi-real"])), torch.randn(2, *IMAGE)
    packed = pack(model, x)
    expected = packed(x)
    half = pack(model, x, float_dtype=torch.bfloat16)
    assert torch.equal(packed.bfloat16()(x), half(x))
    assert torch.equal(packed.to(torch.bfloat16).body(x.bfloat16()), half.body(x.bfloat16()))
    with pytest.raises(TypeError, match="floats are float32, bfloat16 or float16, got"):
        packed.double()
    model.load_state_dict(model.state_dict())
    assert torch.equal(pack(model, x)(x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_of_other_types_are_packed(dtype):
    model, x = shake(Stream(*STREAMS["bi-real"])), torch.randn(2, *IMAGE)
    expected = pack(model, x, float_dtype=None if dtype == torch.float64 else dtype)
    packed = pack(model.to(dtype), x.to(dtype))
    assert packed.float_dtype == (torch.float32 if dtype == torch.float64 else dtype)
    assert packed(x.to(dtype)).dtype == dtype
    if dtype == torch.float64:
        assert torch.equal(packed(x), expected(x))
    assert next(model.parameters()).dtype == dtype, "not modified"


def test_autocast_leaves_packed_models_alone():
    packed = pack(shake(Stream(*STREAMS["bi-real"])), torch.randn(2, *IMAGE))
    x = torch.randn(2, *IMAGE)
    expected = packed(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(packed(x), expected)


def test_unknown_float_dtype_is_refused():
    with pytest.raises(TypeError, match="pack: float_dtype must be float32, bfloat16 or float16"):
        pack(nn.Sequential(BinaryLinear(4, 4)), torch.randn(1, 4), float_dtype=torch.float64)


# --- published networks -----------------------------------------------------------------------------------------------

# Binary layers that hand bits to the next one. The others meet a float layer: the last one a pooling, those in front of
# a transition or of a halving of the image a float convolution, one of the pairs that ReActNet-A joins a sum.
NETWORKS = {
    "birealnet18": (64, {}, 15, 16), "reactnet18": (64, {}, 15, 16), "quicknet": (64, {}, 12, 16),
    "resnet20": (32, {}, 17, 18), "binary_densenet28": (64, {}, 19, 23), "meliusnet22": (64, {}, 30, 34),
    "reactnet_a": (64, {}, 30, 31), "resnet18": (64, {}, 15, 16), "vgg7": (32, {}, 4, 5),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_published_networks(name):
    size, options, handing_on, count = NETWORKS[name]
    model = shake(getattr(models, name)("binary", num_classes=10, **options))
    packed = pack(model, torch.randn(2, 3, size, size))
    notes = [row.note for row in packed.report() if row.kind.startswith("Binary") and row.how == "bits"]
    assert len(notes) == count
    assert sum(note.startswith(("bits to bits", "bits to bits and")) for note in notes) == handing_on
    x = torch.randn(3, 3, size, size)
    with torch.no_grad():
        expected, got = model(x), packed(x)
    # Float convolutions meet another memory format, which may round otherwise.
    assert torch.equal(got.argmax(1), expected.argmax(1))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    lines = str(packed.report()).splitlines()
    assert lines[0].split() == ["layer", "kind", "runs", "note"]
    assert len(lines) == len(packed.report()) + 1


def test_binary_activations_alone_are_no_packed_layers():
    with pytest.raises(ValueError, match="no BinaryConv2d"):
        pack(nn.Sequential(BinaryActivation()), torch.randn(2, 3))
