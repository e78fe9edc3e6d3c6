"""Generators of {x : A x <= b, E x = f}: rays, lines and vertices, in exact arithmetic.

A polyhedron is the sum of the convex hull of its vertices, the cone of its rays and the span of its lines (Minkowski
and Weyl). Going from inequalities to generators takes exponential time in general (double description: Motzkin et al.
1953; Fukuda and Prodon 1996). Most constraints of practice have a structure that needs none of it:

* Rows that share no coordinate, even indirectly, are independent: each group of them has its own generators, and the
  sum of two groups needs the sum of their numbers of vertices, not the product.
* A group of linearly independent rows has one ray a row, the columns of minus a right inverse, and lines that span the
  null space.
* Duplicate rows, rows implied by others and opposite pairs, which are equalities, are taken out first.

Numbers are integers and fractions throughout: floats are dyadic fractions. Only groups whose elimination would take too
long, and every group of independent rows where exact=False, use a float64 pseudo-inverse.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from lowbit_ext.cone.double_description import double_description, predicted_rays
from lowbit_ext.cone.projection import implied_rows
from lowbit_ext.cone.rows import (
    Number,
    Row,
    dense,
    dot,
    eliminate,
    exact_number,
    first_independent,
    groups,
    null_space,
    primitive,
    right_inverse,
    sparse_rows,
    to_float,
    unit_rows,
)

# Exact elimination of m independent rows with n nonzeros of w bits costs about m^2 n w bit operations; 4e9 of them take
# some seconds. Past that, exact="auto" uses float64.
EXACT_WORK_LIMIT = 4e9

# Rows, and rows times the fourth power of their rank, up to which implied rows are searched for, in some seconds and
# 200 MB: m projections, batched, onto m - 1 rows, with up to rank systems of up to rank unknowns each.
IMPLIED_ROWS_LIMIT = 512
IMPLIED_WORK_LIMIT = 2e12


@dataclasses.dataclass
class Summand:
    """Generators of one group of constraints; the polyhedron is the sum of its groups.

    Attributes:
        method: "free", "bounds", "point", "single row", "independent rows" or "double description".
        rows, bounds: the constraints rows x <= bounds on the coordinates that determine the group's part of x.
        rays, lines, vertices: generators as sparse rows. No vertex stands for the origin.
        inverse: for each ray, line and vertex, in this order, the affine function of x that is its coefficient; None
            where the coefficients are not unique.
        exact: whether the numbers are integers and fractions.
        predicted_rays: bound on rays and vertices, known before they were computed.
    """

    method: str
    rows: list[Row] = dataclasses.field(default_factory=list)
    bounds: list[Number] = dataclasses.field(default_factory=list)
    rays: list[Row] = dataclasses.field(default_factory=list)
    lines: list[Row] = dataclasses.field(default_factory=list)
    vertices: list[Row] = dataclasses.field(default_factory=list)
    inverse: list[tuple[Row, Number]] | None = None
    exact: bool = True
    predicted_rays: int = 0


@dataclasses.dataclass(frozen=True)
class Options:
    """Arguments of Cone that steer the computation."""

    max_rays: int
    exact: bool | str


def exact_constraints(
    rows: np.ndarray, bounds: np.ndarray, equalities: np.ndarray, values: np.ndarray
) -> tuple[list[Row], list[Number], list[Row], list[Number]]:
    """The constraints in exact numbers, as the functions below take them."""
    return (
        sparse_rows(rows), [exact_number(bound) for bound in bounds],
        sparse_rows(equalities), [exact_number(value) for value in values],
    )


# --- groups of constraints --------------------------------------------------------------------------------------------


def generators(
    rows: Sequence[Row], bounds: Sequence[Number], equalities: Sequence[Row], values: Sequence[Number], dimension: int,
    options: Options,
) -> list[Summand]:
    """Generators of {x in R^dimension : rows x <= bounds, equalities x = values}, group by group."""
    for row, bound in zip(rows, bounds, strict=True):
        if not row and bound < 0:
            raise ValueError(f"Cone: no x satisfies A x <= b: a zero row of A has the bound {to_float(bound):g}")
    for row, value in zip(equalities, values, strict=True):
        if not row and value != 0:
            raise ValueError(f"Cone: no x satisfies the equalities: a zero row has the value {to_float(value):g}")
    stacked = [*rows, *equalities]
    numbers = [*bounds, *values]
    solved: dict[Any, list[Summand]] = {}  # of groups that differ only in their coordinates
    summands: list[Summand] = []
    for members in groups(stacked):
        columns = sorted({j for i in members for j in stacked[i]})
        place = {j: position for position, j in enumerate(columns)}
        local = [({place[j]: value for j, value in stacked[i].items()}, numbers[i], i >= len(rows)) for i in members]
        key = tuple((tuple(sorted(row.items())), number, equal) for row, number, equal in local)
        if key not in solved:
            solved[key] = _group(
                [row for row, _, equal in local if not equal], [bound for _, bound, equal in local if not equal],
                [row for row, _, equal in local if equal], [value for _, value, equal in local if equal],
                range(len(columns)), options,
            )
        summands += [_relabel(summand, columns) for summand in solved[key]]
    constrained = {j for row in stacked for j in row}
    free = [j for j in range(dimension) if j not in constrained]
    if free:
        axes = [{j: 1} for j in free]
        summands.append(Summand("free", lines=axes, inverse=[(axis, 0) for axis in axes]))
    return summands


def _relabel(summand: Summand, columns: Sequence[int]) -> Summand:
    def relabel(rows: Iterable[Row]) -> list[Row]:
        return [{columns[j]: value for j, value in row.items()} for row in rows]

    inverse = summand.inverse
    if inverse is not None:
        inverse = list(zip(relabel(row for row, _ in inverse), (number for _, number in inverse), strict=True))
    return dataclasses.replace(
        summand, inverse=inverse, rows=relabel(summand.rows), rays=relabel(summand.rays),
        lines=relabel(summand.lines), vertices=relabel(summand.vertices),
    )


def _tidy(rows: Sequence[Row], bounds: Sequence[Number]) -> tuple[dict[Any, tuple[Row, Number]], list[Any]]:
    """Primitive rows without duplicates, each with its least bound; the keys of opposite pairs that leave no room."""
    kept: dict[Any, tuple[Row, Number]] = {}
    for row, bound in zip(rows, bounds, strict=True):
        row, (bound,), _ = primitive(row, bound)
        key = tuple(sorted(row.items()))
        if key not in kept or bound < kept[key][1]:
            kept[key] = row, bound
    tight = []
    for key, (_, bound) in kept.items():
        opposite = tuple((j, -value) for j, value in key)
        if opposite in kept and (room := bound + kept[opposite][1]) <= 0:
            if room < 0:
                raise ValueError(
                    "Cone: no x satisfies A x <= b: two opposite rows leave no room, "
                    f"{to_float(-kept[opposite][1]):g} <= a x <= {to_float(bound):g}"
                )
            tight.append(key)
    return kept, tight


def _group(
    rows: Sequence[Row], bounds: Sequence[Number], equalities: Sequence[Row], values: Sequence[Number],
    columns: Sequence[int], options: Options,
) -> list[Summand]:
    """Generators of one group of constraints over `columns`."""
    kept, tight = _tidy(rows, bounds)
    equal = [*zip(equalities, values, strict=True), *(kept[key] for key in tight)]
    if equal:
        kept = {key: item for key, item in kept.items() if key not in set(tight)}
        return _with_equalities(list(kept.values()), equal, columns, options)
    rows, bounds = [row for row, _ in kept.values()], [bound for _, bound in kept.values()]
    if len(columns) == 1:
        return [_interval(rows, bounds, columns[0])]
    return [_inequalities(rows, bounds, columns, options)]


def _with_equalities(
    inequalities: list[tuple[Row, Number]], equal: list[tuple[Row, Number]], columns: Sequence[int], options: Options
) -> list[Summand]:
    """Solves the equalities for some coordinates (pivots), puts them into the inequalities, extends the generators."""
    reduced, pivots = eliminate([row for row, _ in equal], columns, [{0: value} for _, value in equal])
    if -1 in pivots:
        raise ValueError("Cone: no x satisfies the equalities: they contradict one another")
    # Pivot p: x_p = point_p + sum over the other coordinates of slope_pj x_j.
    point = {p: row[-1] for row, p in zip(reduced, pivots, strict=True) if -1 in row}
    slopes = {
        p: {j: -value for j, value in row.items() if j not in (p, -1)} for row, p in zip(reduced, pivots, strict=True)
    }

    rows, bounds = [], []
    for row, bound in inequalities:
        substituted = {j: value for j, value in row.items() if j not in slopes}
        for p in row.keys() & slopes.keys():
            for j, slope in slopes[p].items():
                substituted[j] = substituted.get(j, 0) + row[p] * slope
        rows.append({j: exact_number(value) for j, value in substituted.items() if value})
        bounds.append(exact_number(bound - dot(row, point)))
        if not rows[-1] and bounds[-1] < 0:
            raise ValueError("Cone: no x satisfies A x <= b together with the equalities")

    summands = []
    left = [j for j in columns if j not in slopes]
    for members in groups(rows):
        touched = sorted({j for i in members for j in rows[i]})
        summands += _group([rows[i] for i in members], [bounds[i] for i in members], [], [], touched, options)
        left = [j for j in left if j not in set(touched)]
    if left:
        axes = [{j: 1} for j in left]
        summands.append(Summand("free", lines=axes, inverse=[(axis, 0) for axis in axes]))

    for summand in summands:
        _extend(summand, slopes)
    # Where nothing is left to choose, the pivots are fixed.
    if point or not summands:
        summands.append(Summand("point", vertices=[point], inverse=[({}, 1)]))
    return summands


def _extend(summand: Summand, slopes: dict[int, Row]) -> None:
    """Adds to every generator the coordinates that the equalities determine; rays and lines stay coprime integers."""
    number = exact_number if summand.exact else to_float

    def extend(row: Row) -> Row:
        return row | {p: number(value) for p, slope in slopes.items() if (value := dot(slope, row))}

    summand.vertices = [extend(row) for row in summand.vertices]
    ray_count = len(summand.rays)
    directions = [extend(row) for row in (*summand.rays, *summand.lines)]
    if summand.exact:
        for index, row in enumerate(directions):
            directions[index], _, factor = primitive(row)
            if summand.inverse is not None:
                affine, constant = summand.inverse[index]
                factor = Fraction(factor)
                summand.inverse[index] = {j: value / factor for j, value in affine.items()}, constant / factor
    summand.rays, summand.lines = directions[:ray_count], directions[ray_count:]


def _interval(rows: list[Row], bounds: list[Number], column: int) -> Summand:
    """Generators of bounds on one coordinate."""
    low = max((Fraction(bound) / row[column] for row, bound in zip(rows, bounds, strict=True) if row[column] < 0),
              default=None)
    high = min((Fraction(bound) / row[column] for row, bound in zip(rows, bounds, strict=True) if row[column] > 0),
               default=None)
    if low is not None and high is not None:
        if low > high:
            raise ValueError(f"Cone: no x satisfies A x <= b: {to_float(low):g} <= x_{column} <= {to_float(high):g}")
        vertices = [{column: exact_number(value)} if value else {} for value in (low, high)]
        width = high - low
        inverse = [({column: -1 / width}, high / width), ({column: 1 / width}, -low / width)]
        return Summand("bounds", rows, bounds, vertices=vertices, inverse=inverse, predicted_rays=2)
    sign, end = (1, low) if low is not None else (-1, high)
    assert end is not None
    summand = Summand("bounds", rows, bounds, rays=[{column: sign}], predicted_rays=1)
    summand.inverse = [({column: sign}, -sign * end)]
    if end:
        summand.vertices = [{column: exact_number(end)}]
        summand.inverse.append(({}, 1))
    return summand


def _inequalities(rows: list[Row], bounds: list[Number], columns: Sequence[int], options: Options) -> Summand:
    """Generators of inequalities without equalities or duplicates."""
    homogeneous = not any(bounds)
    if options.exact is not True and _is_costly(rows, options.exact):
        summand = _pseudo_inverse(rows, bounds, columns)
        if summand is not None:
            return summand
    solved = right_inverse(rows, columns)
    if solved is not None:
        method = "single row" if len(rows) == 1 else "independent rows"
        summand = Summand(method, rows, bounds, predicted_rays=len(rows))
        # A (x0 - sum of beta_k g_k) = b - beta, so that the coefficient of ray k is b_k - a_k x.
        point: Row = {}
        for bound, ray in zip(bounds, solved[0], strict=True):
            for j, value in ray.items():
                point[j] = point.get(j, 0) - bound * value
        inverse = _add_unique(summand, rows, bounds, *solved)
        point = {j: exact_number(value) for j, value in point.items() if value}
        if point:
            summand.vertices = [point]
            inverse.append(({}, 1))
        summand.inverse = inverse
        return summand

    lifted, apex = rows, -1
    if not homogeneous:
        # {(x, t) : A x - b t <= 0, -t <= 0}: rays with t > 0 are vertices, the others rays (Ziegler 1995, section 1.5).
        apex = max(columns) + 1
        lifted = [primitive(row | ({apex: -bound} if bound else {}))[0] for row, bound in
                  zip(rows, bounds, strict=True)] + [{apex: -1}]
    summand = _pointed(lifted, [*columns, *([] if homogeneous else [apex])], options)
    summand.rows, summand.bounds = rows, bounds
    return summand if homogeneous else _lower(summand, apex)


def _add_unique(
    summand: Summand, rows: Sequence[Row], bounds: Sequence[Number], rays: Sequence[Row], lines: Sequence[Row],
    basis: Sequence[int],
) -> list[tuple[Row, Number]]:
    """Adds rays and lines of independent rows, as coprime integers; returns their coefficients as functions of x."""
    inverse: list[tuple[Row, Number]] = []
    for row, bound, ray in zip(rows, bounds, rays, strict=True):
        ray, _, factor = primitive(ray)
        summand.rays.append(ray)
        inverse.append(({j: -value / Fraction(factor) for j, value in row.items()}, bound / Fraction(factor)))
    for line, j in zip(lines, basis, strict=True):
        line, _, factor = primitive(line)
        summand.lines.append(line)
        inverse.append(({j: 1 / Fraction(factor)}, 0))
    return inverse


def _lower(summand: Summand, apex: int) -> Summand:
    """Generators of the polyhedron at t = 1 from those of the lifted cone."""
    inverse = summand.inverse
    count = len(summand.rays)
    order = sorted(range(count), key=lambda index: apex in summand.rays[index])  # rays first, then vertices
    finite = [index for index in order if apex in summand.rays[index]]
    if not finite:
        raise ValueError("Cone: no x satisfies A x <= b: the inequalities contradict one another")
    vertices = []
    for index in finite:
        ray = summand.rays[index]
        height = ray[apex]
        vertices.append({j: exact_number(Fraction(value) / height) for j, value in ray.items() if j != apex})
        if inverse is not None:
            row, number = inverse[index]
            inverse[index] = {j: value * height for j, value in row.items()}, number * height
    if inverse is not None:
        at_one = [({j: v for j, v in row.items() if j != apex}, number + row.get(apex, 0)) for row, number in inverse]
        infinite = order[: count - len(finite)]
        inverse = [*(at_one[i] for i in infinite), *at_one[count:], *(at_one[i] for i in finite)]
    rays = [ray for ray in summand.rays if apex not in ray]
    return dataclasses.replace(summand, rays=rays, vertices=vertices, inverse=inverse)


def _pointed(rows: list[Row], columns: Sequence[int], options: Options) -> Summand:
    """Generators of {x : rows x <= 0} for dependent rows: implied ones removed, then double description if need be."""
    # x is determined modulo lines by its pivot coordinates; the cone of those is pointed.
    reduced, pivots = eliminate(rows, columns, [{} for _ in rows])
    lines, basis = null_space(reduced, pivots, columns)
    pivot_set = set(pivots)
    inner = [{j: value for j, value in row.items() if j in pivot_set} for row in rows]
    rank = len(pivots)
    rays = _simplicial(inner, chosen := first_independent(inner), pivots)
    if rays is None:
        chosen = _without_implied(inner, pivots)
        rays = _simplicial(inner, chosen, pivots) if len(chosen) == rank else None
    if rays is not None:
        summand = Summand("independent rows", predicted_rays=rank)
        summand.inverse = _add_unique(summand, [rows[i] for i in chosen], [0] * rank, rays, lines, basis)
        return summand
    predicted = predicted_rays(len(chosen), rank)
    if predicted > options.max_rays:
        raise ValueError(
            f"Cone: {len(chosen)} inequalities of rank {rank} may have up to {predicted} rays, more than "
            f"max_rays={options.max_rays}; use fewer inequalities, a larger max_rays or, to project alone, Polyhedron"
        )
    summand = Summand("double description", predicted_rays=predicted)
    summand.rays = double_description(inner, pivots)
    summand.lines = [primitive(line)[0] for line in lines]
    return summand


def _simplicial(rows: Sequence[Row], chosen: Sequence[int], columns: Sequence[int]) -> list[Row] | None:
    """Rays of {x : rows x <= 0} if the chosen rows, as many as columns, are independent and imply all others."""
    solved = right_inverse([rows[i] for i in chosen], columns)
    if solved is None:
        return None
    rays, others = solved[0], set(range(len(rows))).difference(chosen)
    return rays if all(dot(rows[i], ray) <= 0 for i in others for ray in rays) else None


def _without_implied(rows: list[Row], columns: Sequence[int]) -> list[int]:
    """Indices of rows without those that are non-negative combinations of others, found in float64.

    A row left out in error makes the cone too large, which the caller notices.
    """
    if len(rows) > IMPLIED_ROWS_LIMIT or len(rows) * len(columns) ** 4 > IMPLIED_WORK_LIMIT:
        return list(range(len(rows)))
    implied = implied_rows(torch.from_numpy(unit_rows(rows, [0] * len(rows), columns)[0]))
    return torch.nonzero(~implied).flatten().tolist()


def _is_costly(rows: Sequence[Row], exact: bool | str) -> bool:
    if exact is False:
        return True
    bits = max(int(value).bit_length() for row in rows for value in row.values())
    return len(rows) ** 2 * sum(map(len, rows)) * bits > EXACT_WORK_LIMIT


def _pseudo_inverse(rows: list[Row], bounds: list[Number], columns: Sequence[int]) -> Summand | None:
    """Generators of independent rows in float64: minus the pseudo-inverse, and an orthonormal null space."""
    if len(rows) > len(columns):
        return None
    matrix, right_side = unit_rows(rows, bounds, columns)
    left, sizes, right = np.linalg.svd(matrix)
    if sizes[-1] < 1e-10 * sizes[0]:
        return None
    count = len(rows)
    inverse = (right[:count].T / sizes) @ left.T
    norms = np.linalg.norm(inverse, axis=0)

    def sparse(vectors: np.ndarray) -> list[Row]:
        return [{columns[j]: float(v[j]) for j in np.flatnonzero(v).tolist()} for v in vectors]

    lines = sparse(right[count:])
    summand = Summand("independent rows", rows, bounds, sparse(-(inverse / norms).T), lines, exact=False)
    summand.predicted_rays = count
    coefficients = zip(sparse(-matrix * norms[:, None]), (right_side * norms).tolist(), strict=True)
    summand.inverse = [*coefficients, *((line, 0) for line in lines)]
    if any(bounds):
        summand.vertices = sparse((inverse @ right_side)[None])
        summand.inverse.append(({}, 1))
    return summand


# --- certificate ------------------------------------------------------------------------------------------------------


def largest_violation(
    summands: Sequence[Summand], rows: Sequence[Row], bounds: Sequence[Number], equalities: Sequence[Row],
    values: Sequence[Number],
) -> Number:
    """How far the generators are from A R <= 0, A L = 0, E R = 0, E L = 0, A v <= b and E v = f, at most.

    v is the worst sum of one vertex of every group. 0 proves that every combination satisfies the constraints; it is
    computed in integers and fractions where the generators are such, else in float64.
    """
    if not all(summand.exact for summand in summands):
        return _largest_violation_float(summands, rows, bounds, equalities, values)
    by_column: dict[int, list[tuple[int, Any]]] = {}
    stacked = [*rows, *equalities]
    for i, row in enumerate(stacked):
        for j, value in row.items():
            by_column.setdefault(j, []).append((i, value))

    def products(generator: Row) -> Row:
        result: Row = {}
        for j, value in generator.items():
            for i, entry in by_column.get(j, ()):
                result[i] = result.get(i, 0) + value * entry
        return result

    worst: Number = 0
    highest: list[Any] = [-bound for bound in (*bounds, *values)]
    lowest = list(highest)
    for summand in summands:
        for ray in summand.rays:
            result = products(ray).items()
            worst = max(worst, *(value if i < len(rows) else abs(value) for i, value in result), 0)
        for line in summand.lines:
            worst = max(worst, *map(abs, products(line).values()), 0)
        images = [products(vertex) for vertex in summand.vertices]
        for i in {i for image in images for i in image}:
            reached = [image.get(i, 0) for image in images]
            highest[i] += max(reached)
            lowest[i] += min(reached)
    worst = max(worst, *highest, 0)
    return max(worst, *(-value for value in lowest[len(rows) :]), 0)


def _largest_violation_float(
    summands: Sequence[Summand], rows: Sequence[Row], bounds: Sequence[Number], equalities: Sequence[Row],
    values: Sequence[Number],
) -> float:
    stacked = [*rows, *equalities]
    generators_of_all = [part for s in summands for part in (s.rays, s.lines, s.vertices)]
    columns = sorted({j for part in (stacked, *generators_of_all) for row in part for j in row})
    matrix, count = dense(stacked, columns), len(rows)
    highest = -np.array([to_float(number) for number in (*bounds, *values)])
    lowest, worst = highest.copy(), 0.0
    for summand in summands:
        rays, lines, vertices = (
            matrix @ dense(part, columns).T for part in (summand.rays, summand.lines, summand.vertices)
        )
        worst = max(worst, rays[:count].max(initial=0), abs(rays[count:]).max(initial=0), abs(lines).max(initial=0))
        if summand.vertices:
            highest, lowest = highest + vertices.max(1), lowest + vertices.min(1)
    return float(max(worst, highest.max(), -lowest[count:].min(initial=0)))
