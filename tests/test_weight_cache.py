"""cached_weights(): bits of weights kept over calls, and never those of another weight."""

import contextvars
import copy
import pickle
import threading

import pytest
import torch
from torch import nn

from conftest import running_on
from lowbit_ext import _native, binary
from lowbit_ext.binary import BinaryConv1d, BinaryConv2d, BinaryLinear, weight_cache

LAYERS = {
    "conv2d": (lambda **options: BinaryConv2d(45, 33, 3, padding=1, **options), (2, 45, 6, 7)),
    "grouped": (lambda **options: BinaryConv2d(44, 32, 3, groups=2, **options), (2, 44, 6, 7)),
    "conv1d": (lambda **options: BinaryConv1d(45, 33, 3, **options), (2, 45, 9)),
    "linear": (lambda **options: BinaryLinear(45, 33, **options), (2, 5, 45)),
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(20260101)


@pytest.fixture
def packings(monkeypatch):
    """Shapes of the weights that are packed for the cache."""
    shapes, pack = [], weight_cache.pack_weight

    def noted(weight, groups):
        shapes.append(tuple(weight.shape))
        return pack(weight, groups)

    monkeypatch.setattr(weight_cache, "pack_weight", noted)
    return shapes


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("weight_scale", ["channel", "layer", "learned", None])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_same_results_of_one_packing(device, packings, name, weight_scale, mode):
    build, shape = LAYERS[name]
    layer, x = build(weight_scale=weight_scale), torch.randn(shape)
    with mode():
        expected = layer(x)
        with binary.cached_weights():
            assert all(torch.equal(layer(x), expected) for _ in range(3))
            with binary.cached_weights():
                assert torch.equal(layer(x), expected)
            assert len(packings) == 1
        with binary.cached_weights():
            layer(x)
        assert len(packings) == 2, "the bits are dropped where the context ends"


def stepped(layer):
    optimizer = torch.optim.SGD(layer.parameters(), 10.0)
    with torch.enable_grad():
        layer(torch.randn(2, 45, 6, 7)).square().mean().backward()
    optimizer.step()


CHANGES = {
    "an optimizer step": stepped,
    "an operation": lambda layer: layer.weight.neg_(),
    "a state dictionary": lambda layer: layer.load_state_dict(BinaryConv2d(45, 33, 3, padding=1).state_dict()),
    "another tensor": lambda layer: setattr(layer.weight, "data", -layer.weight.data),
    "another parameter": lambda layer: setattr(layer, "weight", nn.Parameter(-layer.weight.detach())),
    "another type": lambda layer: layer.bfloat16().float(),
    "another order": lambda layer: layer.to(memory_format=torch.channels_last),
    "another scale": lambda layer: setattr(layer, "weight_scale", "layer"),
    "initialisation": lambda layer: layer.reset_parameters(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_weight_is_packed_anew(name):
    layer, x = BinaryConv2d(45, 33, 3, padding=1), torch.randn(2, 45, 6, 7)
    with torch.no_grad(), binary.cached_weights():
        layer(x)
        for _ in range(3):
            CHANGES[name](layer)
            got = layer(x)
            with running_without_cache():
                assert torch.equal(got, layer(x))


def running_without_cache():
    """The cache of a context that has none."""

    class Context:
        def __enter__(self):
            self.token = weight_cache._active.set(None)

        def __exit__(self, *error):
            weight_cache._active.reset(self.token)

    return Context()


def test_levels_have_their_own_bits():
    layer, x = BinaryConv2d(45, 33, 3, padding=1), torch.randn(2, 45, 6, 7)
    with torch.no_grad(), binary.cached_weights():
        results = []
        for _ in range(2):
            for level in _native.available_isas():
                with running_on(level):
                    results.append(layer(x))
    assert all(torch.equal(result, results[0]) for result in results)


def test_training_within_it_has_its_gradients(packings):
    layer, x = BinaryConv2d(45, 33, 3), torch.randn(2, 45, 6, 7)
    layer(x).sum().backward()
    expected = layer.weight.grad.clone()
    layer.zero_grad()
    with binary.cached_weights():
        layer(x).sum().backward()
    assert torch.equal(layer.weight.grad, expected)
    assert packings == []


def test_frozen_layers_hand_gradients_on_behind_inference():
    layer, x = BinaryConv2d(45, 33, 3).requires_grad_(False), torch.randn(2, 45, 6, 7, requires_grad=True)
    layer(x).sum().backward()
    expected, x.grad = x.grad, None
    with binary.cached_weights():
        with torch.inference_mode():
            layer(x)
        layer(x).sum().backward()
    assert torch.equal(x.grad, expected)


class OwnScale(BinaryConv2d):
    factor = 1.0

    def scale(self):
        return super().scale() * self.factor


def test_a_scale_of_a_derived_class_is_not_kept():
    layer, x = OwnScale(8, 4, 3, bias=False), torch.randn(2, 8, 5, 5)
    with torch.no_grad(), binary.cached_weights():
        before = layer(x)
        layer.factor = 2.0
        assert torch.equal(layer(x), 2 * before)


def test_copies_have_no_bits():
    layer, x = BinaryConv2d(8, 4, 3), torch.randn(2, 8, 5, 5)
    with torch.no_grad(), binary.cached_weights():
        size, expected = len(pickle.dumps(layer)), layer(x)
        for clone in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            clone.weight.neg_()
            clone.bias.neg_()
            assert torch.equal(clone(x), -expected)
        assert len(pickle.dumps(layer)) == size


def test_threads_of_one_context():
    """Copies of a context share its cache."""
    layers = [BinaryConv2d(45, 33, 3) for _ in range(4)]
    x, wrong = torch.randn(2, 45, 6, 7), []
    with torch.no_grad():
        expected = [layer(x) for layer in layers]

        def work():
            with torch.no_grad():
                for _ in range(50):
                    for layer, want in zip(layers, expected, strict=True):
                        if not torch.equal(layer(x), want):
                            wrong.append(layer)

        with binary.cached_weights():
            threads = [threading.Thread(target=contextvars.copy_context().run, args=(work,)) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    assert wrong == []


def test_compiled_layers_do_without():
    layer, x = BinaryConv2d(45, 33, 3), torch.randn(2, 45, 6, 7)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    with torch.no_grad(), binary.cached_weights():
        assert torch.equal(compiled(x), layer(x))
        layer.weight.neg_()
        assert torch.equal(compiled(x), layer(x))
