"""The constraints that networks are most often given, by name. Counts are (rays, lines) or vertices."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor

from lowbit_ext import _arguments
from lowbit_ext.cone.constraints import Cone

LARGEST_SIZE = 1 << 20  # its matrix has 2^40 entries: what is larger is a mistake, not a lack of memory


def _size(op: str, name: str, value: Any, least: int) -> int:
    return _arguments.integer(op, name, value, least, LARGEST_SIZE)


def _differences(dimension: int, order: int) -> np.ndarray:
    """Forward differences of a sequence: (dimension - order, dimension)."""
    return np.diff(np.eye(dimension, dtype=np.int64), order, axis=0)


def monotone(dimension: int, *, decreasing: bool = False) -> Cone:
    """Sequences x_1 <= x_2 <= ... (>= where decreasing): dimension - 1 rays, 1 line."""
    differences = _differences(_size("monotone", "dimension", dimension, 2), 1)
    return Cone(differences if _arguments.flag("monotone", "decreasing", decreasing) else -differences)


def convex(dimension: int, *, concave: bool = False) -> Cone:
    """Convex sequences, x_i - 2 x_{i+1} + x_{i+2} >= 0: dimension - 2 rays, 2 lines."""
    differences = _differences(_size("convex", "dimension", dimension, 3), 2)
    return Cone(differences if _arguments.flag("convex", "concave", concave) else -differences)


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
    lows, highs = _bounds("low", low, size), _bounds("high", high, size)
    if any(least > most for least, most in zip(lows, highs, strict=True)):
        raise ValueError(f"box: low must not be above high, got {low} and {high}")
    if lows == highs:
        raise ValueError(f"box: low must be below high at one coordinate at least, got {low} and {high}")
    rows, bounds = [], []
    for sign, values in ((-1, lows), (1, highs)):
        for j, value in enumerate(values):
            if value == sign * math.inf:
                continue
            rows.append([sign * (i == j) for i in range(size)])
            bounds.append(sign * value)
    if not rows:
        raise ValueError("box: low or high must be finite at one coordinate at least")
    return Cone(np.array(rows, dtype=np.int64).reshape(-1, size), bounds)


def _bounds(name: str, values: Any, size: int) -> list[Any]:
    """One bound a coordinate."""
    if isinstance(values, Tensor):
        values = _arguments.tensor("box", name, values).detach().cpu().double()
    try:
        array = np.asarray(values)
        numbers = np.broadcast_to(array, size).tolist()
        bad = any(isinstance(value, bool) or math.isnan(value) for value in numbers)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise ValueError(f"box: {name} must be a number or {size} numbers, got {values!r}") from None
    if bad:
        raise ValueError(f"box: {name} must hold numbers, not NaN or bools, got {values!r}")
    return numbers
