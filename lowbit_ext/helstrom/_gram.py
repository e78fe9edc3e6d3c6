"""Inner products of packed rows by popcount, and the transpose of packed bits."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit_ext import _arguments
from lowbit_ext.binary import PackedWeight, binarize, linear
from lowbit_ext.packed import WORD_BITS, PackedTensor, packed_words, words_for

# Rows whose products are formed at once: of 4096 features they fill 512 KB, which the second-level cache keeps for all
# the rows they meet. 4000 such rows at once run at 1350 instead of 2050 billion operations a second (a core of Zen 4).
_BLOCK = 1024

# Twice the inner product must fit int32.
_MOST_CHANNELS = 2**30


def _check(op: str, name: str, value: PackedTensor) -> None:
    if not isinstance(value, PackedTensor):
        raise TypeError(f"{op}: {name} must be a PackedTensor, got {type(value).__name__}")
    if value.dim() != 2 or value.encoding != "step" or value.scale is not None:
        raise ValueError(
            f"{op}: {name} must be rows (N, d) of encoding 'step' without a scale, "
            f"got {tuple(value.shape)} of encoding {value.encoding!r}{'' if value.scale is None else ' with a scale'}"
        )
    if value.words.dtype != torch.int64 or value.words.shape[1] != words_for(value.channels):
        raise ValueError(
            f"{op}: {name} must have int64 words of {value.channels} features, got {value.words.dtype} "
            f"{tuple(value.words.shape)}"
        )
    if value.channels >= _MOST_CHANNELS:
        raise ValueError(f"{op}: {name} has {value.channels} features; fewer than 2^30 keep the products in int32")


def gram(a: PackedTensor, b: PackedTensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """Inner products of rows of 0 and 1: popcount(a_i & b_j), exact.

    The binary linear kernel gives 2 popcount(a & w) - popcount(a) for weights w of signs; a weight of ones beside the
    rows of b gives popcount(a), and the sum of both is twice the product.

    Args:
        a: (N, d), encoding "step".
        b: (M, d), encoding "step"; default a, of which only half the products are formed.
        out: int32 (N, M), to write into: first use of fresh memory takes a third of the time of a large product.

    Returns:
        int32 (N, M).

    Raises:
        TypeError, ValueError: not packed rows of 0 and 1, different numbers of features, 2^30 features or more, an
            unfitting out or one whose elements share memory.
    """
    _check("gram", "a", a)
    b = a if b is None else b
    _check("gram", "b", b)
    if a.channels != b.channels:
        raise ValueError(f"gram: a and b must have the same number of features, got {a.channels} and {b.channels}")
    device = a.words.device
    if b.words.device != device:
        raise ValueError(f"gram: a and b must be on one device, got {device} and {b.words.device}")
    symmetric = b is a or b.words is a.words
    shape = (a.shape[0], b.shape[0])
    products = torch.empty(shape, dtype=torch.int32, device=device) if out is None else _checked_out(out, shape, device)
    if not products.numel() or not a.channels:
        return products.zero_()
    ones = _ones(b)
    for column in range(0, b.shape[0], _BLOCK):
        words = torch.cat([b.words[column : column + _BLOCK], ones])
        weight = PackedWeight.from_words(words.reshape(-1, 1, 1, words.shape[1]), (words.shape[0], b.channels))
        for row in range(column if symmetric else 0, a.shape[0], _BLOCK):
            sums = linear(packed_words(a.words[row : row + _BLOCK], a.channels, "step"), weight)
            assert isinstance(sums, Tensor)
            part = products[row : row + _BLOCK, column : column + _BLOCK]
            torch.add(sums[:, :-1], sums[:, -1:], out=part)
            part >>= 1
            if symmetric and row > column:
                products[column : column + _BLOCK, row : row + _BLOCK] = part.t()
    return products


def _checked_out(out: Tensor, shape: tuple[int, int], device: torch.device) -> Tensor:
    _arguments.tensor("gram", "out", out)
    if out.dtype != torch.int32 or out.shape != shape or out.device != device:
        raise ValueError(
            f"gram: out must be an int32 tensor {shape} on {device}, got {out.dtype} {tuple(out.shape)} on {out.device}"
        )
    reach = 1
    for stride, size in sorted(zip(out.stride(), shape, strict=True)):
        if size > 1 and stride < reach:
            raise ValueError(f"gram: out must have memory of its own for each element, got strides {out.stride()}")
        reach += (size - 1) * stride
    return out


def _ones(like: PackedTensor) -> Tensor:
    """Words (1, W) of a row of ones."""
    words = torch.full((1, like.words.shape[1]), -1, dtype=torch.int64, device=like.words.device)
    if like.channels % WORD_BITS:
        words[0, -1] = (1 << like.channels % WORD_BITS) - 1
    return words


def transpose(a: PackedTensor) -> PackedTensor:
    """Rows and columns exchanged: (N, d) to (d, N). gram(transpose(a)) counts in how many rows two features are both 1.

    Args:
        a: (N, d), encoding "step".

    Raises:
        TypeError, ValueError: not packed rows of 0 and 1.
    """
    _check("transpose", "a", a)
    count, features = a.shape
    columns = torch.empty((features, words_for(count)), dtype=torch.int64, device=a.words.device)
    step = _BLOCK  # whole words of the result
    for start in range(0, count, step):
        values = packed_words(a.words[start : start + step], features, "step").unpack(torch.bfloat16)
        # Rows as channels of one image whose pixels are the features: packing moves the channels last.
        packed = binarize(values.contiguous().unsqueeze(0), "step")
        columns[:, start // WORD_BITS : (start + step) // WORD_BITS] = packed.words[0]
    return packed_words(columns, count, "step")
