"""Polyhedron: a set {x : A x <= b, E x = f} by its constraints alone, with its projection."""

from __future__ import annotations

import functools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowbit_ext import _arguments
from lowbit_ext.cone.projection import KnapsackProjection, Projection, norms
from lowbit_ext.cone.rows import groups

# What `contains` and `coefficients` take for rounding, in parts of |a| |x| + |b|: this many times the eps of x's type,
# but at least LEAST_TOLERANCE, the order of what a solver in float64 leaves.
ROUNDING_UNITS = 64
LEAST_TOLERANCE = 1e-11


def _fits(value: Any) -> bool:
    """Whether a number is finite and, but for rounding, in float64."""
    try:
        return math.isfinite(value) and (value == 0 or float(value) != 0)
    except OverflowError:
        return False


def _numbers(op: str, name: str, values: Any, dimensions: int) -> np.ndarray:
    """The argument as an array of integers, floats or exact numbers, all finite."""
    if isinstance(values, Tensor):
        values = _arguments.tensor(op, name, values).detach().cpu()
        values = (values.double() if values.is_floating_point() else values).numpy()
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{op}: {name} must be an array or nested lists of numbers, got {values!r}: {error}") from None
    if array.dtype == object:
        if not all(isinstance(value, (int, Fraction, float, np.integer, np.floating)) for value in array.flat):
            raise TypeError(f"{op}: {name} must hold integers, floats or fractions.Fraction, one number an entry")
    elif array.dtype.kind not in "iufb":
        raise TypeError(f"{op}: {name} must hold real numbers, got {array.dtype}")
    if array.ndim != dimensions:
        raise ValueError(f"{op}: {name} must have {dimensions} dimension{'s'[: dimensions > 1]}, got {array.shape}")
    fits = np.array([_fits(value) for value in array.flat], dtype=bool).reshape(array.shape)
    if not fits.all():
        place = [int(i) for i in np.argwhere(~fits)[0]]
        value = array[tuple(place)]
        wanted = "within the range of float64" if isinstance(value, (int, Fraction)) else "finite"
        raise ValueError(f"{op}: {name} must be {wanted}, got {value} at {place}")
    return array.astype(np.int64) if array.dtype.kind == "b" else array


def _right_side(op: str, name: str, values: Any, count: int) -> np.ndarray:
    if values is None:
        return np.zeros(count, dtype=np.int64)
    array = _numbers(op, name, values, 1)
    if len(array) != count:
        raise ValueError(f"{op}: {name} must have one number a row ({count}), got {len(array)}")
    return array


def _unit_rows(op: str, name: str, rows: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows divided by their norms, and the right side by the same. Rows of 0 stay."""
    # By a power of two first: squares of entries may be beyond the range of float64.
    exponents = np.frexp(np.abs(rows).max(axis=1, initial=0))[1]
    rows = np.ldexp(rows, -exponents[:, None])
    lengths = np.linalg.norm(rows, axis=1)
    lengths[lengths == 0] = 1
    with np.errstate(over="ignore"):
        right = np.ldexp(right, -exponents) / lengths
    if not np.isfinite(right).all():
        raise ValueError(f"{op}: {name} must be within the range of float64 in units of its row of A or E")
    return rows / lengths[:, None], right


class Polyhedron:
    """The set {x : A x <= b, E x = f} by its constraints alone: membership and projection, no generators.

    For what has too many rays and vertices for a Cone: vectors of 50 entries between 0 and 1 / 25 that sum to 1 have
    10^14 vertices.

    Args:
        A: (m, d) inequalities, as a tensor, array or nested lists of integers, floats or fractions.Fraction.
        b: (m,) upper bounds, default 0.
        equality: E (k, d), or a tuple of E and f (k,); default none.

    Attributes:
        dimension: d.

    Raises:
        TypeError, ValueError: wrong shapes or types, NaN or infinity, no constraint at all, or, as far as float64
            tells, no point at all.
    """

    def __init__(self, A: Any, b: Any = None, equality: Any = None) -> None:
        self._constrain(A, b, equality)
        try:
            feasible = bool(self.contains(self.project(torch.from_numpy(np.zeros(self.dimension)))))
        except ValueError:
            feasible = False
        if not feasible:
            raise ValueError("Polyhedron: no x satisfies the constraints")

    def _constrain(self, A: Any, b: Any, equality: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Takes the constraints in float64; returns them as they came."""
        op = type(self).__name__
        matrix = _numbers(op, "A", A, 2)
        count, self.dimension = matrix.shape
        bounds = _right_side(op, "b", b, count)
        right = None
        if isinstance(equality, tuple):
            if len(equality) != 2:
                raise ValueError(f"{op}: equality must be E or a tuple (E, f), got a tuple of {len(equality)}")
            equality, right = equality
        no_rows = np.zeros((0, self.dimension), dtype=np.int64)
        equal = no_rows if equality is None else _numbers(op, "equality", equality, 2)
        if equal.shape[1] != self.dimension:
            raise ValueError(f"{op}: equality must have as many columns as A ({self.dimension}), got {equal.shape[1]}")
        values = _right_side(op, "f of equality", right, len(equal))
        if not matrix.any() and not equal.any():
            raise ValueError(f"{op}: A has no row other than 0: there is nothing to constrain, x may be all of R^d")
        self._a, self._b, self._e, self._f = (part.astype(np.float64) for part in (matrix, bounds, equal, values))
        self._unit = (*_unit_rows(op, "b", self._a, self._b), *_unit_rows(op, "f of equality", self._e, self._f))
        return matrix, bounds, equal, values

    def _check_points(self, op: str, x: Tensor, with_values: bool = False) -> Tensor:
        if not isinstance(x, Tensor) or x.dtype not in _arguments.FLOATS_AND_DOUBLE:
            raise TypeError(f"{op}: x must be a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
        _arguments.tensor(op, "x", x)
        if x.dim() < 1 or x.shape[-1] != self.dimension:
            raise ValueError(f"{op}: x must have {self.dimension} values in its last dimension, got {tuple(x.shape)}")
        if with_values and x.is_meta:
            raise ValueError(f"{op}: x must have values, got a meta tensor")
        return x.double().reshape(-1, self.dimension)

    def violation(self, x: Tensor) -> Tensor:
        """Largest of A x - b and |E x - f|, 0 at least, for every point: (..., d) -> float64 (...)."""
        points = self._check_points("violation", x)
        a, b, e, f = (torch.from_numpy(part).to(x.device) for part in (self._a, self._b, self._e, self._f))
        excess = torch.cat([points @ a.T - b, (points @ e.T - f).abs(), points.new_zeros(len(points), 1)], 1)
        return excess.amax(1).reshape(x.shape[:-1])

    def contains(self, x: Tensor, tolerance: float | None = None) -> Tensor:
        """Whether points satisfy the constraints: (..., d) -> bool (...).

        Args:
            x: (..., d) floating point.
            tolerance: largest A x - b and |E x - f| to accept; default: the rounding of x's type,
                max(64 eps, 1e-11) (|a| |x| + |b|) for each row. A NaN or infinity is never contained.
        """
        points = self._check_points("contains", x)
        if tolerance is not None:
            tolerance = _arguments.number("contains", "tolerance", tolerance)
            return (self.violation(x) <= tolerance) & x.isfinite().all(-1)
        return (self._excess(points, torch.finfo(x.dtype).eps) <= 0).all(1).reshape(x.shape[:-1])

    def _excess(self, points: Tensor, rounding: float) -> Tensor:
        """(A x - b) / |a| and |E x - f| / |e| beyond what rounding explains, for each row; NaN where x is infinite."""
        a, b, e, f = (torch.from_numpy(part).to(points.device) for part in self._unit)
        value = torch.cat([points @ a.T - b, (points @ e.T - f).abs()], 1)
        tolerance = max(ROUNDING_UNITS * rounding, LEAST_TOLERANCE)
        return value - tolerance * (norms(points) + torch.cat([b, f]).abs())

    def project(self, x: Tensor) -> Tensor:
        """The closest points of the set, in the Euclidean norm. Exact up to rounding, in float64.

        A closed form where rows share no coordinates and for bounds, also beside one row; else an active-set method
        (see projection).

        Args:
            x: (..., d) floating point.

        Returns:
            Tensor of x's shape and type.

        Gradient:
            of the projection, by the implicit function theorem; at a kink, of one of the sides.

        Raises:
            TypeError, ValueError: x of another shape or type, or not finite; rows so nearly dependent that float64
                finds no point.
        """
        points = self._check_points("project", x, with_values=True)
        if not torch.isfinite(points).all():
            raise ValueError("project: x holds NaN or infinity")
        closed = self._projections
        if closed.rows is not None:
            rows, bounds = closed.rows.to(x.device), closed.bounds.to(x.device)
            points = points - torch.relu(points @ rows.T - bounds) @ rows
        if closed.low is not None:
            points = points.clamp(closed.low.to(x.device), closed.high.to(x.device))
        for columns, projection in closed.others:
            columns = columns.to(x.device)
            points = points.index_copy(1, columns, projection(points[:, columns]))
        return points.reshape(x.shape).to(x.dtype)

    @functools.cached_property
    def _projections(self) -> _Projections:
        return _Projections(*self._unit)


class _Projections:
    """The projections of the independent groups of constraints: closed forms together, others one by one.

    Args:
        a, b, e, f: the constraints, rows of norm 1 or 0.
    """

    def __init__(self, a: np.ndarray, b: np.ndarray, e: np.ndarray, f: np.ndarray) -> None:
        self.rows: Tensor | None = None
        self.low: Tensor | None = None
        self.others: list[tuple[Tensor, Projection | KnapsackProjection]] = []
        stacked, right, equal = np.concatenate([a, e]), np.concatenate([b, f]), np.arange(len(a) + len(e)) >= len(a)
        low, high = np.full(a.shape[1], -np.inf), np.full(a.shape[1], np.inf)
        single = []
        for members in groups([dict.fromkeys(np.flatnonzero(row).tolist()) for row in stacked]):
            columns = np.flatnonzero(stacked[members].any(0))
            part = stacked[members][:, columns], right[members], equal[members]
            if len(columns) == 1:
                low[columns], high[columns] = _range(part[0][:, 0], *part[1:])
            elif len(members) == 1 and not equal[members[0]]:
                single += members
            else:
                self.others.append((torch.from_numpy(columns), _knapsack(*part) or _general(*part)))
        if single:
            self.rows, self.bounds = torch.from_numpy(a[single]), torch.from_numpy(b[single])
        if np.isfinite(low).any() or np.isfinite(high).any():
            self.low, self.high = torch.from_numpy(low), torch.from_numpy(high)


def _range(signs: np.ndarray, right: np.ndarray, equal: np.ndarray) -> tuple[float, float]:
    """The interval in which v is by sign v <= right, or sign v = right where equal."""
    values = signs * right
    least = values[(signs < 0) | equal].max(initial=-np.inf)
    return float(least), float(values[(signs > 0) | equal].min(initial=np.inf))


def _knapsack(rows: np.ndarray, right: np.ndarray, equal: np.ndarray) -> KnapsackProjection | None:
    """The projection for a group of bounds on coordinates and one other row or its opposite; None for other groups."""
    wide = (rows != 0).sum(1) > 1
    row = rows[wide][0]
    signs = np.where((rows == row).all(1), 1, -1)
    if not (rows[wide] == signs[wide, None] * row).all():
        return None
    ranges = [_range(rows[on, j], right[on], equal[on]) for j in range(len(row)) for on in [~wide & (rows[:, j] != 0)]]
    low, high = np.array(ranges).T
    return KnapsackProjection(row, low, high, *_range(signs[wide], right[wide], equal[wide]))


def _general(rows: np.ndarray, right: np.ndarray, equal: np.ndarray) -> Projection:
    return Projection(rows[~equal], right[~equal], rows[equal], right[equal])
