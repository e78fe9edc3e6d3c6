"""decouple(): a coupled network, of ternary activations, as a network of step activations that is the same function.

The coupling identity t(y) = (b(y - 1/4) + b(y + 1/4)) / 2 makes one ternary channel two binary ones. In the decoupled
network a value v of the coupled one therefore appears in one of these forms, along the channels:

    plain    v
    copies   [v, v]
    shifted  [v - 1/4, v + 1/4]    what a step activation reads; the bias of a batch norm makes the shift
    bits     [b1, b2]              what it gives: 0 and 1, with mean v
    means    [v1, v2]              bits behind an average or dropout: the mean is still v

Whatever reads bits or means has its weights halved and twice in number. Each value takes the form its readers need.
"""

from __future__ import annotations

import collections
import copy
import operator
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from lowbit_ext import _arguments
from lowbit_ext._graph import Traced, first_line, reads_batch_size, trace
from lowbit_ext._torch import pytree
from lowbit_ext.binary import BinaryConv2d, BinaryLinear
from lowbit_ext.duo.functional import ternary_activation
from lowbit_ext.duo.layers import CoupledConv2d, CoupledLinear, StepActivation, TernaryActivation

__all__ = ["decouple"]

_PLAIN, _COPIES, _SHIFTED, _BITS, _MEANS = "plain", "copies", "shifted", "bits", "means"
_SHIFT = 0.25

# Of values on the example, in float64, relative to the largest of them (or 1).
_TOLERANCE = 1e-9

_COUPLED = (CoupledConv2d, CoupledLinear)
_READERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, *_COUPLED)
_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")


def _trace(model: nn.Module) -> fx.Graph:
    try:
        return trace(model)
    except Exception as error:
        raise ValueError(
            "decouple: torch.fx cannot trace the model, which needs static control flow and TernaryActivation as "
            f"modules: {first_line(error)}"
        ) from error


class _Decoupler(Traced):
    """Finds the form of every value, then writes the decoupled graph and the modules that change.

    Args:
        model: coupled.
        shapes: of values on an example, by the names of their nodes.
    """

    def __init__(self, model: nn.Module, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__(model, _trace(model))
        self.shapes = {node: shapes[node.name] for node in self.graph.nodes if node.name in shapes}
        # Nodes with a ternary activation's value, and how it arrives; nodes whose value a batch norm can shift.
        self.halves: dict[fx.Node, str] = {}
        self.shiftable: set[fx.Node] = set()
        for node in self.graph.nodes:
            self._classify(node)
        self.demands: dict[fx.Node, set[str]] = collections.defaultdict(set)
        for node in reversed(self.graph.nodes):
            if self.is_needed(node):
                self._demand(node)
        self.decoupled = fx.Graph()
        self.values: dict[tuple[fx.Node, str], fx.Node] = {}
        self.roles: dict[str, str] = {}
        self.changed: dict[str, nn.Module] = {}
        for node in self.graph.nodes:
            if self.is_needed(node):
                self.values[node, self.form(node)] = self._emit(node)

    # --- what a node is -----------------------------------------------------------------------------------------------

    def _is_activation(self, node: fx.Node) -> bool:
        return self.kind(node) is TernaryActivation

    def _is_addition(self, node: fx.Node) -> bool:
        return self.kind(node) in _ADDITIONS

    def _keeps_form(self, node: fx.Node) -> bool:
        """Does the same to every channel and commutes with adding a number."""
        if self.is_flatten(node) or self.is_identity(node):
            return True
        pool = self.pool(node)
        return pool is not None and (pool.kind == "max" or pool.is_mean)

    def _classify(self, node: fx.Node) -> None:
        inputs = node.all_input_nodes
        if self.kind(node) is ternary_activation:
            raise ValueError(f"decouple: {self.label(node)} is a function; use a TernaryActivation module")
        if self._is_activation(node):
            self.halves[node] = _BITS
        elif self.is_batch_norm(node):
            self.shiftable.add(node)
        elif self._is_addition(node):
            both = len(inputs) == 2 and not node.kwargs and all(operand.op != "get_attr" for operand in inputs)
            if both and not self.shiftable.isdisjoint(inputs):
                self.shiftable.add(node)
        elif inputs and inputs[0] in self.halves:
            form, pool = self.halves[inputs[0]], self.pool(node)
            if self.is_dropout(node) or (pool is not None and pool.kind == "average"):
                self.halves[node] = _MEANS
            # The larger of two ternary values has the larger bits; of means that is not so.
            elif self._keeps_form(node) and (form == _BITS or pool is None):
                self.halves[node] = form
        elif inputs and inputs[0] in self.shiftable and self._keeps_form(node):
            self.shiftable.add(node)

    def _reads_halves(self, node: fx.Node) -> bool:
        """Whether a convolution or linear layer reads bits or means."""
        return self.kind(node) in _READERS and node.all_input_nodes[0] in self.halves

    # --- which forms are needed ---------------------------------------------------------------------------------------

    def form(self, node: fx.Node) -> str:
        """The form that a node's own call gives; `value` derives others."""
        if node in self.halves:
            return self.halves[node]
        if node in self.shiftable:
            return next((form for form in (_SHIFTED, _COPIES) if form in self.demands[node]), _PLAIN)
        return _PLAIN

    def _operands(self, node: fx.Node) -> list[fx.Node]:
        """What a node reads. Sizes that a flatten names are the coupled value's: of two halves it takes none."""
        one = self.is_flatten(node) and self.form(node) != _PLAIN
        return node.all_input_nodes[:1] if one else node.all_input_nodes

    def _operand_form(self, node: fx.Node, operand: fx.Node) -> str:
        """The form in which a node reads an operand."""
        form = self.form(node)
        if self._is_addition(node) and form != _PLAIN:
            return form if operand is self._carrier(node) else _COPIES
        if operand is not node.all_input_nodes[0]:
            return _PLAIN
        if self._is_activation(node):
            return _SHIFTED
        if node in self.halves or self._reads_halves(node) or reads_batch_size(node):
            return self.form(operand)
        return _PLAIN if self.is_batch_norm(node) else form

    def is_needed(self, node: fx.Node) -> bool:
        """Whether a node that others read in the coupled network is read by any in the decoupled one."""
        return not node.users or node.op == "placeholder" or bool(self.demands[node])

    def _demand(self, node: fx.Node) -> None:
        """Asks a node's operands for what its own readers need of it."""
        if self._is_activation(node) and node.all_input_nodes[0] not in self.shiftable:
            raise ValueError(
                f"decouple: {self.label(node)} must read a batch norm, whose bias can be shifted by 1/4, directly or "
                f"through additions and pooling; it reads {self.label(node.all_input_nodes[0])}"
            )
        for operand in self._operands(node):
            self.demands[operand].add(self._operand_form(node, operand))

    def _carrier(self, node: fx.Node) -> fx.Node:
        """The operand that brings an addition's shift: one that is shifted anyway, as an identity shortcut is."""
        able = [operand for operand in node.all_input_nodes if operand in self.shiftable]
        for operand in able:
            source = operand
            while self._keeps_form(source):
                source = source.all_input_nodes[0]
            if self._feeds_activation(source):
                return operand
        return able[0]

    def _feeds_activation(self, node: fx.Node) -> bool:
        return any(
            self._is_activation(user) or (self._keeps_form(user) and self._feeds_activation(user))
            for user in node.users
        )

    def left(self) -> list[str]:
        """Layers that stay coupled though they read a ternary activation, each with the reason."""
        found = []
        for node in self.graph.nodes:
            if self.kind(node) not in _COUPLED or self._reads_halves(node):
                continue
            at = node.all_input_nodes[0]
            while at.all_input_nodes and self.kind(at) not in _READERS and not self.is_batch_norm(at):
                if not self.halves.keys().isdisjoint(at.all_input_nodes):
                    reason = f"{self.label(at)} may mix a ternary activation's channels"
                    found.append(f"{self.label(node)} stays coupled: {reason}")
                    break
                at = at.all_input_nodes[0]
        return found

    # --- writing the graph --------------------------------------------------------------------------------------------

    def value(self, node: fx.Node, form: str) -> fx.Node:
        """A node's value in a form, derived from its own where that is another."""
        key = (node, form)
        if key not in self.values:
            if form == _PLAIN:
                halves = self.decoupled.call_method("unflatten", (self.values[node, self.form(node)], 1, (2, -1)))
                self.values[key] = self.decoupled.call_method("mean", (halves, 1))
            else:
                self.values[key] = self._twice(self.value(node, _PLAIN))
        return self.values[key]

    def _twice(self, node: fx.Node) -> fx.Node:
        return self.decoupled.call_function(torch.cat, ([node, node], 1))

    def _emit(self, node: fx.Node) -> fx.Node:
        if self.is_dropout(node) and node.op != "call_module":
            raise ValueError(
                f"decouple: {self.label(node)} would keep the mode it is traced in; use a torch.nn dropout module"
            )
        if self.sizes(node) and self.is_flatten(node) and self.form(node) != _PLAIN:
            return self._emit_flatten(node)
        target = str(node.target)
        role, change = self._role(node)
        if node.op == "call_module" and self.roles.setdefault(target, role) != role:
            raise ValueError(f"decouple: {self.label(node)} is called twice, in places that need different parameters")
        if change is not None and target not in self.changed:
            self.changed[target] = change(self.modules[target]).train(self.modules[target].training)
        doubles = self.is_batch_norm(node) and role != _PLAIN

        def operand(old: fx.Node) -> fx.Node:
            new = self.value(old, self._operand_form(node, old))
            return self._twice(new) if doubles else new

        new = self.decoupled.node_copy(node, operand)
        new.type = None  # an annotation that is a string cannot be saved
        if self._is_addition(node) and self.form(node) != _PLAIN:
            new.target, new.op = operator.add, "call_function"  # not in place: an operand may be read in another form
        return new

    def _emit_flatten(self, node: fx.Node) -> fx.Node:
        """A view or reshape of two halves, to twice the features where it names their number."""
        operand, (_, features) = node.all_input_nodes[0], self.sizes(node)
        value = self.value(operand, self.form(node))
        if isinstance(features, int) and features > 0:
            batch = self.decoupled.call_method("size", (value, 0))
            return self.decoupled.call_method("reshape", (value, batch, 2 * features))
        return self.decoupled.call_function(torch.flatten, (value, 1))

    def _role(self, node: fx.Node) -> tuple[str, Callable[[Any], nn.Module] | None]:
        """What a node's module becomes; calls of one module must agree in the first of the two."""
        if self._is_activation(node):
            return _PLAIN, _step_activation
        if self.is_batch_norm(node):
            form = self.form(node)
            shift = _SHIFT if form == _SHIFTED else 0.0
            return form, None if form == _PLAIN else lambda norm: _twofold_batch_norm(norm, shift)
        if not self._reads_halves(node):
            return _PLAIN, None
        form = self.halves[node.all_input_nodes[0]]
        layer = self.module(node)
        if getattr(layer, "weight_scale", "") is None:
            raise ValueError(
                f"decouple: {self.label(node)} has weight_scale=None, and a weight of +-1 cannot be halved"
            )
        if getattr(layer, "groups", 1) != 1:
            raise ValueError(
                f"decouple: {self.label(node)} reads a ternary activation in groups of channels, whose two halves "
                "cannot be set side by side"
            )
        return form, lambda layer: _twofold_reader(layer, bits=form == _BITS)


# --- modules ----------------------------------------------------------------------------------------------------------


def _step_activation(activation: TernaryActivation) -> StepActivation:
    return StepActivation(activation.surrogate)


def _twofold_batch_norm(norm: Any, shift: float) -> nn.Module:
    """A batch norm of twice the channels, with the bias lowered and raised by `shift`."""
    reference = norm.weight if norm.affine else norm.running_mean
    options = {} if reference is None else {"device": reference.device, "dtype": reference.dtype}
    new = type(norm)(
        2 * norm.num_features, norm.eps, norm.momentum, norm.affine or shift > 0, norm.track_running_stats, **options
    )
    with torch.no_grad():
        if norm.affine:
            new.weight.copy_(norm.weight.repeat(2))
            new.bias.copy_(norm.bias.repeat(2))
            new.weight.requires_grad_(norm.weight.requires_grad)
            new.bias.requires_grad_(norm.bias.requires_grad)
        if shift:
            new.bias[: norm.num_features] -= shift
            new.bias[norm.num_features :] += shift
        if norm.track_running_stats:
            new.running_mean.copy_(norm.running_mean.repeat(2))
            new.running_var.copy_(norm.running_var.repeat(2))
            new.num_batches_tracked.copy_(norm.num_batches_tracked)
    return new


def _twofold_reader(layer: Any, bits: bool) -> nn.Module:
    """A layer of twice the input channels whose weight is half the old one, twice; a binary one where it reads bits."""
    coupled = isinstance(layer, (CoupledConv2d, CoupledLinear))
    weight = layer.weight
    options: dict[str, Any] = {"bias": layer.bias is not None, "device": weight.device, "dtype": weight.dtype}
    if coupled:
        options["weight_scale"] = layer.weight_scale
    if coupled and bits:
        # The step activation in front has the straight-through mask.
        options |= {"encoding": "step", "surrogate": "identity"}
    if isinstance(layer, nn.Linear):
        kind: Any = BinaryLinear if coupled and bits else type(layer)
        new = kind(2 * layer.in_features, layer.out_features, **options)
    else:
        kind = BinaryConv2d if coupled and bits else type(layer)
        new = kind(
            2 * layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
            padding_mode=layer.padding_mode, **options,
        )
    with torch.no_grad():
        new.weight.copy_(torch.cat([weight, weight], 1) / 2)
        new.weight.requires_grad_(weight.requires_grad)
        if layer.bias is not None:
            new.bias.copy_(layer.bias)
            new.bias.requires_grad_(layer.bias.requires_grad)
    return new


# --- decouple ---------------------------------------------------------------------------------------------------------


def decouple(model: nn.Module, example_input: Any = None) -> fx.GraphModule:
    """The decoupled form of a coupled network: the same function, with two step activations for each ternary one.

    Behind a layer whose result a ternary activation reads, every channel is repeated: batch norm gets the channels
    twice, with its bias lowered and raised by 1/4. The layer that reads the activation gets twice the input channels,
    with half the weight for each copy; a coupled layer becomes a binary one (lowbit_ext.binary, encoding "step"). A sum
    that an activation reads, as in residual networks, is repeated whole: one summand brings the shift, which identity
    shortcuts carry on, and whatever else reads such a sum gets the mean of its two copies. The rest is copied.

    Evaluation and training mode agree with the coupled network's (but for the draws of dropout behind an activation),
    gradients do not: the two halves are free parameters for fine-tuning.

    Args:
        model: that torch.fx can trace, with TernaryActivation, convolutions, linear layers, batch norms and dropout as
            modules. Not modified.
        example_input: a tensor, or a tuple of the model's inputs, to compare the two networks on, value by value in
            float64 and evaluation mode. None: no comparison, and what is a flatten is told by its spelling: a view or
            reshape to two sizes of which the first is the batch's or the second a constant.

    Returns:
        torch.fx.GraphModule with the model's module names, mode and dtype; trains, packs, copies and saves like any
        other module.

    Warns:
        UserWarning: names a coupled layer that stays, because what is between it and a ternary activation may mix the
            activation's channels.

    Raises:
        TypeError: not a module.
        ValueError: the model has no TernaryActivation, or one whose input comes from no batch norm (through additions
            and pooling); a grouped convolution reads one; a module is shared by places that need different parameters;
            torch.fx cannot trace the model; or the networks differ on the example. The message names the module.

    Source:
        Kim et al., "BinaryDuo", ICLR 2020, section 4.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"decouple: model must be a torch.nn.Module, got {type(model).__name__}")
    if not any(isinstance(module, TernaryActivation) for module in model.modules()):
        raise ValueError("decouple: the model has no TernaryActivation")
    shapes: dict[str, tuple[int, ...]] = {}
    if example_input is not None:
        # Rounding beta -+ 1/4 to float32 can flip a bit, so the map itself is compared in float64.
        precise, inputs = copy.deepcopy(model).double(), _in_float64(example_input)
        traced = copy.deepcopy(precise)  # tracing adds constants to it
        expected = _values("model", traced, _trace(traced), inputs)
        shapes = {name: tuple(value.shape) for name, value in expected.items() if isinstance(value, Tensor)}
        decoupler, decoupled = _decoupled(precise, shapes)
        _check(decoupler, expected, _values("decoupled model", decoupled, decoupler.decoupled, inputs))
    decoupler, decoupled = _decoupled(model, shapes)
    for reason in decoupler.left():
        warnings.warn(f"decouple: {reason}", stacklevel=2)
    return decoupled


def _decoupled(model: nn.Module, shapes: dict[str, tuple[int, ...]]) -> tuple[_Decoupler, fx.GraphModule]:
    """How a model is decoupled, and a copy of it that is."""
    root = copy.deepcopy(model)
    decoupler = _Decoupler(root, shapes)
    for target, module in decoupler.changed.items():
        parent, _, name = target.rpartition(".")
        setattr(root.get_submodule(parent), name, module)
    return decoupler, fx.GraphModule(root, decoupler.decoupled, class_name=f"Decoupled{type(model).__name__}")


def _in_float64(example_input: Any) -> tuple[Any, ...]:
    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    for value in inputs:
        if isinstance(value, Tensor):
            _arguments.tensor("decouple", "example_input", value)
    return pytree.tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, inputs)


def _values(which: str, model: nn.Module, graph: fx.Graph, inputs: tuple[Any, ...]) -> dict[str, Any]:
    """Every node's value on the example, by name."""
    interpreter = fx.Interpreter(copy.deepcopy(model).eval(), garbage_collect_values=False, graph=graph)
    try:
        with torch.no_grad():
            interpreter.run(*copy.deepcopy(inputs))
    except Exception as error:
        shapes = ", ".join(str(tuple(value.shape)) for value in inputs if isinstance(value, Tensor))
        raise ValueError(f"decouple: the {which} does not run on the example {shapes}: {first_line(error)}") from error
    return {node.name: value for node, value in interpreter.env.items()}


def _check(decoupler: _Decoupler, coupled: dict[str, Any], decoupled: dict[str, Any]) -> None:
    """Compares all values on the example; raises ValueError at the first that differs."""
    for node in decoupler.graph.nodes:
        expected, form = coupled[node.name], decoupler.form(node)
        if not decoupler.is_needed(node) or not isinstance(expected, Tensor) or not expected.is_floating_point():
            continue
        value = decoupled[decoupler.values[node, form].name]
        if form in (_BITS, _MEANS):
            value = value.unflatten(1, (2, -1)).mean(1)
        elif form != _PLAIN:
            shift = _SHIFT if form == _SHIFTED else 0.0
            expected = torch.cat([expected - shift, expected + shift], 1)
        size = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
        if value.shape != expected.shape or not torch.allclose(value, expected, rtol=0.0, atol=_TOLERANCE * size):
            raise ValueError(
                f"decouple: the decoupled {decoupler.label(node)} differs from the coupled one on the example"
            )
