"""Rewrites the graph of a model for convert(): every coded value gets a second node, its codes, which readers take."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from lowbit_ext._graph import Pool, Traced
from lowbit_ext._rebuilt import Rebuilt
from lowbit_ext._torch import Convolution, StatisticsNorm
from lowbit_ext.lowmem import activations, blocks, norms
from lowbit_ext.lowmem._forms import FINE_BITS
from lowbit_ext.lowmem._layers import (
    CURVES,
    Conversion,
    batch_norm_class,
    curve_of,
    has_hooks,
    has_own_activation,
    join,
    keeps_bits,
    of_own_layer,
)
from lowbit_ext.lowmem._modes import read_modes
from lowbit_ext.lowmem._stored import Curve
from lowbit_ext.lowmem.codes import RANGES

_RELU_CALLS = (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_")
_IN_PLACE_CALLS = (
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem, F.relu_, torch.relu_,
)
# Results in memory of their own; those of other calls may be views of an argument.
_FRESH_CALLS = (operator.add, operator.sub, operator.mul, operator.truediv, torch.add, torch.cat, "add", "mul", "sub")
_FRESH_LAYERS = (
    nn.Linear, Convolution, StatisticsNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.MaxPool2d, nn.AvgPool2d,
)
# Results that may be views of the first argument, beside those of dropout.
_VIEWS = frozenset((
    "view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "t", "transpose", "permute", "movedim",
    "squeeze", "unsqueeze", "expand", "expand_as", "narrow", "select", "chunk", "split", "unbind", "getitem", "detach",
    "to", "float", "contiguous", nn.Identity, nn.Flatten, nn.Unflatten,
))
_KEEPS_RESULT = "it keeps its result"
_LEFT: dict[type[nn.Module], str] = {
    nn.Tanh: _KEEPS_RESULT, nn.Sigmoid: _KEEPS_RESULT, nn.Softmax: _KEEPS_RESULT, nn.LogSoftmax: _KEEPS_RESULT,
}
_PRODUCTS = (operator.mul, torch.mul, "mul")
_CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)


class Converter(Traced):
    """Rewrites a traced graph: every coded value gets a second node, its codes, which readers take."""

    def __init__(
        self, model: nn.Module, graph: fx.Graph, prefix: str, bits: int, span: float, found: list[Conversion],
        convert_within: Callable[[nn.Module, str], nn.Module],
    ) -> None:
        super().__init__(model, graph)
        self.prefix, self.bits, self.span, self.found = prefix, bits, span, found
        self.convert_within = convert_within
        self.changed: dict[nn.Module, nn.Module] = {}
        self.fresh: set[fx.Node] = set()  # values that the rules below make
        self.codes: dict[fx.Node, fx.Node] = {}  # value -> its codes
        self.flat: set[fx.Node] = set()  # coded values that were flattened: for linear layers alone
        self._split_norms()
        for node in graph.nodes:
            self._visit(node)
        read_modes(graph)
        for module in self.modules.values():
            module._modules.update({
                name: self.changed[child] for name, child in module._modules.items() if child in self.changed
            })
        self.result = Rebuilt.of(model, graph)

    # --- nodes --------------------------------------------------------------------------------------------------------

    def _split_norms(self) -> None:
        """Calls of what batch norms have within become nodes behind them."""
        for node in list(self.graph.nodes):
            if has_own_activation(self.module(node)):
                value = node
                for name in ("drop", "act"):
                    if type(self.modules[f"{node.target}.{name}"]) is nn.Identity:
                        continue
                    with self.graph.inserting_after(value):
                        behind = self.graph.call_module(f"{node.target}.{name}", (value,))
                    value.replace_all_uses_with(behind, delete_user_cb=lambda user, own=behind: user is not own)
                    value = behind

    def is_batch_norm(self, node: fx.Node) -> bool:
        """A batch norm that has a form with codes."""
        return node.op == "call_module" and batch_norm_class(self.modules[str(node.target)]) is not None

    def _curve(self, node: fx.Node) -> Curve | nn.Module | None:
        module, kind = self.module(node), self.kind(node)
        if has_hooks(module):
            return None
        names = tuple(name for name, _ in CURVES[kind][1]) if kind in CURVES else ()
        return curve_of(kind, self.options(node, names), module)

    def _note(self, node: fx.Node, converted: bool, how: str) -> None:
        entry = Conversion(join(self.prefix, self.name(node)), self.kind_name(node), converted, how)
        if entry not in self.found:
            self.found.append(entry)

    def _is_relu(self, node: fx.Node) -> bool:
        module = self.module(node)
        if module is not None:
            return type(module) is nn.ReLU and not has_hooks(module)
        return node.op in ("call_function", "call_method") and node.target in _RELU_CALLS

    def _writes(self, node: fx.Node) -> bool:
        """Whether a node changes its first argument in place."""
        if node.op == "call_module":
            return bool(getattr(self.module(node), "inplace", False))
        named = isinstance(node.target, str) and node.target.endswith("_") and not node.target.endswith("__")
        by_position = node.target is F.relu and len(node.args) > 1 and bool(node.args[1])
        return named or by_position or node.target in _IN_PLACE_CALLS or bool(node.kwargs.get("inplace"))

    def _is_private(self, value: fx.Node) -> bool:
        """Whether its only user alone reads the memory of a value."""
        if len(value.users) > 1 or value.op in ("placeholder", "get_attr"):
            return False
        fresh = value in self.fresh or value.target in _FRESH_CALLS or isinstance(self.module(value), _FRESH_LAYERS)
        return fresh or all(map(self._is_private, value.all_input_nodes))

    def _is_written(self, value: fx.Node) -> bool:
        """Whether a value, or a view of it, is changed in place: then codes no longer stand for it."""
        return any(
            (self._writes(user) and not self._is_replaced(user)) or (self._is_view(user) and self._is_written(user))
            for user in value.users if user.args and user.args[0] is value
        )

    def _is_replaced(self, node: fx.Node) -> bool:
        """Whether a function of one element takes the place of one that writes into its argument."""
        replaced = self._is_relu(node) or self._curve(node) is not None
        return replaced and all(map(self._is_private, node.all_input_nodes))

    def _is_view(self, node: fx.Node) -> bool:
        kind = self.kind(node)
        dropout = self.is_dropout(node) or kind is activations.dropout
        return dropout or kind in _VIEWS or getattr(kind, "__name__", "") in _VIEWS

    def _replace(self, node: fx.Node, made: fx.Node) -> fx.Node:
        """Puts the value of `made`, which gives a value and its codes, in the place of a node; returns the value."""
        with self.graph.inserting_after(made):
            codes = self.graph.call_function(operator.getitem, (made, 1))
            value = self.graph.call_function(operator.getitem, (made, 0))
        node.replace_all_uses_with(value, delete_user_cb=lambda user: user not in (value, codes))
        self.fresh.add(value)
        if not self._is_written(value):
            self.codes[value] = codes
        return value

    # --- rules --------------------------------------------------------------------------------------------------------

    def _visit(self, node: fx.Node) -> None:
        module, pool = self.module(node), self.pool(node)
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        if self.is_batch_norm(node):
            self._batch_norm(node)
        elif source is not None and self._is_relu(node):
            self._relu(node, source)
        elif source is not None and self._curve(node) is not None:
            self._activation(node, source)
        elif keeps_bits(module) is not None:
            self._note(node, *of_own_layer(module))
        elif isinstance(module, nn.Linear | Convolution):
            self._reader(node, source)
        elif pool is not None and len(pool.padding) == 2 and not pool.output:
            self._pool(node, source, pool)
        elif pool is not None and pool.kind == "average" and set(pool.output) == {1}:
            self._note(node, True, "keeps nothing")
        elif source is not None and type(module) is nn.Dropout:
            self._dropout(node, source)
        elif self.is_identity(node) or self.is_reshape(node):
            self._pass_on(node, source)
        elif type(module) in norms.NORMS or node.target in norms.FUNCTIONS:
            self._norm(node)
        elif node.target in _PRODUCTS:
            self._product(node)
        elif node.target in _CONCATENATIONS:
            self._concatenation(node)
        elif module is not None:
            whole = type(module).__module__.startswith("torch.nn") and not isinstance(module, nn.Sequential)
            if not whole and any(True for _ in module.children()):
                name = join(self.prefix, self.name(node))
                self.changed[module] = self.convert_within(module, name)
            else:
                self._note(node, False, _LEFT.get(type(module), "no rule for it"))

    def _pass_on(self, node: fx.Node, source: fx.Node | None) -> None:
        """A value with the elements of its source in the same order: the source's codes stand for it."""
        if has_hooks(self.module(node)):
            return self._note(node, False, "hooks watch its result")
        if source in self.codes:
            self.codes[node] = self.codes[source]
            if source in self.flat or self.is_reshape(node):
                self.flat.add(node)
        return None

    def _batch_norm(self, node: fx.Node) -> None:
        module = self.modules[str(node.target)]
        if has_hooks(module):
            return self._note(node, False, "hooks watch its result")
        users = list(node.users)
        relu = users[0] if len(users) == 1 and self._is_relu(users[0]) else None
        (bits, finer), span = self._bits_of(node), self.span
        if finer and span == RANGES[self.bits]:
            span = RANGES[bits]
        self._note(node, True, f"codes of its result{finer}{'' if relu is None else ' behind ReLU'}")
        if module not in self.changed:
            self.changed[module] = batch_norm_class(module).like(module, bits, span)
        if relu is not None:
            relu.replace_all_uses_with(node)
            self.graph.erase_node(relu)
            node.args = (*node.args, True)
        self._replace(node, node)
        return None

    def _wants_fine(self, node: fx.Node) -> bool:
        """Whether it is an activation function other than ReLU, maybe behind what passes values.

        A derivative that bends wants 8 bits. Behind ReLU6 it is the depthwise convolutions: with 4 bits the cosine of
        MobileNetV2's gradients is 0.96, with ReLU and full convolutions above 0.99.
        """
        if (self.is_identity(node) or self.is_dropout(node)) and len(node.users) == 1:
            return self._wants_fine(next(iter(node.users)))
        return self._curve(node) is not None

    def _bits_of(self, node: fx.Node) -> tuple[int, str]:
        """The bits of a norm's codes, and how a report names those that are not the model's."""
        finer = self.bits < FINE_BITS and any(map(self._wants_fine, node.users))
        return (FINE_BITS, f" in {FINE_BITS} bits") if finer else (self.bits, "")

    def _insert(self, node: fx.Node, function: Any, *arguments: Any, **options: Any) -> fx.Node:
        """Puts a call, which gives a value and codes of it or None, in the place of a node; returns the value."""
        with self.graph.inserting_before(node):
            both = self.graph.call_function(function, arguments, options)
        value = self._replace(node, both)
        self.graph.erase_node(node)
        return value

    def _norm(self, node: fx.Node) -> None:
        module = self.module(node)
        if has_hooks(module):
            return self._note(node, False, "hooks watch its result")
        bits, finer = self._bits_of(node)
        self._note(node, True, f"codes of its normalised value{finer}")
        if module is None:
            self._insert(node, norms.FUNCTIONS[node.target], *node.args, **node.kwargs, bits=bits)
            return None
        if module not in self.changed:
            self.changed[module] = norms.NORMS[type(module)].like(module, bits)
        self._replace(node, node)
        return None

    def _activation(self, node: fx.Node, source: fx.Node) -> None:
        if self._writes(node) and not self._is_private(source):
            return self._note(node, False, "it changes a value in place that others may read")
        curve = self._curve(node)
        assert curve is not None
        bent = activations.is_bent(curve)
        how = "a bit an element" if not bent else "reads the codes of its input" if source in self.codes else (
            f"codes of its input in {FINE_BITS} bits"
        )
        self._note(node, True, how)
        codes = None if source in self.flat else self.codes.get(source)
        if isinstance(curve, nn.Module):
            with self.graph.inserting_before(node):
                curve = self.graph.create_node("get_attr", str(node.target))  # type: ignore[assignment]
        self._insert(node, activations.activation, source, codes, curve)
        return None

    def _dropout(self, node: fx.Node, source: fx.Node) -> None:
        module = self.modules[str(node.target)]
        if has_hooks(module) or (module.inplace and not self._is_private(source)):
            return self._note(node, False, "hooks watch its result, or others read what it changes in place")
        self._note(node, True, "a bit an element")
        with self.graph.inserting_before(node):
            mode = self.graph.create_node("get_attr", f"{node.target}.training")
        value = self._insert(node, activations.dropout, source, self.codes.get(source), module.p, mode)
        self.fresh.discard(value)  # in evaluation it is its argument
        return None

    def _product(self, node: fx.Node) -> None:
        """Of a value with codes and a smaller one; which is the smaller, only the call tells."""
        codes = [
            self.codes.get(value) if isinstance(value, fx.Node) and value not in self.flat else None
            for value in node.args
        ]
        if len(codes) == 2 and codes != [None, None] and not node.kwargs:
            self._note(node, True, "reads the codes of its input, if the other one is smaller")
            self._insert(node, activations.product, *node.args, *codes)

    def _concatenation(self, node: fx.Node) -> None:
        values, dim = node.args[0] if node.args else None, node.kwargs.get("dim", (*node.args, 0)[1])
        if not isinstance(values, list | tuple) or not isinstance(dim, int) or not all(
            value in self.codes and value not in self.flat for value in values
        ):
            return
        self._note(node, True, "joins the codes of its parts")
        codes = [self.codes[value] for value in values]
        self._insert(node, activations.concatenate, list(values), codes, dim)

    def _relu(self, node: fx.Node, source: fx.Node) -> None:
        if self._writes(node) and not self._is_private(source):
            return self._note(node, False, "it changes a value in place that others may read")
        self._note(node, True, "codes of its result in groups of 256")
        self._insert(node, activations.relu, source, self.bits)
        return None

    def _reader(self, node: fx.Node, source: fx.Node | None) -> None:
        module = self.modules[str(node.target)]
        reason = blocks.unreadable(module)
        if reason is None and (source is None or (source.op == "placeholder" and not self.prefix)):
            reason = "its input is the model's own"
        if reason is None and module._forward_pre_hooks:
            reason = "a hook may change its input"
        if reason is not None:
            return self._note(node, False, reason)
        if module not in self.changed:
            self.changed[module] = blocks.READERS[type(module)].like(module, self.bits)
        if source in self.codes and (source not in self.flat or isinstance(module, nn.Linear)):
            node.kwargs = {"stored": self.codes[source]}
            self._note(node, True, "reads the codes of its input")
        else:
            self._note(node, True, "codes of its input in groups of 256")
        return None

    def _pool(self, node: fx.Node, source: fx.Node | None, pool: Pool) -> None:
        if has_hooks(self.module(node)):
            return self._note(node, False, "hooks watch its result")
        if source is None or not blocks.is_poolable(pool):
            return self._note(node, False, "no rule for these arguments")
        self._note(node, True, "keeps a byte a window" if pool.kind == "max" else "keeps nothing")
        codes = None if source in self.flat else self.codes.get(source)
        value = self._insert(node, blocks.pool, source, codes, pool)
        if codes is None:
            self.codes.pop(value, None)
        return None
