"""ledger(): what autograd keeps for the backward pass, how large, and who keeps full precision."""

from __future__ import annotations

import dataclasses
import sys
import threading
from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from lowbit_ext._torch import MODULE_CALL, innermost_saved_tensors_hooks, pytree


def running_modules() -> list[nn.Module]:
    """The modules whose forward pass runs, innermost first: read from the stack.

    Hooks on all modules would tell as well, but make torch.compile compile again.
    """
    found, frame = [], sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code is MODULE_CALL:
            found.append(frame.f_locals["self"])
    return found


class Held:
    """Storages of parameters, buffers and other tensors that are there anyway.

    A storage is known by its address: one that is weakly referred to keeps it.
    """

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        self._storages: dict[int, StorageWeakRef] = {}
        self._models: dict[int, nn.Module] = {}
        self.add(tensors)

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Adds their storages."""
        for tensor in tensors:
            if tensor.layout is torch.strided:
                storage = tensor.untyped_storage()
                self._storages[storage._cdata] = StorageWeakRef(storage)

    def add_model(self, model: nn.Module) -> None:
        """Adds parameters and buffers, once a model."""
        if id(model) not in self._models:
            self._models[id(model)] = model
            self.add((*model.parameters(), *model.buffers()))

    def __contains__(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._storages


@dataclasses.dataclass(frozen=True)
class Kept:
    """A tensor that a saved-tensor hook keeps as it is, with autograd's check, which it does not make behind hooks."""

    tensor: Tensor
    version: int

    @staticmethod
    def of(tensor: Tensor) -> Kept:
        """Detached: a result that its own node of the graph kept would never be freed."""
        return Kept(tensor.detach(), tensor._version)

    def read(self, name: str) -> Tensor:
        """The tensor, if it is still what it was."""
        if self.tensor._version != self.version:
            raise RuntimeError(
                f"{name}: a tensor needed for the backward pass was modified in place: {self.tensor.dtype} "
                f"{tuple(self.tensor.shape)} is at version {self.tensor._version}, expected {self.version}. Run "
                "backward() before, or modify a copy"
            )
        return self.tensor


@dataclasses.dataclass
class Entry:
    """One storage that a backward pass needs.

    Attributes:
        module: the module that ran when it was kept, by name where the ledger was given the model, else by class.
        shape, dtype: of the first tensor kept of it.
        stored: bytes of the storage.
        equivalent: bytes that plain torch keeps for the same purpose, beyond what earlier entries account for.
        full_precision: whether it is a float tensor that stands for nothing else.
    """

    module: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    stored: int
    equivalent: int
    full_precision: bool
    storage: StorageWeakRef = dataclasses.field(repr=False)


class _Open(threading.local):
    """Ledgers that are open in this thread: autograd's hooks are the thread's own as well."""

    def __init__(self) -> None:
        self.ledgers: list[Ledger] = []


_open = _Open()


def is_open() -> bool:
    """Whether a ledger is open in this thread."""
    return bool(_open.ledgers)


def stands_for(kept: Tensor | None, *replaced: Tensor) -> None:
    """Tells the open ledgers what is kept, or about to be, in place of tensors that torch keeps: None is nothing."""
    if not torch.compiler.is_compiling():
        for book in _open.ledgers:
            book._stands_for(kept, replaced)


def record(kept: Tensor, *replaced: Tensor) -> None:
    """Tells the open ledgers what a saved-tensor hook keeps in place of others; of none: the tensor itself."""
    if not torch.compiler.is_compiling():
        for book in _open.ledgers:
            if replaced:
                book._stands_for(kept, replaced)
            book._add(kept)


class Ledger:
    """Context manager: records what is kept between its beginning and its end. Made by `ledger`."""

    def __init__(self, model: nn.Module | None) -> None:
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"ledger: model must be a torch.nn.Module or None, got {type(model).__name__}")
        self.entries: list[Entry] = []
        self.peak = 0
        self._names = {} if model is None else {id(module): name for name, module in model.named_modules()}
        self._held = Held()
        if model is not None:
            self._held.add_model(model)
        self._known: dict[int, Entry] = {}
        self._replacing: dict[int, int] = {}  # storages to be entries -> bytes that they stand for
        self._counted: dict[int, StorageWeakRef] = {}  # storages that `equivalent` has in it
        self._spared = 0  # bytes of those that nothing stands for

    @property
    def stored(self) -> int:
        """Bytes of all storages, each once."""
        return sum(entry.stored for entry in self.entries)

    @property
    def equivalent(self) -> int:
        """Bytes that plain torch would keep."""
        return sum(entry.equivalent for entry in self.entries) + self._spared

    @property
    def full_precision(self) -> list[Entry]:
        """Who still keeps float tensors, largest first."""
        return sorted((entry for entry in self.entries if entry.full_precision), key=lambda entry: -entry.stored)

    def _count(self, tensor: Tensor) -> int:
        """Bytes of a storage that plain torch keeps, 0 if they have been counted."""
        storage = tensor.untyped_storage()
        if tensor in self._held or storage._cdata in self._counted:
            return 0
        self._counted[storage._cdata] = StorageWeakRef(storage)
        return storage.nbytes()

    def _stands_for(self, kept: Tensor | None, replaced: Iterable[Tensor]) -> None:
        bytes = sum(map(self._count, replaced))
        if kept is None:
            self._spared += bytes
            return
        key = kept.untyped_storage()._cdata
        if key in self._known:
            self._known[key].equivalent += bytes
        else:
            self._replacing[key] = self._replacing.get(key, 0) + bytes

    def _name(self, modules: list[nn.Module]) -> str:
        for module in modules:
            if id(module) in self._names:
                return self._names[id(module)] or type(module).__name__
        return type(modules[0]).__name__ if modules else "outside of modules"

    def _add(self, tensor: Tensor) -> None:
        modules = running_modules()
        if modules:
            self._held.add_model(modules[-1])
        if tensor.layout is not torch.strided or isinstance(tensor, nn.Parameter) or tensor in self._held:
            return
        storage = tensor.untyped_storage()
        key, bytes = storage._cdata, storage.nbytes()
        if key in self._known or not bytes:
            return
        replacing = key in self._replacing
        entry = Entry(
            self._name(modules), tuple(tensor.shape), tensor.dtype, bytes,
            self._replacing.pop(key) if replacing else self._count(tensor),
            tensor.dtype.is_floating_point and not replacing, StorageWeakRef(storage),
        )
        self._known[key] = entry
        self.entries.append(entry)
        self.peak = max(self.peak, sum(e.stored for e in self.entries if not e.storage.expired()))

    def _pack(self, tensor: Tensor) -> Any:
        if self._below is None:
            self._add(tensor)
            return Kept.of(tensor)
        packed = self._below[0](tensor)
        for part in pytree.tree_leaves(packed):
            if isinstance(part, Tensor):
                self._stands_for(part, (tensor,))
                self._add(part)
        return packed

    def _unpack(self, packed: Any) -> Tensor:
        return packed.read("ledger") if self._below is None else self._below[1](packed)

    def __enter__(self) -> Ledger:
        # torch calls the innermost hooks alone: those outside are called from here.
        self._below = innermost_saved_tensors_hooks(True)
        self._saved = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        self._saved.__enter__()
        _open.ledgers.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _open.ledgers.remove(self)
        self._saved.__exit__(kind, error, trace)

    def __str__(self) -> str:
        lines = [
            f"stored {self.stored:,} bytes, peak {self.peak:,}; plain torch {self.equivalent:,} "
            f"({self.equivalent / max(self.stored, 1):.1f} times)"
        ]
        for entry in self.full_precision[:10]:
            lines.append(f"full precision: {entry.module}, {entry.dtype} {entry.shape}, {entry.stored:,} bytes")
        return "\n".join(lines)


def ledger(model: nn.Module | None = None) -> Ledger:
    """Records what autograd keeps: ``with lowmem.ledger(model) as book: loss = ...``, then ``print(book)``.

    What is kept by other means, as the arguments of torch.utils.checkpoint, is not seen. Ledgers and `saved_tensors`
    may be nested in any order. A ledger sees the thread that opened it. Of a model compiled by torch.compile it sees
    what the compiled graph keeps; there codes of a converted model count as `equivalent` to themselves.

    Args:
        model: gives entries the names of its modules, and its parameters are never counted; those of other modules are
            left out when they run.

    Returns:
        Ledger with `stored`, `equivalent` and `peak` (bytes; each storage once, the peak of those alive together),
        `entries`, and `full_precision`: who still keeps float tensors.

    Raises:
        TypeError: `model` is not a module.
        RuntimeError: in the backward pass, of a tensor that was modified in place after it was kept.
    """
    return Ledger(model)
