"""Runs packed networks on the CPU: a batch in slices whose buffers stay in cache, in half precision in several threads.

A thread that has slices of its own meets no other before the end, where threads that share one image meet after each
layer.
"""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from lowbit_ext import _native
from lowbit_ext._torch import pytree
from lowbit_ext.binary.packing.packed_base import PackedLayer
from lowbit_ext.binary.packing.plan import Plan

_MOST_SHAPES = 8  # of which plans are kept
_DEFAULT_CACHE = 1 << 20  # bytes, where the system does not tell
CACHES = 2  # second-level caches that the buffers of a slice may fill


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
        self._cuts: dict[Any, tuple[list[int], fx.Node | None]] = {}  # of batches, and the head
        self._version = self._layers_version()

    def _layers_version(self) -> int:
        return sum(layer.version for layer in self.layers)

    def run(self, *inputs: Tensor) -> Any:
        """The graph's result for dense tensors on the CPU."""
        if self._version != self._layers_version():
            self.clear()
        batch = inputs[0].shape[0] if inputs and inputs[0].dim() > 0 else 0
        threads = torch.get_num_threads()
        cut = self._by_image and batch >= max(2, threads) and all(value.shape[:1] == (batch,) for value in inputs)
        if not cut:
            return self._run_plan(inputs)
        bounds, head = self._slices(inputs)
        if len(bounds) < 3:
            return self._run_plan(inputs)
        count = len(bounds) - 1
        slices = [[value[a:b] for value in inputs] for a, b in itertools.pairwise(bounds)]
        if threads == 1 or _is_exact(inputs):
            results = [self._run_plan(part, until=head) for part in slices]
        else:
            shares = [slices[count * i // threads : count * (i + 1) // threads] for i in range(threads)]
            others = [_workers().submit(self._run_share, share, head) for share in shares[1:]]
            results = self._run_share(shares[0], head)
            for other in others:
                results += other.result()
        joined = [torch.cat(parts) for parts in zip(*map(pytree.tree_leaves, results), strict=True)]
        if head is not None:
            return self._run_plan(joined, after=head)
        return pytree.tree_unflatten(joined, pytree.tree_structure(results[0]))

    def _run_share(self, slices: Sequence[Sequence[Tensor]], until: fx.Node | None) -> list[Any]:
        """Slices one after the other, in one thread."""
        with torch.no_grad(), _one_thread():
            return [self._run_plan(part, until=until) for part in slices]

    def _run_plan(self, inputs: Sequence[Tensor], after: fx.Node | None = None, until: fx.Node | None = None) -> Any:
        # A plan's workspaces are for so many threads.
        made_for = (_native.cpu.level, torch.get_num_threads(), after, until)
        key = (*made_for, *((value.shape, value.stride(), value.dtype) for value in inputs))
        plans = self._plans.get(key)
        if plans is None:
            while len(self._plans) >= _MOST_SHAPES:
                self._plans.pop(next(iter(self._plans), None), None)
            plans = self._plans.setdefault(key, [])
        try:
            plan = plans.pop()
        except IndexError:
            plan = Plan(self._body, inputs, after, until)
        result = plan.run(inputs)
        plans.append(plan)
        return result

    def _slices(self, inputs: Sequence[Tensor]) -> tuple[list[int], fx.Node | None]:
        """Where a batch is cut, and where the head begins, which runs on the whole of it."""
        threads = torch.get_num_threads()
        key = (_native.cpu.level, threads, *((value.shape, value.dtype) for value in inputs))
        if key not in self._cuts:
            batch = len(inputs[0])
            plan = Plan(self._body, [value[:1] for value in inputs])
            size = max(1, CACHES * cache_bytes() // plan.bytes)
            count = -(-batch // size) if _is_exact(inputs) else max(threads, -(-batch // size))
            bounds = [batch * index // count for index in range(count + 1)]
            if _is_exact(inputs) and not self._rounds_alike(inputs, bounds, plan.head):
                bounds = [0, batch]
            self._cuts[key] = bounds, plan.head
        return self._cuts[key]

    def _rounds_alike(self, inputs: Sequence[Tensor], bounds: Sequence[int], head: fx.Node | None) -> bool:
        """Whether torch's own layers give an image the same bits in its slice as in its batch, as float32 promises."""
        modules = dict(self._body.named_modules())

        def values(given: Sequence[Tensor]) -> dict[fx.Node, Any]:
            run = fx.Interpreter(self._body, garbage_collect_values=False)
            run.run(*given)
            return run.env

        whole = values(inputs)
        for begin, end in itertools.pairwise(bounds):
            part = values([value[begin:end] for value in inputs])
            for node in self._body.graph.nodes:
                if node.op == "output":
                    break
                ours = node.op == "call_module" and isinstance(modules[str(node.target)], PackedLayer)
                tensor = not ours and isinstance(whole[node], Tensor)
                if tensor and node.op != "get_attr" and not torch.equal(whole[node][begin:end], part[node]):
                    return False
                if node is head:
                    break
        return True


def _is_exact(inputs: Sequence[Tensor]) -> bool:
    """Whether results must have the model's own bits.

    Then slices run one after the other in the caller's thread and share its threads: torch's convolutions were seen to
    round otherwise in another thread.
    """
    return any(value.dtype == torch.float32 for value in inputs)


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
