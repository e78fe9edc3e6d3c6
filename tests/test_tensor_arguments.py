"""What reaches a kernel: tensors that are no plain memory, torch's default device and dtype, workspaces, writes."""

import signal

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._pytree import tree_leaves

from conftest import defaults
from lowbit_ext import _native, _oplib, antithetic, lowmem
from lowbit_ext.binary import (
    BinaryActivation,
    BinaryConv2d,
    BinaryLinear,
    avg_pool2d,
    binarize,
    conv2d,
    max_pool2d,
    pack,
    pack_weight,
)
from operator_samples import samples


def schema(name):
    return getattr(torch.ops.lowbit, name.split("::")[1]).default._schema.arguments


def tensor_arguments(of=lambda value, argument: True):
    """Operator, sample and index of the tensor arguments that some sample gives and a kernel reads or writes."""
    return [
        (name, number, index)
        for name, calls in samples("contiguous").items()
        for number, call in enumerate(calls)
        for index, (value, argument) in enumerate(zip(call, schema(name), strict=True))
        if isinstance(value, torch.Tensor) and argument.name != "seed" and of(value, argument)
    ]


def is_read_float(value, argument):
    return value.is_floating_point() and argument.alias_info is None


def run(name, arguments):
    """Results of an operator's function, and what it wrote, as plain tensors."""
    result = _oplib.functions()[name](*arguments)
    written = [value for value, argument in zip(arguments, schema(name), strict=True) if argument.alias_info]
    tensors = [value for value in tree_leaves([result, written]) if value is not None]
    return [value.a if isinstance(value, TwoTensor) else value for value in tensors]


def call(name, number, index=None, change=None):
    """The arguments of a sample, one of them changed; written tensors are copies."""
    arguments = list(samples("contiguous")[name][number])
    arguments = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
    if index is not None:
        arguments[index] = change(arguments[index])
    return arguments


NAMES = ("name", "number", "index")


@pytest.mark.parametrize(NAMES, tensor_arguments())
def test_subclass(name, number, index):
    expected = run(name, call(name, number))
    got = run(name, call(name, number, index, lambda x: TwoTensor(x, x.clone())))
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(NAMES, tensor_arguments(is_read_float))
def test_negated_view(name, number, index):
    got = run(name, call(name, number, index, lambda x: torch._neg_view(-x)))
    for a, b in zip(got, run(name, call(name, number)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(NAMES, tensor_arguments())
@pytest.mark.parametrize("kind", ["meta", "sparse"])
def test_refusals_name_the_argument(name, number, index, kind):
    arguments = call(name, number, index, lambda x: x.to("meta") if kind == "meta" else x.to_sparse())
    leaves = torch.utils._pytree.tree_leaves(list(arguments))
    tensors = [value for value in leaves if isinstance(value, torch.Tensor) and value.dim() > 0]
    if kind == "meta" and len(tensors) == 1:
        assert all(result.device.type == "meta" for result in run(name, arguments))
        return
    argument = r"\w+" if kind == "meta" and index == 0 else schema(name)[index].name  # the input decides
    with pytest.raises((TypeError, ValueError), match=rf"^\w+: {argument} must be "):
        run(name, arguments)


def network(x, weight, scale):
    """Numbers in place of tensors, workspaces, and every kind of result."""
    bits = conv2d(x, weight, padding=1, scale=scale, threshold=257.0)
    floats = conv2d(x, weight, padding=1, scale=0.1, bias=torch.ones_like(scale))
    return [bits.words, floats, max_pool2d(bits, 2).words, avg_pool2d(bits, 2), binarize(x, threshold=0.3).words]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_defaults_of_torch_change_nothing(dtype, device):
    x, weight, scale = torch.randn(2, 256, 4, 4), torch.randn(6, 256, 3, 3), torch.rand(6)
    logits, generator = torch.randn(5, 70), torch.Generator("cpu")

    def results():
        group = lowmem.quantize(x, 4, stochastic=True, generator=generator.manual_seed(1))
        codes = [group, lowmem.quantize_channels(x)]
        samples = antithetic.sample(logits, 4, generator=generator.manual_seed(1))
        dense = [lowmem.dequantize(each) for each in codes]
        return [*network(x, weight, scale), *dense, samples.bits, samples.ratio, samples.unpack()]

    expected = results()
    with defaults(dtype, device):
        _native._kept.__dict__.clear()  # a workspace is allocated anew
        got = results()
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_number_as_threshold_is_compared_exactly():
    ones = torch.ones(1, 256, 1, 1)
    for threshold, bit in ((256, 1), (256.0, 1), (256.5, 0), (257.0, 0)):
        assert conv2d(ones, ones, threshold=threshold).words.item() == bit


def test_signal_handler_that_runs_a_layer(monkeypatch):
    """Python runs handlers between two instructions: also between a workspace's allocation and the kernel's start."""
    x, weight = torch.randn(2, 70, 9, 9), torch.randn(6, 70, 3, 3)
    large, wide = torch.randn(2, 640, 40, 40), torch.randn(64, 640, 3, 3)
    expected = conv2d(x, weight, padding=1)
    ran = []

    def handler(*_):
        monkeypatch.undo()
        ran.append(conv2d(large, wide, padding=1))

    allocate = _native.workspace

    def interrupted(size, like):
        buffer = allocate(size, like)
        signal.raise_signal(signal.SIGUSR1)
        return buffer

    _native._kept.__dict__.clear()
    before = signal.signal(signal.SIGUSR1, handler)
    monkeypatch.setattr(_native, "workspace", interrupted)
    try:
        got = conv2d(x, weight, padding=1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert len(ran) == 1
    assert torch.equal(got, expected)


class TestWrites:
    """dequantize(out=) writes into a tensor that a graph may need."""

    def test_version_is_counted(self):
        for codes in (lowmem.quantize(torch.randn(4, 64)), lowmem.quantize_channels(torch.randn(4, 64))):
            out = torch.randn(4, 64)
            factor = torch.ones(4, 64, requires_grad=True)
            loss = (factor * out).sum()
            lowmem.dequantize(codes, out=out)
            assert out._version == 1
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()

    def test_version_is_counted_by_the_dispatcher(self):
        codes, out = lowmem.quantize(torch.randn(256)), torch.zeros(256)
        torch.ops.lowbit.group_dequantize_into(codes.codes, codes.scale_minimum, 4, out)
        assert out._version == 1
        assert torch.equal(out, lowmem.dequantize(codes))

    def test_inference_tensors(self):
        codes = lowmem.quantize(torch.randn(256))
        with torch.inference_mode():
            out = torch.zeros(256)
            assert torch.equal(lowmem.dequantize(codes, out=out), lowmem.dequantize(codes))

    def test_a_leaf_that_requires_grad_is_refused(self):
        codes, out = lowmem.quantize(torch.randn(256)), torch.zeros(256, requires_grad=True)
        for target in (out, out * 1):
            with pytest.raises(ValueError, match=r"^dequantize: out requires grad, "):
                lowmem.dequantize(codes, out=target)
        assert out.detach().count_nonzero() == 0
        with torch.no_grad():
            lowmem.dequantize(codes, out=out)
        assert torch.equal(out.detach(), lowmem.dequantize(codes))


def test_modes_that_record():
    x, weight = torch.randn(2, 70, 8, 8), torch.randn(6, 70, 3, 3)

    def layers(x):
        return conv2d(max_pool2d(binarize(x), 2), pack_weight(weight), scale=0.5)

    traced = torch.jit.trace(layers, (x,))
    graph = make_fx(layers)(x)
    for seed in range(3):
        x = torch.randn(2, 70, 8, 8, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(traced(x), layers(x))
        assert torch.equal(graph(x), layers(x))
    assert any("lowbit" in str(node.target) for node in graph.graph.nodes)


def test_symbolic_trace():
    """torch.fx, and what is built on it, records layers and functions as calls."""
    layers = torch.nn.Sequential(
        BinaryConv2d(3, 8, 3), torch.nn.BatchNorm2d(8), BinaryActivation(), BinaryConv2d(8, 8, 3), torch.nn.Flatten(),
        BinaryLinear(128, 5),
    ).eval()
    x = torch.randn(2, 3, 8, 8)
    traced = torch.fx.symbolic_trace(layers)
    assert torch.equal(traced(x + 1), layers(x + 1))
    packed = pack(layers, x)
    wrapped = torch.nn.Sequential(torch.nn.Identity(), packed)
    assert torch.equal(torch.fx.symbolic_trace(wrapped)(x + 1), packed(x + 1))

    def functions(x):
        bits = max_pool2d(binarize(x), 2)
        return avg_pool2d(bits, 2) + bits.unpack().mean()

    assert torch.equal(torch.fx.symbolic_trace(functions)(x), functions(x))


def test_subclass_with_a_torch_function():
    class Named(torch.Tensor):
        """An ordinary subclass: results of functions of it are of it."""

    x = torch.randn(2, 70, 8, 8)
    assert torch.equal(binarize(x.as_subclass(Named)).words, binarize(x).words)
    got = conv2d(x.as_subclass(Named), torch.ones(6, 70, 3, 3))
    assert type(got) is Named
    assert torch.equal(got.as_subclass(torch.Tensor), conv2d(x, torch.ones(6, 70, 3, 3)))
