"""pack(): bit-exactness over architectures, and refusal of damaged states and files."""

import copy
import errno
import importlib
import io
import os
import pickle
import stat
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flattens import SPELLINGS, Flattened
from lowbit_ext import _native, binary
from lowbit_ext.binary import BinaryActivation, BinaryConv1d, BinaryConv2d, BinaryLinear
from lowbit_ext.binary.packing.packed_layers import (
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
    return shake(
        nn.Sequential(
            nn.Conv2d(3, a, 3, padding=1),
            nn.MaxPool2d(2),
            nn.BatchNorm2d(a),
            BinaryConv2d(a, b, 3, padding=1, encoding=encoding, **options),
            nn.BatchNorm2d(b),
            nn.Hardtanh(inplace=True),
            BinaryConv2d(b, c, 3, padding=1, stride=2, bias=False, encoding=encoding, **options),
            nn.MaxPool2d(3, 2, padding=1, ceil_mode=True),
            nn.BatchNorm2d(c),
            nn.Dropout2d(0.5),
            BinaryConv2d(c, c, 3, padding="same", groups=c // 16 if c % 16 == 0 else 1, encoding=encoding, **options),
            nn.BatchNorm2d(c),
            nn.MaxPool2d(2, 1),
            nn.Flatten(),
            BinaryLinear(c * 4, 70, encoding=encoding),
            nn.BatchNorm1d(70),
            BinaryActivation(encoding),
            BinaryLinear(70, 33, encoding=encoding, surrogate="identity"),
            nn.BatchNorm1d(33),
            nn.Linear(33, 10),
        )
    )


def learned(model):
    """With learned scales of both signs and 0."""
    for module in model.modules():
        if getattr(module, "weight_scale", None) == "learned":
            nn.init.normal_(module.learned_scale)
            module.learned_scale.data[3] = 0
    return model


class Block(nn.Module):
    """A pre-activation block whose float stream meets a binary layer's result, with and without batch norm between."""

    def __init__(self, channels, normed):
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.conv = BinaryConv2d(channels, channels, 3, padding=1)
        self.after = nn.BatchNorm2d(channels) if normed else None

    def forward(self, x):
        y = self.conv(self.bn(x))
        if self.after is not None:
            y = self.after(y)
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
        return self.head(x.view(x.size(0), self.head.in_features))


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


def larq():
    """Strided "same" padding of TensorFlow, of 1 and of values 0, +1."""
    return shake(
        nn.Sequential(
            nn.Conv2d(3, 45, 3), nn.BatchNorm2d(45),
            BinaryConv2d(45, 64, 3, 2, ((1, 1), (0, 1)), bias=False, padding_value=1), nn.BatchNorm2d(64),
            BinaryConv2d(64, 33, 3, 2, ((0, 1), (0, 1)), bias=False), nn.BatchNorm2d(33),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(33, 4),
        )
    )


def audio():
    return shake(
        nn.Sequential(
            nn.Conv1d(2, 45, 5),
            nn.BatchNorm1d(45),
            BinaryConv1d(45, 90, 3, padding=(4, 0), dilation=2),
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
    "vgg_learned_scale": (lambda: learned(vgg((33, 64, 48), weight_scale="learned")), IMAGE),
    "larq": (larq, IMAGE),
    "vgg_unscaled_padding": (lambda: vgg((33, 64, 48), weight_scale=None, padding_value=-1)[:13], IMAGE),
    "residual": (lambda: shake(Residual()), IMAGE),
    "doubled": (lambda: shake(Doubled()), IMAGE),
    "mlp": (mlp, (20,)),
    "mlp_step": (lambda: mlp("step"), (20,)),
    "audio": (audio, (2, 40)),
}


def packed_mlp():
    return binary.pack(mlp(), torch.randn(4, 20))


def packed_vgg():
    return binary.pack(vgg(), torch.randn(2, *IMAGE))


def flip_bit(data, position):
    data = bytearray(data)
    data[position // 8] ^= 1 << position % 8
    return bytes(data)


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(model, state):
    assert model.state_dict().keys() == state.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


# --- exactness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_packed_model_equals_the_model(name, isa):
    build, shape = MODELS[name]
    model = build()
    before = copy.deepcopy(model.state_dict())
    packed = binary.pack(model, torch.randn(2, *shape))
    x = torch.randn(5, *shape)
    with torch.no_grad():
        expected = model(x)
    assert torch.equal(packed(x), expected)
    assert torch.equal(packed(x.to(memory_format=torch.channels_last) if x.dim() == 4 else x), expected)
    assert packed(x[:0]).shape == (0, *expected.shape[1:])
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_values_stay_bits_between_layers():
    layers = packed_vgg().packed_layers()
    kinds = [type(layer) for layer in layers.values()]
    assert kinds.count(PackedBinarize) == 1
    assert kinds.count(PackedUnpack) == 0
    floats = [name for name, layer in layers.items() if isinstance(layer, PackedConv2d) and layer.threshold is None]
    assert floats == ["body.17"], "only the layer in front of the float classifier leaves the packed domain"
    conv = layers["body.3"]
    assert conv.threshold.dtype == torch.int32
    assert 0 < int(conv.flip.sum()) < conv.flip.numel(), "the test needs flipped channels and others"
    pools = [layer for layer in layers.values() if isinstance(layer, PackedMaxPool2d)]
    assert any(pool.invert is not None and bool(pool.invert.any()) for pool in pools), (
        "the test needs pooling in front of a negative batch norm"
    )


def test_shared_value_is_packed_once_and_sums_are_fused():
    packed = binary.pack(shake(Residual()), torch.randn(2, *IMAGE))
    kinds = [type(layer) for layer in packed.packed_layers().values()]
    assert kinds.count(PackedBinarize) == 0, "the pass that makes a value makes its bits"
    assert kinds.count(PackedAvgPool2d) == 1
    assert not any("add" in node.name for node in packed.body.graph.nodes), "sums are steps of passes"


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_values_stay_bits_through_every_flatten(spelling):
    """Behind a float convolution, whose result, unlike a binary one's, lies as x.view() wants it."""
    before = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), BinaryActivation(), nn.MaxPool2d(4))
    model = shake(Flattened(before, spelling, 5 * 4 * 4, nn.Sequential(BinaryLinear(80, 7), nn.BatchNorm1d(7))))
    packed = binary.pack(model, torch.randn(2, *IMAGE))
    x = torch.randn(5, *IMAGE)
    with torch.no_grad():
        assert torch.equal(packed(x), model(x))
    kinds = [type(layer) for layer in packed.packed_layers().values()]
    assert kinds == [PackedBinarize, PackedMaxPool2d, PackedConv2d], "no floats between"


class Scaled(BinaryLinear):
    def forward(self, input):
        return super().forward(input) * 2


@pytest.mark.parametrize(("layer", "shape", "message"), [
    (BinaryLinear(20, 6), (3, 2, 5, 20), r"1 \(BinaryLinear\) stays as it is: its result is \(2, 3, 2, 5, 6\)"),
    (Scaled(20, 6), (20,), r"1 \(Scaled\) stays as it is: its class or a hook changes what the layer does"),
])
def test_what_is_not_packed_is_named(layer, shape, message):
    model = nn.Sequential(nn.LayerNorm(20), layer, nn.Flatten(), BinaryLinear(layer(torch.ones(1, *shape)).numel(), 4))
    x = torch.randn(2, *shape)
    with pytest.warns(UserWarning, match=f"pack: {message}") as record:
        packed = binary.pack(model, x)
    assert record[0].filename == __file__
    assert torch.equal(packed(x), model(x))
    assert [type(layer) for layer in packed.packed_layers().values()] == [PackedBinarize, PackedConv2d]

class Functions(nn.Module):
    """Binary layers as functions, with a scale by an expression of the weight, a parameter, or a number."""

    def __init__(self, second="constant"):
        super().__init__()
        self.stem, self.bn1, self.bn2 = nn.Conv2d(3, 45, 3), nn.BatchNorm2d(45), nn.BatchNorm2d(64)
        self.weight, self.bias = nn.Parameter(torch.randn(64, 45, 3, 3)), nn.Parameter(torch.randn(64))
        self.register_buffer("grouped", torch.randn(32, 32, 2, 3))
        self.alpha, self.bn3 = nn.Parameter(torch.randn(32)), nn.BatchNorm1d(32)
        self.matrix, self.second = nn.Parameter(torch.randn(10, 32)), second

    def forward(self, x):
        x = self.bn1(self.stem(x))
        scale = self.weight.abs().mean((1, 2, 3)).log2().round().exp2()
        x = binary.conv2d(x, self.weight, stride=2, padding=((0, 1), 1), scale=scale, bias=self.bias)
        x = F.hardtanh(self.bn2(x))
        alpha = self.alpha if self.second == "constant" else self.alpha + x.mean()
        x = binary.conv2d(x, self.grouped, groups=2, dilation=(2, 1), padding_value=1, padding=1, scale=alpha)
        return binary.linear(self.bn3(x.flatten(2).amax(2)), self.matrix, scale=0.25)


def test_functions_pack_as_layers():
    model, x = shake(Functions()), torch.randn(3, *IMAGE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        packed = binary.pack(model, x)
    other = torch.randn(5, *IMAGE)
    assert torch.equal(packed(other), model(other))
    assert [type(layer) for layer in packed.packed_layers().values()].count(PackedConv2d) == 3
    assert all(not isinstance(module, BinaryConv2d) for module in model.modules()), "the model stays as it is"


def test_functions_of_one_dimension_pack():
    class Audio(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bn = nn.Parameter(torch.randn(40, 8, 3)), nn.BatchNorm1d(40)

        def forward(self, x):
            y = binary.conv1d(x, self.weight, stride=2, padding=(2, 0), dilation=2, groups=2, bias=self.bn.bias)
            return binary.linear(self.bn(y).flatten(1), self.weight.reshape(24, 40).repeat(1, 4))

    model = shake(Audio())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        packed = binary.pack(model, torch.randn(2, 16, 9))
    x = torch.randn(3, 16, 9)
    assert torch.equal(packed(x), model(x))
    assert [type(layer) for layer in packed.packed_layers().values()].count(PackedConv2d) == 2


def test_functions_that_no_layer_does_stay():
    model, x = shake(Functions("varying")), torch.randn(3, *IMAGE)
    with pytest.warns(UserWarning, match=r"conv2d_1 \(conv2d\) stays as it is: its scale is not constant"):
        packed = binary.pack(model, x)
    torch.testing.assert_close(packed(x), model(x))


def test_layers_of_one_image_stay():
    head = nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (1, -1)), BinaryLinear(8 * 4, 4))
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), BinaryConv2d(8, 8, 3), *head), torch.randn(3, 6, 6)
    with pytest.warns(UserWarning, match=r"pack: 1 \(BinaryConv2d\) stays as it is: its result is \(8, 2, 2\)"):
        packed = binary.pack(model, x)
    assert torch.equal(packed(x), model(x))


@pytest.mark.parametrize("activation", [BinaryActivation(), nn.ReLU()])
def test_volumes_in_front_of_a_flatten(activation):
    model = shake(nn.Sequential(nn.Conv3d(2, 3, 3), activation, nn.MaxPool3d(2), nn.Flatten(), BinaryLinear(3, 4)))
    x = torch.randn(2, 2, 4, 4, 4)
    assert torch.equal(binary.pack(model, x)(x), model(x))


def test_one_accumulator_meets_two_thresholds():
    packed = binary.pack(shake(Doubled()), torch.randn(2, *IMAGE)).packed_layers()
    assert packed["body.conv1"].threshold.shape == (2, 45)
    assert packed["body.conv2"].threshold.shape == (2, 33)


@pytest.mark.parametrize("gamma", [2.0, -2.0, 0.0])
@pytest.mark.parametrize("beta", [0.0, 0.3, -0.3])
@pytest.mark.parametrize("encoding", ["sign", "step"])
def test_every_accumulator_value_meets_its_threshold(gamma, beta, encoding):
    """All accumulators of 8 input bits, where the batch norm is exactly at its threshold for some."""
    model = nn.Sequential(
        BinaryLinear(8, 16, bias=False, encoding=encoding), nn.BatchNorm1d(16), BinaryActivation(encoding)
    ).eval()
    nn.init.constant_(model[1].weight, gamma)
    nn.init.constant_(model[1].bias, beta)
    model[1].running_mean.copy_(torch.linspace(-4, 4, 16) * model[0].scale())
    x = torch.tensor([[(value >> bit & 1) * 2.0 - 1 for bit in range(8)] for value in range(256)])
    packed = binary.pack(model, x)
    with torch.no_grad():
        assert torch.equal(packed(x), model(x))


def test_instruction_set_may_change_after_packing():
    packed = packed_vgg()
    x = torch.randn(2, *IMAGE)
    expected, before = packed(x), _native.active_isa()
    try:
        for level in _native.available_isas():
            _native.select_isa(level)
            assert torch.equal(packed(x), expected), level
    finally:
        _native.select_isa(before)


def test_trained_network_on_digits():
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    images = torch.tensor(images / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    labels = torch.tensor(labels)
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        BinaryConv2d(32, 64, 3, padding=1),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(64),
        BinaryConv2d(64, 64, 3, padding=1),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(64),
        nn.Flatten(),
        BinaryLinear(256, 64),
        nn.BatchNorm1d(64),
        nn.Linear(64, 10),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(4):
        for index in torch.randperm(1400).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[index]), labels[index]).backward()
            optimizer.step()
    model.eval()
    packed = binary.pack(model, images[:4])
    with torch.no_grad():
        expected = model(images[1400:])
    assert torch.equal(packed(images[1400:]), expected)
    assert (expected.argmax(1) == labels[1400:]).float().mean() > 0.85


# --- errors -----------------------------------------------------------------------------------------------------------


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = BinaryLinear(4, 4)

    def forward(self, x):
        return self.layer(x) if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("build", "example", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 4)), torch.zeros(1, 4), "no BinaryConv2d"),
        (Untraceable, torch.zeros(1, 4), "cannot trace"),
        (lambda: nn.Sequential(BinaryLinear(4, 4)), torch.zeros(1, 5), r"does not run on the example \(1, 5\)"),
        (lambda: nn.Sequential(BinaryLinear(4, 4, device="meta")), torch.zeros(1, 4), "must have values"),
        (lambda: nn.Sequential(nn.ReLU(), Scaled(4, 4)), torch.zeros(1, 4), r"nothing could be packed; 1 \(Scaled\)"),
        (lambda: nn.Sequential(BinaryLinear(4, 4)), (torch.zeros(1, 4),) * 2, "does not fit the model's forward"),
    ],
)
def test_pack_refuses(build, example, message):
    with pytest.raises(ValueError, match=message) as info:
        binary.pack(build(), example)
    assert "\n" not in str(info.value)


def test_pack_names_the_layer_that_differs(monkeypatch):
    # The package's attribute of this name is the function.
    module = importlib.import_module("lowbit_ext.binary.packing.packer")
    fold = module.fold_integers

    def wrong(*arguments):
        result = fold(*arguments)
        result.threshold += 3
        return result

    monkeypatch.setattr(module, "fold_integers", wrong)
    with pytest.raises(ValueError, match=r"packed bits of 1 \(.*\) differ"):
        binary.pack(nn.Sequential(BinaryLinear(32, 32), nn.BatchNorm1d(32), BinaryLinear(32, 4)), torch.randn(9, 32))


def test_training_mode_is_packed_as_evaluation():
    model = mlp().train()
    packed = binary.pack(model, torch.randn(4, 20))
    x = torch.randn(6, 20)
    assert model.training
    assert not packed.train().training
    assert torch.equal(packed(x), model.eval()(x))


def test_packed_layers_refuse_other_inputs():
    with pytest.raises(ValueError, match="pixels"):
        packed_vgg()(torch.randn(1, 3, 33, 16))
    with pytest.raises(ValueError, match="must have 7 channels"):
        binary.pack(nn.Sequential(BinaryLinear(7, 4)), torch.randn(1, 7))(torch.randn(1, 8))


# --- copies, states and files -----------------------------------------------------------------------------------------


def through_torch_save(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_torch_save])
def test_copies_are_independent_and_equal(clone):
    packed = packed_vgg()
    x = torch.randn(2, *IMAGE)
    expected = packed(x)
    other = clone(packed)
    for buffer in packed.buffers():
        buffer.zero_()
    assert torch.equal(other(x), expected)


def test_casts_leave_packed_layers_alone():
    packed = packed_mlp()
    before = {name: buffer.dtype for name, buffer in packed.named_buffers() if name != "checksum"}
    packed.bfloat16().float()
    after = {name: buffer.dtype for name, buffer in packed.named_buffers() if name != "checksum"}
    assert after == before
    packed.load_state_dict(packed.state_dict())


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_of_another_training(assign):
    source, target = packed_vgg(), binary.pack(vgg(), torch.randn(2, *IMAGE))
    x = torch.randn(2, *IMAGE)
    assert not torch.equal(source(x), target(x))
    target.load_state_dict(source.state_dict(), assign=assign)
    assert torch.equal(source(x), target(x))


def test_state_dict_inside_another_module():
    source, target = (nn.Sequential(nn.Identity(), packed_mlp()) for _ in range(2))
    target.load_state_dict(source.state_dict())
    x = torch.randn(3, 20)
    assert torch.equal(source(x), target(x))


def damage_word(state):
    state["body.1.words"].view(-1)[3] ^= 1 << 17


def damage_threshold(state):
    state["body.3.threshold"].view(-1)[0] += 1


def damage_flip(state):
    state["body.3.flip"].view(-1)[5] ^= True


def damage_checksum(state):
    state["checksum"] += 1


def damage_shape(state):
    state["body.0.weight"] = state["body.0.weight"][:, :-1]


def damage_dtype(state):
    state["body.1.words"] = state["body.1.words"].to(torch.int32)


def damage_by_removal(state):
    del state["body.3.words"]


def damage_by_addition(state):
    state["body.99.words"] = torch.zeros(1)


@pytest.mark.parametrize(
    "damage",
    [
        damage_word, damage_threshold, damage_flip, damage_checksum, damage_shape, damage_dtype, damage_by_removal,
        damage_by_addition,
    ],
)
def test_damaged_state_is_refused_and_nothing_written(damage):
    source, target = packed_mlp(), packed_mlp()
    state, before = snapshot(source), snapshot(target)
    damage(state)
    with pytest.raises(ValueError, match="packed model: "):
        target.load_state_dict(state)
    assert_same_state(target, before)


def test_file_round_trip(tmp_path):
    pytest.importorskip("safetensors")
    source, target = packed_vgg(), packed_vgg()
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"older file")
    binary.save(source, path)
    assert binary.load(target, path) is target
    x = torch.randn(2, *IMAGE)
    assert torch.equal(source(x), target(x))
    assert [file.name for file in tmp_path.iterdir()] == [path.name], "no temporary file may stay"


def test_saved_file_has_the_permissions_of_any_other(tmp_path):
    pytest.importorskip("safetensors")
    model, path = packed_mlp(), tmp_path / "model.safetensors"
    before = os.umask(0o027)
    try:
        binary.save(model, path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o640, "a new file: what the umask leaves of 666"
        path.chmod(0o604)
        binary.save(model, path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o604, "a replaced file: its own"
    finally:
        os.umask(before)


def test_failed_save_leaves_the_older_file_alone(tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"older file")

    def full_disk(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        binary.save(packed_mlp(), path)
    assert path.read_bytes() == b"older file"
    assert [file.name for file in tmp_path.iterdir()] == [path.name], "no temporary file may stay"


def test_damaged_files_are_refused_and_nothing_written(tmp_path):
    pytest.importorskip("safetensors")
    path, target = tmp_path / "model.safetensors", packed_mlp()
    binary.save(packed_mlp(), path)
    whole, before = path.read_bytes(), snapshot(target)
    bits = torch.randint(len(whole) * 8, (200,)).tolist() + list(range(0, 64 * 8, 5))
    damaged = [flip_bit(whole, bit) for bit in bits] + [whole[:size] for size in (0, 7, 8, 100, len(whole) - 1)]
    damaged += [whole + b"x", b"not a model"]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"load: |packed model: "):
            binary.load(target, path)
    assert_same_state(target, before)


def test_foreign_files_are_refused(tmp_path):
    torch_files = pytest.importorskip("safetensors.torch")
    path, target = tmp_path / "model.safetensors", packed_mlp()
    before = snapshot(target)
    torch_files.save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="holds no packed model"):
        binary.load(target, path)
    binary.save(packed_vgg(), path)
    with pytest.raises(ValueError, match="packed model: "):
        binary.load(target, path)
    # The same tensors, another encoding.
    binary.save(binary.pack(mlp("step"), torch.randn(4, 20)), path)
    with pytest.raises(ValueError, match="another architecture"):
        binary.load(target, path)
    assert_same_state(target, before)
    with pytest.raises(FileNotFoundError):
        binary.load(target, tmp_path / "absent.safetensors")
    with pytest.raises(TypeError, match="made by pack"):
        binary.save(nn.Linear(2, 2), path)


# --- compilers --------------------------------------------------------------------------------------------------------


def test_compiles_without_graph_breaks():
    packed = packed_vgg()
    compiled = torch.compile(packed, fullgraph=True)
    for batch in (2, 5):
        x = torch.randn(batch, *IMAGE)
        torch.testing.assert_close(compiled(x), packed(x))


def test_exports():
    packed = packed_vgg()
    x = torch.randn(2, *IMAGE)
    program = torch.export.export(packed, (x,))
    assert torch.equal(program.module()(x), packed(x))


_TRAINING_CODE = """
import torch
from torch import nn
from lowbit_ext import binary

class OwnBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(64), binary.BinaryConv2d(64, 64, 3, padding=1)

    def forward(self, x):
        return x + self.conv(self.norm(x))

torch.manual_seed(0)
x = torch.randn(2, 64, 7, 7)
packed = binary.pack(nn.Sequential(OwnBlock(), OwnBlock()).eval(), x)
torch.save(packed, "packed.pt")
torch.save((x, packed(x)), "example.pt")
"""


def test_a_saved_model_needs_no_training_code(tmp_path):
    subprocess.run([sys.executable, "-c", _TRAINING_CODE], cwd=tmp_path, check=True, timeout=120)
    packed = torch.load(tmp_path / "packed.pt", weights_only=False)
    x, expected = torch.load(tmp_path / "example.pt")
    assert torch.equal(packed(x), expected)
