"""ledger(): what autograd keeps for the backward pass, how large, and who keeps full precision."""

from __future__ import annotations

import dataclasses
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef


@dataclasses.dataclass
class Entry:
    """One storage that a backward pass needs.

    Attributes:
        module: the module that ran when it was kept, by name where the ledger was given the model, else by class.
        shape, dtype: of the first tensor kept of it.
        stored: bytes of the storage.
        equivalent: bytes that plain torch keeps for the same purpose.
    """

    module: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    stored: int
    equivalent: int
    storage: StorageWeakRef = dataclasses.field(repr=False)

    @property
    def full_precision(self) -> bool:
        """Whether it is a float tensor that stands for nothing larger."""
        return self.dtype.is_floating_point and self.equivalent <= self.stored


_open: list[Ledger] = []


def stands_for(kept: Tensor, bytes: int) -> None:
    """Tells the open ledger that a tensor about to be kept replaces so many bytes."""
    if _open and not torch.compiler.is_compiling():
        _open[-1]._equivalents[kept.untyped_storage()._cdata] = bytes


def record(kept: Tensor, bytes: int | None = None) -> None:
    """Tells the open ledger what a saved-tensor hook keeps."""
    if _open and not torch.compiler.is_compiling():
        _open[-1]._add(kept, bytes)


class Ledger:
    """Context manager: records what is kept between its beginning and its end. Made by `ledger`."""

    def __init__(self, model: nn.Module | None) -> None:
        self.entries: list[Entry] = []
        self.peak = 0
        self._names = {} if model is None else {id(module): name for name, module in model.named_modules()}
        self._parameters = set()
        if model is not None:
            for tensor in (*model.parameters(), *model.buffers()):
                self._parameters.add(tensor.untyped_storage()._cdata)
        self._known: dict[int, Entry] = {}
        self._equivalents: dict[int, int] = {}
        self._running: list[str] = []
        self._hooks: list[Any] = []

    @property
    def stored(self) -> int:
        """Bytes of all storages, each once."""
        return sum(entry.stored for entry in self.entries)

    @property
    def equivalent(self) -> int:
        """Bytes that plain torch would keep."""
        return sum(entry.equivalent for entry in self.entries)

    @property
    def full_precision(self) -> list[Entry]:
        """Who still keeps float tensors, largest first."""
        return sorted((e for e in self.entries if e.full_precision), key=lambda e: -e.stored)

    def _enter_module(self, module: nn.Module, _: Any) -> None:
        self._running.append(self._names.get(id(module)) or type(module).__name__)
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            self._parameters.add(tensor.untyped_storage()._cdata)

    def _leave_module(self, *_: Any) -> None:
        if self._running:
            self._running.pop()

    def _add(self, tensor: Tensor, equivalent: int | None = None) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._known.get(key)
        if key in self._parameters or (known is not None and not known.storage.expired()):
            return
        bytes = storage.nbytes()
        if equivalent is None:
            equivalent = self._equivalents.pop(key, bytes)
        module = self._running[-1] if self._running else "outside of modules"
        entry = Entry(module, tuple(tensor.shape), tensor.dtype, bytes, equivalent, StorageWeakRef(storage))
        self._known[key] = entry
        self.entries.append(entry)
        self.peak = max(self.peak, sum(e.stored for e in self.entries if not e.storage.expired()))

    def _pack(self, tensor: Tensor) -> Tensor:
        self._add(tensor)
        return tensor

    def __enter__(self) -> Ledger:
        _open.append(self)
        self._hooks = [
            nn.modules.module.register_module_forward_pre_hook(self._enter_module),
            nn.modules.module.register_module_forward_hook(self._leave_module, always_call=True),
        ]
        self._saved = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._saved.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._saved.__exit__(kind, error, trace)
        for hook in self._hooks:
            hook.remove()
        _open.remove(self)

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

    Args:
        model: gives entries the names of its modules, and its parameters are never counted; those of other modules are
            left out when they run.

    Returns:
        Ledger with `stored`, `equivalent` and `peak` (bytes; each storage once, the peak of those alive together),
        `entries`, and `full_precision`: who still keeps float tensors.
    """
    return Ledger(model)
