"""Activations as codes: what a forward pass hands to the readers of one, and how a backward pass reads it.

Codes stand for a value; what happens to it on the way to a reader, as pooling or an activation function, are steps that
the reader's backward pass repeats on what the codes say.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit_ext import _oplib
from lowbit_ext._graph import Pool
from lowbit_ext.lowmem import _ledger, ops


class Curve(NamedTuple):
    """A function of one element, applied by torch's own operator.

    Attributes:
        name: of a function of torch.nn.functional.
        numbers: its arguments behind the input.
        words: further arguments by name.
    """

    name: str
    numbers: tuple[float, ...] = ()
    words: tuple[tuple[str, str], ...] = ()

    def __call__(self, x: Tensor) -> Tensor:
        return getattr(F, self.name)(x, *self.numbers, **dict(self.words))


class Affine(NamedTuple):
    """A product with one tensor and a sum with another, where there are any."""

    has_factor: bool
    has_summand: bool


Step = Pool | Curve | Affine | nn.Module  # a module: an activation function of another library


class Stored(NamedTuple):
    """An activation as codes, and how a backward pass reads it.

    Attributes:
        tensors: codes, gamma and beta of a batch norm, or codes and groups' scale and minimum; then those of Affine
            steps. Of several parts: theirs, one part after the other.
        kind: "channel", "group" or "parts".
        bits, span: of the codes; span in standard deviations, for "channel".
        relu: whether negative elements read as 0, for "channel".
        shape, channels_last, dtype: of the value that the codes stand for.
        version: how often the result had been written in place: one that is written afterwards is no longer what they
            say.
        steps: what happened to the value between there and the reader.
        parts, dim: concatenated along dim; each without tensors but with their number.
    """

    tensors: tuple[Tensor, ...]
    kind: str
    bits: int
    span: float
    relu: bool
    shape: tuple[int, ...]
    channels_last: bool
    dtype: torch.dtype
    version: int
    steps: tuple[Step, ...] = ()
    parts: tuple[tuple[Any, int], ...] = ()
    dim: int = 0

    def after(self, out: Tensor, step: Step, *tensors: Tensor) -> Stored:
        """The codes of `out`, a further step from here."""
        return self._replace(
            tensors=(*self.tensors, *tensors), version=version_of(out), steps=(*self.steps, step)
        )


def version_of(x: Tensor) -> int:
    """How often x was written in place. torch.compile does not tell: there convert() has looked through the graph."""
    return 0 if torch.compiler.is_compiling() else x._version


def apply_pool(pool: Pool, x: Tensor) -> Tensor:
    """torch's own pooling of x, and so of what codes say of x."""
    if pool.kind == "max":
        return F.max_pool2d(x, pool.kernel, pool.stride, pool.padding, 1, pool.ceil_mode)
    return F.avg_pool2d(x, pool.kernel, pool.stride, pool.padding, pool.ceil_mode, pool.count_pad, pool.divisor)


# Tensors larger than this come fresh from the operating system at every allocation (glibc's largest mmap threshold).
_FRESH_BYTES = 32 << 20


class _Memory:
    """What one thread has."""

    def __init__(self) -> None:
        self.bytes = torch.empty(0, dtype=torch.uint8, device="cpu")


_memories: weakref.WeakSet[_Memory] = weakref.WeakSet()  # of all threads


class Workspace(threading.local):
    """Memory that a thread's backward passes unpack large activations into, one after the other, kept for the next.

    Page faults of fresh memory cost eight times the unpacking: 51 MB on one core of a Zen 4, 38 instead of 4.5 ms.
    """

    def __init__(self) -> None:
        self._memory = _Memory()
        _memories.add(self._memory)

    @property
    def memory(self) -> Tensor:
        """The bytes of this thread."""
        return self._memory.bytes

    def empty(self, like: Tensor, shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool) -> Tensor:
        """An uninitialised tensor: of this memory where it is large and on the CPU, otherwise a new one."""
        size = math.prod(shape) * dtype.itemsize
        if torch.compiler.is_compiling() or size <= _FRESH_BYTES or not like.is_cpu:
            return ops.empty(like, shape, dtype, channels_last)
        if self.memory.nbytes < size:
            self._memory.bytes = torch.empty(size, dtype=torch.uint8, device="cpu")
        memory = self.memory[:size].view(dtype)
        if not channels_last:
            return memory.view(shape)
        return memory.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


def empty_cache() -> None:
    """Gives back the memory that backward passes of converted models have unpacked large activations into.

    It is as large as the largest activation above 32 MB, once a thread, and stays for the next step, which would
    otherwise pay for fresh memory again. A backward pass that runs in another thread is not disturbed.
    """
    for memory in list(_memories):
        memory.bytes = torch.empty(0, dtype=torch.uint8, device="cpu")


_workspace = Workspace()


def read_codes(meta: Stored, tensors: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    """The activation from its codes, with all steps. Used up before the next one is read."""
    if meta.kind == "parts":
        value, taken = _read_parts(meta, tensors, dtype)
    else:
        taken = 2 if meta.kind == "group" else 3
        value = _workspace.empty(tensors[0], meta.shape, dtype, meta.channels_last)
        if meta.kind == "group":
            ops.group_dequantize_into(tensors[0], tensors[1].view(torch.bfloat16), meta.bits, value)
        else:
            ops.channel_dequantize_into(
                *tensors[:3], meta.channels_last, meta.bits, meta.span, meta.relu, value
            )
    rest = iter(tensors[taken:])
    for step in meta.steps:
        if isinstance(step, Pool):
            value = apply_pool(step, value)
        elif isinstance(step, Affine):
            value = value * next(rest).to(dtype) if step.has_factor else value
            value = value + next(rest).to(dtype) if step.has_summand else value
        else:
            value = step(value)
    return value


def _read_parts(meta: Stored, tensors: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, int]:
    value = ops.empty(tensors[0], meta.shape, dtype, meta.channels_last)
    place = taken = 0
    for part, count in meta.parts:
        read = read_codes(part, tensors[taken : taken + count], dtype)
        value.narrow(meta.dim, place, read.shape[meta.dim]).copy_(read)
        place, taken = place + read.shape[meta.dim], taken + count
    return value, taken


def concatenated(out: Tensor, dim: int, parts: Sequence[Stored]) -> Stored:
    """The codes of torch.cat from those of its arguments."""
    tensors = tuple(tensor for part in parts for tensor in part.tensors)
    stripped = tuple((part._replace(tensors=()), len(part.tensors)) for part in parts)
    return Stored(
        tensors, "parts", 0, 0.0, False, tuple(out.shape), ops.is_channels_last(out), out.dtype, version_of(out), (),
        stripped, dim % out.dim(),
    )


def _quantize(x: Tensor, bits: int, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    if not x.numel() or x.is_cpu:
        return ops.group_quantize(x, bits, x.numel() > 0 and bool(x.amin() == 0), seed, 0)
    return quantize_both_ways(x, bits, seed)


def quantize_both_ways(x: Tensor, bits: int, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    """group_quantize, `positive` where the smallest element is 0, without a look at it: that would wait for a GPU."""
    is_rectified = x.amin() == 0
    positive, other = (ops.group_quantize(x, bits, positive, seed, 0) for positive in (True, False))
    return torch.where(is_rectified, positive[0], other[0]), torch.where(is_rectified, positive[1], other[1])


def _quantize_outputs(x: Tensor, bits: int, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    return ops.group_quantize(x, bits, False, seed, 0)


# group_quantize, `positive` where the smallest element is 0, as a ReLU's: elsewhere to raise small elements from code 0
# would be a bias for nothing. An operator, so that a graph of torch.compile decides at every call.
quantize_saved = _oplib.define(
    "group_quantize_saved(Tensor x, int bits, Tensor? seed) -> (Tensor, Tensor)",
    outputs=_quantize_outputs, launcher=_quantize,
)


def coded(x: Tensor, bits: int) -> Stored:
    """Codes of any value, in groups of 256, to the nearest: no mask is read from them."""
    x = x.detach()
    codes, scale_minimum = ops.group_quantize(x, bits, False, None, 0)
    tensors = (codes, scale_minimum.view(torch.uint8))  # as bytes: saved_tensors() codes floats
    _ledger.stands_for(tensors[1])
    return Stored(tensors, "group", bits, 0.0, False, tuple(x.shape), ops.is_channels_last(x), x.dtype, version_of(x))


def attach(value: Tensor, stored: Stored | None) -> None:
    """Lets layers that a graph does not connect find the codes of a value: they live as long as the value."""
    if not torch.compiler.is_compiling():
        value._lowmem_codes = stored  # type: ignore[attr-defined]


def attached(value: Tensor) -> Stored | None:
    """The codes that a value has, if it is still what they say."""
    stored = None if torch.compiler.is_compiling() else getattr(value, "_lowmem_codes", None)
    return stored if stored is not None and stored.version == version_of(value) else None


def refuse_second_order(name: str) -> None:
    """Raises RuntimeError in a backward pass of which a graph is recorded."""
    # Grad mode is on within a backward pass for create_graph=True alone.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"lowmem: {name} has no second derivative: its backward pass reads rounded activations. Call backward() "
            "without create_graph=True, or differentiate the model that was not converted"
        )


def shared_attributes(module: nn.Module) -> dict[str, Any]:
    """Attributes of a module for a second one with the same parameters and buffers: its registries are copies.

    What Module.compile() made of the first is not the second's.
    """
    return {
        name: value.copy() if isinstance(value, dict) else value
        for name, value in vars(module).items() if name != "_compiled_call_impl"
    }
