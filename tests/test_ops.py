"""Every operator through torch's own checks, and the functions through compile, export and vmap's refusals."""

import pytest
import torch
from torch.library import opcheck

from conftest import assert_as_good, running_on
from lowbit_ext import PackedTensor, _native, _oplib
from lowbit_ext.binary import binarize, conv2d, linear, max_pool2d, pack_weight
from operator_samples import samples


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted"])
@pytest.mark.parametrize("name", _oplib.functions())
def test_opcheck(device, name, layout):
    operator = getattr(torch.ops.lowbit, name.split("::")[1]).default
    for arguments in samples(layout)[name]:
        assert set(opcheck(operator, arguments).values()) == {"SUCCESS"}
        with_grad = tuple(
            a.detach().clone().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
            for a in arguments
        )
        # Raw operators carry no autograd rule: what remains to check on inputs that want a gradient.
        checks = ("test_schema", "test_faketensor")
        assert set(opcheck(operator, with_grad, test_utils=checks).values()) == {"SUCCESS"}


def network(x, w, v):
    """Float in, float out; packed in between."""
    bits = conv2d(x, w, padding=1, threshold=0.0)
    return conv2d(max_pool2d(bits, 2), v, scale=0.5).sum((2, 3))


def test_compiled_forward(device, rng):
    x, w, v = torch.randn(2, 40, 8, 8), torch.randn(70, 40, 3, 3), torch.randn(6, 70, 3, 3)
    expected = network(x, w, v)
    compiled = torch.compile(network, fullgraph=True)
    assert torch.equal(compiled(x, w, v), expected)
    batch = torch.randn(5, 40, 8, 8)
    dynamic = torch.compile(network, fullgraph=True, dynamic=True)
    assert torch.equal(dynamic(x, w, v), expected)
    assert torch.equal(dynamic(batch, w, v), network(batch, w, v))


def test_compiled_graph_serves_every_level(rng):
    """torch keeps compiled graphs on disk, where a process that runs another level finds them."""
    x, w, v = torch.randn(2, 40, 8, 8), torch.randn(70, 40, 3, 3), torch.randn(6, 70, 3, 3)
    expected = network(x, w, v)
    compiled = torch.compile(network, fullgraph=True)
    for level in _native.available_isas():
        with running_on(level), torch.compiler.set_stance("fail_on_recompile" if level != "scalar" else "default"):
            assert torch.equal(compiled(x, w, v), expected), level


def test_compiled_with_packed_arguments(device):
    x, weight = binarize(torch.randn(2, 40, 8, 8)), pack_weight(torch.randn(70, 40, 3, 3))
    compiled = torch.compile(lambda a, b: conv2d(a, b, threshold=1.0), fullgraph=True, backend="aot_eager")
    result = compiled(x, weight)
    assert isinstance(result, PackedTensor)
    assert torch.equal(result.words, conv2d(x, weight, threshold=1.0).words)


@pytest.mark.parametrize("surrogate", ["clip", "approx_sign"])
def test_compiled_backward(device, surrogate):
    def loss(x, w, b):
        return conv2d(x, w, bias=b, padding=1, surrogate=surrogate).square().mean()

    gradients = []
    # In float64 by torch's operators.
    for function, dtype in ((torch.compile(loss, fullgraph=True), torch.float32), (loss, torch.float32),
                            (loss, torch.float64)):
        torch.manual_seed(0)
        leaves = [torch.randn(2, 40, 8, 8), torch.randn(7, 40, 3, 3), torch.randn(7)]
        leaves = [leaf.to(dtype).requires_grad_() for leaf in leaves]
        function(*leaves).backward()
        gradients.append([leaf.grad for leaf in leaves])
    for compiled, eager, exact in zip(*gradients, strict=True):
        assert_as_good(compiled, eager, exact)


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.v = torch.nn.Parameter(torch.randn(70, 40, 3, 3)), torch.nn.Parameter(torch.randn(6, 70))

    def forward(self, x):
        with torch.no_grad():
            return linear(conv2d(x, self.w, padding=1).mean((2, 3)), self.v)


def test_export(device, tmp_path):
    model, x = Network(), torch.randn(2, 40, 8, 8)
    exported = torch.export.export(model, (x,))
    assert torch.equal(exported.module()(x), model(x))
    torch.export.save(exported, tmp_path / "model.pt2")
    assert torch.equal(torch.export.load(tmp_path / "model.pt2").module()(x), model(x))


def test_export_with_packed_input(device):
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.randn(6, 40, 3, 3))

        def forward(self, x):
            with torch.no_grad():
                return conv2d(x, self.w)

    model, x = Layer(), binarize(torch.randn(2, 40, 8, 8))
    assert torch.equal(torch.export.export(model, (x,)).module()(x), model(x))


def test_profiler_sees_the_operators(device):
    x, weight = binarize(torch.randn(2, 40, 8, 8)), pack_weight(torch.randn(70, 40, 3, 3))
    with torch.profiler.profile() as profile:
        conv2d(x, weight)
    assert "lowbit::binary_conv2d" in {event.key for event in profile.key_averages()}
