"""saved_tensors(): codes of a few bits in place of whatever autograd keeps, for any module."""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.multiprocessing.reductions import StorageWeakRef

from lowbit_ext import _oplib
from lowbit_ext.lowmem import _ledger, ops
from lowbit_ext.lowmem.codes import as_int, check_flags, check_generator, check_settings, drawn_seed

# Between a parameter and what an operation keeps of it: views, and the copies that autocast makes.
_OF_LEAF = ("ToCopyBackward0", "TBackward0", "TransposeBackward0", "PermuteBackward0", "ViewBackward0")


# --- coding -----------------------------------------------------------------------------------------------------------


def _quantize(x: Tensor, bits: int, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    return ops.group_quantize(x, bits, x.numel() > 0 and bool(x.amin() == 0), seed, 0)


def _quantize_outputs(x: Tensor, bits: int, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    return ops.group_quantize(x, bits, False, seed, 0)


# group_quantize, `positive` where the smallest element is 0, as a ReLU's: elsewhere to raise small elements from code 0
# would be a bias for nothing. An operator, so that a compiled graph decides at every call.
_quantize_saved = _oplib.define(
    "group_quantize_saved(Tensor x, int bits, Tensor? seed) -> (Tensor, Tensor)",
    outputs=_quantize_outputs, launcher=_quantize,
)


def _flat(x: Tensor) -> tuple[Tensor, tuple[int, ...], tuple[int, ...]]:
    """Elements in the order of memory, without a copy of a dense x; dimensions from the outermost, and their sizes."""
    order = tuple(sorted(range(x.dim()), key=lambda dim: (x.stride()[dim], x.shape[dim]), reverse=True))
    ordered = x.permute(order)
    return ordered.reshape(-1), order, tuple(ordered.shape)


def _unflat(flat: Tensor, order: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    places = sorted(range(len(order)), key=order.__getitem__)
    return flat.reshape(shape).permute(places)


def _pack_bools(flat: Tensor) -> Tensor:
    rows = torch.nn.functional.pad(flat.to(torch.uint8), (0, -flat.numel() % 8)).reshape(-1, 8)
    return (rows << torch.arange(8, dtype=torch.uint8, device=flat.device)).sum(1, dtype=torch.uint8)


def _unpack_bools(words: Tensor, count: int) -> Tensor:
    shifts = torch.arange(8, dtype=torch.uint8, device=words.device)
    return (words[:, None] >> shifts & 1).reshape(-1)[:count].bool()


def _narrow(flat: Tensor) -> Tensor:
    low, high = (int(value) for value in torch.aminmax(flat))
    for dtype in (torch.uint8, torch.int16, torch.int32):
        limits = torch.iinfo(dtype)
        if limits.min <= low and high <= limits.max:
            return flat.to(dtype)
    return flat.clone()


# --- eager hooks ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class _Coded:
    """Codes of a piece of a storage, which several operations may keep in several shapes.

    Attributes:
        tensors: codes, scales and minima of floats; words of bools; integers in a narrower type.
        storage: keeps the storage's address from being used again: it is how the piece is known.
    """

    tensors: tuple[Tensor, ...]
    bits: int
    dtype: torch.dtype
    count: int
    storage: StorageWeakRef

    def read(self) -> Tensor:
        if self.dtype.is_floating_point:
            return ops.group_dequantize(*self.tensors, (self.count,), False, self.dtype, self.bits)
        if self.dtype == torch.bool:
            return _unpack_bools(self.tensors[0], self.count)
        return self.tensors[0].to(self.dtype)


@dataclasses.dataclass(frozen=True)
class _Packed:
    """A tensor: codes of a piece of memory, and how it lies in there, see _flat."""

    coded: _Coded
    order: tuple[int, ...]
    shape: tuple[int, ...]


class saved_tensors:
    """Context manager: float tensors that autograd keeps become codes, for any module and without changing it.

    Args:
        bits: 2, 4 or 8, in groups of 256 with 0.125 bits more.
        stochastic: stochastic rounding, whose error has mean 0.
        min_numel: smaller tensors are kept as they are.
        keep: tensors whose storages are kept as they are. Parameters and buffers of models that run within the context
            always are, and so are leaves of the graph that want a gradient, and casts of either.
        generator: gives the seeds of stochastic rounding; None: torch's own.
        compiled: put the coding into the graphs of models compiled by torch.compile, which then return codes and need
            not hold full precision until their end. Without it, such a model works as any other, but is coded after its
            forward pass. In this form integers stay as they are; so do arguments and results of a compiled graph.

    A piece of memory that several operations keep is packed once: the result of a ReLU, which the ReLU and the next
    layer keep. Tensors whose smallest element is 0 keep their zeros exactly: the mask of ReLU stays exact. Boolean
    tensors become a bit an element, int64 ones (indices of pooling) the narrowest type. Gradients read rounded values;
    where a layer's input gradient does, as that of batch norm, GELU or attention, the error goes on to the layers in
    front of it. `convert` keeps about half as much where it applies: one code for all that batch norm, ReLU and
    convolution keep.

    Works with retain_graph, torch.utils.checkpoint, autocast, DistributedDataParallel and `ledger`; of nested ones the
    innermost counts. The context is for the forward pass; backward may run outside of it. A tensor that is modified in
    place after it was packed is read as it was; one that was kept as it is raises, as without the context. Second
    derivatives are those of the rounded values.

    Raises:
        TypeError: an argument has another type.
        ValueError: bits or min_numel out of range; `compiled` with a generator or `keep`.
        RuntimeError: opened within compiled code, or `compiled` within a ledger, which cannot see into a graph. In the
            backward pass: a tensor that was kept was modified in place.

    Source:
        Chen et al., "ActNN", ICML 2021.
    """

    def __init__(
        self, bits: int = 4, stochastic: bool = False, min_numel: int = 1024, keep: Iterable[Tensor] = (), *,
        generator: torch.Generator | None = None, compiled: bool = False,
    ) -> None:
        bits, _ = check_settings("saved_tensors", bits, None)
        min_numel = as_int("saved_tensors", "min_numel", min_numel)
        if min_numel < 0:
            raise ValueError(f"saved_tensors: min_numel must not be negative, got {min_numel}")
        check_flags("saved_tensors", stochastic=stochastic, compiled=compiled)
        check_generator("saved_tensors", generator)
        try:
            keep = (keep,) if isinstance(keep, Tensor) else tuple(keep)
        except TypeError:
            raise TypeError(f"saved_tensors: keep must be tensors, got {type(keep).__name__}") from None
        for kept in keep:
            if not isinstance(kept, Tensor):
                raise TypeError(f"saved_tensors: keep must be tensors, got {type(kept).__name__}")
        if compiled and (generator is not None or keep):
            raise ValueError("saved_tensors: compiled hooks take neither a generator nor tensors to keep")
        self.bits, self.stochastic, self.min_numel, self.compiled = bits, stochastic, min_numel, compiled
        self._generator = generator
        self._held = _ledger.Held(keep)
        self._coded: weakref.WeakValueDictionary[tuple[Any, ...], _Coded] = weakref.WeakValueDictionary()
        self._entered: list[torch.autograd.graph.saved_tensors_hooks] = []

    def _is_held(self, x: Tensor) -> bool:
        """Whether x is memory that is there anyway, or a cast of a parameter, which exact gradients rest on."""
        modules = _ledger.running_modules()
        if modules:
            self._held.add_model(modules[-1])
        if x in self._held or isinstance(x, nn.Parameter):
            return True
        if x.requires_grad:
            node = x.grad_fn
            while node is not None and node.name() in _OF_LEAF:
                node = node.next_functions[0][0]
            return node is None or node.name() == "torch::autograd::AccumulateGrad"
        # Casts of frozen parameters have no history: their sizes must tell.
        frozen = modules[0].parameters(recurse=False) if modules else ()
        sizes = [tuple(p.shape) for p in frozen if p.dim() > 1 and p.dtype != x.dtype]
        return tuple(x.shape) in sizes or tuple(x.shape)[::-1] in sizes

    def _encode(self, flat: Tensor) -> _Coded:
        if flat.dtype == torch.bool:
            tensors: tuple[Tensor, ...] = (_pack_bools(flat),)
        elif flat.dtype == torch.int64:
            tensors = (_narrow(flat),)
        else:
            tensors = _quantize_saved(flat, self.bits, drawn_seed(self.stochastic, self._generator))
        return _Coded(tensors, self.bits, flat.dtype, flat.numel(), StorageWeakRef(flat.untyped_storage()))

    def _pack(self, x: Tensor) -> _ledger.Kept | _Packed:
        if not _is_suited(x, self.min_numel, (*ops.FLOAT_TYPES, torch.bool, torch.int64)) or self._is_held(x):
            _ledger.record(x)
            return _ledger.Kept.of(x)
        flat, order, shape = _flat(x.detach())
        key = (flat.untyped_storage()._cdata, flat.storage_offset(), flat.numel(), flat.dtype, x._version)
        coded = self._coded.get(key)
        if coded is None:
            coded = self._coded[key] = self._encode(flat)
        for kept in coded.tensors:
            _ledger.record(kept, x)
        return _Packed(coded, order, shape)

    @staticmethod
    def _unpack(packed: _ledger.Kept | _Packed) -> Tensor:
        if isinstance(packed, _ledger.Kept):
            return packed.read("saved_tensors")
        return _unflat(packed.coded.read(), packed.order, packed.shape)

    def __enter__(self) -> saved_tensors:
        if torch.compiler.is_compiling():
            raise RuntimeError("saved_tensors: open it round the call of a compiled function, not within")
        if self.compiled and _ledger.is_open():
            raise RuntimeError("saved_tensors: a ledger cannot see into compiled graphs: open it within this context")
        hooks: Any = (self._pack, self._unpack)
        if self.compiled:
            hooks = _traced_hooks(self.bits, self.stochastic, self.min_numel)
        saved = torch.autograd.graph.saved_tensors_hooks(*hooks)
        saved.__enter__()
        self._entered.append(saved)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered.pop().__exit__(kind, error, trace)


def _is_suited(x: Tensor, min_numel: int, dtypes: Iterable[torch.dtype]) -> bool:
    plain = x.layout is torch.strided and x.dtype in dtypes
    return plain and type(x) in (Tensor, nn.Parameter) and x.numel() >= max(min_numel, 1)


# --- hooks within compiled graphs -------------------------------------------------------------------------------------


def _pack_traced(x: Tensor, bits: int, stochastic: bool, min_numel: int) -> tuple[Any, ...]:
    if x.dtype not in (*ops.FLOAT_TYPES, torch.bool) or x.numel() < max(min_numel, 1) or isinstance(x, nn.Parameter):
        return (x.detach(),)
    flat, order, shape = _flat(x)
    if x.dtype == torch.bool:
        tensors: tuple[Tensor, ...] = (_pack_bools(flat),)
    else:
        tensors = _quantize_saved(flat, bits, drawn_seed(stochastic))
    return (*tensors, x.dtype, order, shape)


def _unpack_traced(packed: tuple[Any, ...], bits: int) -> Tensor:
    if len(packed) == 1:
        return packed[0]
    *tensors, dtype, order, shape = packed
    count = 1
    for size in shape:
        count *= size
    if dtype == torch.bool:
        flat = _unpack_bools(tensors[0], count)
    else:
        flat = ops.group_dequantize(*tensors, (count,), False, dtype, bits)
    return _unflat(flat, order, shape)


@functools.cache
def _traced_hooks(bits: int, stochastic: bool, min_numel: int) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The pair of hooks as torch.fx graphs, as torch.compile wants them.

    The same pair for the same settings: it compiles anew for another one.
    """
    hooks = []
    for function, settings in ((_pack_traced, (bits, stochastic, min_numel)), (_unpack_traced, (bits,))):
        graph = fx.Graph()
        graph.output(graph.call_function(function, (graph.placeholder("x"), *settings)))
        hooks.append(fx.GraphModule({}, graph))
    return hooks[0], hooks[1]
