"""Packed weights of layers, kept while a network is evaluated.

A weight cannot tell all its changes: torch counts those of operations (`_version`), but not those through `.data`, with
which binary networks are trained (clipping, binarizing in place). Weights are therefore kept where the user says that
they stay as they are, and what torch does count is checked all the same.
"""

from __future__ import annotations

import contextlib
import contextvars
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowbit_ext import _arguments, _native, _oplib
from lowbit_ext.binary.activation import wants_grad
from lowbit_ext.binary.weights import PackedWeight, pack_weight


class _Kept(NamedTuple):
    """A layer's packed weight and scale, and what they were made of."""

    made_of: tuple[Any, ...]
    source: Tensor  # shares the weight's memory, whose address no other weight can have meanwhile
    weight: PackedWeight
    scale: Tensor | None


_Cache = weakref.WeakKeyDictionary[nn.Module, _Kept]
_active: contextvars.ContextVar[_Cache | None] = contextvars.ContextVar("cached_weights", default=None)


@contextlib.contextmanager
def cached_weights() -> Iterator[None]:
    """Within it, a binary layer packs its weight in its first call without gradients, and keeps the bits for others.

    For the evaluation of a network that is not packed:

        with torch.inference_mode(), binary.cached_weights():
            for images in batches:
                logits = model(images)

    A weight that operations change, as an optimizer or load_state_dict does, or that is another tensor, of another type
    or device, is packed anew. A change through `.data` or within inference mode is not seen: leave the context for
    those. The context is that of the thread, and a layer's bits are dropped where the outermost one ends.
    """
    token = _active.set(_Cache() if _active.get() is None else _active.get())
    try:
        yield
    finally:
        _active.reset(token)


def cached_operands(layer: Any) -> tuple[PackedWeight, Tensor | None] | None:
    """A layer's packed weight and the scale that follows from it, where a cache is active and may be used."""
    if torch.compiler.is_compiling():
        return None
    cache = _active.get()
    if cache is None:
        return None
    weight = layer.weight
    if wants_grad(weight) or weight.dtype not in _arguments.FLOATS or weight.is_meta or not _oplib.is_eager():
        return None
    version = 0 if weight.is_inference() else weight._version
    made_of = (
        version, weight.data_ptr(), weight.shape, weight.stride(), weight.dtype, weight.device, layer.weight_scale,
        _native.kernels(weight).level, torch.is_inference_mode_enabled(),  # whose tensors no gradient may need
    )
    kept = cache.get(layer)
    if kept is None or kept.made_of != made_of:
        source = weight.detach()
        kept = _Kept(made_of, source, pack_weight(source, getattr(layer, "groups", 1)), layer.scale())
        cache[layer] = kept
    return kept.weight, kept.scale
