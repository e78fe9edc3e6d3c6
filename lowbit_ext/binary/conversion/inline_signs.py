"""Signs that a module's forward spells out, with any straight-through estimator, become activations of its graph."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from lowbit_ext._graph import first_line, trace
from lowbit_ext._rebuilt import Rebuilt
from lowbit_ext.binary.conversion.recognition import Levels, is_sign, levels_of, surrogate_of
from lowbit_ext.binary.layers import BinaryActivation

_TRACING = threading.RLock()


@contextlib.contextmanager
def _whole_functions(module: nn.Module) -> Iterator[None]:
    """While tracing, a call of an autograd.Function is one node, which has the function's own derivative.

    Also one by another name, `sign = Sign.apply`, among the module's attributes or in the file of its forward.
    """
    original = vars(torch.autograd.Function)["apply"]

    def apply(cls: Any, *arguments: Any, **options: Any) -> Any:
        for value in arguments:
            if isinstance(value, fx.Proxy):
                return value.tracer.create_proxy("call_function", cls.apply, arguments, options)
        return original.__func__(cls, *arguments, **options)

    places = (vars(module), getattr(type(module).forward, "__globals__", {}))
    with _TRACING:
        aliases = [
            (place, name, value) for place in places for name, value in place.items()
            if getattr(value, "__func__", None) is original.__func__
        ]
        torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment]
        try:
            for place, name, value in aliases:
                place[name] = value.__self__.apply
            yield
        finally:
            torch.autograd.Function.apply = original  # type: ignore[method-assign]
            for place, name, value in aliases:
                place[name] = value


def _is_function(node: fx.Node) -> bool:
    owner = getattr(node.target, "__self__", None)
    return isinstance(owner, type) and issubclass(owner, torch.autograd.Function)


def _graphs(module: nn.Module) -> fx.Graph:
    """The graph of a module's own forward, the same in both modes; its children are one node each."""
    training = module.training
    try:
        graphs = []
        for mode in (True, False):
            module.training = mode
            with _whole_functions(module):
                graphs.append(trace(module, is_whole=lambda child: True))
    finally:
        module.training = training
    if str(graphs[0]) != str(graphs[1]):
        raise ValueError("its graph is another one in evaluation")
    return graphs[1]


class _Block:
    """A module, its graph and the values of its nodes on an example."""

    def __init__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.module, self.graph = module, _graphs(module)
        runner = fx.Interpreter(module, garbage_collect_values=False, graph=self.graph)
        runner.run(*inputs)
        self.values = runner.env

    def find_sign(self, node: fx.Node) -> tuple[fx.Node, Callable[[Tensor], Tensor]] | None:
        """The value whose sign a node is, and the function from one to the other."""
        value = self.values.get(node)
        if node.op not in ("call_function", "call_method") or not isinstance(value, Tensor):
            return None
        if not value.is_floating_point() or not value.numel() or not isinstance(levels_of(value), Levels):
            return None
        for source in _ancestors(node):
            given = self.values.get(source)
            if not isinstance(given, Tensor) or not given.is_floating_point() or given.shape != value.shape:
                continue

            def function(values: Tensor, source: fx.Node = source) -> Any:
                return self._evaluate(node, {source: values})

            if is_sign(function, given):
                return source, function
        return None

    def _evaluate(self, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
        """A node's value where those of others are known; fails at inputs of the module that are not."""
        if node in known:
            return known[node]
        if node.op == "get_attr":
            result = self.values[node]
        elif node.op in ("call_function", "call_method"):
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda value: self._evaluate(value, known))
            called: Any = getattr(Tensor, str(node.target)) if node.op == "call_method" else node.target
            result = called(*args, **kwargs)
        else:
            raise ValueError(f"{node} is not made of the source alone")
        known[node] = result
        return result

    def replace_signs(self, otherwise: str) -> list[str]:
        """Puts activations for signs; returns their surrogates, with a remark where it is not the sign's own."""
        found: list[str] = []
        erased: set[fx.Node] = set()
        for node in list(reversed(self.graph.nodes)):
            sign = None if node in erased else self.find_sign(node)
            if sign is None:
                continue
            source, function = sign
            own = surrogate_of(function, self.values[source])
            found.append(f"surrogate {own or otherwise!r}{'' if own else ', in place of a derivative of its own'}")
            name = "sign" if not hasattr(self.module, "sign") else f"sign_{len(found)}"
            while hasattr(self.module, name):
                name += "_"
            self.module.add_module(name, BinaryActivation("sign", own or otherwise))
            with self.graph.inserting_before(node):
                made = self.graph.call_module(name, (source,))
            node.replace_all_uses_with(made)
            self._erase(node, erased)
        return found

    def _erase(self, node: fx.Node, erased: set[fx.Node]) -> None:
        """Erases a node that nobody reads, and what only it has read."""
        waiting = [node]
        while waiting:
            unused = waiting.pop()
            if unused in erased or unused.users or unused.op not in ("call_function", "call_method", "get_attr"):
                continue
            waiting.extend(unused.all_input_nodes)
            self.graph.erase_node(unused)
            erased.add(unused)

    def rebuilt(self) -> nn.Module:
        """The module on its changed graph, with all that it has."""
        if any(map(_is_function, self.graph.nodes)):
            raise ValueError("it calls an autograd.Function that is no sign, which no graph can be saved with")
        made = Rebuilt.of(self.module, self.graph)
        vars(made).update({name: value for name, value in vars(self.module).items() if name not in vars(made)})
        return made


def _ancestors(node: fx.Node) -> list[fx.Node]:
    """What a node is made of, the nearest first in the order of the graph."""
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        new = [value for value in waiting.pop().all_input_nodes if value not in found]
        found.update(new)
        waiting.extend(new)
    return [other for other in reversed(node.graph.nodes) if other in found]


def with_activations(module: nn.Module, inputs: tuple[Any, ...], otherwise: str) -> tuple[nn.Module, list[str]] | str:
    """A module whose forward spells out signs, with activations in their place.

    Args:
        module: gets the activations as children, named sign.
        inputs: those of a call on the example.
        otherwise: surrogate where the derivative is none of ours.

    Returns:
        The module on its own graph and a remark on each sign; none where there is no sign. Or why it stays as it is.
    """
    children = dict(module._modules)
    try:
        block = _Block(module, inputs)
        found = block.replace_signs(otherwise)
        return (block.rebuilt() if found else module), found
    except Exception as error:  # tracing runs somebody's forward, which may raise anything
        module._modules.clear()
        module._modules.update(children)
        return first_line(error)
