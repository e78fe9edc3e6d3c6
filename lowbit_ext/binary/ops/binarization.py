"""Floats -> packed bits, and with them the mask of the straight-through estimator."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowbit_ext import _native, _oplib
from lowbit_ext._native import pointer
from lowbit_ext.binary.ops.geometry import ENCODINGS
from lowbit_ext.packed import FLOAT_TYPES, words_for


def _bits_a_channel(threshold: Tensor | None) -> int:
    """Thresholds, and bits, a channel."""
    return 1 if threshold is None else threshold.dim()


def _check(x: Tensor, threshold: Tensor | None, flip: Tensor | None, encoding: str) -> None:
    if x.dtype not in FLOAT_TYPES:
        raise TypeError(f"binarize: input must be float32, bfloat16 or float16, got {x.dtype}")
    if x.dim() < 2:
        raise ValueError(f"binarize: input must have shape (N, C, ...), got {tuple(x.shape)}")
    if encoding not in ENCODINGS:
        raise ValueError(f"binarize: encoding must be 'sign' or 'step', got {encoding!r}")
    if threshold is None and flip is None:
        return
    channels = x.shape[1]
    if threshold is not None and (
        threshold.dtype != torch.float32 or threshold.shape not in ((channels,), (2, channels))
    ):
        raise ValueError(
            f"binarize: threshold must be float32 with one value a channel ({channels}) or two (2, {channels}), "
            f"got {threshold.dtype} {tuple(threshold.shape)}"
        )
    bits = _bits_a_channel(threshold) * channels
    if flip is not None and (flip.dtype != torch.bool or flip.numel() != bits):
        raise ValueError(
            f"binarize: flip must be bool with one value a threshold ({bits}), got {flip.dtype} {tuple(flip.shape)}"
        )


def _outputs(x: Tensor, threshold: Tensor | None, flip: Tensor | None, common: float, encoding: str) -> Tensor:
    _check(x, threshold, flip, encoding)
    words = words_for(_bits_a_channel(threshold) * x.shape[1])
    return x.new_empty((x.shape[0], *x.shape[2:], words), dtype=torch.int64)


def _launch(
    x: Tensor, threshold: Tensor | None, flip: Tensor | None, common: float, encoding: str, words: Tensor,
    mask: Tensor | None,
) -> None:
    channels_last = False
    if not x.is_contiguous():
        channels_last = x.movedim(1, -1).is_contiguous()
        if not channels_last:
            x = x.contiguous()
    batch, channels, *space = x.shape
    threshold = None if threshold is None else threshold.contiguous()
    flip = None if flip is None else flip.contiguous()
    status = _native.kernels(x).binarize(
        pointer(x, x, "binarize: x"),
        FLOAT_TYPES[x.dtype],
        channels_last,
        batch,
        channels,
        math.prod(space),
        pointer(threshold, x, "binarize: threshold"),
        common,
        pointer(flip, x, "binarize: flip"),
        ENCODINGS[encoding],
        words.data_ptr(),
        0 if mask is None else mask.data_ptr(),
        _bits_a_channel(threshold),
    )
    _native.check("binarize", status)


def _binarize(x: Tensor, threshold: Tensor | None, flip: Tensor | None, common: float, encoding: str) -> Tensor:
    words = _outputs(x, threshold, flip, common, encoding)
    _launch(x, threshold, flip, common, encoding, words, None)
    return words


# (N, C, *spatial) -> words (N, *spatial, W). Without `threshold` every channel meets `common`; thresholds (2, C) give
# two bits a channel, c and C + c.
binarize = _oplib.define(
    "binarize(Tensor x, Tensor? threshold, Tensor? flip, float common, str encoding) -> Tensor",
    outputs=_outputs,
    launcher=_binarize,
)


def _outputs_with_mask(x: Tensor, common: float, encoding: str) -> tuple[Tensor, Tensor]:
    words = _outputs(x, None, None, common, encoding)
    return words, torch.empty_like(words)


def _binarize_with_mask(x: Tensor, common: float, encoding: str) -> tuple[Tensor, Tensor]:
    words, mask = _outputs_with_mask(x, common, encoding)
    _launch(x, None, None, common, encoding, words, mask)
    return words, mask


# The same and, in the same pass, the clipped straight-through mask: |x| <= 1 (sign) or 0 < x < 1 (step).
binarize_with_mask = _oplib.define(
    "binarize_with_mask(Tensor x, float common, str encoding) -> (Tensor, Tensor)",
    outputs=_outputs_with_mask,
    launcher=_binarize_with_mask,
)
