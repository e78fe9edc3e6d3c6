"""A packed graph's calls for inputs of one shape: every kernel's arguments bound, results in planned buffers.

A buffer is used again as soon as nobody reads it, a residual's by the sum. A run is a list of calls of kernels and of
torch's layers, and allocates nothing but what those layers do.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from lowbit_ext import _native
from lowbit_ext._torch import pytree

_PAGE = 4096  # bytes


class Value(NamedTuple):
    """What a node gives: its tensor in the plan's own run, and where later runs have theirs; None in a buffer."""

    tensor: Tensor
    slot: int | None = None


def _is_value(leaf: Any) -> bool:
    return isinstance(leaf, Value)


class _Buffer:
    """Memory of the plan, and the last node that reads what is in it."""

    def __init__(self, memory: Tensor) -> None:
        self.memory, self.last = memory, -1


class Plan:
    """A packed graph's calls for inputs of one shape, on buffers of its own: one call at a time.

    Args:
        body: the packed graph.
        inputs: on which it is run once.
        after: a node whose value is the input instead, and behind which the plan begins.
        until: a node whose value is the result, and with which the plan ends.
        functions: called in place of these nodes' modules.

    Attributes:
        bytes: of the buffers, and of the largest result of a layer of torch.
        head: the first node that gives vectors (N, features) and is all that later nodes read, or None.
    """

    def __init__(
        self, body: fx.GraphModule, inputs: Sequence[Tensor], after: fx.Node | None = None,
        until: fx.Node | None = None, functions: Mapping[fx.Node, Callable[..., Any]] = MappingProxyType({}),
    ) -> None:
        self._functions = functions
        self._calls: list[Callable[[list[Any]], None]] = []
        self._buffers: dict[int, _Buffer] = {}  # by address
        self._free: list[Tensor] = []
        self._memory: dict[int, int] = {}  # sizes of all buffers, by address
        self._kept: list[Any] = []  # what bound addresses point to
        self._slots = 0
        self._largest = 0
        self._now = 0
        values: dict[fx.Node, Any] = {}
        waiting = iter(inputs)
        nodes = list(body.graph.nodes)
        order = {node: index for index, node in enumerate(nodes)}
        modules = dict(body.named_modules())
        for node in nodes if after is None else nodes[order[after] :]:
            self._now = order[node]
            if node.op == "placeholder" or node is after:
                values[node] = self._new_value(next(waiting))
            elif node.op == "output":
                self._outputs = fx.map_arg(node.args[0], values.__getitem__)
            else:
                values[node] = self._node(body, modules, node, values)
            last = max((order[user] for user in node.users), default=self._now)
            for value in pytree.tree_leaves(values.get(node), is_leaf=_is_value):
                self._hold(value, last)
            if until is not None and node is until:
                self._outputs = values[node]
                break
            self._release(node, order, values)
        self.bytes = self._largest + sum(self._memory.values())
        self.head = _head(nodes, order, values)

    # Making the plan: what layers call

    def buffer(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory for a result of this shape, contiguous. It is the plan's until the last node that reads it."""
        size = torch.Size(shape).numel() * dtype.itemsize
        pages = max(1, -(-size // _PAGE)) * _PAGE
        fits = [memory for memory in self._free if pages <= memory.numel() <= 2 * pages]
        if fits:
            memory = min(fits, key=Tensor.numel)
            self._free = [other for other in self._free if other is not memory]
        else:
            memory = torch.empty(pages, dtype=torch.uint8, device="cpu")
            self._memory[memory.data_ptr()] = memory.numel()
            self._kept.append(memory)
        self._buffers[memory.data_ptr()] = _Buffer(memory)
        return memory[:size].view(dtype).reshape(tuple(shape))

    def images(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The same for images (N, C, H, W), channels-last in memory."""
        batch, channels, height, width = shape
        return self.buffer((batch, height, width, channels), dtype).movedim(-1, 1)

    def dies_here(self, value: Value) -> bool:
        """Whether the present node is the last to read a value, whose buffer may be written over."""
        buffer = self._buffers.get(value.tensor.untyped_storage().data_ptr())
        return value.slot is None and buffer is not None and buffer.last == self._now

    def call(self, op: str, function: Callable[..., int], *arguments: Any, table: Tensor | None = None,
             rows: Sequence[tuple[int, Value]] = ()) -> None:
        """Adds a kernel's call, and runs it.

        Args:
            op: named by errors.
            function: of the compiled module.
            arguments: integers; a tensor or Value stands for its address.
            table: of an epilogue's steps (ops.step_table), one of the arguments.
            rows: its rows that add a value which each run has elsewhere.
        """
        bound: list[Any] = []
        patches: list[tuple[int, int]] = []
        for argument in arguments:
            if isinstance(argument, Value):
                if argument.slot is not None:
                    patches.append((len(bound), argument.slot))
                argument = argument.tensor
            if isinstance(argument, Tensor):
                self._kept.append(argument)
                argument = argument.data_ptr()
            bound.append(argument)
        addresses = None if table is None else table.numpy()
        moving = [(row, value.slot) for row, value in rows if value.slot is not None]

        def run(values: list[Any]) -> None:
            for index, slot in patches:
                bound[index] = values[slot].data_ptr()
            for row, slot in moving:
                addresses[row, 2] = values[slot].data_ptr()  # type: ignore[index]
            status = function(*bound)
            if status != 0:
                _native.check(op, status)

        if patches or moving:
            call = run
        else:
            fixed = tuple(bound)

            def call(values: list[Any]) -> None:
                status = function(*fixed)
                if status != 0:
                    _native.check(op, status)

        self._calls.append(call)
        status = function(*bound)
        _native.check(op, status)

    def keep(self, values: Any) -> None:
        """Holds what a call reads by address as long as the plan lives."""
        self._kept.append(values)

    def workspace(self, size: int) -> Tensor:
        """Memory for the present call alone."""
        return self.buffer((size,), torch.uint8)

    def dynamic(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Adds a call of torch, whose results are new tensors in each run; arguments hold Values."""
        arguments, structure = pytree.tree_flatten((args, kwargs), is_leaf=_is_value)
        given = [leaf.tensor if isinstance(leaf, Value) else leaf for leaf in arguments]
        slots_read = [leaf.slot if isinstance(leaf, Value) else None for leaf in arguments]
        moving = [(index, slot) for index, slot in enumerate(slots_read) if slot is not None]
        first_args, first_kwargs = pytree.tree_unflatten(given, structure)
        result = function(*first_args, **first_kwargs)
        values = pytree.tree_map(self._new_value, result)
        slots = [value.slot for value in pytree.tree_leaves(values, is_leaf=_is_value)]
        fixed = [None if _is_value(leaf) and leaf.slot is not None else value
                 for leaf, value in zip(arguments, given, strict=True)]
        plain = isinstance(result, Tensor) and len(arguments) == len(args)  # one tensor of flat arguments

        def run(env: list[Any]) -> None:
            given = fixed.copy()
            for index, slot in moving:
                given[index] = env[slot]
            if plain:
                env[slots[0]] = function(*given)
                return
            args, kwargs = pytree.tree_unflatten(given, structure)
            for slot, leaf in zip(slots, pytree.tree_leaves(function(*args, **kwargs)), strict=True):
                env[slot] = leaf

        self._calls.append(run)
        return values

    def _new_value(self, result: Any) -> Value:
        self._slots += 1
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in self._memory:
            self._largest = max(self._largest, result.numel() * result.element_size())
        return Value(result, self._slots - 1)

    def _node(self, body: fx.GraphModule, modules: dict[str, Any], node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        if node.op == "get_attr":
            return Value(functools.reduce(getattr, str(node.target).split("."), body))  # type: ignore[arg-type]
        if node.op == "call_module":
            module = modules[str(node.target)]
            if hasattr(module, "plan"):
                return module.plan(self, *args)
            return self.dynamic(self._functions.get(node, module), args, kwargs)
        if node.op == "call_method":
            return self.dynamic(functools.partial(_call_method, str(node.target)), args, kwargs)
        if node.target is operator.getitem and type(args[0]) is tuple:
            item: Any = args[0][args[1]]  # type: ignore[index]
            if _is_value(item) and item.slot is None:  # of a packed layer's results; a torch call's go with their tuple
                return item
        return self.dynamic(node.target, args, kwargs)  # type: ignore[arg-type]

    def _hold(self, value: Any, last: int) -> None:
        if isinstance(value, Value) and isinstance(value.tensor, Tensor):
            buffer = self._buffers.get(value.tensor.untyped_storage().data_ptr())
            if buffer is not None:
                buffer.last = max(buffer.last, last)

    def _release(self, node: fx.Node, order: dict[fx.Node, int], values: dict[fx.Node, Any]) -> None:
        """Gives back the buffers and results that no later node reads."""
        for address, buffer in list(self._buffers.items()):
            if buffer.last <= self._now:
                self._free.append(buffer.memory)
                del self._buffers[address]
        dead = {value for value in node.all_input_nodes if max(map(order.__getitem__, value.users)) == self._now}
        slots = [
            value.slot for source in dead for value in pytree.tree_leaves(values.get(source), is_leaf=_is_value)
            if _is_value(value) and value.slot is not None
        ]
        if slots and node.op != "output":

            def forget(env: list[Any]) -> None:
                for slot in slots:
                    env[slot] = None

            self._calls.append(forget)

    # Running it

    def run(self, inputs: Sequence[Tensor]) -> Any:
        """The graph's result, in memory of its own."""
        values: list[Any] = [None] * self._slots
        values[: len(inputs)] = inputs
        for call in self._calls:
            call(values)

        def result(leaf: Any) -> Any:
            if not isinstance(leaf, Value):
                return leaf
            value = leaf.tensor if leaf.slot is None else values[leaf.slot]
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() in self._memory:
                return value.clone()
            return value

        return pytree.tree_map(result, self._outputs, is_leaf=_is_value)


def _head(nodes: Sequence[fx.Node], order: dict[fx.Node, int], values: dict[fx.Node, Any]) -> fx.Node | None:
    reach = 0  # the last node that reads one of those before
    for index, node in enumerate(nodes):
        value = values.get(node)
        tensor = value.tensor if isinstance(value, Value) else None
        vectors = isinstance(tensor, Tensor) and tensor.dim() == 2
        if vectors and reach <= index and node.op != "placeholder":
            return node
        reach = max((order[user] for user in node.users), default=0) if reach <= index else max(
            reach, *(order[user] for user in node.users), 0
        )
    return None


def _call_method(name: str, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    return getattr(tensor, name)(*args, **kwargs)
