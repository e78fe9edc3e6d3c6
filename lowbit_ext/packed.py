"""PackedTensor: a tensor of one bit an element, 64 channels a word."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lowbit_ext import _arguments, _native, _oplib
from lowbit_ext._torch import register_tree

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


def clear_tail(words: Tensor, channels: int) -> Tensor:
    """Words (..., ceil(channels / 64)) with zeros past the last channel, which kernels take for granted.

    The words themselves where channels fill them; else a copy, without a look at what they hold: a look would wait for
    the device and leave nothing to trace.
    """
    bits = channels % WORD_BITS
    if bits == 0:
        return words
    words = words.clone()
    words.select(-1, -1).bitwise_and_((1 << bits) - 1)
    return words


def join_channels(words: Sequence[Tensor], channels: Sequence[int]) -> Tensor:
    """Words of several values side by side: the channels of each behind those of the one before.

    Args:
        words: int64 (..., ceil(channels / 64)) of each value, zeros past the last channel.
        channels: of each value.

    Returns:
        int64 (..., ceil(sum of channels / 64)).
    """
    if all(count % WORD_BITS == 0 for count in channels[:-1]):
        return torch.cat(list(words), -1)
    joined = words[0].new_zeros(*words[0].shape[:-1], words_for(sum(channels)))
    begin = 0
    for part, count in zip(words, channels, strict=True):
        first, shift = divmod(begin, WORD_BITS)
        joined[..., first : first + part.shape[-1]] |= part << shift
        overflows = joined.shape[-1] - first - 1  # words whose upper bits belong to the next one
        if shift and overflows:
            upper = (part[..., :overflows] >> (WORD_BITS - shift)) & ((1 << shift) - 1)  # the shift copies the sign
            joined[..., first + 1 : first + 1 + upper.shape[-1]] |= upper
        begin += count
    return joined


def unchecked(kind: type[Any], **fields: Any) -> Any:
    """An instance of a frozen dataclass from fields that are known to be right, as a kernel's results are."""
    made = object.__new__(kind)
    made.__dict__.update(fields)
    return made


def _unpack_outputs(words: Tensor, channels: int, low: float, high: float, dtype: torch.dtype) -> Tensor:
    if words.dtype != torch.int64:
        raise TypeError(f"unpack: words must be int64, got {words.dtype}")
    if dtype not in FLOAT_TYPES:
        raise TypeError(f"unpack: dtype must be float32, bfloat16 or float16, got {dtype}")
    if words.shape[-1] != words_for(channels):
        raise ValueError(
            f"unpack: {channels} channels need {words_for(channels)} words a pixel, got {words.shape[-1]}"
        )
    return words.new_empty((*words.shape[:-1], channels), dtype=dtype)


def _unpack(words: Tensor, channels: int, low: float, high: float, dtype: torch.dtype) -> Tensor:
    output = _unpack_outputs(words, channels, low, high, dtype)
    words = words.contiguous()
    pixels = words.numel() // max(words.shape[-1], 1)
    status = _native.kernels(words).unpack(
        _native.pointer(words, words, "unpack: words"), pixels, channels, low, high, output.data_ptr(),
        FLOAT_TYPES[dtype],
    )
    _native.check("unpack", status)
    return output


# [..., words] -> dense [..., channels]: bit ? high : low.
unpack_op = _oplib.define(
    "unpack(Tensor words, SymInt channels, float low, float high, ScalarType dtype) -> Tensor",
    outputs=_unpack_outputs,
    launcher=_unpack,
)


def _broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    return len(shape) <= len(to) and all(
        size in (1, wanted) for size, wanted in zip(reversed(shape), reversed(to), strict=False)
    )


@dataclasses.dataclass(frozen=True, eq=False)
class PackedTensor:
    """Bits of a tensor of logical shape (N, C, *spatial), channels packed into 64-bit words.

    Attributes:
        words: int64, seen as unsigned, shape (N, *spatial, ceil(C / 64)). Channel c is bit c % 64 of word c // 64. Bits
            past the last channel are 0: words given with others are copied and these cleared, whether they come from
            a caller, a file, a pickle or a transformation.
        channels: C.
        encoding: "sign" (bit 1 is +1, bit 0 is -1) or "step" (bit 1 is 1, bit 0 is 0).
        scale: optional factor of the values, a float tensor that broadcasts against (N, C, *spatial).

    Raises:
        TypeError, ValueError: words of the wrong dtype or last dimension, unknown encoding, a scale that does not fit.
    """

    words: Tensor
    channels: int
    encoding: str = "sign"
    scale: Tensor | None = None

    def __post_init__(self) -> None:
        if not torch.compiler.is_compiling():
            self._check()
        object.__setattr__(self, "words", clear_tail(self.words, self.channels))

    def _check(self) -> None:
        words = _arguments.tensor("PackedTensor", "words", self.words)
        if words.dtype != torch.int64:
            raise TypeError(f"PackedTensor: words must be int64, got {words.dtype}")
        object.__setattr__(self, "channels", _arguments.integer("PackedTensor", "channels", self.channels, 0))
        _arguments.choice("PackedTensor", "encoding", self.encoding, tuple(ENCODING_VALUES))
        if words.dim() < 2 or words.shape[-1] != words_for(self.channels):
            raise ValueError(
                f"PackedTensor: {self.channels} channels need words of shape (N, ..., {words_for(self.channels)}), "
                f"got {tuple(words.shape)}"
            )
        if self.scale is None:
            return
        scale = _arguments.tensor_like("PackedTensor", "scale", self.scale, words)
        if scale.dtype not in _arguments.FLOATS_AND_DOUBLE or not _broadcasts(scale.shape, self.shape):
            raise ValueError(
                f"PackedTensor: scale must be a float tensor that broadcasts against {tuple(self.shape)}, "
                f"got {scale.dtype} {tuple(scale.shape)}"
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()

    @property
    def shape(self) -> torch.Size:
        """Logical shape (N, C, *spatial)."""
        sizes = self.words.shape
        return torch.Size((*sizes[:1], self.channels, *sizes[1:-1]))

    @property
    def device(self) -> torch.device:
        """Device of the words."""
        return self.words.device

    def dim(self) -> int:
        """Number of logical dimensions."""
        return self.words.dim()

    def to(self, device: torch.device | str) -> PackedTensor:
        """The same bits on another device.

        Raises:
            TypeError, ValueError: no device. RuntimeError: torch cannot move tensors there.
        """
        device = _arguments.device("PackedTensor.to", "device", device)
        scale = None if self.scale is None else self.scale.to(device)
        return packed_words(self.words.to(device), self.channels, self.encoding, scale)

    def unpack(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Values as a dense tensor of shape (N, C, *spatial), channels-last in memory.

        Args:
            dtype: float32, bfloat16 or float16.

        Raises:
            TypeError: another dtype.
        """
        _arguments.dtype("unpack", "dtype", dtype, _arguments.FLOATS)
        if self.scale is not None and self.scale.device != self.device:  # words or scale replaced by a transformation
            raise ValueError(f"unpack: packed's scale must be on {self.device} like its words, got {self.scale.device}")
        low, high = ENCODING_VALUES[self.encoding]
        values = unpack_op(self.words, self.channels, low, high, dtype).movedim(-1, 1)
        return values if self.scale is None else values * self.scale.to(dtype)


def packed_words(words: Tensor, channels: int, encoding: str, scale: Tensor | None = None) -> PackedTensor:
    """A PackedTensor of words that a kernel wrote, without its checks."""
    return unchecked(PackedTensor, words=words, channels=channels, encoding=encoding, scale=scale)


def _unflatten(tensors: Any, context: Any) -> PackedTensor:
    # Transforms rebuild the structure with placeholders in place of tensors, so nothing is checked here. Where they
    # changed the words, `~` for one, the bits past the last channel may have changed as well.
    words, scale = tensors
    channels, encoding = context
    if isinstance(words, Tensor) and words.dtype == torch.int64 and words.shape[-1:] == (words_for(channels),):
        words = clear_tail(words, channels)
    return packed_words(words, channels, encoding, scale)


register_tree(PackedTensor, ("words", "scale"), ("channels", "encoding"), _unflatten)
_arguments.TAKE_NOTHING_OVER.add(PackedTensor)
torch.serialization.add_safe_globals([PackedTensor])
