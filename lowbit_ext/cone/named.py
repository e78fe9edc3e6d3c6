"""The constraints that networks are most often given, by name. Counts are (rays, lines) or vertices."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from lowbit_ext.cone.constraints import Cone


def _size(op: str, name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{op}: {name} must be an integer of at least {least}, got {value!r}")
    return int(value)


def _differences(dimension: int, order: int) -> np.ndarray:
    """Forward differences of a sequence: (dimension - order, dimension)."""
    return np.diff(np.eye(dimension, dtype=np.int64), order, axis=0)


def monotone(dimension: int, *, decreasing: bool = False) -> Cone:
    """Sequences x_1 <= x_2 <= ... (>= where decreasing): dimension - 1 rays, 1 line."""
    differences = _differences(_size("monotone", "dimension", dimension, 2), 1)
    return Cone(differences if decreasing else -differences)


def convex(dimension: int, *, concave: bool = False) -> Cone:
    """Convex sequences, x_i - 2 x_{i+1} + x_{i+2} >= 0: dimension - 2 rays, 2 lines."""
    differences = _differences(_size("convex", "dimension", dimension, 3), 2)
    return Cone(differences if concave else -differences)


def monotone_convex(dimension: int) -> Cone:
    """Convex sequences that never fall: dimension - 1 rays, 1 line."""
    size = _size("monotone_convex", "dimension", dimension, 3)
    return Cone(-np.concatenate([_differences(size, 1)[:1], _differences(size, 2)]))


def checkerboard(height: int = 28, width: int = 28, tile: int = 7) -> Cone:
    """Images whose tiles are by turns dark on average (sum of pixels <= 0, the first one) and bright (>= 0).

    One inequality a tile, entries 1 or -1, pixels row by row: one ray a tile, one line for each of its other pixels.
    With the defaults, the constraints of Frerix et al. (2020) for MNIST in [-1, 1].

    Args:
        height, width: of the image, in pixels. tile: side of a tile; divides both.
    """
    height, width, tile = (
        _size("checkerboard", name, value, 1) for name, value in (("height", height), ("width", width), ("tile", tile))
    )
    if height % tile or width % tile or tile < 2:
        raise ValueError(
            f"checkerboard: tile must be at least 2 and divide height and width, got {tile} for {height} x {width}"
        )
    down, across = np.indices((height, width)).reshape(2, -1) // tile
    signs = 1 - 2 * ((down + across) % 2)
    tiles = down * (width // tile) + across
    return Cone((np.arange(tiles.max() + 1)[:, None] == tiles) * signs)


def nonnegative(dimension: int) -> Cone:
    """Vectors without a negative entry: dimension rays."""
    return Cone(-np.eye(_size("nonnegative", "dimension", dimension, 1), dtype=np.int64))


def simplex(dimension: int) -> Cone:
    """Probability vectors, x >= 0 that sum to 1: dimension vertices."""
    size = _size("simplex", "dimension", dimension, 2)
    return Cone(-np.eye(size, dtype=np.int64), equality=(np.ones((1, size), dtype=np.int64), [1]))


def box(dimension: int, low: Any = -1, high: Any = 1) -> Cone:
    """Vectors between low and high: a group of two vertices for each coordinate.

    Args:
        dimension: d.
        low, high: a number, or d of them; -inf and inf leave a side open.
    """
    size = _size("box", "dimension", dimension, 1)
    rows, bounds = [], []
    for name, sign, values in (("low", -1, low), ("high", 1, high)):
        array = np.asarray(values)
        if array.ndim and array.shape != (size,):
            raise ValueError(f"box: {name} must be a number or {size} numbers, got {array.shape}")
        for j, value in enumerate(np.broadcast_to(array, size).tolist()):
            if math.isnan(value):
                raise ValueError(f"box: {name} holds NaN")
            if value == sign * math.inf:
                continue
            rows.append([sign * (i == j) for i in range(size)])
            bounds.append(sign * value)
    return Cone(np.array(rows, dtype=np.int64).reshape(-1, size), bounds)
