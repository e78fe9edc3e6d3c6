"""The vocabulary of graph rewriting: what each node of a traced model is, over every spelling."""

import contextlib
import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flattens import SPELLINGS, flattens
from lowbit_ext import models
from lowbit_ext._graph import (
    Pool,
    Traced,
    first_line,
    has_binary_weight,
    pool_of,
    reads_batch_size,
    reads_bits,
    trace,
)
from lowbit_ext.binary import BinaryActivation, BinaryConv1d, BinaryConv2d, BinaryLinear
from lowbit_ext.duo import CoupledConv2d, CoupledLinear, StepActivation, TernaryActivation


class Calls(nn.Module):
    """A module or function as a model."""

    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, x):
        return self.call(x)


def traced(call):
    model = Calls(call)
    return Traced(model, trace(model))


def last(call):
    """The traced model, and the node of its result."""
    graph = traced(call)
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    return graph, output.args[0]


# --- flattening -------------------------------------------------------------------------------------------------------


def _batch_of_clips(x):
    return x.reshape(x.size(0) // 2, -1)


def _rows(x):
    return x.view(-1, x.size(-1))


NO_FLATTENS = {
    "x.flatten(2)": lambda x: x.flatten(2),
    "x.flatten()": lambda x: x.flatten(),
    "nn.Flatten(0)": nn.Flatten(0),
    "x.view(-1)": lambda x: x.view(-1),
    "x.view(n, c, -1)": lambda x: x.view(x.size(0), x.size(1), -1),
    "x.view(dtype)": lambda x: x.view(torch.int32),
    "x.view_as(x)": lambda x: x.view_as(x),
    "x.view(-1, w)": _rows,
    "x.reshape(n // 2, -1)": _batch_of_clips,
    "x.transpose(1, 2)": lambda x: x.transpose(1, 2),
    "x.squeeze(2)": lambda x: x.squeeze(2),
    "nn.Unflatten": nn.Unflatten(1, (2, 2)),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_flattens(spelling):
    call = flattens(3 * 2 * 2)[spelling]
    graph, node = last(call)
    assert graph.is_flatten(node)
    assert graph.is_reshape(node)
    assert [other for other in graph.graph.nodes if graph.is_flatten(other)] == [node]
    # It is what the word says.
    x = torch.arange(48.0).reshape(4, 3, 2, 2)
    assert torch.equal(call(x), x.flatten(1))


@pytest.mark.parametrize("spelling", NO_FLATTENS)
def test_other_reshapes_are_no_flattens(spelling):
    graph, node = last(NO_FLATTENS[spelling])
    assert not graph.is_flatten(node)
    reshapes = spelling.startswith(("x.flatten", "nn.Flatten", "x.view", "x.reshape")) and "dtype" not in spelling
    assert graph.is_reshape(node) == reshapes


def test_names_of_arguments_are_no_calls():
    class Model(nn.Module):
        def forward(self, flatten, size, contiguous):
            return flatten + size + contiguous

    graph = Traced(Model(), trace(Model()))
    for node in graph.graph.nodes:
        assert not any((graph.is_flatten(node), graph.is_identity(node), reads_batch_size(node))), node


@pytest.mark.parametrize(("call", "result", "is_flatten"), [
    (lambda x: x.view(-1, 4), (3, 4), False), (lambda x: x.view(-1, 12), (1, 12), True),
    (lambda x: x.flatten(-3), (1, 12), True), (lambda x: x.flatten(1, 2), (1, 6, 2), False),
    (lambda x: x.view(-1, x.size(1) * x.size(2) * x.size(3)), (1, 12), True),
])
def test_shapes_tell_where_they_are_known(call, result, is_flatten):
    graph, node = last(call)
    graph.shapes = {node.args[0]: (1, 3, 2, 2), node: result}
    assert graph.is_flatten(node) == is_flatten


# --- sizes ------------------------------------------------------------------------------------------------------------

BATCH_SIZES = {
    "x.size(0)": lambda x: x.size(0),
    "x.size(dim=0)": lambda x: x.size(dim=0),
    "x.size()[0]": lambda x: x.size()[0],
    "x.shape[0]": lambda x: x.shape[0],
}


@pytest.mark.parametrize("spelling", BATCH_SIZES)
def test_sizes_have_one_spelling(spelling):
    graph, node = last(BATCH_SIZES[spelling])
    assert (node.target, node.args[1:], node.kwargs) == ("size", (0,), {})
    assert reads_batch_size(node)
    assert [other.op for other in graph.graph.nodes] == ["placeholder", "call_method", "output"], "no other is left"


@pytest.mark.parametrize("call", [lambda x: x.size(1), lambda x: x.shape[1], lambda x: x.shape, lambda x: x.shape[1:],
                                  lambda x: x[0]])
def test_other_sizes_are_not_the_batchs(call):
    assert not reads_batch_size(last(call)[1])


def test_a_shape_that_is_read_as_one_stays():
    size, rest = last(lambda x: (x.shape[2], x.shape[1:]))[1]
    assert (size.target, size.args[1]) == ("size", 2)
    assert rest.target is operator.getitem
    assert rest.args[0].target is getattr


# --- pooling ----------------------------------------------------------------------------------------------------------

POOLS = [
    (Pool("max", (2, 2), (2, 2), (0, 0)),
     [nn.MaxPool2d(2), lambda x: F.max_pool2d(x, 2), lambda x: torch.max_pool2d(x, (2, 2)),
      lambda x: F.max_pool2d(input=x, kernel_size=2), lambda x: torch.max_pool2d(x, 2, [])]),
    (Pool("max", (3, 2), (2, 1), (1, 0), True, dilation=(2, 2)),
     [nn.MaxPool2d((3, 2), (2, 1), (1, 0), 2, ceil_mode=True),
      lambda x: F.max_pool2d(x, (3, 2), (2, 1), (1, 0), 2, True),
      lambda x: torch.max_pool2d(x, (3, 2), [2, 1], (1, 0), [2, 2], ceil_mode=True)]),
    (Pool("max", (3,), (1,), (1,), dilation=(1,)),
     [nn.MaxPool1d(3, 1, 1), lambda x: F.max_pool1d(x, 3, 1, 1),
      lambda x: torch.max_pool1d(x, (3,), stride=1, padding=1)]),
    (Pool("max", (2, 2, 2), (1, 2, 2), (0, 0, 0), dilation=(1, 1, 1)),
     [nn.MaxPool3d(2, (1, 2, 2)), lambda x: F.max_pool3d(x, 2, (1, 2, 2))]),
    (Pool("average", (3, 3), (2, 2), (1, 1), True, False, 5),
     [nn.AvgPool2d(3, 2, 1, True, False, 5), lambda x: F.avg_pool2d(x, 3, 2, 1, True, False, 5),
      lambda x: F.avg_pool2d(x, 3, stride=2, padding=1, ceil_mode=True, count_include_pad=False, divisor_override=5)]),
    (Pool("average", (2,), (2,), (1,), dilation=(1,)),
     [nn.AvgPool1d(2, padding=1), lambda x: F.avg_pool1d(x, 2, None, 1), lambda x: torch.avg_pool1d(x, 2, padding=1)]),
    (Pool("average", (), (), (0, 0), output=(1, 1)),
     [nn.AdaptiveAvgPool2d(1), nn.AdaptiveAvgPool2d((1, 1)), lambda x: F.adaptive_avg_pool2d(x, 1)]),
    (Pool("max", (), (), (0, 0), output=(None, 3)),
     [nn.AdaptiveMaxPool2d((None, 3)), lambda x: F.adaptive_max_pool2d(x, (None, 3))]),
    (Pool("average", (), (), (0,), dilation=(1,), output=(4,)),
     [nn.AdaptiveAvgPool1d(4), lambda x: torch.adaptive_avg_pool1d(x, 4)]),
]


@pytest.mark.parametrize(("pool", "call"), [(pool, call) for pool, calls in POOLS for call in calls])
def test_pools(pool, call):
    graph, node = last(call)
    assert graph.pool(node) == pool
    if isinstance(call, nn.Module):
        assert pool_of(type(call), vars(call)) == pool


@pytest.mark.parametrize("call", [
    nn.MaxPool2d(2, return_indices=True), lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
    nn.AdaptiveMaxPool2d(2, return_indices=True), nn.LPPool2d(2, 2), nn.ReLU(), lambda x: x.mean((2, 3)),
])
def test_no_pools(call):
    graph = traced(call)
    assert all(graph.pool(node) is None for node in graph.graph.nodes)


def test_windows_that_the_call_computes():
    graph, node = last(lambda x: F.avg_pool2d(x, x.size(2)))
    assert graph.pool(node) == Pool("average", (), (), (0, 0))
    assert not graph.pool(node).is_known
    assert graph.pool(node).is_mean
    graph, node = last(lambda x: F.avg_pool2d(x, 2, padding=x.size(2)))
    assert not graph.pool(node).is_mean


@pytest.mark.parametrize(("module", "is_mean"), [
    (nn.AvgPool2d(2), True), (nn.AvgPool2d(3, 1, 1), False), (nn.AvgPool2d(3, 1, 1, count_include_pad=False), True),
    (nn.AvgPool2d(2, divisor_override=3), False), (nn.AdaptiveAvgPool2d(2), True), (nn.MaxPool2d(2), False),
])
def test_means(module, is_mean):
    pool = pool_of(type(module), vars(module))
    assert pool.is_mean == is_mean
    if pool.kind == "average":
        assert bool((module(torch.ones(1, 1, 6, 6)) == 1).all()) == is_mean, "a mean of ones is one"


# --- other nodes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("call", "words"), [
    (nn.Identity(), {"identity"}), (lambda x: x.contiguous(), {"identity"}), (lambda x: x.clone(), {"identity"}),
    (nn.Dropout(), {"dropout"}), (nn.Dropout3d(), {"dropout"}), (nn.AlphaDropout(), {"dropout"}),
    (lambda x: F.dropout2d(x, 0.1, True), {"dropout"}), (lambda x: torch.dropout(x, 0.1, False), {"dropout"}),
    (nn.BatchNorm1d(3), {"batch_norm"}), (nn.BatchNorm3d(3), {"batch_norm"}), (nn.SyncBatchNorm(3), set()),
    (nn.InstanceNorm2d(3), set()), (nn.ReLU(), set()), (lambda x: x + 1, set()), (nn.Flatten(), {"flatten", "reshape"}),
])
def test_kinds(call, words):
    graph, node = last(call)
    known = ("identity", "dropout", "batch_norm", "flatten", "reshape")
    assert {word for word in known if getattr(graph, f"is_{word}")(node)} == words


def test_layers_with_a_binary_weight():
    of_bits = [BinaryConv2d(1, 1, 1), BinaryConv1d(1, 1, 1), BinaryLinear(1, 1)]
    of_values = [CoupledConv2d(1, 1, 1), CoupledLinear(1, 1)]
    others = [nn.Conv2d(1, 1, 1), nn.Linear(1, 1), BinaryActivation(), TernaryActivation(), None]
    assert [has_binary_weight(layer) for layer in (*of_bits, *of_values, *others)] == [True] * 5 + [False] * 5
    assert [reads_bits(layer) for layer in (*of_bits, *of_values, *others)] == [True] * 3 + [False] * 7


class Derived(BinaryActivation):
    def forward(self, input):
        return super().forward(input) if input.sum() > 0 else input


def test_own_layers_are_one_node_and_own_containers_are_not():
    model = nn.Sequential(BinaryConv2d(1, 2, 1), StepActivation(), Derived(), models.vgg7("coupled", image_size=8))
    graph = Traced(model, trace(model))
    called = [node for node in graph.graph.nodes if node.op == "call_module"]
    assert [type(graph.module(node)) for node in called[:4]] == [BinaryConv2d, StepActivation, Derived, nn.Conv2d]
    kinds = {type(graph.module(node)) for node in called}
    assert {CoupledConv2d, CoupledLinear, TernaryActivation} <= kinds
    assert nn.Sequential not in kinds
    whole = trace(model, lambda module: isinstance(module, nn.Sequential))
    assert [str(node.target) for node in whole.nodes if node.op == "call_module"] == ["0", "1", "2", "3"]


def _without_gradients(x):
    with torch.no_grad():
        return x.relu()


def _in_inference_mode(x):
    with torch.inference_mode():
        return x.relu()


def _in_bfloat16(x):
    with torch.autocast("cpu", torch.bfloat16):
        return x.relu()


def _in_full_precision(x):
    with torch.autocast("cpu", enabled=False):
        return x.relu()


@pytest.mark.parametrize("call", [
    _without_gradients, torch.no_grad()(lambda x: x.relu()), _in_inference_mode, _in_bfloat16, _in_full_precision,
])
@pytest.mark.parametrize("around", [contextlib.nullcontext, torch.no_grad, lambda: torch.autocast("cpu")])
def test_modes_that_a_graph_would_lose(call, around):
    with around():
        before = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        with pytest.raises(torch.fx.proxy.TraceError, match="it switches gradients or autocast on or off"):
            trace(Calls(call))
        trace(Calls(call), inference=True)
        trace(Calls(lambda x: x.relu()))
        assert before == (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"))


def test_inputs_by_name_come_first():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = BinaryConv2d(1, 1, 1)

        def forward(self, x):
            return F.relu(input=self.conv(input=x))

    relu = last(Named())[1]
    for node in (relu, relu.args[0]):
        assert len(node.args) == 1
        assert "input" not in node.kwargs


def test_labels():
    graph, node = last(nn.ReLU())
    assert (graph.name(node), graph.kind_name(node), graph.label(node)) == ("call", "ReLU", "call (ReLU)")
    graph, node = last(lambda x: torch.flatten(x.relu(), 1))
    assert graph.label(node) == "flatten (flatten)"
    assert graph.label(node.args[0]) == "relu (relu)"
    assert graph.label(node.args[0].args[0]) == "x (x)"


def test_errors_in_one_line():
    assert first_line(ValueError("one\ntwo")) == "ValueError: one"
    assert first_line(KeyError("x")) == "KeyError: 'x'"
    assert first_line(StopIteration()) == "StopIteration"
