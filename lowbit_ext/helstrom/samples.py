"""Samples of any kind the classifier takes: packed bits, sparse or dense rows, and their products."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import scipy.sparse
import torch

from lowbit_ext.helstrom._gram import gram
from lowbit_ext.helstrom.states import Array, encode, encoded_product
from lowbit_ext.packed import WORD_BITS, PackedTensor, words_for

# Bits, or float64 rows: a numpy array or a scipy CSR matrix.
Samples: TypeAlias = Any

# Rows that are unpacked, encoded or compared at once: 8 MB of float64 at 1000 features.
BLOCK = 1024


def pack(bits: np.ndarray) -> PackedTensor:
    """Packs rows of booleans (N, d)."""
    padded = np.zeros((len(bits), words_for(bits.shape[1]) * WORD_BITS), dtype=bool)
    padded[:, : bits.shape[1]] = bits
    words = np.packbits(padded, axis=1, bitorder="little").view("<i8").astype(np.int64, copy=False)
    return PackedTensor(torch.from_numpy(words), bits.shape[1], "step")


def binarize(x: Any, threshold: float | None) -> Samples:
    """Bits x > threshold; without a threshold bits where all values are 0 or 1, otherwise the values as they are."""
    if threshold is None:
        values = x.data if scipy.sparse.issparse(x) else x
        if not ((values == 0) | (values == 1)).all():
            return x
        threshold = 0.5
    if not scipy.sparse.issparse(x):
        return pack(x > threshold)
    words = [pack(x[start : start + BLOCK].toarray() > threshold).words for start in range(0, x.shape[0], BLOCK)]
    return PackedTensor(torch.cat(words), x.shape[1], "step")


def count(samples: Samples) -> int:
    """Number of samples."""
    return int(samples.shape[0])


def take(samples: Samples, part: Any) -> Samples:
    """Some of the samples, by a slice or a boolean mask."""
    if not isinstance(samples, PackedTensor):
        return samples[part]
    part = torch.from_numpy(part) if isinstance(part, np.ndarray) else part
    return PackedTensor(samples.words[part], samples.channels, samples.encoding)


def dense(samples: Samples) -> Array:
    """The samples as a float64 array (N, d)."""
    if isinstance(samples, PackedTensor):
        return samples.unpack().numpy().astype(np.float64)
    return samples.toarray() if scipy.sparse.issparse(samples) else samples


def blocks(samples: Samples) -> Iterator[tuple[slice, Array]]:
    """Parts of the samples as dense arrays."""
    for start in range(0, count(samples), BLOCK):
        part = slice(start, min(start + BLOCK, count(samples)))
        yield part, dense(take(samples, part))


def squared_lengths(samples: Samples) -> Array:
    """Squared length (N,) of every sample; the number of ones where they are bits."""
    if isinstance(samples, PackedTensor):
        ones = pack(np.ones((1, samples.channels), dtype=bool))
        return gram(samples, ones).numpy()[:, 0].astype(np.float64)
    if scipy.sparse.issparse(samples):
        return np.asarray(samples.multiply(samples).sum(axis=1), dtype=np.float64).ravel()
    return np.einsum("ij,ij->i", samples, samples)


def state_product(samples: Samples, others: Samples, encoding: str) -> Array:
    """Inner products (N, M) of the states of two sets of samples: by popcounts where both are bits.

    Raises:
        ValueError: values whose squares overflow.
    """
    if isinstance(samples, PackedTensor) and isinstance(others, PackedTensor):
        inner = gram(samples, others).numpy().astype(np.float64)
    elif scipy.sparse.issparse(samples) and scipy.sparse.issparse(others):
        inner = (samples @ others.T).toarray()
    else:
        states = encode(dense(others), encoding).T
        return np.concatenate([encode(block, encoding) @ states for _, block in blocks(samples)])
    with np.errstate(over="ignore", invalid="ignore"):
        product = encoded_product(inner, squared_lengths(samples), squared_lengths(others), encoding)
    if not np.isfinite(product).all():
        raise ValueError("helstrom: X holds values whose squares overflow float64; scale the features")
    return product
