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
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lowbit_ext.binary import BinaryConv2d, BinaryLinear
from lowbit_ext.duo.layers import CoupledConv2d, CoupledLinear, StepActivation, TernaryActivation

__all__ = ["decouple"]

_PLAIN, _COPIES, _SHIFTED, _BITS, _MEANS = "plain", "copies", "shifted", "bits", "means"
_SHIFT = 0.25

# Of values on the example, in float64, relative to the largest of them (or 1).
_TOLERANCE = 1e-9

_OURS = (BinaryConv2d, BinaryLinear, CoupledConv2d, CoupledLinear, StepActivation, TernaryActivation)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_READERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, CoupledConv2d, CoupledLinear)
_MAX_POOLS = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, F.max_pool1d, F.max_pool2d,
    torch.max_pool1d, torch.max_pool2d, F.adaptive_max_pool1d, F.adaptive_max_pool2d,
)  # fmt: skip
_AVG_POOLS = (
    nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, F.avg_pool1d, F.avg_pool2d,
    torch.avg_pool1d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d,
)  # fmt: skip
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_DROPOUT_CALLS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout)
_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return isinstance(module, _OURS) or super().is_leaf_module(module, qualified_name)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


class _Decoupler:
    """Finds the form of every value, then writes the decoupled graph and the modules that change."""

    def __init__(self, model: nn.Module) -> None:
        try:
            self.coupled = _Tracer().trace(model)
        except Exception as error:
            raise ValueError(
                "decouple: torch.fx cannot trace the model, which needs static control flow and TernaryActivation as "
                f"modules: {_first_line(error)}"
            ) from error
        self.modules = dict(model.named_modules())
        # Nodes with a ternary activation's value, and how it arrives; nodes whose value a batch norm can shift.
        self.halves: dict[fx.Node, str] = {}
        self.shiftable: set[fx.Node] = set()
        for node in self.coupled.nodes:
            self._classify(node)
        self.demands: dict[fx.Node, set[str]] = collections.defaultdict(set)
        for node in reversed(self.coupled.nodes):
            self._demand(node)
        self.graph = fx.Graph()
        self.values: dict[tuple[fx.Node, str], fx.Node] = {}
        self.roles: dict[str, str] = {}
        self.changed: dict[str, nn.Module] = {}
        for node in self.coupled.nodes:
            self.values[node, self.form(node)] = self._emit(node)

    # --- what a node is -----------------------------------------------------------------------------------------------

    def _is(self, node: fx.Node, kinds: tuple[Any, ...]) -> bool:
        """Whether a node calls a module, function or method of these."""
        kind = type(self.modules[str(node.target)]) if node.op == "call_module" else node.target
        return kind in kinds

    def name(self, node: fx.Node) -> str:
        """How messages name a node."""
        if node.op == "call_module":
            return f"{node.target} ({type(self.modules[str(node.target)]).__name__})"
        return f"{node.name} ({getattr(node.target, '__name__', node.target)})"

    def _is_flatten(self, node: fx.Node) -> bool:
        """(N, C, *spatial) -> (N, features)."""
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            return isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1)
        arguments = (*node.args[1:], *node.kwargs.values())
        if node.target in (torch.flatten, "flatten"):
            return arguments in ((1,), (1, -1))
        if node.target in ("view", "reshape", torch.reshape):
            sizes = arguments[0] if len(arguments) == 1 and isinstance(arguments[0], tuple | list) else arguments
            return bool(len(sizes) == 2 and sizes[1] == -1)
        return False

    def _averages_padding(self, node: fx.Node) -> bool:
        """Whether an average pooling adds up fewer pixels than it divides by."""
        if node.op != "call_module":
            named = {"padding", "divisor_override"} & set(node.kwargs)
            return node.target in _AVG_POOLS and (len(node.args) > 3 or bool(named))
        module: Any = self.modules[str(node.target)]
        if type(module) not in (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d):
            return False
        padded = module.padding not in (0, (0,), (0, 0), (0, 0, 0)) and module.count_include_pad
        return bool(padded or getattr(module, "divisor_override", None) is not None)

    def _keeps_form(self, node: fx.Node) -> bool:
        """Does the same to every channel and commutes with adding a number."""
        if self._is_flatten(node) or self._is(node, (nn.Identity, "contiguous")):
            return True
        return self._is(node, _MAX_POOLS + _AVG_POOLS) and not self._averages_padding(node)

    def _classify(self, node: fx.Node) -> None:
        inputs = node.all_input_nodes
        if self._is(node, (TernaryActivation,)):
            self.halves[node] = _BITS
        elif self._is(node, _BATCH_NORMS):
            self.shiftable.add(node)
        elif self._is(node, _ADDITIONS):
            both = len(inputs) == 2 and not node.kwargs and all(operand.op != "get_attr" for operand in inputs)
            if both and not self.shiftable.isdisjoint(inputs):
                self.shiftable.add(node)
        elif inputs and inputs[0] in self.halves:
            form = self.halves[inputs[0]]
            if self._is(node, _AVG_POOLS + _DROPOUTS):
                self.halves[node] = _MEANS
            # The larger of two ternary values has the larger bits; of means that is not so.
            elif self._keeps_form(node) and (form == _BITS or not self._is(node, _MAX_POOLS)):
                self.halves[node] = form
        elif inputs and inputs[0] in self.shiftable and self._keeps_form(node):
            self.shiftable.add(node)

    def _reads_halves(self, node: fx.Node) -> bool:
        """Whether a convolution or linear layer reads bits or means."""
        return self._is(node, _READERS) and node.all_input_nodes[0] in self.halves

    def _reads_batch_size(self, node: fx.Node) -> bool:
        if node.op == "call_method" and node.target == "size":
            return node.args[1:] == (0,)
        shape = node.target is getattr and node.args[1] == "shape"
        return shape and all(user.target is operator.getitem and user.args[1] == 0 for user in node.users)

    # --- which forms are needed ---------------------------------------------------------------------------------------

    def form(self, node: fx.Node) -> str:
        """The form that a node's own call gives; `value` derives others."""
        if node in self.halves:
            return self.halves[node]
        if node in self.shiftable:
            return next((form for form in (_SHIFTED, _COPIES) if form in self.demands[node]), _PLAIN)
        return _PLAIN

    def _operand_form(self, node: fx.Node, operand: fx.Node) -> str:
        """The form in which a node reads an operand."""
        form = self.form(node)
        if self._is(node, _ADDITIONS) and form != _PLAIN:
            return form if operand is self._carrier(node) else _COPIES
        if operand is not node.all_input_nodes[0]:
            return _PLAIN
        if self._is(node, (TernaryActivation,)):
            return _SHIFTED
        if node in self.halves or self._reads_halves(node) or self._reads_batch_size(node):
            return self.form(operand)
        return _PLAIN if self._is(node, _BATCH_NORMS) else form

    def _demand(self, node: fx.Node) -> None:
        """Asks a node's operands for what its own readers need of it."""
        if self._is(node, (TernaryActivation,)) and node.all_input_nodes[0] not in self.shiftable:
            raise ValueError(
                f"decouple: {self.name(node)} must read a batch norm, whose bias can be shifted by 1/4, directly or "
                f"through additions and pooling; it reads {self.name(node.all_input_nodes[0])}"
            )
        for operand in node.all_input_nodes:
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
            self._is(user, (TernaryActivation,)) or (self._keeps_form(user) and self._feeds_activation(user))
            for user in node.users
        )

    # --- writing the graph --------------------------------------------------------------------------------------------

    def value(self, node: fx.Node, form: str) -> fx.Node:
        """A node's value in a form, derived from its own where that is another."""
        key = (node, form)
        if key not in self.values:
            if form == _PLAIN:
                halves = self.graph.call_method("unflatten", (self.values[node, self.form(node)], 1, (2, -1)))
                self.values[key] = self.graph.call_method("mean", (halves, 1))
            else:
                self.values[key] = self._twice(self.value(node, _PLAIN))
        return self.values[key]

    def _twice(self, node: fx.Node) -> fx.Node:
        return self.graph.call_function(torch.cat, ([node, node], 1))

    def _emit(self, node: fx.Node) -> fx.Node:
        if self._is(node, _DROPOUT_CALLS):
            raise ValueError(
                f"decouple: {self.name(node)} would keep the mode it is traced in; use a torch.nn dropout module"
            )
        target = str(node.target)
        role, change = self._role(node)
        if node.op == "call_module" and self.roles.setdefault(target, role) != role:
            raise ValueError(f"decouple: {self.name(node)} is called twice, in places that need different parameters")
        if change is not None and target not in self.changed:
            self.changed[target] = change(self.modules[target]).train(self.modules[target].training)
        doubles = self._is(node, _BATCH_NORMS) and role != _PLAIN

        def operand(old: fx.Node) -> fx.Node:
            new = self.value(old, self._operand_form(node, old))
            return self._twice(new) if doubles else new

        new = self.graph.node_copy(node, operand)
        new.type = None  # an annotation that is a string cannot be saved
        if self._is(node, _ADDITIONS) and self.form(node) != _PLAIN:
            new.target, new.op = operator.add, "call_function"  # not in place: an operand may be read in another form
        return new

    def _role(self, node: fx.Node) -> tuple[str, Callable[[Any], nn.Module] | None]:
        """What a node's module becomes; calls of one module must agree in the first of the two."""
        if self._is(node, (TernaryActivation,)):
            return _PLAIN, _step_activation
        if self._is(node, _BATCH_NORMS):
            form = self.form(node)
            shift = _SHIFT if form == _SHIFTED else 0.0
            return form, None if form == _PLAIN else lambda norm: _twofold_batch_norm(norm, shift)
        if not self._reads_halves(node):
            return _PLAIN, None
        form = self.halves[node.all_input_nodes[0]]
        if getattr(self.modules[str(node.target)], "weight_scale", "") is None:
            raise ValueError(f"decouple: {self.name(node)} has weight_scale=None, and a weight of +-1 cannot be halved")
        if getattr(self.modules[str(node.target)], "groups", 1) != 1:
            raise ValueError(
                f"decouple: {self.name(node)} reads a ternary activation in groups of channels, whose two halves "
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
        )  # fmt: skip
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
            float64 and evaluation mode. None: no comparison.

    Returns:
        torch.fx.GraphModule with the model's module names, mode and dtype; trains, packs, copies and saves like any
        other module.

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
    if example_input is not None:
        # Rounding beta -+ 1/4 to float32 can flip a bit, so the map itself is compared in float64.
        _check(*_decoupled(copy.deepcopy(model).double()), example_input)
    return _decoupled(model)[2]


def _decoupled(model: nn.Module) -> tuple[_Decoupler, fx.GraphModule, fx.GraphModule]:
    """How a model is decoupled, a copy of it, and the decoupled one."""
    root = copy.deepcopy(model)
    decoupler = _Decoupler(root)
    coupled = fx.GraphModule(root, decoupler.coupled)  # keeps the modules that root loses
    for target, module in decoupler.changed.items():
        parent, _, name = target.rpartition(".")
        setattr(root.get_submodule(parent), name, module)
    return decoupler, coupled, fx.GraphModule(root, decoupler.graph, class_name=f"Decoupled{type(model).__name__}")


def _check(decoupler: _Decoupler, coupled: nn.Module, decoupled: nn.Module, example_input: Any) -> None:
    """Compares all values on the example; raises ValueError at the first that differs."""
    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    inputs = torch.utils._pytree.tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, inputs)
    values = []
    for which, model, graph in (("", coupled, decoupler.coupled), ("decoupled ", decoupled, decoupler.graph)):
        interpreter = fx.Interpreter(copy.deepcopy(model).eval(), garbage_collect_values=False, graph=graph)
        try:
            with torch.no_grad():
                interpreter.run(*copy.deepcopy(inputs))
        except Exception as error:
            shapes = ", ".join(str(tuple(value.shape)) for value in inputs if isinstance(value, Tensor))
            raise ValueError(
                f"decouple: the {which}model does not run on the example {shapes}: {_first_line(error)}"
            ) from error
        values.append(interpreter.env)
    for node in decoupler.coupled.nodes:
        expected, form = values[0][node], decoupler.form(node)
        if not isinstance(expected, Tensor) or not expected.is_floating_point():
            continue
        value = values[1][decoupler.values[node, form]]
        if form in (_BITS, _MEANS):
            value = value.unflatten(1, (2, -1)).mean(1)
        elif form != _PLAIN:
            shift = _SHIFT if form == _SHIFTED else 0.0
            expected = torch.cat([expected - shift, expected + shift], 1)
        size = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
        if value.shape != expected.shape or not torch.allclose(value, expected, rtol=0.0, atol=_TOLERANCE * size):
            raise ValueError(
                f"decouple: the decoupled {decoupler.name(node)} differs from the coupled one on the example"
            )
