"""saved_tensors(): codes of a few bits in place of whatever autograd keeps, for any module."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from lowbit_ext.lowmem import codes, ledger, ops


@dataclasses.dataclass(frozen=True)
class _Bools:
    """A boolean tensor as a bit an element."""

    words: Tensor
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Integers:
    """An int64 tensor in a narrower type."""

    values: Tensor


_Packed = Tensor | codes.Codes | _Bools | _Integers


def _pack_bools(x: Tensor) -> _Bools:
    flat = torch.nn.functional.pad(x.reshape(-1).to(torch.uint8), (0, -x.numel() % 8)).reshape(-1, 8)
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=x.device)
    return _Bools((flat * weights).sum(1, dtype=torch.uint8), tuple(x.shape))


def _unpack_bools(packed: _Bools) -> Tensor:
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.words.device)
    count = torch.Size(packed.shape).numel()
    return (packed.words[:, None] >> shifts & 1).reshape(-1)[:count].reshape(packed.shape).bool()


def _narrow(x: Tensor) -> Tensor | _Integers:
    low, high = (int(value) for value in torch.aminmax(x))
    for dtype in (torch.uint8, torch.int16, torch.int32):
        limits = torch.iinfo(dtype)
        if limits.min <= low and high <= limits.max:
            return _Integers(x.to(dtype))
    return x


class saved_tensors:  # noqa: N801  # a context manager, named like torch's
    """Context manager: float tensors that autograd keeps become codes, for any module and without changing it.

    Args:
        bits: 2, 4 or 8, in groups of 256 with 0.125 bits more.
        stochastic: stochastic rounding, whose error has mean 0; seeded from torch's generator.
        min_numel: smaller tensors are kept as they are.
        keep: tensors whose storages are kept as they are. Parameters and buffers of modules that run within the context
            always are.

    A storage that several operations keep is packed once. Tensors without negative elements keep their zeros exactly:
    the mask of ReLU stays exact. Boolean tensors become a bit an element, int64 ones (indices of pooling) the narrowest
    type. The gradients of everything else read rounded values, and errors build up with depth where a layer's input
    gradient reads them: `convert` does better where it applies. Works with retain_graph, torch.utils.checkpoint and
    autocast. There is no second derivative beyond what the rounded values give.

    Raises:
        ValueError: bits or min_numel out of range.

    Source:
        Chen et al., "ActNN", ICML 2021.
    """

    def __init__(
        self, bits: int = 4, stochastic: bool = False, min_numel: int = 1024, keep: Iterable[Tensor] = ()
    ) -> None:
        if bits not in ops.BITS:
            raise ValueError(f"saved_tensors: bits must be 2, 4 or 8, got {bits}")
        if min_numel < 0:
            raise ValueError(f"saved_tensors: min_numel must not be negative, got {min_numel}")
        self.bits, self.stochastic, self.min_numel = bits, stochastic, min_numel
        self._kept = {tensor.untyped_storage()._cdata for tensor in keep}
        self._sizes: list[set[tuple[int, ...]]] = []  # of the parameters of the modules that run, innermost last
        self._packed: dict[tuple[Any, ...], tuple[StorageWeakRef, _Packed]] = {}
        self._hooks: list[Any] = []

    def _enter_module(self, module: nn.Module, _: Any) -> None:
        sizes = set()
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            self._kept.add(tensor.untyped_storage()._cdata)
            if tensor.dim() > 1:
                sizes |= {tuple(tensor.shape), tuple(tensor.shape[::-1])}
        self._sizes.append(sizes)

    def _leave_module(self, *_: Any) -> None:
        if self._sizes:
            self._sizes.pop()

    def _is_weight(self, x: Tensor) -> bool:
        # Autocast keeps a copy of the weight in a narrower type: another storage, the same size.
        return x.dtype != torch.float32 and bool(self._sizes) and tuple(x.shape) in self._sizes[-1]

    def _pack_new(self, x: Tensor) -> _Packed:
        if x.dtype == torch.bool:
            return _pack_bools(x)
        if x.dtype == torch.int64:
            return _narrow(x)
        positive = bool(x.amin() >= 0)
        return codes.quantize(x, self.bits, stochastic=self.stochastic, positive=positive)

    def _pack(self, x: Tensor) -> _Packed:
        storage = x.untyped_storage()
        suited = x.dtype in ops.FLOAT_TYPES or x.dtype in (torch.bool, torch.int64)
        if (
            type(x) not in (Tensor, nn.Parameter) or not suited or x.numel() < max(self.min_numel, 1)
            or storage._cdata in self._kept or self._is_weight(x)
        ):  # fmt: skip
            ledger.record(x)
            return x
        key = (storage._cdata, x.storage_offset(), x.shape, x.stride(), x.dtype, x._version)
        found = self._packed.get(key)
        if found is not None and not found[0].expired():
            return found[1]
        packed = self._pack_new(x)
        self._packed[key] = StorageWeakRef(storage), packed
        if isinstance(packed, codes.Codes):
            ledger.record(packed.codes, x.nbytes)
            ledger.record(packed.scale_minimum, packed.scale_minimum.nbytes)
        elif isinstance(packed, Tensor):
            ledger.record(packed)
        else:
            ledger.record(packed.words if isinstance(packed, _Bools) else packed.values, x.nbytes)
        return packed

    @staticmethod
    def _unpack(packed: _Packed) -> Tensor:
        if isinstance(packed, codes.Codes):
            return codes.dequantize(packed)
        if isinstance(packed, _Bools):
            return _unpack_bools(packed)
        return packed.values.long() if isinstance(packed, _Integers) else packed

    def __enter__(self) -> saved_tensors:
        self._hooks = [
            nn.modules.module.register_module_forward_pre_hook(self._enter_module),
            nn.modules.module.register_module_forward_hook(self._leave_module, always_call=True),
        ]
        self._saved = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        self._saved.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._saved.__exit__(kind, error, trace)
        for hook in self._hooks:
            hook.remove()
        self._packed.clear()
