"""Extreme rays of a pointed cone by double description, and how many there may be."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lowbit_ext import _arguments
from lowbit_ext.cone.rows import Row, primitive

INSTALL = 'pip install "lowbit-ext[cone]"'
MOST_ROWS = 100_000  # the bound then has 30 000 digits, in a tenth of a second


def predicted_rays(rows: int, rank: int) -> int:
    """Most extreme rays that a pointed cone {x : A x <= 0} can have: McMullen's upper bound theorem (1970).

    Args:
        rows: inequalities.
        rank: of A, which is the dimension modulo lines.

    Raises:
        TypeError, ValueError: no integers, negative ones, or more rows than MOST_ROWS beyond the rank.
    """
    rows = _arguments.integer("predicted_rays", "rows", rows, 0)
    rank = _arguments.integer("predicted_rays", "rank", rank, 0)
    if rows <= rank or rank == 0:
        return min(rows, rank)
    _arguments.integer("predicted_rays", "rows", rows, most=MOST_ROWS)
    facets = rank - 1  # dimension of a cross-section, a polytope with at most `rows` facets
    upper, lower = (facets + 1) // 2, facets // 2
    return math.comb(rows - upper, lower) + (math.comb(rows - lower - 1, upper - 1) if upper else 0)


def double_description(rows: Sequence[Row], columns: Sequence[int]) -> list[Row]:
    """Extreme rays of a pointed cone {x : rows x <= 0} as coprime integers, by the Parma Polyhedra Library.

    Raises:
        ImportError: pplpy is not installed.
    """
    try:
        import ppl
    except ImportError as error:
        raise ImportError(
            f"Cone: {len(rows)} dependent inequalities on {len(columns)} coordinates need double description: {INSTALL}"
        ) from error
    system = ppl.Constraint_System()
    for row in rows:
        coefficients = primitive(row)[0]
        system.insert(ppl.Linear_Expression([coefficients.get(j, 0) for j in columns], 0) <= 0)
    polyhedron = ppl.C_Polyhedron(len(columns), "universe")
    polyhedron.add_constraints(system)
    rays = [generator for generator in polyhedron.minimized_generators() if generator.is_ray()]
    return [
        {j: int(value) for j, value in zip(columns, ray.coefficients(), strict=True) if value} for ray in rays
    ]
