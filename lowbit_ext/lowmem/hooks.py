"""saved_tensors(): codes of a few bits in place of whatever autograd keeps, for any module."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from lowbit_ext import _arguments
from lowbit_ext.lowmem import _ledger, ops
from lowbit_ext.lowmem._forms import (
    CODES,
    EXACT,
    FINE,
    Call,
    Encoded,
    Form,
    dictionary,
    encode,
    form_of,
    pack_bits,
    unpack_bits,
)
from lowbit_ext.lowmem._stored import quantize_saved
from lowbit_ext.lowmem.codes import as_int, check_flags, check_generator, check_settings, drawn_seed

# Between a parameter and what an operation keeps of it: views, and the copies that autocast makes.
_OF_LEAF = ("ToCopyBackward0", "TBackward0", "TransposeBackward0", "PermuteBackward0", "ViewBackward0")


# --- eager hooks ------------------------------------------------------------------------------------------------------


def _flat(x: Tensor) -> tuple[Tensor, tuple[int, ...], tuple[int, ...]]:
    """Elements in the order of memory, without a copy of a dense x; dimensions from the outermost, and their sizes."""
    order = tuple(sorted(range(x.dim()), key=lambda dim: (x.stride()[dim], x.shape[dim]), reverse=True))
    ordered = x.permute(order)
    return ordered.reshape(-1), order, tuple(ordered.shape)


def _unflat(flat: Tensor, order: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    places = sorted(range(len(order)), key=order.__getitem__)
    return flat.reshape(shape).permute(places)


@dataclasses.dataclass(eq=False)
class _Coded:
    """A piece of a storage in one form, which several operations may keep in several shapes.

    Attributes:
        storages: keep the storages' addresses from being used again: it is how a piece is known.
        curve: of an activation function's argument: the function, whose result needs no codes of its own.
    """

    encoded: Encoded
    order: tuple[int, ...]
    storages: list[StorageWeakRef]
    curve: Callable[[Tensor], Tensor] | None = None


@dataclasses.dataclass(frozen=True)
class _Packed:
    """A tensor: a piece of memory, how it lies in there, see _flat, and a function that the elements go through."""

    coded: _Coded
    order: tuple[int, ...]
    shape: tuple[int, ...]
    curve: Callable[[Tensor], Tensor] | None = None

    def read(self) -> Tensor:
        flat = self.coded.encoded.decode(*self.coded.encoded.tensors)
        return _unflat(flat if self.curve is None else self.curve(flat), self.order, self.shape)


class _Watch(TorchFunctionMode):
    """Knows which of torch's functions runs; what that calls in turn is not seen.

    Attributes:
        call: the function.
        argument: what it keeps in place of its argument, if it is a curve.
        on_result: called with that and the result.
    """

    def __init__(self, on_result: Callable[[_Coded, Tensor], None]) -> None:
        super().__init__()
        self.call: Call | None = None
        self.argument: _Coded | None = None
        self.on_result = on_result

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            return func(*args, **kwargs)
        self.call = Call(func.__name__.strip("_"), args, kwargs)
        try:
            result = func(*args, **kwargs)
            if self.argument is not None and isinstance(result, Tensor):
                self.on_result(self.argument, result)
            return result
        finally:
            self.call = self.argument = None


def _place(flat: Tensor, version: int) -> tuple[Any, ...]:
    """What tells a piece of memory from every other, while its storage is referred to."""
    return flat.untyped_storage()._cdata, flat.storage_offset(), flat.numel(), flat.dtype, version


@dataclasses.dataclass(frozen=True)
class BitPlan:
    """How many bits each tensor that a model keeps gets from `saved_tensors`. Made by `allocate_bits`.

    Attributes:
        bits: of each layer, by its name within the module that is called, "" of what is kept outside of it: of the
            tensors that it keeps, in this order and then from the first again, as at the next step. Tensors of layers
            that are not listed get 4.
        average: bits an element that this is on average, on the batch that the plan was made with.

    Raises:
        TypeError: bits is no dict of tuples of ints by strings, or average no number.
        ValueError: other bits than 2, 4 and 8.
    """

    bits: dict[str, tuple[int, ...]]
    average: float

    def __post_init__(self) -> None:
        _arguments.number("BitPlan", "average", self.average)
        if not isinstance(self.bits, dict):
            raise TypeError(f"BitPlan: bits must be a dict, got {type(self.bits).__name__}")
        for name, values in self.bits.items():
            if not isinstance(name, str) or not isinstance(values, tuple):
                raise TypeError(f"BitPlan: bits must be tuples by names of layers, got {values!r} by {name!r}")
            for value in values:
                check_settings("BitPlan", value, None)


class saved_tensors:
    """Context manager: float tensors that autograd keeps become codes, for any module and without changing it.

    Args:
        bits: 2, 4 or 8, in groups of 256 with 0.125 bits more; or a BitPlan, for each tensor its own.
        stochastic: stochastic rounding, whose error has mean 0.
        min_numel: smaller tensors are kept as they are.
        keep: tensors whose storages are kept as they are. Parameters and buffers of models that run within the context
            always are, and so are leaves of the graph that want a gradient, and casts of either.
        generator: gives the seeds of stochastic rounding; None: torch's own.
        compiled: put the coding into the graphs of models compiled by torch.compile, which then return codes and need
            not hold full precision until their end. Without it, such a model works as any other, but is coded after its
            forward pass. In this form integers stay as they are, so do arguments and results of a compiled graph, and
            floats are codes whatever derivative reads them.

    The form follows from the derivative that reads a tensor, see the table in docs/lowmem.md: codes of `bits` bits
    where it multiplies by the value; a bit where it compares the value with a threshold, exact; codes of 8 bits of the
    argument of GELU, SiLU, Hardswish and Mish, which stand for the result as well, and of queries and keys; half
    precision where it divides by the value; of sigmoid the logit. Statistics of norms, what is not finite and constants
    with at most 16 values, as masks, are exact, the latter in up to 4 bits. What codes do not resolve, as logits with a
    mask of -1e4 among them, is kept in half precision. A function of Python that calls others, as
    F.multi_head_attention_forward, is known by its own name alone.

    A piece of memory that several operations keep is packed once: the result of a ReLU, which the ReLU and the next
    layer keep. Tensors whose smallest element is 0 keep their zeros exactly: the mask of ReLU stays exact. Boolean
    tensors become a bit an element, int64 ones (indices of pooling) the narrowest type. Where a layer's input gradient
    reads rounded values, as that of batch norm, GELU or attention, the error goes on to the layers in front of it.
    `convert` keeps about half as much where it applies: one code for all that batch norm, ReLU and convolution keep.

    Works with retain_graph, torch.utils.checkpoint, autocast, DistributedDataParallel and `ledger`; of nested ones the
    innermost counts. The context is for the forward pass; backward may run outside of it. A tensor that is modified in
    place after it was packed is read as it was; one that was kept as it is raises, as without the context. Second
    derivatives are those of the rounded values.

    Raises:
        TypeError: an argument has another type.
        ValueError: bits or min_numel out of range; `compiled` with a generator, `keep` or a BitPlan.
        RuntimeError: opened within compiled code, or `compiled` within a ledger, which cannot see into a graph;
            stochastic rounding while a CUDA graph is being captured. In the backward pass: a tensor that was kept was
            modified in place.

    Source:
        Chen et al., "ActNN", ICML 2021.
    """

    def __init__(
        self, bits: int | BitPlan = 4, stochastic: bool = False, min_numel: int = 1024, keep: Iterable[Tensor] = (), *,
        generator: torch.Generator | None = None, compiled: bool = False,
    ) -> None:
        plan = bits if isinstance(bits, BitPlan) else None
        bits, _ = check_settings("saved_tensors", 4 if isinstance(bits, BitPlan) else bits, None)
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
        if compiled and (generator is not None or keep or plan is not None):
            raise ValueError("saved_tensors: compiled hooks take neither a generator nor tensors to keep nor a BitPlan")
        self.bits, self.stochastic, self.min_numel, self.compiled = bits, stochastic, min_numel, compiled
        self._generator, self._plan = generator, plan
        self._names: dict[int, dict[int, str]] = {}  # of the modules within one that was called
        self._counts: dict[str, int] = {}  # of tensors that layers have kept
        self._held = _ledger.Held(keep)
        self._coded: weakref.WeakValueDictionary[tuple[Any, ...], _Coded] = weakref.WeakValueDictionary()
        self._arguments: weakref.WeakValueDictionary[tuple[Any, ...], _Coded] = weakref.WeakValueDictionary()
        self._watch = _Watch(self._note_result)
        self._entered: list[contextlib.ExitStack] = []

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

    def _pack(self, x: Tensor) -> _ledger.Kept | _Packed:
        call = self._watch.call
        if _is_suited(x, self.min_numel, (*ops.FLOAT_TYPES, torch.bool, torch.int64)) and not self._is_held(x):
            packed = self._coded_as(x, form_of(x, call), call)
            if packed is not None:
                for kept in packed.coded.encoded.tensors:
                    _ledger.record(kept, x)
                return packed
        _ledger.record(x)
        return _ledger.Kept.of(x)

    def _coded_as(self, x: Tensor, form: Form, call: Call | None) -> _Packed | None:
        """x as codes, those that are there already if they do; None: it is to be kept as it is."""
        flat, order, shape = _flat(x.detach())
        place = _place(flat, x._version)
        argument = self._arguments.get(place)
        if argument is not None:
            return _Packed(argument, order, shape, argument.curve)
        coded = self._coded.get((place, form)) or (self._coded.get((place, FINE)) if form == CODES else None)
        if coded is None:
            encoded = self._encoded(x, flat, form)
            if encoded is None:
                return None
            coded = _Coded(encoded, order, [StorageWeakRef(flat.untyped_storage())])
            self._coded[place, form] = coded
        if form == FINE and call is not None and call.curve() is not None:
            coded.curve = call.curve()
            self._watch.argument = coded
        return _Packed(coded, order, shape)

    def _encoded(self, x: Tensor, flat: Tensor, form: Form) -> Encoded | None:
        """What is kept of a piece of memory; None: it is to be kept as it is."""
        if x.is_floating_point() and not x.requires_grad and form in (CODES, EXACT):
            found = dictionary(flat)
            if found is not None:
                return found
        bits = self.bits
        if self._plan is not None and has_bits(x, form):
            name, index = self._piece()
            planned = self._plan.bits.get(name, ())
            bits = planned[index % len(planned)] if planned else bits
        return encode(flat, form, bits, drawn_seed("saved_tensors", flat, self.stochastic, self._generator))

    def _piece(self) -> tuple[str, int]:
        """The layer that keeps a tensor, by its name in the module that was called, and how many it kept before."""
        modules, name = _ledger.running_modules(), ""
        if modules:
            called = modules[-1]
            if id(called) not in self._names:
                self._names[id(called)] = {id(module): name for name, module in called.named_modules()}
            name = next((names for names in map(self._names[id(called)].get, map(id, modules)) if names), "")
        index = self._counts.get(name, 0)
        self._counts[name] = index + 1
        return name, index

    def _note_result(self, argument: _Coded, result: Tensor) -> None:
        """Of an activation function: what keeps its result reads the codes of its argument."""
        flat, order, _ = _flat(result.detach())
        if order == argument.order and flat.untyped_storage()._cdata == result.untyped_storage()._cdata:
            argument.storages.append(StorageWeakRef(flat.untyped_storage()))
            self._arguments[_place(flat, result._version)] = argument

    @staticmethod
    def _unpack(packed: _ledger.Kept | _Packed) -> Tensor:
        return packed.read("saved_tensors") if isinstance(packed, _ledger.Kept) else packed.read()

    def __enter__(self) -> saved_tensors:
        if torch.compiler.is_compiling():
            raise RuntimeError("saved_tensors: open it round the call of a compiled function, not within")
        if self.compiled and _ledger.is_open():
            raise RuntimeError("saved_tensors: a ledger cannot see into compiled graphs: open it within this context")
        self._counts.clear()
        hooks: Any = (self._pack, self._unpack)
        if self.compiled:
            hooks = _traced_hooks(self.bits, self.stochastic, self.min_numel)
        entered = contextlib.ExitStack()
        entered.enter_context(torch.autograd.graph.saved_tensors_hooks(*hooks))
        if not self.compiled:
            entered.enter_context(self._watch)
        self._entered.append(entered)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered.pop().__exit__(kind, error, trace)


def has_bits(x: Tensor, form: Form) -> bool:
    """Whether a tensor is kept in as many bits as are asked for."""
    return x.is_floating_point() and (form == CODES or form.name == "rows")


def _is_suited(x: Tensor, min_numel: int, dtypes: Iterable[torch.dtype]) -> bool:
    plain = x.layout is torch.strided and x.dtype in dtypes
    return plain and type(x) in (Tensor, nn.Parameter) and x.numel() >= max(min_numel, 1)


# --- hooks within compiled graphs -------------------------------------------------------------------------------------


def _pack_traced(x: Tensor, bits: int, stochastic: bool, min_numel: int) -> tuple[Any, ...]:
    if x.dtype not in (*ops.FLOAT_TYPES, torch.bool) or x.numel() < max(min_numel, 1) or isinstance(x, nn.Parameter):
        return (x.detach(),)
    flat, order, shape = _flat(x)
    if x.dtype == torch.bool:
        tensors: tuple[Tensor, ...] = (pack_bits(flat),)
    else:
        tensors = quantize_saved(flat, bits, drawn_seed("saved_tensors", flat, stochastic))
    return (*tensors, x.dtype, order, shape)


def _unpack_traced(packed: tuple[Any, ...], bits: int) -> Tensor:
    if len(packed) == 1:
        return packed[0]
    *tensors, dtype, order, shape = packed
    count = 1
    for size in shape:
        count *= size
    if dtype == torch.bool:
        flat = unpack_bits(tensors[0], count)
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
