"""Activations as codes: what a forward pass hands to the readers of one, and how a backward pass reads it."""

from __future__ import annotations

import math
import threading
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit_ext._graph import Pool
from lowbit_ext.lowmem import ops


class Stored(NamedTuple):
    """An activation as codes, and how a backward pass reads it.

    Attributes:
        tensors: codes, gamma and beta of a batch norm; codes and groups' scale and minimum of a ReLU.
        kind: "channel" or "group".
        bits, span: of the codes; span in standard deviations, for "channel".
        relu: whether negative elements read as 0, for "channel".
        shape, channels_last, dtype: of the activation that the codes stand for.
        version: how often it had been written in place: one that is written afterwards is no longer what they say.
        pools: what happened to it between there and the reader.
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
    pools: tuple[Pool, ...] = ()


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


class Workspace(threading.local):
    """Memory that a thread's backward passes unpack large activations into, one after the other, kept for the next.

    Page faults of fresh memory cost eight times the unpacking: 51 MB on one core of a Zen 4, 38 instead of 4.5 ms.
    """

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8, device="cpu")

    def empty(self, like: Tensor, shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool) -> Tensor:
        """An uninitialised tensor: of this memory where it is large and on the CPU, otherwise a new one."""
        size = math.prod(shape) * dtype.itemsize
        if torch.compiler.is_compiling() or size <= _FRESH_BYTES or not like.is_cpu:
            return ops.empty(like, shape, dtype, channels_last)
        if self.memory.nbytes < size:
            self.memory = torch.empty(size, dtype=torch.uint8, device="cpu")
        memory = self.memory[:size].view(dtype)
        if not channels_last:
            return memory.view(shape)
        return memory.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


_workspace = Workspace()


def read_codes(meta: Stored, tensors: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    """The activation from its codes, pooled as it was. Used up before the next one is read."""
    value = _workspace.empty(tensors[0], meta.shape, dtype, meta.channels_last)
    if meta.kind == "group":
        codes, scale_minimum = tensors
        ops.group_dequantize_into(codes, scale_minimum.view(torch.bfloat16), meta.bits, value)
    else:
        ops.channel_dequantize_into(*tensors, meta.channels_last, meta.bits, meta.span, meta.relu, value)
    for pool in meta.pools:
        value = apply_pool(pool, value)
    return value
