"""Cone: a set {x : A x <= b, E x = f} with its generators and their inverse map."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowbit_ext import _arguments
from lowbit_ext.cone import generators as gen
from lowbit_ext.cone.polyhedron import Polyhedron
from lowbit_ext.cone.rows import Row, dense, to_float, unit_rows

MAX_RAYS = 100_000


@dataclasses.dataclass(frozen=True)
class Generators:
    """Generators of one kind in float64, sparse.

    Attributes:
        index: int64 (2, entries): generator and coordinate of every entry that is not 0.
        values: float64 (entries,).
        shape: generators, coordinates.
    """

    index: Tensor
    values: Tensor
    shape: tuple[int, int]

    def dense(self) -> Tensor:
        """float64 matrix, one generator a row."""
        return self.values.new_zeros(self.shape).index_put_(tuple(self.index), self.values)

    @functools.cached_property
    def is_ternary(self) -> bool:
        """Whether each generator's entries are 0 and one magnitude with either sign."""
        largest = self.values.new_zeros(self.shape[0])
        largest.scatter_reduce_(0, self.index[0], self.values.abs(), "amax")
        return bool((self.values.abs() == largest[self.index[0]]).all())


def _generators(rows: Sequence[Row], dimension: int) -> Generators:
    index = [(i, j) for i, row in enumerate(rows) for j in row]
    values = [to_float(value) for row in rows for value in row.values()]
    return Generators(
        torch.tensor(index, dtype=torch.int64, device="cpu").reshape(-1, 2).T.contiguous(),
        torch.tensor(values, dtype=torch.float64, device="cpu"), (len(rows), dimension),
    )


def _power_of_two(row: Row) -> Fraction:
    """The power of two that brings the row's norm next to 1. It leaves the digits of the entries as they are."""
    shift = max(0, max(abs(value) for value in row.values()).bit_length() - 500)  # beyond, floats overflow
    norm = math.hypot(*(value >> shift for value in row.values()))
    return Fraction(2) ** -(round(math.log2(norm)) + shift)


class Cone(Polyhedron):
    """The set {x : A x <= b, E x = f}: a polyhedral cone where b and f are 0, else a polyhedron.

    Its points are exactly ``beta @ rays + gamma @ lines + alpha @ vertices`` with beta >= 0, any gamma, and alpha >= 0
    that sums to 1. The generators are computed here, once: from the structure of A where there is any (independent
    groups of rows; linearly independent rows; rows implied by others), else by double description, which needs the
    optional package pplpy.

    Args:
        A: (m, d) inequalities, as a tensor, array or nested lists of integers, floats or fractions.Fraction. Floats are
            taken at their exact value.
        b: (m,) upper bounds, default 0.
        equality: E (k, d), or a tuple of E and f (k,); default none.
        max_rays: refuse constraints whose generators may be more than this many, by McMullen's bound.
        exact: "auto", exact arithmetic unless it would take long; True, always; False, float64 where the rows of A are
            linearly independent (equalities and double description are always exact).

    Attributes:
        dimension: d.
        summands: what each independent group of constraints contributes, see generators.Summand.
        predicted_rays: bound on the number of rays and vertices that was compared with max_rays.
        exact: whether all generators are exact, up to the final conversion to float64.
        largest_violation: certificate: 0, computed in integers and fractions, for exact generators; else the largest
            float64 value of A R, |A L|, A V - b.

    Raises:
        TypeError, ValueError: wrong shapes or types, NaN or infinity, no constraint at all, nothing but one point, no
            point at all, or possibly more than max_rays generators. ImportError: double description without pplpy.

    Source:
        Frerix, Niessner, Cremers, "Homogeneous Linear Inequality Constraints for Neural Network Activations" (2020).
    """

    def __init__(
        self,
        A: Any,
        b: Any = None,
        equality: Any = None,
        *,
        max_rays: int = MAX_RAYS,
        exact: bool | str = "auto",
    ) -> None:
        if not isinstance(exact, (str, bool)) or exact not in ("auto", True, False):
            raise ValueError(f"Cone: exact must be 'auto', True or False, got {exact!r}")
        max_rays = _arguments.integer("Cone", "max_rays", max_rays, 1)
        exact_parts = gen.exact_constraints(*self._constrain(A, b, equality))
        self.summands = gen.generators(*exact_parts, self.dimension, gen.Options(max_rays, exact))
        self.predicted_rays = sum(summand.predicted_rays for summand in self.summands)
        if self.predicted_rays > max_rays:
            raise ValueError(
                f"Cone: the {len(self.summands)} groups of constraints may have up to {self.predicted_rays} rays "
                f"together, more than max_rays={max_rays}"
            )
        if not any(summand.rays or summand.lines or len(summand.vertices) > 1 for summand in self.summands):
            raise ValueError(
                f"Cone: the constraints leave only the point {'x = 0' if self.is_homogeneous else 'that they fix'}"
            )
        self.exact = all(summand.exact for summand in self.summands)
        self.largest_violation = gen.largest_violation(self.summands, *exact_parts)
        if self.exact and self.largest_violation != 0:
            raise RuntimeError(f"Cone: the generators violate the constraints by {float(self.largest_violation):g}")
        self._assemble()

    # --- generators ---------------------------------------------------------------------------------------------------

    def _assemble(self) -> None:
        """float64 generators of all groups, rays and lines scaled by powers of two, and the affine inverse map."""
        parts: dict[str, list[Row]] = {"rays": [], "lines": [], "vertices": []}
        inverse: dict[str, list[Any]] = {"rays": [], "lines": [], "vertices": []}
        fixed: list[Row] = []
        self.vertex_groups: list[int] = []
        self._peeled: list[_Peeling] = []
        for summand in self.summands:
            vertices = summand.vertices if len(summand.vertices) > 1 else []
            fixed += summand.vertices[:1]
            scales: list[Any] = []
            for name in ("rays", "lines"):
                rows = getattr(summand, name)
                scales += [_power_of_two(row) if summand.exact else 1.0 for row in rows]
                parts[name] += [
                    {j: value * scale for j, value in row.items()}
                    for row, scale in zip(rows, scales[-len(rows) :] if rows else [], strict=True)
                ]
            scales += [1] * len(vertices)
            if vertices:
                # Of the sum over a group only differences to its first vertex matter: its weights sum to 1.
                first = vertices[0]
                parts["vertices"] += [
                    {j: difference for j in row.keys() | first.keys()
                     if (difference := row.get(j, 0) - first.get(j, 0))} for row in vertices
                ]
                self.vertex_groups.append(len(vertices))
            if summand.inverse is None:
                start = [len(inverse[name]) for name in inverse]
                self._peeled.append(_Peeling(summand, scales, start))
                affine: list[Any] = [({}, 0)] * len(scales)
            else:
                affine = [
                    ({j: value / scale for j, value in row.items()}, number / scale)
                    for (row, number), scale in zip(summand.inverse, scales, strict=False)
                ]
            counts = {"rays": len(summand.rays), "lines": len(summand.lines), "vertices": len(vertices)}
            for name, count in counts.items():
                inverse[name] += affine[:count]
                affine = affine[count:]
        self.ray_generators, self.line_generators, self.vertex_generators = (
            _generators(parts[name], self.dimension) for name in ("rays", "lines", "vertices")
        )
        offset = np.zeros(self.dimension)
        for row in fixed:
            for j, value in row.items():
                offset[j] += to_float(value)
        self.offset = torch.from_numpy(offset)
        flat = [item for name in ("rays", "lines", "vertices") for item in inverse[name]]
        self._inverse = _generators([row for row, _ in flat], self.dimension)
        numbers = [to_float(number) for _, number in flat]
        self._inverse_offset = torch.tensor(numbers, dtype=torch.float64, device="cpu")

    @property
    def is_homogeneous(self) -> bool:
        """Whether b and f are 0: then every non-negative multiple of a point is a point."""
        return not any(any(summand.vertices) for summand in self.summands)

    @property
    def rays(self) -> Tensor:
        """(rays, d) float64: x may go any way along them. Scaled by powers of two to a norm between 0.7 and 1.5."""
        return self.ray_generators.dense()

    @property
    def lines(self) -> Tensor:
        """(lines, d) float64: x may go both ways along them. Scaled like rays."""
        return self.line_generators.dense()

    @property
    def vertices(self) -> Tensor:
        """(vertices, d) float64; one vertex, 0, for a cone. All sums of one vertex of each group of constraints.

        Raises:
            ValueError: more than MAX_RAYS of them. The layers do without: they keep the groups apart.
        """
        if math.prod(self.vertex_groups) > MAX_RAYS:
            raise ValueError(
                f"Cone: there are {math.prod(self.vertex_groups)} vertices, the sums of one of each of "
                f"{len(self.vertex_groups)} groups; read them group by group from summands"
            )
        total = self.offset.unsqueeze(0)
        for part in self.vertex_generators.dense().split(self.vertex_groups):
            total = (total.unsqueeze(1) + part).flatten(0, 1)
        return total

    @property
    def coefficient_counts(self) -> tuple[int, int, int]:
        """Coefficients of rays, of lines and of vertices, in the order of all coefficients."""
        return self.ray_generators.shape[0], self.line_generators.shape[0], self.vertex_generators.shape[0]

    def combine(self, coefficients: Tensor) -> Tensor:
        """The point with these coefficients: beta of the rays, gamma of the lines, alpha of each group of vertices.

        Args:
            coefficients: (..., sum(coefficient_counts)), beta and alpha >= 0, alpha summing to 1 in each group.

        Returns:
            (..., d), computed in float64, in the type of coefficients.

        Raises:
            TypeError, ValueError: coefficients of another number, or not floating point.
        """
        _arguments.tensor("combine", "coefficients", coefficients)
        expected = sum(self.coefficient_counts)
        if not coefficients.is_floating_point() or coefficients.shape[-1:] != (expected,):
            raise ValueError(
                f"combine: coefficients must be floating point with {expected} in the last dimension, got "
                f"{coefficients.dtype} {tuple(coefficients.shape)}"
            )
        beta, gamma, alpha = coefficients.double().split(self.coefficient_counts, dim=-1)
        device = coefficients.device
        rays, lines, vertices = self.rays.to(device), self.lines.to(device), self.vertex_generators.dense().to(device)
        x = beta @ rays + gamma @ lines + alpha @ vertices + self.offset.to(device)
        return x.to(coefficients.dtype)

    def coefficients(self, x: Tensor) -> Tensor:
        """Coefficients of points of the set: the inverse of `combine`.

        They are unique, and affine in x, unless double description was needed; then one of the possible choices, with
        at most d of them not 0 in each group.

        Args:
            x: (..., d) floating point, in the set.

        Returns:
            (..., sum(coefficient_counts)) in x's type: of rays and vertices >= 0, of lines any.

        Raises:
            TypeError, ValueError: x of another shape or type, or a point outside the set; project it first.
        """
        points = self._check_points("coefficients", x, with_values=True)
        excess = self._excess(points, torch.finfo(x.dtype).eps)
        if not bool((excess <= 0).all()):
            sample, row = (int(i) for i in torch.nonzero(~(excess <= 0))[0])
            raise ValueError(
                f"coefficients: x must be in the set: point {sample} violates constraint {row}; project it first"
            )
        result = points @ self._inverse.dense().to(x.device).T + self._inverse_offset.to(x.device)
        rays, lines, _ = self.coefficient_counts
        for peeling in self._peeled:
            result = peeling(points, result, (0, rays, rays + lines))
        beta, gamma, alpha = result.split(self.coefficient_counts, dim=1)
        result = torch.cat([beta.clamp_min(0), gamma, alpha.clamp_min(0)], 1)
        return result.reshape(*x.shape[:-1], result.shape[1]).to(x.dtype)

    # --- words --------------------------------------------------------------------------------------------------------

    def describe(self) -> str:
        """A few lines about the set, its structure and its generators."""
        count, equal = len(self._a), len(self._e)
        methods = collections.Counter(summand.method for summand in self.summands)
        rays, lines, vertices = self.coefficient_counts
        nonzeros = sum(len(part.values) for part in self._all_generators)
        parts = f"{rays} rays, {lines} lines"
        if vertices:
            sizes = collections.Counter(self.vertex_groups)
            parts += ", vertices in " + " and ".join(f"{n} group{'s'[: n > 1]} of {size}" for size, n in sizes.items())
        density = nonzeros / max(1, (rays + lines + vertices) * self.dimension)
        kind = "ternary" if all(part.is_ternary for part in self._all_generators) else "not ternary"
        proof = "certified in exact arithmetic" if self.exact else f"violation {float(self.largest_violation):.1e}"
        lines_of_text = [
            f"{'cone' if self.is_homogeneous else 'polyhedron'} in R^{self.dimension}: {count} inequalities"
            + (f", {equal} equalities" if equal else ""),
            "structure: " + ", ".join(f"{n} x {method}" for method, n in methods.items()),
            f"generators: {parts} (predicted at most {self.predicted_rays} rays and vertices)",
            f"entries: {100 * density:.3g} % nonzero, {kind}; {proof}",
        ]
        return "\n".join(lines_of_text)

    @property
    def _all_generators(self) -> tuple[Generators, Generators, Generators]:
        return self.ray_generators, self.line_generators, self.vertex_generators

    def __repr__(self) -> str:
        rays, lines, vertices = self.coefficient_counts
        return f"Cone(dimension={self.dimension}, rays={rays}, lines={lines}, vertices={vertices})"


class _Peeling:
    """Coefficients of points of one group of constraints from its generators (Caratheodory's theorem, done).

    While x is off the lineality space: take a ray of the smallest face that holds x and subtract the largest multiple
    that leaves x in the cone. Each step makes a further inequality tight, so that rank(A) steps suffice.
    """

    def __init__(self, summand: gen.Summand, scales: Sequence[Any], starts: Sequence[int]) -> None:
        self.columns = sorted({j for row in summand.rows for j in row})
        lifted = any(summand.bounds)
        rows, bounds = unit_rows(summand.rows, summand.bounds, self.columns)
        self.lifted, self.starts = lifted, starts
        self.counts = len(summand.rays), len(summand.lines), len(summand.vertices)

        def local(generators: Sequence[Row], factors: Sequence[Any]) -> np.ndarray:
            # Generators reach beyond these coordinates where equalities determine others.
            inner = [
                {j: value * factor for j, value in row.items() if j in set(self.columns)}
                for row, factor in zip(generators, factors, strict=True)
            ]
            return dense(inner, self.columns)

        ray_count, line_count, vertex_count = self.counts
        rays = local([*summand.rays, *summand.vertices], [*scales[:ray_count], *[1] * vertex_count])
        lines = local(summand.lines, scales[ray_count : ray_count + line_count])
        if lifted:
            heights = np.array([0.0] * ray_count + [1.0] * vertex_count)
            rays = np.concatenate([rays, heights[:, None]], 1)
            lines = np.concatenate([lines, np.zeros((line_count, 1))], 1)
            rows = np.concatenate([rows, -bounds[:, None]], 1)
            rows = np.concatenate([rows, -np.eye(1, rows.shape[1], rows.shape[1] - 1)])
        self.rows, self.rays = torch.from_numpy(rows), torch.from_numpy(rays)
        images = self.rows @ self.rays.T
        self.images = torch.where(images.abs() <= 1e-12 * self.rays.norm(dim=1), 0.0, images)
        self.line_inverse = torch.linalg.pinv(torch.from_numpy(lines))

    def __call__(self, points: Tensor, result: Tensor, offsets: Sequence[int]) -> Tensor:
        """Fills in this group's columns of the coefficients."""
        rows, rays, images = (part.to(points.device) for part in (self.rows, self.rays, self.images))
        x = points[:, self.columns]
        if self.lifted:
            x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        weights = x.new_zeros(len(x), len(rays))
        scale = x.norm(dim=1, keepdim=True)
        moves = (images < 0).to(x.dtype)  # (rows, rays): whether the ray leaves the row's hyperplane
        for _ in range(len(rows)):
            slack = -(x @ rows.T)
            tight = slack <= 1e-10 * scale
            if bool(tight.all()):
                break
            # Rays of the face: they leave none of the tight hyperplanes.
            outside = tight.to(x.dtype) @ moves > 0
            steps = self._steps(slack, images)
            steps = torch.where(outside | steps.isinf(), -1.0, steps)
            step, ray = (steps * rays.norm(dim=1)).max(1)
            step = torch.where(tight.all(1), 0.0, step.clamp_min(0)) / rays[ray].norm(dim=1)
            weights = weights.scatter_add(1, ray.unsqueeze(1), step.unsqueeze(1))
            x = x - step.unsqueeze(1) * rays[ray]
        gamma = x @ self.line_inverse.to(points.device)
        # A single vertex has weight 1 and no coefficient.
        alpha = weights[:, self.counts[0] :] if self.counts[2] > 1 else weights[:, :0]
        parts = weights[:, : self.counts[0]], gamma, alpha
        for start, offset, part in zip(self.starts, offsets, parts, strict=True):
            if part.shape[1]:
                columns = torch.arange(offset + start, offset + start + part.shape[1], device=points.device)
                result = result.index_copy(1, columns, part)
        return result

    @staticmethod
    def _steps(slack: Tensor, images: Tensor) -> Tensor:
        """For each point and ray the multiple that may be subtracted: the least slack over descent of the rows."""
        steps = slack.new_full((len(slack), images.shape[1]), torch.inf)
        for row in range(len(images)):
            descends = images[row] < 0
            candidate = torch.where(descends, slack[:, row : row + 1] / -images[row], torch.inf)
            steps = torch.minimum(steps, candidate)
        return steps
