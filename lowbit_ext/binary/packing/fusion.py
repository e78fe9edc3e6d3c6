"""Passes over floats: which nodes between two binary layers run as one, and the steps that they are there.

A pass reads the accumulator of a binary layer, or a float tensor, runs a list of steps on each element while it is in a
register, and writes what others read: floats, and bits by thresholds. Batch norms, constants a channel, ReLUs of every
kind, sums with other tensors and one pooling are steps. Each rounds as torch's own operator does.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Set
from typing import Any

import torch
from torch import Tensor, fx, nn

from lowbit_ext._graph import Pool
from lowbit_ext.binary.ops.steps import MOST_STEPS
from lowbit_ext.binary.packing.chains import PRODUCTS, SUBTRACTIONS, Model

FLOATS = "floats"  # a demand
SCALE_AND_BIAS = 2  # steps of a binary layer's own


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """A step of a pass: its name among the kernels' (csrc/core/epilogue.h), factors (C,), and the other operand."""

    kind: str
    factors: tuple[Tensor, ...] = ()
    operand: fx.Node | None = None


@dataclasses.dataclass(eq=False)
class Pass:
    """Nodes that run as one.

    Attributes:
        source: a binary layer, whose accumulator is read, or the node whose floats are.
        nodes: in order, each reading the one before; the pooling among them.
        steps: of each node.
        pool: the pooling, or None.
    """

    source: fx.Node
    reads_accumulator: bool
    nodes: list[fx.Node] = dataclasses.field(default_factory=list)
    steps: dict[fx.Node, tuple[Step, ...]] = dataclasses.field(default_factory=dict)
    pool: fx.Node | None = None

    @property
    def last(self) -> fx.Node:
        """The node whose value the steps end with."""
        return self.nodes[-1] if self.nodes else self.source

    def operands(self) -> list[fx.Node]:
        """The tensors that steps read, in order."""
        return [step.operand for node in self.nodes for step in self.steps[node] if step.operand is not None]


# --- steps ------------------------------------------------------------------------------------------------------------


def steps_of(model: Model, node: fx.Node, source: fx.Node) -> tuple[Step, ...] | None:
    """What a node does to its input `source`, or None where it cannot be a step.

    () of a node that leaves values as they are.
    """
    shape = model.shape(node)
    if model.dtype(node) != torch.float32 or shape != model.shape(source) or not 2 <= len(shape) <= 4:
        return None
    if model.axis(node) != model.axis(source):
        return None
    if model.is_transparent(node):
        return ()
    if model.is_batch_norm(node):
        return _batch_norm_steps(model, node)
    if model.is_addition(node):
        (other,) = (value for value in model.variables(node) if value is not source)
        return (Step("add_tensor", operand=other),) if model.dtype(other) == torch.float32 else None
    constant = model.channel_constant(node)
    if constant is not None:
        if model.kind(node) in PRODUCTS:
            return (Step("multiply", (constant,)),)
        return (Step("add", (-constant if model.kind(node) in SUBTRACTIONS else constant,)),)
    slope = model.slope(node)
    if slope is not None:
        return (Step("prelu", (slope,)),)
    limits = _limits(model, node)
    if limits is not None:
        return (Step("clamp", tuple(torch.full((model.channels(node),), limit) for limit in limits)),)
    return _gate_steps(model, node, source)


def _limits(model: Model, node: fx.Node) -> tuple[float, float] | None:
    """The ends between which a monotone node clamps."""
    if not model.is_monotone(node) or model.slope_kind(node):
        return None
    if isinstance(model.module(node), nn.Module) and type(model.module(node)) not in (nn.ReLU, nn.ReLU6, nn.Hardtanh):
        return None
    # The function itself tells its ends: at -inf and inf.
    ends = model.call(node, torch.tensor([[-math.inf, math.inf]]))[0]
    return float(ends[0]), float(ends[1])


def _gate_steps(model: Model, node: fx.Node, source: fx.Node) -> tuple[Step, ...] | None:
    """A product with one factor for each image and channel."""
    variables = model.variables(node)
    if model.kind(node) not in PRODUCTS or node.kwargs or len(node.args) != 2 or len(variables) != 2:
        return None
    (gate,) = (value for value in variables if value is not source)
    shape, axis = model.shape(source), model.axis(source)
    wanted = tuple(size if index in (0, axis % len(shape)) else 1 for index, size in enumerate(shape))
    if model.shape(gate) != wanted or model.dtype(gate) != torch.float32 or len(shape) < 3:
        return None
    return (Step("multiply_image", operand=gate),)


def _batch_norm_steps(model: Model, node: fx.Node) -> tuple[Step, ...] | None:
    """A batch norm of running statistics, in torch's own rounding.

    torch's CPU kernel (aten/src/ATen/native/cpu/batch_norm_kernel.cpp) makes alpha and beta of the statistics and then
    fma(x, alpha, beta), or rounds twice on processors that cannot fuse. On memory in no order that it knows it makes
    (x - mean) / std * weight + bias. The module itself tells alpha and beta, and which it was; None if it is neither.
    """
    norm = model.module(node)
    channels = model.channels(node)
    if model.axis(node) != 1:
        return None
    linear = type(norm)(channels, norm.eps, affine=norm.affine).eval()
    linear.running_var.copy_(norm.running_var)
    if norm.affine:
        linear.weight.copy_(norm.weight)
    zeros, ones = torch.zeros(1, channels), torch.ones(1, channels)
    alpha, beta = model.norm(node, linear, ones)[0], model.norm(node, norm, zeros)[0]
    mean, std = norm.running_mean, (norm.running_var + norm.eps).sqrt()
    weight, bias = (norm.weight, norm.bias) if norm.affine else (ones[0], zeros[0])
    centred = Step("add", (-mean,)), Step("multiply", (1 / std,))
    probes = torch.linspace(-3, 3, 37).reshape(-1, 1) * std + mean
    expected = model.norm(node, norm, probes)
    for steps in (
        (Step("multiply_add", (alpha, beta)),),
        (Step("multiply", (alpha,)), Step("add", (beta,))),
        (*centred, Step("multiply_add", (weight, bias))),
        (*centred, Step("multiply", (weight,)), Step("add", (bias,))),
    ):
        if torch.equal(_on(probes, steps), expected):
            return steps
    return None


def _on(values: Tensor, steps: tuple[Step, ...]) -> Tensor:
    """What steps of constants make of values (k, C)."""
    for step in steps:
        first, *second = step.factors
        if step.kind == "multiply_add":
            values = (values.double() * first + second[0]).float()  # the product is exact
        else:
            values = values + first if step.kind == "add" else values * first
    return values


# --- passes -----------------------------------------------------------------------------------------------------------


class Fusion:
    """Joins the nodes whose floats somebody needs into passes.

    Args:
        model: traced.
        demands: what the values that are made must give: floats, or the bits of a later value.
        reads_bits: whether a node reads bits.

    Attributes:
        passes: by each of their nodes, and by a binary layer that is a pass's source.
    """

    def __init__(
        self, model: Model, demands: Mapping[fx.Node, Set[Any]], reads_bits: Callable[[fx.Node], bool]
    ) -> None:
        self.model, self.demands = model, demands
        self.passes: dict[fx.Node, Pass] = {}
        for node in model.graph.nodes:
            if not demands.get(node) or model.constant(node) is not None:
                continue
            if model.binary_layer(node) is not None:
                self.passes[node] = Pass(node, True)
            elif not reads_bits(node):
                self._join(node)

    def _hands_on(self, node: fx.Node) -> bool:
        """Whether one node alone reads a value, and as floats."""
        readers = [user for user in node.users if self.demands.get(user) or user.op == "output"]
        return len(readers) == 1 and self.demands[node] == {FLOATS}

    def _join(self, node: fx.Node) -> None:
        """Makes a node part of the pass of an input, or the first of a pass of its own."""
        model = self.model
        pool = window_of(model, node)
        variables = [value for value in model.variables(node) if model.shape(value)]
        # A binary layer's accumulator first: what reads a tensor anyway can take it as an operand.
        variables.sort(key=lambda value: not (value in self.passes and self.passes[value].reads_accumulator))
        choices = [(value, () if pool is not None else steps_of(model, node, value)) for value in variables]
        for value, steps in choices:
            joined = self.passes.get(value)
            if steps is None or joined is None or joined.last is not value:
                continue
            if pool is not None and not self._takes_pool(joined):
                continue
            if self._count(joined) + len(steps) + max(1, self._written(node)) > MOST_STEPS - SCALE_AND_BIAS:
                continue
            operands = {step.operand for step in steps if step.operand is not None}
            if not self._depends(operands, joined):
                self._append(joined, node, steps, pool)
                return
        for value, steps in choices:
            if steps or (steps is not None and pool is not None):
                self._append(Pass(value, False), node, steps, pool)
                return

    def _append(self, joined: Pass, node: fx.Node, steps: tuple[Step, ...], pool: Pool | None) -> None:
        joined.nodes.append(node)
        joined.steps[node] = steps
        joined.pool = node if pool is not None else joined.pool
        self.passes[node] = joined

    def _count(self, joined: Pass) -> int:
        """The steps of a pass so far, with those that write."""
        nodes = [joined.source, *joined.nodes] if joined.reads_accumulator else joined.nodes
        return sum(len(joined.steps.get(node, ())) + self._written(node) for node in nodes)

    def _written(self, node: fx.Node) -> int:
        return 0 if self._hands_on(node) else 1 + len(self.demands[node] - {FLOATS})

    def _takes_pool(self, joined: Pass) -> bool:
        """Whether a pooling may follow: steps in front of it run on each window's pixels, and nothing is written."""
        return (
            not joined.reads_accumulator and joined.pool is None and not joined.operands()
            and all(map(self._hands_on, joined.nodes))
        )

    def _depends(self, nodes: set[fx.Node], joined: Pass) -> bool:
        """Whether one of the nodes needs something that the pass writes, itself or through other passes."""
        waiting, seen = list(nodes), set(nodes)
        while waiting:
            node = waiting.pop()
            own = self.passes.get(node)
            if own is joined:
                return True
            # All that the pass reads comes before any of its results.
            inputs = node.all_input_nodes if own is None else [
                value for member in (own.source, *own.nodes) for value in (member, *member.all_input_nodes)
            ]
            waiting.extend(value for value in inputs if value not in seen)
            seen.update(inputs)
        return False


def window_of(model: Model, node: fx.Node) -> Pool | None:
    """A pooling of images that a pass can make: of known windows or an average of the whole image, on float32."""
    pool = model.pool(node)
    if pool is None or len(pool.padding) != 2 or len(model.shape(node)) != 4:
        return None
    whole = pool.kind == "average" and pool.output == (1, 1)
    if not (_is_sum_in_order(model, node) if whole else pool.is_known and not pool.output):
        return None
    return pool if model.dtype(node) == torch.float32 else None


def _is_sum_in_order(model: Model, node: fx.Node) -> bool:
    """Whether an average of the whole image rounds as a sum of the pixels one by one: of many, torch's does not."""
    pixels = model.values[node.args[0]].flatten(2)  # type: ignore[index]
    total = torch.zeros_like(pixels[..., 0])
    for index in range(pixels.shape[2]):
        total = total + pixels[..., index]
    return torch.equal(total / pixels.shape[2], model.values[node].flatten(1))
