"""Slow definitions of cones, independent of the package: double description in fractions, projection by enumeration."""

from fractions import Fraction
from itertools import combinations

import numpy as np


def _null_space(rows, dimension):
    """Basis of {x : rows x = 0} by Gauss-Jordan elimination in fractions."""
    rows = [[Fraction(value) for value in row] for row in rows]
    pivots = []
    for column in range(dimension):
        found = next((i for i in range(len(pivots), len(rows)) if rows[i][column] != 0), None)
        if found is None:
            continue
        rank = len(pivots)
        rows[rank], rows[found] = rows[found], rows[rank]
        rows[rank] = [value / rows[rank][column] for value in rows[rank]]
        for i in range(len(rows)):
            if i != rank and rows[i][column] != 0:
                rows[i] = [a - rows[i][column] * b for a, b in zip(rows[i], rows[rank], strict=True)]
        pivots.append(column)
    basis = []
    for free in (column for column in range(dimension) if column not in pivots):
        vector = [Fraction(0)] * dimension
        vector[free] = Fraction(1)
        for i, pivot in enumerate(pivots):
            vector[pivot] = -rows[i][free]
        basis.append(vector)
    return basis


def _dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def double_description(matrix):
    """Rays and lines of {x : matrix x <= 0}, in fractions, one inequality after the other (Motzkin et al. 1953).

    Returns:
        (rays, lines): lists of lists of Fraction; rays are extreme modulo lines.
    """
    matrix = [[Fraction(value) for value in row] for row in matrix]
    dimension = len(matrix[0])
    rays, lines = [], [[Fraction(int(i == j)) for j in range(dimension)] for i in range(dimension)]
    for count, row in enumerate(matrix):
        crossing = next((line for line in lines if _dot(row, line) != 0), None)
        if crossing is not None:
            slope = _dot(row, crossing)
            shear = lambda v: [a - _dot(row, v) / slope * c for a, c in zip(v, crossing, strict=True)]  # noqa: B023, E731
            lines = [shear(line) for line in lines if line is not crossing]
            rays = [shear(ray) for ray in rays] + [[-c if slope > 0 else c for c in crossing]]
            continue
        values = [_dot(row, ray) for ray in rays]
        seen = matrix[:count]
        rank = dimension - len(_null_space(seen, dimension)) if seen else 0
        kept = [ray for ray, value in zip(rays, values, strict=True) if value <= 0]
        for (high, up), (low, down) in (
            ((high, up), (low, down))
            for high, up in zip(rays, values, strict=True) if up > 0
            for low, down in zip(rays, values, strict=True) if down < 0
        ):
            # Adjacent: the inequalities tight at both leave a two-dimensional face modulo lines.
            tight = [other for other in seen if _dot(other, high) == 0 == _dot(other, low)]
            if dimension - len(_null_space(tight, dimension)) == rank - 2:
                kept.append([up * b - down * a for a, b in zip(high, low, strict=True)])
        rays = kept
    return rays, lines


def polyhedron(a, b, e, f):
    """Rays, lines and vertices of {x : a x <= b, e x = f}, from the cone over it: a x <= b t, e x = f t, t >= 0.

    Returns:
        (rays, lines, vertices): lists of lists of Fraction; no vertex where no x satisfies the constraints.
    """
    rows = [[*row, -bound] for row, bound in zip(a, b, strict=True)]
    for row, value in zip(e, f, strict=True):
        rows += [[*row, -value], [*(-entry for entry in row), value]]
    dimension = len(rows[0]) - 1
    rays, lines = double_description([*rows, [0] * dimension + [-1]])
    vertices = [[value / ray[-1] for value in ray[:-1]] for ray in rays if ray[-1] > 0]
    return [ray[:-1] for ray in rays if ray[-1] == 0], [line[:-1] for line in lines], vertices


def project(a, b, x):
    """Projection of x onto {y : a y <= b}: the closest feasible among the projections onto all sets of active rows."""
    best, distance = None, np.inf
    for size in range(len(a) + 1):
        for active in combinations(range(len(a)), size):
            rows = a[list(active)]
            y = x - np.linalg.pinv(rows) @ (rows @ x - b[list(active)]) if size else x
            if (a @ y <= b + 1e-9).all() and np.linalg.norm(x - y) < distance:
                best, distance = y, np.linalg.norm(x - y)
    return best
