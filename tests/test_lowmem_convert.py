"""lowmem.convert: the same function to the bit for networks of every structure, states and copies, what is left."""

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from conftest import assert_as_good
from flattens import SPELLINGS, Flattened
from lowbit_ext import lowmem, models
from lowbit_ext.binary import BinaryActivation, BinaryConv1d, BinaryLinear
from lowbit_ext.duo import CoupledConv2d, TernaryActivation
from lowbit_ext.lowmem import LowMemBlock, convert, ledger, report
from lowmem_networks import NETWORKS, Branching, Functional, joined, make, relative, rounding_of_inputs, step


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(20260101)


def left(model):
    return {entry.name: entry.how for entry in report(model) if not entry.converted}


def converted(model):
    return {entry.name: entry.how for entry in report(model) if entry.converted}


def assert_same_state(got, expected):
    got, expected = got.state_dict(), expected.state_dict()
    assert list(got) == list(expected)
    assert all(torch.equal(got[name], value) for name, value in expected.items())


# --- the same function ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_is_the_same_function(name):
    """Results and buffers to the bit in both modes; gradients close with codes that are fine and wide."""
    plain, shape = make(name)
    model = convert(copy.deepcopy(plain), 8, 12.0)
    for training in (True, True, False):
        plain.train(training), model.train(training)
        got, expected = step(model, shape), step(plain, shape)
        assert torch.equal(got[0], expected[0])
        assert got[2].keys() == expected[2].keys()
        assert relative(joined(got), joined(expected)) < 0.1
        assert_same_state(model, plain)
    with torch.no_grad():
        assert str(model(torch.ones(shape))) == str(plain(torch.ones(shape)))


@pytest.mark.parametrize("name", NETWORKS)
def test_names_and_states_are_the_models(name):
    plain, shape = make(name)
    model = convert(plain)
    for names in ("named_parameters", "named_buffers", "named_modules"):
        assert [key for key, _ in getattr(model, names)()] == [key for key, _ in getattr(plain, names)()]
    assert all(a is b for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    other, _ = make(name)
    step(other, shape)
    copied = copy.deepcopy(model)
    copied.load_state_dict(other.state_dict())
    assert_same_state(copied, other)
    plain.load_state_dict(copied.state_dict())
    assert_same_state(model, other)


@pytest.mark.parametrize("name", NETWORKS)
def test_copies_and_pickles(name):
    plain, shape = make(name)
    model = convert(copy.deepcopy(plain))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    expected = step(copy.deepcopy(model), shape)
    step(plain, shape)
    for copied in (copy.deepcopy(model), torch.load(file, weights_only=False), copy.copy(model)):
        assert report(copied) == report(model)
        assert all(map(torch.equal, joined(step(copied, shape)), joined(expected)))
        copied.eval(), plain.eval()
        assert torch.equal(step(copied, shape)[0], step(plain, shape)[0]), "the mode is asked at each call"
        copied.train()


@pytest.mark.parametrize("name", NETWORKS)
def test_leaves_the_model_alone(name):
    plain, _ = make(name)
    before = [(key, type(module), list(vars(module))) for key, module in plain.named_modules()]
    next(plain.modules()).training = False
    convert(plain)
    assert [(key, type(module), list(vars(module))) for key, module in plain.named_modules()] == before
    assert not plain.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["preact", "vgg", "3d", "mlp"])
def test_narrow_types(name, dtype):
    plain, shape = make(name)
    plain = plain.to(dtype)
    model = convert(copy.deepcopy(plain), 8)
    got, expected = step(model, shape, dtype=dtype), step(plain, shape, dtype=dtype)
    assert torch.equal(got[0], expected[0])
    assert all(grad.dtype == dtype for grad in got[2].values())
    # Beside the codes, the rounding of 8 or 11 bits through some ten layers.
    assert relative(joined(got), joined(expected)) < rounding_of_inputs(4)


@pytest.mark.parametrize("name", ["preact", "post", "vgg"])
def test_channels_last(name):
    plain, shape = make(name)
    plain = plain.to(memory_format=torch.channels_last)
    model = convert(copy.deepcopy(plain), 8, 12.0)
    x = torch.randn(shape).expand(-1, 1, -1, -1).to(memory_format=torch.channels_last)
    for network in (model, plain):
        network.zero_grad()
        torch.manual_seed(2)  # dropout
        network(x).square().mean().backward()
    exact = {key: p.grad for key, p in plain.named_parameters()}
    for key, p in model.named_parameters():
        assert p.grad.is_contiguous(memory_format=torch.channels_last) == exact[key].is_contiguous(
            memory_format=torch.channels_last
        )
    found, exact = (torch.cat([p.grad.flatten() for p in network.parameters()]) for network in (model, plain))
    assert relative(found, exact) < 0.1


def test_empty_batch():
    for name in ("preact", "vgg", "mlp"):
        plain, shape = make(name)
        model = convert(copy.deepcopy(plain))
        plain.eval(), model.eval()
        got, expected = step(model, (0, *shape[1:])), step(plain, (0, *shape[1:]))
        assert torch.equal(got[0], expected[0])
        assert all(torch.equal(got[2][key], value) for key, value in expected[2].items())
    model = convert(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        model(torch.ones(1, 3, 1, 1).requires_grad_())


@st.composite
def sequential_models(draw):
    """Convolutions, batch norms, ReLUs, pooling, dropout and linear layers in any order."""
    channels, size = draw(st.integers(1, 5)), draw(st.integers(4, 9))
    shape, layers = (channels, size, size), []
    for _ in range(draw(st.integers(2, 8))):
        image = len(shape) == 3
        kinds = ["norm", "relu", "relu in place", "identity", "dropout", "layer", "layer"]
        kinds += ["flatten", "max", "average"] if image and shape[1] >= 2 else []
        kind, width = draw(st.sampled_from(kinds)), draw(st.integers(1, 6))
        if kind == "norm":
            layers.append((nn.BatchNorm2d if image else nn.BatchNorm1d)(shape[0], affine=draw(st.booleans())))
        elif kind == "layer" and image:
            kernel, stride = draw(st.integers(1, 3)), draw(st.integers(1, 2))
            layers.append(nn.Conv2d(shape[0], width, kernel, stride, 1, bias=draw(st.booleans())))
            shape = (width, *((edge + 2 - kernel) // stride + 1 for edge in shape[1:]))
        elif kind == "layer":
            layers.append(nn.Linear(shape[0], width))
            shape = (width,)
        elif kind == "flatten":
            layers.append(nn.Flatten())
            shape = (shape[0] * shape[1] * shape[2],)
        elif kind in ("max", "average"):
            ceil = draw(st.booleans())
            layers.append((nn.MaxPool2d if kind == "max" else nn.AvgPool2d)(2, 2, 0, ceil_mode=ceil))
            shape = (shape[0], *((edge + ceil) // 2 for edge in shape[1:]))
        else:
            layers.append({"relu": nn.ReLU(), "relu in place": nn.ReLU(True), "identity": nn.Identity(),
                           "dropout": nn.Dropout(0.3)}[kind])
    # In place on the input itself would change what the two models read.
    return nn.Sequential(nn.Conv2d(channels, channels, 1), *layers), (draw(st.integers(2, 4)), channels, size, size)


@settings(max_examples=40, deadline=None)
@given(sequential_models(), st.integers(0, 2**31))
def test_any_sequence_of_layers(case, seed):
    plain, shape = case
    model = convert(copy.deepcopy(plain), 8, 12.0)
    results = []
    for network in (plain, model):
        try:
            results.append(step(network, shape, seed))
        except (ValueError, RuntimeError) as error:  # one value a channel; a ReLU in place on what torch still needs
            results.append(error)
    expected, got = results
    if isinstance(expected, RuntimeError):
        return  # ours has copies where torch's has none, and may well go on
    if isinstance(expected, Exception):
        assert str(got) == str(expected)
        return
    assert torch.equal(got[0], expected[0])
    assert_same_state(model, plain)
    # How close gradients are is no general matter: those of batch norms over few values are differences of large terms.
    assert got[2].keys() == expected[2].keys()
    assert joined(got).isfinite().all()


# --- structures -------------------------------------------------------------------------------------------------------


def test_codes_that_no_longer_hold_are_not_read():
    """A batch norm's result that is changed in place, itself or through a view, before a convolution reads it."""

    class Changed(nn.Module):
        def __init__(self, how):
            super().__init__()
            self.bn, self.conv, self.how = nn.BatchNorm2d(3), nn.Conv2d(3, 2, 3), how

        def forward(self, x):
            y = self.bn(x)
            self.how(y)
            return self.conv(y)

    changes = [lambda y: y.mul_(-2), lambda y: y.flatten().add_(3), lambda y: y.view(-1)[::2].neg_(),
               lambda y: y.__setitem__(0, 1.0), lambda y: y.detach().add_(3)]
    for change in changes:
        plain = Changed(change)
        got, expected = step(convert(copy.deepcopy(plain), 8), (4, 3, 6, 6)), step(plain, (4, 3, 6, 6))
        assert torch.equal(got[0], expected[0])
        # From codes of what the convolution read, which the batch norm's codes do not say.
        assert relative(got[2]["conv.weight"], expected[2]["conv.weight"]) < rounding_of_inputs(8)


@torch.fx.wrap
def hidden(x):
    """A change in place that tracing does not look into."""
    x.mul_(-2)


def test_what_torch_fx_does_not_see_is_found_at_run_time():
    class Changed(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.pool, self.conv = nn.BatchNorm2d(3), nn.MaxPool2d(2), nn.Conv2d(3, 2, 3)

        def forward(self, x):
            y = self.bn(x)
            hidden(y)
            return self.conv(y).sum() + self.conv(self.pool(y))

    plain = Changed()
    model = convert(copy.deepcopy(plain), 8)
    assert converted(model)["conv"] == "reads the codes of its input"
    got, expected = step(model, (4, 3, 8, 8)), step(plain, (4, 3, 8, 8))
    assert torch.equal(got[0], expected[0])
    assert relative(got[2]["conv.weight"], expected[2]["conv.weight"]) < rounding_of_inputs(8)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_codes_go_through_every_flatten(spelling):
    """Also through pooling in front; the linear layer's gradients are those of its plain twin on what the codes say."""
    before = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.MaxPool2d(2))
    plain = Flattened(before, spelling, 45, nn.Sequential(nn.Linear(45, 7), nn.ReLU(), nn.Linear(7, 2)))
    model = convert(copy.deepcopy(plain), 8, 12.0)
    assert left(model) == {"before.0": "its input is the model's own"}
    got, expected = step(model, (4, 3, 8, 8)), step(plain, (4, 3, 8, 8))
    assert torch.equal(got[0], expected[0])
    assert relative(joined(got), joined(expected)) < 0.1
    with lowmem.ledger(model) as book:
        model(torch.ones(4, 3, 8, 8))
    assert {entry.module for entry in book.full_precision} == {"before.0"}, "of the image alone"


@pytest.mark.parametrize("reshape", [
    lambda x: x.view(-1, 6), lambda x: x.flatten(0, 2), lambda x: x.reshape(2, -1, 6), lambda x: x.view_as(x),
    lambda x: x.clone(),
])
def test_linear_layers_read_codes_through_any_reshape(reshape):
    """Rows of six pixels, in channels-last memory too: only the order of elements counts."""
    plain = Flattened(nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)), "x.flatten(1)", 1, nn.Linear(6, 2))
    plain.flatten = reshape
    model = convert(copy.deepcopy(plain), 8, 12.0)
    assert left(model) == {"before.0": "its input is the model's own"}
    got, expected = step(model, (4, 3, 8, 8)), step(plain, (4, 3, 8, 8))
    assert torch.equal(got[0], expected[0])
    assert relative(joined(got), joined(expected)) < 0.1


def test_hooks_that_change_what_only_passes():
    """The convolution or linear layer reads the hook's result, for which no codes stand."""
    for layers in ((nn.Identity(), nn.Conv2d(3, 2, 1)), (nn.Flatten(), nn.Linear(48, 2))):
        plain = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), *layers)
        plain[2].register_forward_hook(lambda module, args, out: out * 2)
        model = convert(copy.deepcopy(plain))
        got, expected = step(model, (4, 3, 4, 4)), step(plain, (4, 3, 4, 4))
        assert relative(got[2]["3.weight"], expected[2]["3.weight"]) < rounding_of_inputs(4)
        assert left(model) == {"2": "hooks watch its result"}
        assert converted(model)["3"] == "codes of its input in groups of 256"


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.AvgPool2d(3, 1, 1)])
def test_pooling_keeps_little_of_any_value(pool):
    plain = nn.Sequential(nn.Conv2d(3, 5, 3), pool, nn.Conv2d(5, 2, 1))
    model = convert(copy.deepcopy(plain))
    got, expected = step(model, (4, 3, 8, 8)), step(plain, (4, 3, 8, 8))
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1]), "the gradient that passes is exact"
    assert torch.equal(got[2]["0.weight"], expected[2]["0.weight"])
    books = []
    for network in (model, plain):
        with lowmem.ledger(network) as book:
            network(torch.ones(4, 3, 8, 8))
        books.append(book)
    assert {entry.module for entry in books[0].full_precision} == {"0"}
    assert books[0].equivalent == books[1].stored


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_binary_resnet(stem):
    """What keeps full precision is the convolution that reads the model's input."""
    plain = models.resnet18("binary", num_classes=10, widths=(8,) * 4 + (9,), stem=stem)
    model = convert(copy.deepcopy(plain), 8, 12.0)
    shape = (4, 3, 64, 64) if stem == "imagenet" else (4, 3, 16, 16)
    got, expected = step(model, shape), step(plain, shape)
    assert torch.equal(got[0], expected[0])
    assert relative(joined(got), joined(expected)) < 0.1
    assert left(model) == {"stem.conv": "its input is the model's own"}
    kept = [name for name, how in converted(model).items() if how == "keeps bits by itself"]
    assert len(kept) == 32, "16 activations and 16 binary convolutions"
    norms = [name for name, module in plain.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert set(norms) <= converted(model).keys()
    with lowmem.ledger(model) as book:
        model(torch.ones(shape))
    assert {entry.module for entry in book.full_precision if math.prod(entry.shape) > 1} == {"stem.conv"}


@pytest.mark.parametrize(("layer", "shape", "converted"), [
    (BinaryActivation(surrogate="steep"), (3, 4), True), (BinaryActivation(surrogate="approx_sign"), (3, 4), False),
    (BinaryLinear(4, 2), (3, 4), True), (BinaryLinear(4, 2, surrogate="steep"), (3, 4), False),
    (BinaryConv1d(4, 2, 1, surrogate="identity"), (3, 4, 5), True), (TernaryActivation(), (3, 4), True),
    (TernaryActivation("polynomial"), (3, 4), False),
    (CoupledConv2d(4, 2, 1), (3, 4, 5, 5), True), (CoupledConv2d(4, 2, 1, save_codes=False), (3, 4, 5, 5), False),
])
def test_own_layers_say_what_they_keep(layer, shape, converted):
    """As the ledger sees it, of ternary values; alone and in a model."""
    alone, within = convert(layer), convert(nn.Sequential(nn.Identity(), layer))
    how = "keeps bits by itself" if converted else f"{type(layer).__name__} keeps its input"
    assert report(alone) == (lowmem.Conversion("", type(layer).__name__, converted, how),)
    assert report(within) == (lowmem.Conversion("1", type(layer).__name__, converted, how),)
    x = (torch.randint(0, 3, shape) / 2).requires_grad_()
    with lowmem.ledger(layer) as book:
        layer(x)
    assert converted == all(math.prod(entry.shape) != x.numel() for entry in book.full_precision)


def test_relu_in_place_on_a_value_that_others_read():
    class Reused(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.relu, self.drop = nn.Conv2d(3, 3, 1), nn.ReLU(True), nn.Dropout(0.0)

        def forward(self, x):
            y = self.conv(x)
            z = self.drop(y)  # y itself in evaluation
            return y.sum() + self.relu(self.conv(x)) + self.relu(z) + y

    plain = Reused()
    model = convert(copy.deepcopy(plain))
    plain.eval(), model.eval()
    assert torch.equal(step(model, (2, 3, 4, 4))[0], step(plain, (2, 3, 4, 4))[0])
    assert left(model)["relu"] == "it changes a value in place that others may read"
    assert converted(model)["relu"] == "codes of its result in groups of 256"
    x = -torch.ones(2, 3, 4, 4)
    convert(nn.Sequential(nn.ReLU(True)))(x)
    assert not x.any(), "the caller's tensor is changed as before"


def test_modes_follow_their_modules():
    """F.dropout in a part that is in evaluation while the rest trains."""
    plain, shape = make("post")
    plain[3].eval()
    model = convert(plain)
    assert [module.training for module in model.modules()] == [module.training for module in plain.modules()]
    torch.manual_seed(0)
    first = model(torch.ones(shape))
    torch.manual_seed(0)
    assert torch.equal(first, copy.deepcopy(plain)(torch.ones(shape)))
    model.get_submodule("3").train()
    torch.manual_seed(0)
    assert not torch.equal(first, model(torch.ones(shape)))


def test_models_that_cannot_be_traced():
    model = convert(Branching())
    assert type(model) is Branching
    assert model.body is model.same
    assert {"body.1", "body.3", "bn"} <= converted(model).keys()
    assert left(model)[""].startswith("children one by one, torch.fx cannot trace it: TraceError: symbolically")
    assert converted(model)["fc"] == "codes of its input"

    class Stochastic(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x):
            return self.bn(x) if self.training else x

    model = convert(Stochastic())
    assert left(model)[""].endswith("torch.fx cannot trace it: its graph is another one in evaluation")
    assert torch.equal(model.eval()(torch.ones(2, 3, 4, 4)), torch.ones(2, 3, 4, 4))


class Switching(nn.Module):
    """A backbone without gradients, and a layer in bfloat16."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
        self.head, self.fc = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3)), nn.Linear(5, 3)

    def forward(self, x):
        with torch.no_grad():
            x = self.backbone(x)
        with torch.autocast("cpu", torch.bfloat16):
            x = self.head(x).float()
        return self.fc(x.mean((2, 3)))


def test_modes_within_a_forward_stay():
    plain = Switching()
    model = convert(copy.deepcopy(plain), 8, 12.0)
    assert "it switches gradients or autocast on or off" in left(model)[""]
    assert {"backbone.1", "head.0", "head.2"} <= converted(model).keys()
    results = []
    for network in (model, plain):
        network.zero_grad()
        out = network(torch.ones(4, 3, 12, 12) * torch.arange(12))
        out.square().sum().backward()
        results.append((out, {name for name, p in network.named_parameters() if p.grad is not None}))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1] == {name for name, _ in plain.named_parameters() if "backbone" not in name}


def test_nested_converted_models():
    inner, shape = make("preact")
    once = convert(inner)
    twice = convert(once)
    assert report(twice) == report(once)
    outer = convert(nn.Sequential(once, nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 3)))
    assert set(report(once)) <= {
        lowmem.Conversion(e.name.removeprefix("0."), e.kind, e.converted, e.how) for e in report(outer)
    }
    assert {"1", "3"} <= converted(outer).keys()
    assert torch.equal(step(twice, shape)[0], step(inner, shape)[0])
    part = once.get_submodule("blocks.0.bn1")
    assert report(convert(part))[0].how == "converted before"
    block = LowMemBlock(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3))
    model = convert(nn.Sequential(block, nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)))
    assert converted(model).keys() == {"0", "1", "3"}
    assert step(model, (4, 3, 8, 8))[0].shape == (4, 2, 6, 6)


def test_hooks_stay():
    plain = Functional()
    seen = []
    plain.conv2.register_forward_hook(lambda module, args, out: seen.append((len(args), type(out))))
    plain.fc.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    plain.bn1.register_forward_hook(lambda module, args, out: out + 1)
    plain.pool.register_full_backward_hook(lambda module, grads, outs: None)
    plain.register_forward_hook(lambda module, args, out: seen.append(sorted(out)))
    model = convert(copy.deepcopy(plain))
    assert torch.equal(step(model, (4, 3, 12, 12))[0], step(plain, (4, 3, 12, 12))[0])
    assert seen[:2] == seen[2:] == [(1, torch.Tensor), ["flag", "logits"]]
    assert left(model)["bn1"] == left(model)["pool"] == "hooks watch its result"
    plain = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3))
    plain[2].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    model = convert(copy.deepcopy(plain))
    assert left(model) == {"2": "a hook may change its input"}
    assert torch.equal(step(model, (4, 3, 8, 8))[0], step(plain, (4, 3, 8, 8))[0])
    # A container with hooks is called as one, and converted within.
    plain = nn.Sequential(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3)), nn.ReLU())
    plain[0].register_forward_hook(lambda module, args, out: out * 2)
    model = convert(copy.deepcopy(plain))
    assert {"0.0", "0.2"} <= converted(model).keys()
    assert torch.equal(step(model, (4, 3, 8, 8))[0], step(plain, (4, 3, 8, 8))[0])


@pytest.mark.parametrize("frozen", ["weights", "norms", "first", "all"])
def test_frozen_parameters(frozen):
    plain, shape = make("preact")
    for name, parameter in plain.named_parameters():
        kinds = {"weights": parameter.dim() > 1, "norms": "bn" in name, "first": name.startswith("blocks.0")}
        parameter.requires_grad_(not kinds.get(frozen, True))
    model = convert(copy.deepcopy(plain), 8, 12.0)
    got, expected = step(model, shape), step(plain, shape)
    assert got[2].keys() == expected[2].keys()
    assert torch.equal(got[0], expected[0])
    assert relative(joined(got), joined(expected)) < 0.1
    with lowmem.ledger(model) as book:
        model(torch.randn(shape).requires_grad_())
    assert {entry.module for entry in book.full_precision} <= {"conv", "fc"}


def test_exact_where_the_paper_says():
    """The last block's gradients: of biases and of the input of the convolution, exact; ReLU's mask exact."""
    plain = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3))
    nn.init.normal_(plain[0].weight), nn.init.normal_(plain[0].bias)
    model = convert(copy.deepcopy(plain), 2)
    got, expected = (step(network, (4, 3, 8, 8))[2] for network in (model, plain))
    exact = step(copy.deepcopy(plain).double(), (4, 3, 8, 8), dtype=torch.float64)[2]
    assert torch.equal(got["2.bias"], expected["2.bias"])
    assert_as_good(got["0.bias"], expected["0.bias"], exact["0.bias"])
    plain = nn.Sequential(nn.Linear(8, 300), nn.ReLU(), nn.Linear(300, 4))
    got, expected = (step(network, (5, 8)) for network in (convert(copy.deepcopy(plain), 2), plain))
    exact = step(copy.deepcopy(plain).double(), (5, 8), dtype=torch.float64)
    assert_as_good(got[1], expected[1], exact[1])  # through the mask and weights alone
    assert_as_good(got[2]["0.weight"], expected[2]["0.weight"], exact[2]["0.weight"])


# --- what is left -----------------------------------------------------------------------------------------------------

REASONS = {
    "softmax": (nn.Softmax(1), "it keeps its result"),
    "elu": (nn.ELU(), "no rule for it"),
    "transposed": (nn.ConvTranspose2d(3, 3, 1), "ConvTranspose2d keeps its input"),
    "padding": (nn.Conv2d(3, 3, 3, 1, 1, padding_mode="circular"), "padding_mode 'circular' keeps the padded input"),
    "same": (nn.Conv2d(3, 3, 2, padding="same"), "padding 'same' of an even kernel is not symmetric"),
    "pool": (nn.MaxPool2d(2, dilation=2), "no rule for these arguments"),
    "indices": (nn.MaxPool2d(17), "no rule for these arguments"),
}


@pytest.mark.parametrize("name", REASONS)
def test_report_gives_the_reason(name):
    layer, reason = REASONS[name]
    model = convert(nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), layer))
    assert report(model) == (
        lowmem.Conversion("0", "Conv2d", False, "its input is the model's own"),
        lowmem.Conversion("1", "BatchNorm2d", True, "codes of its result behind ReLU"),
        lowmem.Conversion("3", type(layer).__name__, False, reason),
    )


def test_report_of_functions_and_flattened_values():
    found = {(e.name, e.kind): e.how for e in report(convert(Functional()))}
    assert found["relu_1", "relu"] == "codes of its result in groups of 256"
    assert found["max_pool2d", "max_pool2d"] == "keeps a byte a window"
    model = convert(nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Unflatten(1, (3, 16)), nn.Conv1d(3, 2, 1)))
    assert converted(model)["3"] == "codes of its input in groups of 256"
    with pytest.raises(ValueError, match="report: model must be one that convert made, got Functional"):
        report(Functional())
    with pytest.raises(TypeError, match=r"report: model must be a torch\.nn\.Module, got NoneType"):
        report(None)


def test_modules_bound_to_their_attributes_are_left():
    """A copy of one would run the layers of the original, whatever became of its own."""
    def layers():
        return nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 1))

    compiled, patched = torch.compile(layers(), backend="eager"), layers()
    patched.forward = patched.forward
    for module, reason in (
        (compiled, "torch.compile has compiled it; convert it first and compile the result"),
        (patched, "its forward is an attribute of the object, not of its class"),
    ):
        with pytest.raises(ValueError, match=f"convert: model cannot be converted: {reason}"):
            convert(module)
        outer = nn.Sequential(module, nn.BatchNorm2d(2))
        converted = convert(outer)
        assert left(converted) == {"0": reason}
        x = torch.randn(4, 3, 5, 5)
        assert torch.equal(converted(x), outer(x))


def test_a_module_compiled_in_place_is_converted():
    plain = nn.Sequential(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 1)), nn.Softmax(1))
    plain[0].compile(backend="eager")
    model = convert(plain)
    with ledger(model) as book:
        model(torch.randn(4, 3, 5, 5))
    assert any(entry.dtype == torch.uint8 and entry.shape == (4, 3, 13) for entry in book.entries)
    assert plain[0]._compiled_call_impl is not None
    assert model.get_submodule("0.2")._compiled_call_impl is None


@pytest.mark.parametrize(("arguments", "error", "message"), [
    ((3,), TypeError, "convert: model must be a torch.nn.Module, got int"),
    ((nn.ReLU(), 3), ValueError, "convert: bits must be 2, 4 or 8, got 3"),
    ((nn.ReLU(), True), TypeError, "convert: bits must be an int, got bool"),
    ((nn.ReLU(), 4, "6"), TypeError, "convert: range must be a number or None, got str"),
    ((nn.ReLU(), 4, -1.0), ValueError, "convert: range must be a positive number of standard deviations, got -1.0"),
    ((nn.ReLU(), 4, float("nan")), ValueError, "convert: range must be a positive number"),
])
def test_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        convert(*arguments)


# --- what else models go through --------------------------------------------------------------------------------------


def test_retain_graph_gives_the_same_gradients():
    plain, shape = make("vgg")
    model = convert(plain)
    loss = model(torch.randn(shape)).square().sum()
    loss.backward(retain_graph=True)
    first = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    loss.backward()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), first, strict=True))


@pytest.mark.parametrize(("layers", "name"), [
    ((nn.BatchNorm2d(3),), "batch norm"), ((nn.ReLU(), nn.Flatten()), "ReLU"),
    ((nn.ReLU(), nn.Conv2d(3, 2, 1)), "convolution"), ((nn.ReLU(), nn.Linear(8, 2)), "linear layer"),
    ((nn.ReLU(), nn.MaxPool2d(2)), "max-pooling"), ((nn.ReLU(), nn.AvgPool2d(2)), "average pooling"),
])
def test_second_derivative_is_refused(layers, name):
    x = torch.randn(2, 3, 8, 8).requires_grad_()
    out = convert(nn.Sequential(*layers, nn.Identity()))(x)
    with pytest.raises(RuntimeError, match=f"lowmem: {name} has no second derivative"):
        torch.autograd.grad(out.sum(), x, create_graph=True)


@pytest.mark.parametrize("name", ["preact", "vgg", "mlp"])
def test_autocast(name):
    plain, shape = make(name)
    model = convert(copy.deepcopy(plain), 8, 12.0)
    results = []
    for network in (model, plain):
        with torch.autocast("cpu", torch.bfloat16):
            results.append(step(network, shape))
    got, expected = results
    assert torch.equal(got[0], expected[0])
    assert all(grad.dtype == torch.float32 for grad in got[2].values())
    assert relative(joined(got), joined(expected)) < 0.1


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant):
    plain, shape = make("preact")
    model = convert(copy.deepcopy(plain))
    expected = joined(step(model, shape))
    again = convert(copy.deepcopy(plain))

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = again

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=reentrant)

    assert torch.equal(joined(step(Checkpointed(), shape)), expected)


def test_optimizers_serve_both_models():
    plain, shape = make("vgg")
    model = convert(plain)
    optimizer = torch.optim.SGD(plain.parameters(), 0.1)
    losses = []
    for _ in range(5):
        torch.manual_seed(0)
        loss = F.cross_entropy(model(torch.randn(shape)), torch.arange(6) % 10)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert torch.equal(step(model.eval(), shape)[0], step(plain.eval(), shape)[0])
