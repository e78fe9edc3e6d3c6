"""Modules on a changed graph that keep all that they had, through copies and pickles."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from torch import fx, nn


@dataclasses.dataclass(frozen=True)
class _Value:
    """A node by its name, where the node itself cannot go: in pickles."""

    name: str


def _by_name(value: Any) -> Any:
    return _Value(value.name) if isinstance(value, fx.Node) else value


class Rebuilt(fx.GraphModule):
    """A graph on a model's own tree of layers.

    Copies and pickles keep all of it. Those of a plain GraphModule lose layers that the graph does not call, keep no
    report, and trace the code again, which fixes the mode.
    """

    @staticmethod
    def of(model: nn.Module, graph: fx.Graph) -> Rebuilt:
        """The graph with everything that the model has as a module: parameters, buffers, children, hooks, mode."""
        state = {name: value for name, value in vars(model).items() if name in _OF_MODULES}
        for node in graph.nodes:
            head = str(node.target).partition(".")[0]
            if node.op == "get_attr" and head in vars(model):  # tensors that are neither parameters nor buffers
                state[head] = vars(model)[head]
        return Rebuilt._with_state(model, graph, state)

    @staticmethod
    def _with_state(root: nn.Module, graph: fx.Graph, state: dict[str, Any]) -> Rebuilt:
        made = Rebuilt(root, graph)
        made.__dict__.update(state)
        return made

    def _parts(self) -> tuple[dict[str, Any], list[Any]]:
        state = {name: value for name, value in vars(self).items() if name not in _OF_GRAPHS}
        nodes = []
        for node in self.graph.nodes:
            arguments: Any = (node.args, node.kwargs)
            nodes.append((node.op, node.target, *fx.node.map_aggregate(arguments, _by_name), node.name))
        return state, nodes

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, self._parts()

    def __deepcopy__(self, memo: dict[int, Any]) -> Rebuilt:
        made = memo[id(self)] = _rebuild(*copy.deepcopy(self._parts(), memo))
        return made

    def __copy__(self) -> Rebuilt:
        return _rebuild(*self._parts())


_OF_MODULES = frozenset(vars(nn.Module()))
_OF_GRAPHS = frozenset(vars(fx.GraphModule({}, fx.Tracer().trace(nn.Identity())))) - _OF_MODULES


def _rebuild(state: dict[str, Any], nodes: list[Any]) -> Rebuilt:
    root = nn.Module()
    root.__dict__.update(state)
    graph = fx.Graph()
    values: dict[str, fx.Node] = {}
    for op, target, args, kwargs, name in nodes:
        args, kwargs = fx.node.map_aggregate(
            (args, kwargs), lambda value: values[value.name] if isinstance(value, _Value) else value
        )
        values[name] = graph.create_node(op, target, args, kwargs, name)
    return Rebuilt._with_state(root, graph, state)
