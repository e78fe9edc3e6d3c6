"""Weights whose signs count: packed for many calls, or latent with a straight-through gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lowbit_ext import _arguments, _native
from lowbit_ext._torch import register_tree
from lowbit_ext.binary import ops
from lowbit_ext.binary.activation import check_float
from lowbit_ext.packed import (
    clear_tail,
    unchecked,
    unpack_op,
    words_for,
)


@dataclasses.dataclass(frozen=True, eq=False)
class PackedWeight:
    """Signs of a weight, packed once for many calls. Made by pack_weight or from_words.

    Attributes:
        words: int64 (O, kh, kw, ceil(C / groups / 64)); bit 1 is +1, bits past the last channel are 0.
        blocked: uint8, the same bits in the order the kernels of `isa` read; a new PackedWeight makes its own.
        shape: shape of the float weight: (O, C / groups, kh, kw), (O, C / groups, k) or (O, C).
        groups: convolution groups.
        isa: what `blocked` is for: an instruction-set level, or a GPU and its architecture.
    """

    words: Tensor
    blocked: Tensor
    shape: tuple[int, ...]
    groups: int
    isa: str

    def __post_init__(self) -> None:
        if torch.compiler.is_compiling():
            return
        shape, groups = _check_weight_words("PackedWeight", self.words, self.shape, self.groups)
        self.__dict__.update(vars(pack_words(clear_tail(self.words, shape[1]), shape, groups)))

    def __reduce__(self) -> Any:
        # Copies and pickles make the private copy anew: they are checked, and may be read on another machine.
        return PackedWeight.from_words, (self.words, self.shape, self.groups)

    @property
    def channels(self) -> int:
        """Input channels over all groups."""
        return self.shape[1] * self.groups

    def unpack(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Signs as a dense tensor of the float weight's shape; dtype float32, bfloat16 or float16, else TypeError."""
        _arguments.dtype("unpack", "dtype", dtype, _arguments.FLOATS)
        return unpack_op(self.words, self.shape[1], -1.0, 1.0, dtype).movedim(-1, 1).reshape(self.shape)

    @staticmethod
    def from_words(words: Tensor, shape: Sequence[int], groups: int = 1) -> PackedWeight:
        """Rebuilds the kernels' private copy from words, e.g. those of a loaded file; bits past the last channel count
        as 0.

        Args:
            words: int64 (O, kh, kw, ceil(C / groups / 64)).
            shape: (O, C / groups, kh, kw), (O, C / groups, k) or (O, C).
            groups: convolution groups.

        Raises:
            TypeError, ValueError: words that are not those of a weight of this shape, or groups that do not divide it.
        """
        shape, groups = _check_weight_words("PackedWeight.from_words", words, shape, groups)
        return pack_words(clear_tail(words, shape[1]), shape, groups)


def _check_weight_words(op: str, words: Any, shape: Any, groups: Any) -> tuple[tuple[int, ...], int]:
    """Checks words against the shape of the weight they are of; returns the shape and the groups as ints."""
    _arguments.tensor(op, "words", words, (torch.int64,))
    sizes = [_arguments.index(size) for size in shape] if isinstance(shape, (tuple, list)) else []
    if not 2 <= len(sizes) <= 4 or any(size is None or size < 0 for size in sizes):
        raise ValueError(f"{op}: shape must be (O, C), (O, C, k) or (O, C, kh, kw), got {shape!r}")
    filters, channels, *kernel = sizes
    wanted = (filters, *(1,) * (2 - len(kernel)), *kernel, words_for(channels))  # type: ignore[arg-type]
    if words.shape != wanted:
        raise ValueError(
            f"{op}: words of a weight of shape {tuple(sizes)} must have shape {wanted}, got {tuple(words.shape)}"
        )
    return tuple(sizes), check_groups(op, groups, filters)  # type: ignore[arg-type]


def check_groups(op: str, groups: Any, filters: int) -> int:
    """The number of groups: an int that divides the filters."""
    count = _arguments.integer(op, "groups", groups)
    if count < 1 or filters % count:
        raise ValueError(f"{op}: groups must divide the {filters} filters, got {groups}")
    return count


def pack_words(words: Tensor, shape: tuple[int, ...], groups: int) -> PackedWeight:
    """With the private copy of the active kernels, of words that are known to be right."""
    blocked = ops.binary_conv2d_block_weight(words, shape[1] * groups, groups)
    level = _native.kernels(words).level
    return unchecked(PackedWeight, words=words, blocked=blocked, shape=shape, groups=groups, isa=level)


def _unflatten_weight(tensors: Any, context: Any) -> PackedWeight:
    words, blocked = tensors
    shape, groups, isa = context
    return unchecked(PackedWeight, words=words, blocked=blocked, shape=tuple(shape), groups=groups, isa=isa)


register_tree(PackedWeight, ("words", "blocked"), ("shape", "groups", "isa"), _unflatten_weight)
_arguments.TAKE_NOTHING_OVER.add(PackedWeight)


def sign_words(weight: Tensor) -> Tensor:
    """Sign bits of a float weight (O, C, kh, kw), (O, C, k) or (O, C) as words (O, kh, kw, W)."""
    words = ops.binarize(weight.detach(), None, None, 0.0, "sign")
    kernel = words.shape[1:-1]
    return words.reshape(words.shape[0], *(1,) * (2 - len(kernel)), *kernel, words.shape[-1])


def pack_weight(weight: Tensor, groups: int = 1) -> PackedWeight:
    """Packs the signs of a weight (sign(0) = +1) for any number of calls.

    Args:
        weight: (O, C / groups, kh, kw), (O, C / groups, k) or (O, C); float32, bfloat16 or float16.
        groups: convolution groups the weight is for.

    Raises:
        TypeError: wrong dtype. ValueError: not 2 to 4 dimensions, or groups does not divide the filters.
    """
    check_float("pack_weight", "weight", weight)
    if not 2 <= weight.dim() <= 4:
        raise ValueError(
            f"pack_weight: weight must be (O, C), (O, C, k) or (O, C, kh, kw), got {tuple(weight.shape)}"
        )
    groups = check_groups("pack_weight", groups, weight.shape[0])
    return pack_words(sign_words(weight), tuple(weight.shape), groups)


def straight_through_weight(weight: Tensor, scale: Tensor | None) -> Tensor:
    """scale * sign(weight), sign(0) = +1, whose gradient goes to the weight as it is.

    Args:
        weight: latent float weight, any float dtype.
        scale: None, (1,) or one value a filter; taken as a constant.
    """
    signs = torch.where(weight.detach() >= 0, 1.0, -1.0).to(weight.dtype)
    if scale is not None:
        signs = signs * scale.detach().to(weight.dtype).reshape(-1, *(1,) * (weight.dim() - 1))
    return signs + (weight - weight.detach()).nan_to_num(0.0)  # plus 0, for infinite weights too
