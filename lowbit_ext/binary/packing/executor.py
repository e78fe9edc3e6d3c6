"""Runs packed networks on the CPU: a batch in slices whose buffers stay in cache, given to threads whole.

A thread that has slices of its own meets no other before the end, where threads that share one image meet after each
layer.
"""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from lowbit_ext import _native
from lowbit_ext._torch import mkldnn_convolution, pytree
from lowbit_ext.binary.packing.packed_base import PackedLayer
from lowbit_ext.binary.packing.plan import Plan

_MOST_SHAPES = 8  # of which plans are kept
_DEFAULT_CACHE = 1 << 20  # bytes, where the system does not tell
CACHES = 2  # second-level caches that the buffers of a slice may fill


class Cut(NamedTuple):
    """How a batch is cut.

    Attributes:
        bounds: of the slices; fewer than three leave it whole.
        head: the last node that runs on slices; what follows runs on the whole batch. None, all nodes run on slices.
        functions: in place of nodes' modules, which would choose another kernel for a slice than for the batch.
    """

    bounds: tuple[int, ...]
    head: fx.Node | None
    functions: dict[fx.Node, Callable[..., Any]]


_WHOLE = Cut((), None, {})


class Executor:
    """Plans of a packed graph by the shape of its inputs. Several threads may run it.

    Args:
        body: the packed graph.
        by_image: whether each image's result depends on it alone, so that a batch may be cut.

    Attributes:
        layers: the packed layers.
    """

    def __init__(self, body: fx.GraphModule, by_image: bool) -> None:
        self._body, self._by_image = body, by_image
        self.layers = [layer for layer in body.modules() if isinstance(layer, PackedLayer)]
        self.clear()

    def clear(self) -> None:
        """Forgets the plans, whose arguments may have changed."""
        self._plans: dict[Any, list[Plan]] = {}  # those that no thread uses
        self._cuts: dict[Any, Cut] = {}  # of batches
        self._version = self._layers_version()

    def _layers_version(self) -> int:
        return sum(layer.version for layer in self.layers)

    def run(self, *inputs: Tensor) -> Any:
        """The graph's result for dense tensors on the CPU."""
        if self._version != self._layers_version():
            self.clear()
        batch = inputs[0].shape[0] if inputs and inputs[0].dim() > 0 else 0
        threads = torch.get_num_threads()
        can_cut = self._by_image and batch >= max(2, threads) and all(value.shape[:1] == (batch,) for value in inputs)
        cut = self._cut(inputs) if can_cut else _WHOLE
        if len(cut.bounds) < 3:
            return self._run_plan(inputs)
        count = len(cut.bounds) - 1
        slices = [[value[a:b] for value in inputs] for a, b in itertools.pairwise(cut.bounds)]
        if threads == 1:
            results = [self._run_plan(part, cut=cut) for part in slices]
        else:
            shares = [slices[count * i // threads : count * (i + 1) // threads] for i in range(threads)]
            others = [_workers().submit(self._run_share, share, cut) for share in shares[1:]]
            results = self._run_share(shares[0], cut)
            for other in others:
                results += other.result()
        joined = [torch.cat(parts) for parts in zip(*map(pytree.tree_leaves, results), strict=True)]
        if cut.head is not None:
            return self._run_plan(joined, after=cut.head)
        return pytree.tree_unflatten(joined, pytree.tree_structure(results[0]))

    def _run_share(self, slices: Sequence[Sequence[Tensor]], cut: Cut) -> list[Any]:
        """Slices one after the other, in one thread."""
        with torch.no_grad(), _one_thread():
            return [self._run_plan(part, cut=cut) for part in slices]

    def _run_plan(self, inputs: Sequence[Tensor], after: fx.Node | None = None, cut: Cut = _WHOLE) -> Any:
        # A plan's workspaces are for so many threads.
        made_for = (_native.cpu.level, torch.get_num_threads(), after, cut.head, *cut.functions)
        key = (*made_for, *((value.shape, value.stride(), value.dtype) for value in inputs))
        plans = self._plans.get(key)
        if plans is None:
            while len(self._plans) >= _MOST_SHAPES:
                self._plans.pop(next(iter(self._plans), None), None)
            plans = self._plans.setdefault(key, [])
        try:
            plan = plans.pop()
        except IndexError:
            plan = Plan(self._body, inputs, after, cut.head, cut.functions)
        result = plan.run(inputs)
        plans.append(plan)
        return result

    def _cut(self, inputs: Sequence[Tensor]) -> Cut:
        """How a batch is cut. float32 promises an image the same bits in its slice as in its batch."""
        threads = torch.get_num_threads()
        key = (_native.cpu.level, threads, *((value.shape, value.dtype) for value in inputs))
        if key not in self._cuts:
            batch = len(inputs[0])
            with _one_thread():
                plan = Plan(self._body, [value[:1] for value in inputs])
            size = max(1, CACHES * cache_bytes() // plan.bytes)
            count = max(threads, -(-batch // size))
            cut = Cut(tuple(batch * index // count for index in range(count + 1)), plan.head, {})
            if any(value.dtype == torch.float32 for value in inputs):
                comparison = _Comparison(self._body, cut)
                comparison.run(*inputs)
                if not comparison.equal:
                    cut = _WHOLE
            self._cuts[key] = cut
        return self._cuts[key]


class _Comparison(fx.Interpreter):
    """Runs a graph on a batch and on its slices side by side: every node's value is a list, the batch's first.

    Attributes:
        equal: whether torch's own layers gave every image the same bits in both, up to the head.
    """

    def __init__(self, body: fx.GraphModule, cut: Cut) -> None:
        super().__init__(body)
        self._cut, self._ended, self.equal = cut, False, True

    def run_node(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return [super().run_node(node)] * len(self._cut.bounds)
        if node.op == "placeholder":
            batch = super().run_node(node)
            return [batch, *(batch[a:b].clone() for a, b in itertools.pairwise(self._cut.bounds))]
        if self._ended or not self.equal or node.op == "output":
            return None
        module = self.submodules.get(node.target) if node.op == "call_module" else None
        arguments = [self._arguments(node, index) for index in range(len(self._cut.bounds))]
        if type(module) is nn.Conv2d:
            function = mkldnn_convolution(module, *arguments[0][0])
            if function is not None:
                self._cut.functions[node] = function
        batch = getattr(self, node.op)(node.target, *arguments[0])
        with _one_thread():
            slices = [self._on_slice(node, *part) for part in arguments[1:]]
        if not isinstance(module, PackedLayer):
            self.equal = self._agree(batch, slices)
        self._ended = node is self._cut.head
        return [batch, *slices]

    def _arguments(self, node: fx.Node, index: int) -> tuple[Any, Any]:
        return fx.map_arg((node.args, node.kwargs), lambda read: self.env[read][index])

    def _on_slice(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        function = self._cut.functions.get(node)
        return getattr(self, node.op)(node.target, args, kwargs) if function is None else function(*args)

    def _agree(self, batch: Any, slices: Sequence[Any]) -> bool:
        leaves = zip(*map(pytree.tree_leaves, (batch, *slices)), strict=True)
        return all(
            torch.equal(whole[a:b], part)
            for whole, *parts in leaves if isinstance(whole, Tensor)
            for part, (a, b) in zip(parts, itertools.pairwise(self._cut.bounds), strict=True)
        )


@functools.cache
def cache_bytes() -> int:
    """Size of a core's own second-level cache."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text("ascii").strip()
        return int(text.removesuffix("K")) * 1024
    except (OSError, ValueError):
        return _DEFAULT_CACHE


class _one_thread:
    """Kernels and torch's operators called by this thread use it alone."""

    def __enter__(self) -> None:
        self._before = torch.get_num_threads()  # also lets torch set the thread up, which it would do later
        _native.cpu.set_threads(1)

    def __exit__(self, *error: object) -> None:
        _native.cpu.set_threads(self._before)


@functools.cache
def _workers() -> concurrent.futures.ThreadPoolExecutor:
    """The threads that slices are given to, besides the caller's."""
    return concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1, "lowbit_ext")


os.register_at_fork(after_in_child=_workers.cache_clear)  # a child has none of the threads
