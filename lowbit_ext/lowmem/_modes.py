"""Training and evaluation in one graph: a model is traced in both modes, and flags that follow the mode stay flags."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import fx, nn

from lowbit_ext._graph import trace

_DEPENDS = "its graph depends on which arguments are given"


class _Mode:
    """Stands for a module's flag `training` among a node's arguments."""


def trace_in_both_modes(model: nn.Module, is_whole: Callable[[nn.Module], bool]) -> fx.Graph | None:
    """The graph, if it is the same in training and evaluation but for flags that follow the mode; None otherwise.

    Such flags, as a dropout's `training=self.training`, are left to read_modes(). Raises TraceError where the graph
    depends on which optional arguments are given.
    """
    graph, evaluation = trace(model.train(), is_whole), trace(model.eval(), is_whole)
    _check_optional(model, is_whole, evaluation)
    same = len(graph.nodes) == len(evaluation.nodes)
    for node, other in zip(graph.nodes, evaluation.nodes, strict=False):
        same = same and len(node.args) == len(other.args) and node.kwargs.keys() == other.kwargs.keys()
        if not same:
            break
        args = tuple(map(_mark_mode, node.args, other.args))
        kwargs = {key: _mark_mode(value, other.kwargs[key]) for key, value in node.kwargs.items()}
        other_args = tuple(_Mode if a is _Mode else b for a, b in zip(args, other.args, strict=True))
        other_kwargs = {key: _Mode if kwargs[key] is _Mode else value for key, value in other.kwargs.items()}
        same = _signature(node, args, kwargs) == _signature(other, other_args, other_kwargs)
        node.args, node.kwargs = args, kwargs
    return graph if same else None


def _check_optional(model: nn.Module, is_whole: Callable[[nn.Module], bool], graph: fx.Graph) -> None:
    """Raises TraceError where the graph of a call with all arguments does not serve calls without optional ones."""
    parameters = inspect.signature(type(model).forward).parameters.values()
    optional = [parameter.name for parameter in parameters if parameter.default is None]
    if optional:
        try:
            other = trace(model, is_whole, absent=optional)
        except Exception:  # the user's forward may raise anything, of None all the more
            raise fx.proxy.TraceError(_DEPENDS) from None
        if _calls(other) != _calls(graph):
            raise fx.proxy.TraceError(_DEPENDS)


def _calls(graph: fx.Graph) -> list[tuple[str, Any]]:
    nodes = [node for node in graph.nodes if node.op != "placeholder"]
    return [(node.op, node.target) for node in nodes if getattr(node.target, "__name__", "") != "_assert_is_none"]


def read_modes(graph: fx.Graph) -> None:
    """Makes the flags that followed the mode while tracing be read from their modules at every call."""
    for node in graph.nodes:
        if _Mode not in (*node.args, *node.kwargs.values()):
            continue
        stack = list(node.meta.get("nn_module_stack", {}).values())
        path = stack[-1][0] if stack else ""
        with graph.inserting_before(node):
            # Not Graph.get_attr, which warns of what is no tensor.
            mode = graph.create_node("get_attr", f"{path}.training" if path else "training")
        node.args = tuple(mode if value is _Mode else value for value in node.args)
        node.kwargs = {key: mode if value is _Mode else value for key, value in node.kwargs.items()}


def _mark_mode(in_training: Any, in_evaluation: Any) -> Any:
    return _Mode if in_training is True and in_evaluation is False else in_training


def _signature(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    return node.op, node.target, str(args), str(kwargs)
