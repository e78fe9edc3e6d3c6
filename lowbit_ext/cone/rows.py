"""Exact linear algebra on sparse rows of integers and fractions, and their conversion to float64.

An exact number is an int wherever it is one, else a Fraction: never a Fraction of denominator 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

Number = int | Fraction | float
Row = dict[int, Any]  # coordinate -> number; absent coordinates are 0


def exact_number(value: Any) -> Number:
    """The value as an integer or, where it is none, a fraction."""
    if isinstance(value, np.generic):
        value = value.item()
    # np.longdouble has no other exact form.
    fraction = Fraction(value) if isinstance(value, (int, float, Fraction)) else Fraction(*value.as_integer_ratio())
    return fraction.numerator if fraction.denominator == 1 else fraction


def sparse_rows(matrix: np.ndarray) -> list[Row]:
    """Rows of a matrix of numbers as exact sparse rows."""
    rows: list[Row] = [{} for _ in range(len(matrix))]
    for i, j in zip(*np.nonzero(matrix), strict=True):
        rows[i][int(j)] = exact_number(matrix[i, j])
    return rows


def primitive(row: Row, *more: Number) -> tuple[Row, list[Number], Number]:
    """The positive multiple of a row whose entries are coprime integers, further numbers times the same, the factor."""
    denominator = math.lcm(*(value.denominator for value in row.values()))
    divisor = math.gcd(*(value.numerator * (denominator // value.denominator) for value in row.values()))
    factor = exact_number(Fraction(denominator, divisor))
    return {j: int(value * factor) for j, value in row.items()}, [exact_number(v * factor) for v in more], factor


def dot(left: Row, right: Row) -> Any:
    """Inner product of two sparse rows."""
    if len(left) > len(right):
        left, right = right, left
    return sum(value * right[j] for j, value in left.items() if j in right)


def groups(rows: Sequence[Row]) -> list[list[int]]:
    """Indices of rows, grouped so that no coordinate is in two groups. Rows without an entry are in none."""
    parent: dict[int, int] = {}

    def root(j: int) -> int:
        while parent[j] != j:
            parent[j] = j = parent[parent[j]]
        return j

    for row in rows:
        for j in row:
            parent.setdefault(j, j)
        first, *others = [root(j) for j in row] or [-1]
        for j in others:
            parent[root(j)] = root(first)
    members: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        if row:
            members.setdefault(root(next(iter(row))), []).append(index)
    return list(members.values())


# --- elimination ------------------------------------------------------------------------------------------------------


def eliminate(rows: Sequence[Row], columns: Sequence[int], extra: Sequence[Row]) -> tuple[list[Row], list[int]]:
    """Reduced row echelon form of [rows | extra].

    Returns:
        The nonzero reduced rows and their pivots, in terms of columns; entries of `extra` have keys (-1 - j).
    """
    from sympy import QQ
    from sympy.polys.matrices import DomainMatrix

    place = {j: position for position, j in enumerate(columns)}
    width = max((j for row in extra for j in row), default=-1) + 1
    label = [*columns, *(-1 - j for j in range(width))]
    entries = {
        i: {place[j]: QQ(value.numerator, value.denominator) for j, value in row.items()}
        | {len(columns) + j: QQ(value.numerator, value.denominator) for j, value in more.items() if value}
        for i, (row, more) in enumerate(zip(rows, extra, strict=True))
    }
    reduced, pivots = DomainMatrix(entries, (len(rows), len(label)), QQ).rref()
    result = reduced.to_sparse().rep
    return [
        {label[j]: exact_number(Fraction(int(v.numerator), int(v.denominator))) for j, v in result[i].items()}
        for i in range(len(pivots))
    ], [label[j] for j in pivots]


def null_space(reduced: Sequence[Row], pivots: Sequence[int], columns: Sequence[int]) -> tuple[list[Row], list[int]]:
    """One line for each coordinate that is no pivot: 1 there, 0 in the others that are none."""
    pivot_set = set(pivots)
    basis = [j for j in columns if j not in pivot_set]
    lines: dict[int, Row] = {j: {j: 1} for j in basis}
    for row, pivot in zip(reduced, pivots, strict=True):
        for j, value in row.items():
            if j in lines:
                lines[j][pivot] = -value
    return [lines[j] for j in basis], basis


def first_independent(rows: Sequence[Row]) -> list[int]:
    """Indices of the rows that are no combination of earlier ones."""
    transposed: dict[int, Row] = {}
    for i, row in enumerate(rows):
        for j, value in row.items():
            transposed.setdefault(j, {})[i] = value
    _, pivots = eliminate(list(transposed.values()), range(len(rows)), [{} for _ in transposed])
    return pivots


def right_inverse(rows: Sequence[Row], columns: Sequence[int]) -> tuple[list[Row], list[Row], list[int]] | None:
    """Minus a right inverse G of independent rows, A G = -1, and their null space; None where they are dependent.

    G is zero off the pivots, so that it and the null space are sparse where A is.

    Returns:
        Columns of -G, lines, and for each line the coordinate in which it alone is nonzero, there 1.
    """
    if len(rows) > len(columns):
        return None
    if len(rows) == 1:
        (row,) = rows
        pivot = next(iter(row))
        scaled = {j: exact_number(Fraction(value, row[pivot])) for j, value in row.items()}
        lines, basis = null_space([scaled], [pivot], columns)
        return [{pivot: exact_number(Fraction(-1, row[pivot]))}], lines, basis
    reduced, pivots = eliminate(rows, columns, [{i: 1} for i in range(len(rows))])
    if pivots and pivots[-1] < 0:
        return None
    inverse: list[Row] = [{} for _ in rows]
    for row, pivot in zip(reduced, pivots, strict=True):
        for j, value in row.items():
            if j < 0:
                inverse[-1 - j][pivot] = -value
    lines, basis = null_space(reduced, pivots, columns)
    return inverse, lines, basis


# --- float64 ----------------------------------------------------------------------------------------------------------


def to_float(value: Number) -> float:
    """The nearest float64.

    Raises:
        ValueError: the number is larger than all of them.
    """
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError("Cone: a number that follows from the constraints is beyond the range of float64") from error


def dense(rows: Sequence[Row], columns: Sequence[int]) -> np.ndarray:
    """Sparse rows as a float64 matrix over the given coordinates."""
    place = {j: position for position, j in enumerate(columns)}
    matrix = np.zeros((len(rows), len(place)))
    for i, row in enumerate(rows):
        for j, value in row.items():
            matrix[i, place[j]] = to_float(value)
    return matrix


def unit_rows(rows: Sequence[Row], bounds: Sequence[Number], columns: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Integer rows divided by their norms, (rows, columns), and their bounds by the same, in float64."""
    # By a power of two first: integers of primitive rows may be beyond the range of float64.
    scales = [Fraction(1, 1 << max(value.bit_length() for value in row.values())) for row in rows]
    matrix = dense([{j: v * s for j, v in row.items()} for row, s in zip(rows, scales, strict=True)], columns)
    norms = np.linalg.norm(matrix, axis=1)
    right = np.array([to_float(bound * scale) for bound, scale in zip(bounds, scales, strict=True)])
    return matrix / norms[:, None], right / norms
