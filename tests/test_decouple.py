"""decouple(): the same function to float64 rounding, free halves, copies and states, refusals; packed in integers."""

import copy
import importlib
import io

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from flattens import SPELLINGS, Flattened
from lowbit_ext import binary, duo, models
from lowbit_ext.binary import BinaryConv2d, BinaryLinear
from lowbit_ext.binary.packing.packed_layers import PackedBinarize, PackedConv2d, PackedMaxPool2d, PackedUnpack
from lowbit_ext.duo import CoupledConv2d, CoupledLinear, StepActivation, TernaryActivation, decouple


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(20260101)


def shake(model):
    """Batch norms with positive, negative and zero scales, as a trained network may have; evaluation mode."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.affine:
                nn.init.normal_(module.weight)
                module.weight.data[::7] = 0
                nn.init.normal_(module.bias)
            if module.track_running_stats:
                module.running_mean.normal_()
                module.running_var.uniform_(0.1, 3)
    return model.eval()


WIDTHS = {"odd": (5, 7, 9, 6, 13, 11, 8), "words": (64, 33, 32, 65, 64, 70, 31)}


def families(widths):
    options = {"num_classes": 10, "in_channels": 1}
    shortcuts = {"standard": "imagenet", "every_conv": "cifar"}
    residual = {
        f"resnet18 {name}": lambda name=name, stem=stem: models.resnet18(
            "coupled", widths=widths[:5], stem=stem, shortcuts=name, **options
        )
        for name, stem in shortcuts.items()
    }
    return {
        "vgg7": lambda: models.vgg7("coupled", widths=widths[:6], image_size=28, **options),
        "alexnet": lambda: models.alexnet("coupled", widths=widths, image_size=28, dropout=0.0, **options),
        "alexnet dropout": lambda: models.alexnet("coupled", widths=widths, image_size=28, **options),
        # The same widths throughout: no projection round the last convolution.
        "resnet18 even": lambda: models.resnet18("coupled", widths=(widths[0],) * 5, stem="cifar", **options),
        **residual,
    }


NAMES = list(families(WIDTHS["odd"]))
IMAGE = (1, 28, 28)


def assert_same(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12 * max(1.0, float(expected.detach().abs().max())))


# --- the map ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "width"), [*((name, "odd") for name in NAMES), ("vgg7", "words")])
def test_decoupled_equals_coupled(name, width):
    coupled = shake(families(WIDTHS[width])[name]()).double()
    state = copy.deepcopy(coupled.state_dict())
    x = torch.randn(4, *IMAGE, dtype=torch.float64)
    decoupled = decouple(coupled, x)
    with torch.no_grad():
        assert_same(decoupled(x), coupled(x))
        if "dropout" not in name:  # whose draws differ in training
            coupled.train(), decoupled.train()
            assert_same(decoupled(x), coupled(x))
            # The running statistics, of the copies as well.
            coupled.eval(), decoupled.eval()
            assert_same(decoupled(x), coupled(x))
            coupled.load_state_dict(state)
    assert all(torch.equal(value, state[key]) for key, value in coupled.state_dict().items())


def test_identity_at_every_threshold():
    """t(y) = (b(y - 1/4) + b(y + 1/4)) / 2 on both sides of 1/4 and 3/4."""
    model = nn.Sequential(nn.BatchNorm1d(1, eps=0), TernaryActivation(), nn.Linear(1, 1)).double().eval()
    nn.init.ones_(model[2].weight), nn.init.zeros_(model[2].bias)
    tiny = 2.0**-50
    y = torch.tensor([[t + d] for t in (0.0, 0.25, 0.5, 0.75, 1.0) for d in (-tiny, 0.0, tiny)], dtype=torch.float64)
    expected = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2], dtype=torch.float64).reshape(-1, 1) / 2
    decoupled = decouple(model)
    assert torch.equal(decoupled(y), expected)
    assert torch.equal(model(y), expected)


def test_what_becomes_of_each_layer():
    coupled = shake(families(WIDTHS["odd"])["vgg7"]())
    decoupled = decouple(coupled)
    modules = dict(decoupled.named_modules())
    assert [type(modules[name]) for name in ("conv1", "act2", "conv2", "fc5", "act6", "fc7")] == [
        nn.Conv2d, StepActivation, BinaryConv2d, BinaryLinear, nn.ReLU, nn.Linear,
    ]
    conv = modules["conv3"]
    weight = coupled.conv3.weight.detach()
    assert (conv.encoding, conv.surrogate, conv.weight_scale) == ("step", "identity", "layer")
    assert torch.equal(conv.weight, torch.cat([weight, weight], 1) / 2)
    norm, before = modules["bn2"], coupled.bn2
    assert torch.equal(norm.bias, torch.cat([before.bias - 0.25, before.bias + 0.25]))
    for name in ("weight", "running_mean", "running_var"):
        assert torch.equal(getattr(norm, name), getattr(before, name).repeat(2))
    assert modules["bn6"].num_features == coupled.bn6.num_features, "the last batch norm meets a ReLU"
    assert modules["act2"].surrogate == coupled.act2.surrogate


def test_residual_stream_carries_the_shift_once():
    """Only the batch norm where the stream begins is shifted; identity shortcuts carry it on."""
    coupled = shake(families((4, 5, 6, 7, 8))["resnet18 every_conv"]())
    decoupled = dict(decouple(coupled).named_modules())
    shifted = []
    for name, norm in coupled.named_modules():
        if isinstance(norm, nn.BatchNorm2d) and decoupled[name].num_features == 2 * norm.num_features:
            difference = decoupled[name].bias - norm.bias.repeat(2)
            if bool(difference.any()):
                shifted.append(name)
                torch.testing.assert_close(difference.abs(), torch.full_like(difference, 0.25))
    # The stem, then one batch norm for each down-sampling.
    assert shifted == ["stem.bn", "blocks.2.bn1", "blocks.4.bn1", "blocks.6.bn1"]


class Odd(nn.Module):
    """What sequential models do not have: values read twice, functional calls, sums and means of ternary values."""

    def __init__(self, shares=False):
        super().__init__()
        self.stem, self.bn1 = nn.Conv2d(1, 5, 3, bias=False), nn.BatchNorm2d(5, affine=False)
        self.act = TernaryActivation()  # called four times
        self.conv2, self.bn2 = CoupledConv2d(5, 7, 3, padding=1, weight_scale="channel"), nn.BatchNorm2d(7)
        self.conv3, self.bn3 = nn.Conv2d(7, 5, 3, padding=1), nn.BatchNorm2d(5)  # float weights
        self.bn4 = self.bn3 if shares else nn.BatchNorm2d(5)
        self.drop, self.linear = nn.Dropout(0.5), CoupledLinear(5 * 9, 6)
        self.bn5, self.act5 = nn.BatchNorm1d(6), TernaryActivation("identity")
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        first = self.act(F.max_pool2d(self.bn1(self.stem(x)), 2))
        second = self.act(input=self.bn2(self.conv2(first)))
        third = self.bn3(self.conv3(F.avg_pool2d(second, 2, 1, 1)))
        third = F.adaptive_avg_pool2d(third, 3) + F.adaptive_max_pool2d(first, 3)
        fourth = self.act(F.adaptive_avg_pool2d(self.bn4(F.conv2d(second, torch.ones(5, 7, 1, 1).to(x))), 3))
        fourth = self.linear((y := self.drop(fourth)).view(y.size(0), -1))
        fifth = self.act5(self.bn5(fourth))
        return self.head(fifth), fifth, third, second.mean((2, 3))


@pytest.mark.parametrize("training", [False, True])
def test_general_structures(training):
    model = shake(Odd()).double()
    x = torch.randn(4, *IMAGE, dtype=torch.float64)
    decoupled = decouple(model, x)
    assert decoupled.act5.surrogate == "identity"
    assert type(decoupled.linear) is CoupledLinear, "dropout's values are no bits in training"
    assert type(decoupled.conv3) is nn.Conv2d
    model.train(training).drop.eval(), decoupled.train(training).drop.eval()
    for got, expected in zip(decoupled(x), model(x), strict=True):
        assert_same(got, expected)


def flattened(spelling, behind=True):
    """Ternary values, and with `behind` a batch norm's for others, through a flatten to a coupled layer."""
    norm, act = nn.BatchNorm2d(3), TernaryActivation()
    before, front = ([norm], [act]) if behind else ([norm, act], [])
    layers = [*front, CoupledLinear(48, 6), nn.BatchNorm1d(6), TernaryActivation(), CoupledLinear(6, 2)]
    return shake(Flattened(nn.Sequential(nn.Conv2d(1, 3, 3), *before), spelling, 48, nn.Sequential(*layers))).double()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("example", [None, torch.randn(2, 1, 6, 6, dtype=torch.float64)])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_halves_go_through_every_flatten(spelling, example, behind):
    model = flattened(spelling, behind)
    decoupled = decouple(model, example)
    layers = [module for module in decoupled.modules() if isinstance(module, nn.Linear)]
    assert [(type(layer), layer.in_features) for layer in layers] == [(BinaryLinear, 96), (BinaryLinear, 12)]
    for batch in (1, 4):
        x = torch.randn(batch, 1, 6, 6, dtype=torch.float64)
        with torch.no_grad():
            assert_same(decoupled(x), model(x))
    targets = [str(node.target) for node in decoupled.graph.nodes]
    assert "mean" not in targets, "no value is put together again"
    assert "mul" not in targets, "sizes that nobody reads are not computed"


class Reshaped(nn.Module):
    """A coupled layer behind a reshape of ternary values (N, 3, 4, 4)."""

    def __init__(self, reshape, features):
        super().__init__()
        self.norm, self.act, self.reshape, self.fc = nn.BatchNorm2d(3), TernaryActivation(), reshape, None
        self.fc = CoupledLinear(features, 2)

    def forward(self, x):
        return self.fc(self.reshape(self.act(self.norm(x))))


@pytest.mark.parametrize(("reshape", "features", "node"), [
    (lambda x: x.permute(0, 2, 3, 1).flatten(1), 48, "permute"), (lambda x: x[:, :, 0, 0], 3, "getitem"),
    (lambda x: torch.cat([x, x], 1).flatten(1), 96, "cat"), (lambda x: x.view(-1, x.size(-1)), 4, "view"),
])
def test_what_stays_coupled_is_named(reshape, features, node):
    model, x = Reshaped(reshape, features).eval(), torch.randn(2, 3, 4, 4)
    message = rf"decouple: fc \(CoupledLinear\) stays coupled: {node} \(\w+\) may mix a ternary activation's channels"
    for example in (None, x):
        with pytest.warns(UserWarning, match=message) as record:
            decoupled = decouple(model, example)
        assert record[0].filename == __file__
        assert type(decoupled.fc) is CoupledLinear
        with torch.no_grad():
            torch.testing.assert_close(decoupled(x), model(x))


def test_a_coupled_layer_of_other_values_is_not_named(recwarn):
    decouple(nn.Sequential(CoupledLinear(4, 4), nn.BatchNorm1d(4), TernaryActivation(), nn.Linear(4, 2)))
    assert not recwarn.list


def test_views_that_are_no_flattens_are_told_apart_by_the_example():
    """Rows of four pixels. Without the example the spelling stands for a flatten: an error, no wrong number."""
    model, x = Reshaped(lambda x: x.view(-1, 4), 4).eval(), torch.randn(2, 3, 4, 4)
    with pytest.warns(UserWarning, match="fc .* stays coupled"):
        decoupled = decouple(model, x)
    with torch.no_grad():
        torch.testing.assert_close(decoupled(x), model(x))
    with pytest.raises(RuntimeError, match=r"shape '\[2, 8\]' is invalid for input of size 192"):
        decouple(model)(x)


def test_a_shared_module_must_play_one_part():
    with pytest.raises(ValueError, match=r"bn3 \(BatchNorm2d\) is called twice, in places that need different"):
        decouple(Odd(shares=True))


@st.composite
def sequential_models(draw):
    """Convolutions and linear layers with pooling, dropout, identities, flattening, batch norm in any valid order."""
    channels, size = draw(st.integers(1, 4)), draw(st.integers(6, 12))
    shape = (channels, size, size)
    layers = []
    values = False  # whether the last value is a ternary activation's
    for _ in range(draw(st.integers(1, 4))):
        width = draw(st.integers(1, 9))
        if len(shape) == 3 and draw(st.booleans()):
            layers.append(nn.Flatten())
            shape = (shape[0] * shape[1] * shape[2],)
        kind = draw(st.sampled_from(["coupled", "float"] if values else ["float"]))
        bias = draw(st.booleans())
        scale = {"weight_scale": draw(st.sampled_from(["layer", "channel"]))} if kind == "coupled" else {}
        if len(shape) == 1:
            layers.append((CoupledLinear if kind == "coupled" else nn.Linear)(shape[0], width, bias=bias, **scale))
            shape = (width,)
        else:
            conv = CoupledConv2d if kind == "coupled" else nn.Conv2d
            stride, dilation = draw(st.integers(1, 2)), draw(st.integers(1, 2))
            layers.append(conv(shape[0], width, 3, stride, 2, dilation, bias=bias, **scale))
            with torch.no_grad():
                shape = tuple(layers[-1](torch.zeros(1, *shape)).shape[1:])
        pools = [lambda: nn.MaxPool2d(2, ceil_mode=True), lambda: nn.AvgPool2d(2, ceil_mode=True), nn.Identity]
        spots = [draw(st.none() | st.sampled_from(pools)) if len(shape) == 3 else None for _ in range(3)]
        norm = (nn.BatchNorm2d if len(shape) == 3 else nn.BatchNorm1d)(width, affine=draw(st.booleans()))
        for spot, module in zip(spots, (norm, TernaryActivation(), nn.Dropout(0.3)), strict=True):
            layers += [spot()] if spot is not None else []
            layers.append(module)
            if len(shape) == 3:
                with torch.no_grad():
                    probe = nn.Sequential(*layers).eval()(torch.zeros(1, channels, size, size))
                shape = tuple(probe.shape[1:])
        values = True
    model = nn.Sequential(*layers)
    if draw(st.booleans()):
        model.append(nn.Linear(shape[-1], 3) if len(shape) == 1 else nn.Conv2d(shape[0], 3, 1))
    return model, (channels, size, size)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(sequential_models())
def test_any_sequential_model(case):
    model, shape = case
    shake(model).double()
    x = torch.randn(3, *shape, dtype=torch.float64)
    decoupled = decouple(model, x)
    with torch.no_grad():
        assert_same(decoupled(x), model(x))


# --- what one does with the result ------------------------------------------------------------------------------------


def train(model, steps=3):
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(16, *IMAGE)), torch.arange(16) % 10).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("name", NAMES)
def test_halves_are_free_parameters(name):
    decoupled = decouple(families(WIDTHS["odd"])[name]())
    assert decoupled.training
    names = [key for key, module in decoupled.named_modules() if isinstance(module, (BinaryConv2d, BinaryLinear))]
    before = {key: parameter.clone() for key, parameter in decoupled.named_parameters()}
    train(decoupled)
    for key, parameter in decoupled.named_parameters():
        assert not torch.equal(parameter, before[key]), key
    for key in names:
        first, second = decoupled.get_submodule(key).weight.chunk(2, 1)
        assert not torch.equal(first, second), key


def through_torch_save(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def through_state_dict(model):
    other = decouple(families(WIDTHS["odd"])["resnet18 standard"]())
    other.load_state_dict(model.state_dict())
    return other.eval()


@pytest.mark.parametrize("clone", [copy.deepcopy, through_torch_save, through_state_dict])
def test_copies_are_equal_and_independent(clone):
    model = train(decouple(families(WIDTHS["odd"])["resnet18 standard"]())).eval()
    x = torch.randn(2, *IMAGE)
    with torch.no_grad():
        expected = model(x)
        other = clone(model)
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(other(x), expected)


def test_state_dict_keeps_the_names():
    coupled = families(WIDTHS["odd"])["alexnet dropout"]()
    assert list(decouple(coupled).state_dict()) == list(coupled.state_dict())


def test_mode_dtype_and_frozen_parameters_are_kept():
    coupled = shake(families(WIDTHS["odd"])["vgg7"]()).bfloat16()
    coupled.act3.train()
    coupled.conv3.weight.requires_grad_(False)
    coupled.bn3.bias.requires_grad_(False)
    decoupled = decouple(coupled)
    assert {key: module.training for key, module in decoupled.named_modules()} == {
        key: module.training for key, module in coupled.named_modules()
    }
    assert {parameter.dtype for parameter in decoupled.parameters()} == {torch.bfloat16}
    frozen = [key for key, parameter in decoupled.named_parameters() if not parameter.requires_grad]
    assert frozen == ["conv3.weight", "bn3.bias"]


def test_decoupled_model_compiles():
    model = decouple(shake(families(WIDTHS["odd"])["resnet18 standard"]()))
    x = torch.randn(2, *IMAGE)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


# --- packed -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "width"), [*((name, "odd") for name in NAMES), ("vgg7", "words")])
def test_packed_equals_decoupled(name, width):
    decoupled = decouple(families(WIDTHS[width])[name]())
    # Statistics of real activations, so that bits are neither all 0 nor all 1.
    with torch.no_grad():
        for _ in range(3):
            decoupled.train()(torch.randn(8, *IMAGE))
    decoupled.eval()
    packed = binary.pack(decoupled, torch.randn(2, *IMAGE))
    x = torch.randn(5, *IMAGE)
    with torch.no_grad():
        expected = decoupled(x)
    got = packed(x)
    if "dropout" in name:  # its linear layers take floats, whose sums round
        torch.testing.assert_close(got, expected)
    else:
        assert torch.equal(got, expected)
    assert torch.equal(got.argmax(1), expected.argmax(1))


def test_packed_equals_decoupled_at_every_level(isa):
    decoupled = decouple(shake(families(WIDTHS["odd"])["vgg7"]()))
    x = torch.randn(5, *IMAGE)
    with torch.no_grad():
        assert torch.equal(binary.pack(decoupled, x)(x), decoupled(x))


@pytest.mark.parametrize("name", ["vgg7", "alexnet", "alexnet dropout"])
def test_one_accumulator_two_thresholds_two_bits(name):
    widths = WIDTHS["odd"]
    packed = binary.pack(decouple(shake(families(widths)[name]())), torch.randn(2, *IMAGE))
    layers = list(packed.packed_layers().values())
    convolutions = [layer for layer in layers if isinstance(layer, PackedConv2d)]
    hidden = widths[1 : 6 if name == "vgg7" else 7]
    assert [layer.shape[0] for layer in convolutions] == list(hidden)
    assert all(layer.threshold.shape == (2, layer.shape[0]) for layer in convolutions[:-1])
    assert convolutions[-1].threshold is None, "the last one meets a float classifier"
    first = [layer for layer in layers if isinstance(layer, PackedBinarize)]
    assert [layer.threshold.shape for layer in first] == [(2, widths[0])]
    kinds = {type(layer) for layer in layers} - {PackedConv2d, PackedBinarize, PackedMaxPool2d}
    assert kinds == set(), "the body stays packed"
    assert not any(node.op == "call_function" for node in packed.body.graph.nodes), "nothing is copied"
    assert PackedUnpack not in {type(layer) for layer in layers}


def test_residual_blocks_stay_packed_inside():
    packed = binary.pack(decouple(shake(families(WIDTHS["odd"])["resnet18 standard"]())), torch.randn(2, *IMAGE))
    layers = packed.packed_layers()
    for block in range(8):
        inner = layers[f"body.blocks.{block}.conv1"]
        assert inner.threshold.shape == (2, inner.shape[0])
        assert layers[f"body.blocks.{block}.conv2"].threshold is None, "its result joins the float stream"
    assert not any(isinstance(layer, PackedBinarize) for layer in layers.values()), "passes make the stream's bits"


def test_packed_state_of_another_training():
    build = families(WIDTHS["words"])["vgg7"]
    x = torch.randn(2, *IMAGE)
    source, target = (binary.pack(decouple(shake(build())), x) for _ in range(2))
    assert not torch.equal(source(x), target(x))
    target.load_state_dict(source.state_dict())
    assert torch.equal(source(x), target(x))


# --- refusals ---------------------------------------------------------------------------------------------------------


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.act = TernaryActivation()

    def forward(self, x):
        return self.act(x) if x.sum() > 0 else x


class FunctionalActivation(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.act, self.fc = nn.BatchNorm1d(4), TernaryActivation(), CoupledLinear(4, 4)

    def forward(self, x):
        return self.fc(duo.ternary_activation(self.bn(x)))


class FunctionalDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.act = nn.BatchNorm1d(4), TernaryActivation()

    def forward(self, x):
        return F.dropout(self.act(self.bn(x)), 0.5, self.training)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 4)), "the model has no TernaryActivation"),
        (Branching, "torch.fx cannot trace the model"),
        (FunctionalActivation, "use a TernaryActivation module|TernaryActivation as modules"),
        (FunctionalDropout, r"dropout \(dropout\) would keep the mode it is traced in"),
        (lambda: nn.Sequential(nn.Linear(4, 4), TernaryActivation()),
         r"1 \(TernaryActivation\) must read a batch norm.*it reads 0 \(Linear\)"),
        (lambda: nn.Sequential(nn.BatchNorm1d(4), nn.ReLU(), TernaryActivation()), r"it reads 1 \(ReLU\)"),
        (lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.1), TernaryActivation()), r"it reads 1 \(Dropout\)"),
        (lambda: nn.Sequential(nn.BatchNorm2d(4), nn.AvgPool2d(3, 1, 1), TernaryActivation()),
         r"it reads 1 \(AvgPool2d\)"),
        (lambda: nn.Sequential(nn.BatchNorm2d(4), TernaryActivation(), CoupledConv2d(4, 4, 1, groups=2)),
         r"2 \(CoupledConv2d\) reads a ternary activation in groups"),
        (lambda: nn.Sequential(nn.BatchNorm1d(4), TernaryActivation(), CoupledLinear(4, 4, weight_scale=None)),
         r"2 \(CoupledLinear\) has weight_scale=None"),
    ],
)
def test_refused_structures(build, message):
    with pytest.raises(ValueError, match=f"decouple: .*{message}") as info:
        decouple(build())
    assert "\n" not in str(info.value)


def test_refused_arguments():
    with pytest.raises(TypeError, match=r"decouple: model must be a torch\.nn\.Module, got function"):
        decouple(F.relu)
    model = families(WIDTHS["odd"])["vgg7"]()
    with pytest.raises(ValueError, match=r"decouple: the model does not run on the example \(1, 3, 28, 28\)"):
        decouple(model, torch.zeros(1, 3, 28, 28))


@pytest.mark.parametrize(
    ("function", "layer"),
    [("_twofold_reader", r"conv2 \(CoupledConv2d"), ("_twofold_batch_norm", r"bn1 \(BatchNorm2d")],
)
def test_names_the_first_layer_that_differs(monkeypatch, function, layer):
    # The package's attribute of this name is the function.
    module = importlib.import_module("lowbit_ext.duo._decouple")
    make = getattr(module, function)

    def wrong(*arguments, **options):
        made = make(*arguments, **options)
        made.weight.data *= 1.001
        return made

    monkeypatch.setattr(module, function, wrong)
    model = shake(families(WIDTHS["odd"])["vgg7"]())
    with pytest.raises(ValueError, match=rf"decouple: the decoupled {layer}.* differs from the coupled one"):
        decouple(model, torch.randn(2, *IMAGE))


def test_wrong_structures_are_caught_by_the_example():
    """A linear layer over the last of three axes: the halves lie along another."""
    model = nn.Sequential(nn.BatchNorm1d(4), TernaryActivation(), nn.Linear(6, 4)).eval()
    with pytest.raises(ValueError, match="decouple: the decoupled model does not run on the example"):
        decouple(model, torch.randn(2, 4, 6))
