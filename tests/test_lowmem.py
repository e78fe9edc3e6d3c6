"""lowmem: forward to the bit, gradients against the float64 formulas, flat errors by depth, refusals."""

import copy

import pytest
import torch
import torch.nn.functional as F
from reference import lowmem as reference
from torch import nn

from lowbit_ext import lowmem, models
from lowbit_ext.lowmem import blocks, convert, report



@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(20260101)


class PostActivation(nn.Module):
    """Two convolutions, each with batch norm, and the sum behind ReLU; one ReLU module, in place, for both."""

    def __init__(self, width):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding="same"), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x
        return F.dropout(self.relu(y), 0.25, training=self.training)


NETWORKS = {
    "preact": lambda: models.preact_resnet(8, in_channels=1, widths=(4, 8, 8)),
    "bottleneck": lambda: models.preact_resnet(164, in_channels=1, widths=(2, 3, 4)),
    "post": lambda: nn.Sequential(
        nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), PostActivation(5), PostActivation(5), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(5, 10),
    ),
    "vgg": lambda: nn.Sequential(
        nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(5, 7, 3, padding=1),
        nn.BatchNorm2d(7), nn.ReLU(), nn.AvgPool2d(2, ceil_mode=True), nn.Flatten(), nn.Linear(63, 9), nn.BatchNorm1d(9),
        nn.ReLU(), nn.Linear(9, 10),
    ),
    "mlp": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(144, 33), nn.ReLU(), nn.Linear(33, 9), nn.ReLU(), nn.Linear(9, 10)
    ),
}  # fmt: skip
IMAGES = (6, 1, 12, 12)


def step(model, seed=1):
    torch.manual_seed(seed)
    out = model(torch.randn(IMAGES))
    F.cross_entropy(out, torch.arange(IMAGES[0]) % 10).backward()
    return out


@pytest.mark.parametrize("bits", blocks.BITS)
def test_block_has_the_formulas_gradients(bits):
    norm, conv = nn.BatchNorm2d(9), nn.Conv2d(9, 4, 3, padding=1, bias=False)
    with torch.no_grad():  # both signs, almost and exactly zero, and ratios beyond the range
        norm.weight.copy_(torch.tensor([1, -1, 0.3, -0.3, 2.0, 1e-3, 0.0, 0.0, -1]))
        norm.bias.copy_(torch.tensor([0, 0.5, 3, -3, -1, 0.01, 0.5, -0.5, 10.0]))
    x = torch.randn(8, 9, 7, 7, requires_grad=True)
    out = blocks.LowMemBlock(norm, conv, bits=bits)(x)
    grad = torch.randn_like(out)
    out.backward(grad)
    found = (out.detach(), x.grad, norm.weight.grad, norm.bias.grad, conv.weight.grad)
    expected = reference.block(
        x.detach(), norm.weight.detach(), norm.bias.detach(), conv.weight.detach(), grad, norm.eps, bits,
        blocks.RANGES[bits], padding=1,
    )  # fmt: skip
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-6 * float(want.abs().max()))


@pytest.mark.parametrize("name", NETWORKS)
def test_forward_and_buffers_are_identical(name):
    plain = NETWORKS[name]()
    converted = convert(copy.deepcopy(plain))
    for _ in range(2):
        assert torch.equal(step(converted), step(plain))
    state = converted.state_dict()
    assert state.keys() == plain.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in plain.state_dict().items())
    plain.eval(), converted.eval()
    assert torch.equal(step(converted), step(plain))
    with torch.no_grad():
        assert torch.equal(converted(torch.ones(IMAGES)), plain(torch.ones(IMAGES)))


@pytest.mark.parametrize("name", NETWORKS)
def test_eight_bits_are_close_to_the_exact_gradient(name):
    plain = NETWORKS[name]()
    converted = convert(copy.deepcopy(plain), 8, 12.0)
    step(plain), step(converted)
    exact = torch.cat([p.grad.flatten() for p in plain.parameters()])
    names = dict(converted.named_parameters())
    found = torch.cat([names[key].grad.flatten() for key, _ in plain.named_parameters()])
    assert F.cosine_similarity(found, exact, dim=0) > 0.99


def test_error_does_not_grow_with_depth():
    errors = []
    for depth in (20, 56):
        torch.manual_seed(0)
        plain = models.preact_resnet(depth, in_channels=1, widths=(4, 8, 16))
        converted = convert(copy.deepcopy(plain))
        step(plain), step(converted)
        names = dict(converted.named_parameters())
        relative = [
            float((names[key].grad - p.grad).norm() / p.grad.norm())
            for key, p in plain.named_parameters() if p.dim() == 4 and key != "conv.weight"
        ]  # fmt: skip
        errors.append(sum(relative) / len(relative))
    assert errors[1] < 1.5 * errors[0]


def test_shares_parameters_and_leaves_the_model_alone():
    plain = NETWORKS["preact"]()
    converted = convert(plain)
    assert {id(p) for p in converted.parameters()} == {id(p) for p in plain.parameters()}
    assert type(plain.bn) is nn.BatchNorm2d
    copied = copy.deepcopy(converted)
    assert report(copied) == report(converted)
    assert torch.equal(step(copied), step(plain))


def test_report_names_what_was_left():
    left = {entry.name: entry.how for entry in report(convert(NETWORKS["vgg"]())) if not entry.converted}
    assert left == {"0": "its input has no codes"}
    model = NETWORKS["vgg"]()
    model[1].register_forward_hook(lambda *_: None)
    assert {"1": "hooks watch its result"}.items() <= {
        entry.name: entry.how for entry in report(convert(model)) if not entry.converted
    }.items()
    with pytest.raises(ValueError, match="not made by convert"):
        report(model)


def test_retain_graph_gives_the_same_gradients():
    converted = convert(NETWORKS["vgg"]())
    loss = converted(torch.randn(IMAGES)).square().sum()
    loss.backward(retain_graph=True)
    first = [p.grad.clone() for p in converted.parameters()]
    converted.zero_grad()
    loss.backward()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(converted.parameters(), first, strict=True))


def test_second_derivative_is_refused():
    converted = convert(NETWORKS["preact"]())
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(converted(torch.randn(IMAGES)).sum(), list(converted.parameters()), create_graph=True)


def test_autocast():
    plain = NETWORKS["preact"]()
    converted = convert(copy.deepcopy(plain))
    with torch.autocast("cpu", torch.bfloat16):
        x = torch.randn(IMAGES)
        expected, got = plain(x), converted(x)
    assert torch.equal(got, expected)
    got.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in converted.parameters())


@pytest.mark.parametrize(("arguments", "error", "message"), [
    ((nn.ReLU(), 3), ValueError, "bits must be 2, 4 or 8, got 3"), ((3,), TypeError, "must be a torch.nn.Module"),
    ((nn.ReLU(), True), TypeError, "bits must be an int"), ((nn.ReLU(), 4, -1.0), ValueError, "range must be a positive"),
    ((nn.ReLU(), 4, "6"), TypeError, "range must be a number"),
])  # fmt: skip
def test_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        convert(*arguments)
