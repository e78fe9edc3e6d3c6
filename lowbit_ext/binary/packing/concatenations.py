"""Concatenations along the channels, and slices of them, in the form in which packing reads them.

What joins several results of binary layers stays in parts as long as it can: each part has floats and bits in the pass
behind its own accumulator.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

if TYPE_CHECKING:
    from lowbit_ext.binary.packing.chains import Model

_SPLITS = (torch.split, torch.chunk, "split", "chunk")


def parts(model: Model, node: fx.Node) -> list[tuple[fx.Node, int, int]]:
    """The values that a concatenation along the channels joins, with their ranges of channels; [] of others."""
    if node.target not in (torch.cat, torch.concat) or model.axis(node) != 1:
        return []
    tensors, axis, *_ = (*node.args, *node.kwargs.values(), 0)
    if not isinstance(tensors, tuple | list) or axis not in (1, 1 - len(model.shape(node))):
        return []
    found, begin = [], 0
    for part in tensors:
        end = begin + model.shape(part)[1]  # type: ignore[arg-type]
        found.append((part, begin, end))
        begin = end
    return found if len({part for part, _, _ in found}) == len(found) else []  # type: ignore[return-value]


def simplify(model: Model) -> bool:
    """Rewrites the graph; whether it changed.

    Concatenations of concatenations become one, slices of them their parts: the value of a dense block grows by parts
    that then need no copy. Steps with a constant for each channel behind a concatenation run on its parts.
    """
    found = False
    for node in list(model.graph.nodes):
        if _narrow(model, node) or _flatten(model, node) or _move_behind(model, node):
            found = True
    if found:
        fx.GraphModule(model.root, model.graph).graph.eliminate_dead_code()
    return found


def _narrow(model: Model, node: fx.Node) -> bool:
    """A slice of a concatenation becomes the parts that it takes, if they are whole."""
    taken = _channel_range(model, node)
    if taken is None:
        return False
    source, begin, end = taken
    inside = [part for part in parts(model, source) if begin <= part[1] and part[2] <= end]
    if not inside or inside[0][1] != begin or inside[-1][2] != end:
        return False
    if len(inside) == 1:
        node.replace_all_uses_with(inside[0][0])
    else:
        node.op, node.target, node.kwargs = "call_function", torch.cat, {}
        node.args = ([part for part, _, _ in inside], 1)
    return True


def _channel_range(model: Model, node: fx.Node) -> tuple[fx.Node, int, int] | None:
    """Of a slice along the channels, the value it is taken of and its range; None of others."""
    if model.kind(node) is operator.getitem and isinstance(node.args[1], tuple) and len(node.args[1]) > 1:
        source: Any = node.args[0]
        batch, channels, *others = node.args[1]
        whole = all(index in (slice(None), ...) for index in (batch, *others))
        if whole and isinstance(channels, slice) and model.shape(source):
            begin, end, step = channels.indices(model.shape(source)[1])
            return (source, begin, end) if step == 1 else None
    if model.kind(node) is operator.getitem and isinstance(node.args[1], int):
        pieces = node.args[0]
        if isinstance(pieces, fx.Node) and model.kind(pieces) in _SPLITS and _axis_of(pieces, 2) == 1:
            sizes = [piece.shape[1] for piece in model.values[pieces]]
            index = node.args[1] % len(sizes)
            return pieces.args[0], sum(sizes[:index]), sum(sizes[: index + 1])  # type: ignore[return-value]
    return None


def _axis_of(node: fx.Node, position: int) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get("dim", 0)


def _flatten(model: Model, node: fx.Node) -> bool:
    """A concatenation of concatenations becomes one."""
    joined = parts(model, node)
    if not any(parts(model, part) for part, _, _ in joined):
        return False
    flat = [inner for part, _, _ in joined for inner, _, _ in parts(model, part) or [(part, 0, 0)]]
    node.args, node.kwargs = (flat, 1), {}
    return True


def _move_behind(model: Model, node: fx.Node) -> bool:
    """A step on a concatenation, its only reader, becomes steps on its parts, and then the concatenation."""
    variables = model.variables(node) if model.shape(node) else []
    source = variables[0] if len(variables) == 1 else None
    joined = [] if source is None or len(source.users) > 1 else parts(model, source)
    constant, slope = model.channel_constant(node), model.slope(node)
    if not joined or (constant is None and slope is None and not model.is_monotone(node)):
        return False
    results = []
    with model.graph.inserting_before(node):
        for index, (part, begin, end) in enumerate(joined):
            name = f"{model.name(node)}_{index}"
            if slope is not None:
                prelu = nn.PReLU(end - begin).eval()
                prelu.weight.data = slope[begin:end].clone()
                step = model.graph.create_node("call_module", model.add_module(name, prelu), (part,))
            else:
                arguments: Any = fx.map_arg(node.args, {source: part}.get)
                if constant is not None:
                    pixels = (1,) * (len(model.shape(node)) - 2)
                    factor = model.add_constant(f"{name}_constant", constant[begin:end].reshape(-1, *pixels).clone())
                    arguments = tuple(part if argument is source else factor for argument in node.args)
                step = model.graph.create_node(node.op, node.target, arguments, node.kwargs)
            model.record(step, model.values[node][:, begin:end])
            results.append(step)
    node.op, node.target, node.args, node.kwargs = "call_function", torch.cat, (results, 1), {}
    return True
