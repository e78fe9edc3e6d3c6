"""PackedTensor: a tensor of one bit an element, 64 channels a word."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from lowbit_ext import _native, _oplib

WORD_BITS: int = _native.cpu.WORD_BITS

# The float types kernels read and write, by the number they have there.
FLOAT_TYPES: dict[torch.dtype, int] = {
    getattr(torch, name): number for name, number in _native.cpu.FLOAT_TYPES.items()
}

# Values that bit 0 and bit 1 stand for.
ENCODING_VALUES: dict[str, tuple[float, float]] = {"sign": (-1.0, 1.0), "step": (0.0, 1.0)}


def words_for(channels: int) -> int:
    """Number of 64-bit words that hold `channels` bits."""
    return (channels + WORD_BITS - 1) // WORD_BITS


def _unpack(words: Tensor, channels: int, low: float, high: float, dtype: torch.dtype) -> Tensor:
    if words.dtype != torch.int64:
        raise TypeError(f"unpack: words must be int64, got {words.dtype}")
    if dtype not in FLOAT_TYPES:
        raise TypeError(f"unpack: dtype must be float32, bfloat16 or float16, got {dtype}")
    if words.shape[-1] != words_for(channels):
        raise ValueError(
            f"unpack: {channels} channels need {words_for(channels)} words a pixel, got {words.shape[-1]}"
        )
    words = words.contiguous()
    output = words.new_empty((*words.shape[:-1], channels), dtype=dtype)
    pixels = words.numel() // max(words.shape[-1], 1)
    status = _native.kernels(words).unpack(
        words.data_ptr(), pixels, channels, low, high, output.data_ptr(), FLOAT_TYPES[dtype]
    )
    _native.check("unpack", status)
    return output


def _unpack_fake(words: Tensor, channels: int, low: float, high: float, dtype: torch.dtype) -> Tensor:
    return words.new_empty((*words.shape[:-1], channels), dtype=dtype)


# [..., words] -> dense [..., channels]: bit ? high : low.
unpack_op = _oplib.define(
    "unpack(Tensor words, SymInt channels, float low, float high, ScalarType dtype) -> Tensor",
    cpu=_unpack,
    cuda=_unpack,
    fake=_unpack_fake,
)


@dataclasses.dataclass(frozen=True, eq=False)
class PackedTensor:
    """Bits of a tensor of logical shape (N, C, *spatial), channels packed into 64-bit words.

    Attributes:
        words: int64, seen as unsigned, shape (N, *spatial, ceil(C / 64)), contiguous. Channel c is bit c % 64 of word
            c // 64; bits past the last channel are 0.
        channels: C.
        encoding: "sign" (bit 1 is +1, bit 0 is -1) or "step" (bit 1 is 1, bit 0 is 0).
        scale: optional factor of the values, a tensor that broadcasts against (N, C, *spatial).

    Raises:
        TypeError, ValueError: words of the wrong dtype or last dimension, unknown encoding.
    """

    words: Tensor
    channels: int
    encoding: str = "sign"
    scale: Tensor | None = None

    def __post_init__(self) -> None:
        if torch.compiler.is_compiling():
            return
        if self.words.dtype != torch.int64:
            raise TypeError(f"PackedTensor: words must be int64, got {self.words.dtype}")
        if self.encoding not in ENCODING_VALUES:
            raise ValueError(f"PackedTensor: encoding must be one of {list(ENCODING_VALUES)}, got {self.encoding!r}")
        if self.words.dim() < 2 or self.words.shape[-1] != words_for(self.channels):
            raise ValueError(
                f"PackedTensor: {self.channels} channels need words of shape (N, ..., {words_for(self.channels)}), "
                f"got {tuple(self.words.shape)}"
            )

    @property
    def shape(self) -> torch.Size:
        """Logical shape (N, C, *spatial)."""
        sizes = self.words.shape
        return torch.Size((sizes[0], self.channels, *sizes[1:-1]))

    @property
    def device(self) -> torch.device:
        """Device of the words."""
        return self.words.device

    def dim(self) -> int:
        """Number of logical dimensions."""
        return self.words.dim()

    def to(self, device: torch.device | str) -> PackedTensor:
        """The same bits on another device."""
        scale = None if self.scale is None else self.scale.to(device)
        return dataclasses.replace(self, words=self.words.to(device), scale=scale)

    def unpack(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Values as a dense tensor of shape (N, C, *spatial), channels-last in memory.

        Args:
            dtype: float32, bfloat16 or float16.

        Raises:
            TypeError: another dtype.
        """
        low, high = ENCODING_VALUES[self.encoding]
        values = unpack_op(self.words, self.channels, low, high, dtype).movedim(-1, 1)
        return values if self.scale is None else values * self.scale.to(dtype)


def _flatten(packed: PackedTensor) -> tuple[list[Any], Any]:
    return [packed.words, packed.scale], (packed.channels, packed.encoding)


def _flatten_with_keys(packed: PackedTensor) -> tuple[list[Any], Any]:
    tensors, context = _flatten(packed)
    keys = (torch.utils._pytree.GetAttrKey("words"), torch.utils._pytree.GetAttrKey("scale"))
    return list(zip(keys, tensors, strict=True)), context


def _unflatten(tensors: Any, context: Any) -> PackedTensor:
    # Transforms rebuild the structure with placeholders in place of tensors, so nothing is checked here.
    packed = object.__new__(PackedTensor)
    words, scale = tensors
    channels, encoding = context
    for name, value in (("words", words), ("channels", channels), ("encoding", encoding), ("scale", scale)):
        object.__setattr__(packed, name, value)
    return packed


torch.utils._pytree.register_pytree_node(
    PackedTensor,
    _flatten,
    _unflatten,
    serialized_type_name="lowbit_ext.PackedTensor",
    to_dumpable_context=list,
    from_dumpable_context=tuple,
    flatten_with_keys_fn=_flatten_with_keys,
)
torch.serialization.add_safe_globals([PackedTensor])
