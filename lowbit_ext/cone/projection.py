"""Euclidean projection onto {y : A y <= b, E y = f}, exact, batched, differentiable.

Bounds on coordinates beside one row, as of a simplex, leave a single multiplier to look for (KnapsackProjection). In
general two finite methods find which inequalities are active: block principal pivoting (Portugal, Judice and Vicente
1994; Kim and Park 2011) where the rows of A are independent, a few exchanges of whole sets, and the dual active-set
method of Goldfarb and Idnani (1983) otherwise, one row at a time. The projection is then the solution of a linear
system in x, and so is its derivative: the implicit function theorem on the optimality conditions.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

# A row violated by less than this part of |x| + |y| + |b|, y the projection, counts as satisfied. Rows have norm 1.
TOLERANCE = 1e-12

# By how much a row that depends on active ones may be violated in the end, in the same units: the rounding of the
# active rows' system, which is worse. More is a contradiction.
DEPENDENT_TOLERANCE = 1e-9

# Block pivoting takes about ten rounds; on nearly dependent rows, rounding can make it go round in circles.
PIVOTING_ROUNDS = 40

# Numbers in the batched systems of one slice of the batch.
SLICE_NUMBERS = 1 << 23


def norms(x: Tensor) -> Tensor:
    """Euclidean norms of rows, (n, d) -> (n, 1), without overflow on the way; NaN for infinities."""
    largest = x.abs().amax(1, keepdim=True)
    return (x / torch.where(largest == 0, 1, largest)).norm(dim=1, keepdim=True) * largest


def _has_direction(y: Tensor, size: Tensor) -> Tensor:
    """Whether y (n, d), the projection of points of a size (n, 1), is more than rounding of the apex 0: (n, 1)."""
    return norms(y.detach()) > 1e-13 * size


def _active_system(gram: Tensor, active: Tensor) -> Callable[[Tensor], Tensor]:
    """Factors gram_PP for the active rows P of every sample, once for any number of right sides.

    Args:
        gram: (m, m). active: bool (n, m).

    Returns:
        Maps right sides (n, m) to z (n, m) with gram_PP z_P = right_P, 0 off P.
    """
    most = int(active.sum(1).max()) if len(active) else 0
    # The active rows of every sample first, padded to the largest number of them by rows of the identity.
    index = active.to(torch.uint8).argsort(dim=1, descending=True)[:, :most]
    mask = active.gather(1, index).to(gram.dtype)
    system = gram[index.unsqueeze(2), index.unsqueeze(1)] * mask.unsqueeze(1) * mask.unsqueeze(2)
    # Not torch.linalg.solve: torch 2.13 on two threads answers batches of 190 x 190 wrongly (error of its LU, 1e18).
    factor, failures = torch.linalg.cholesky_ex(system + torch.diag_embed(1 - mask))
    if failures.any():
        raise ValueError("project: the active rows of A are dependent up to rounding")

    def solve(right: Tensor) -> Tensor:
        half = torch.linalg.solve_triangular(factor, (right.gather(1, index) * mask).unsqueeze(2), upper=False)
        solution = torch.linalg.solve_triangular(factor.mT, half, upper=True).squeeze(2)
        return torch.zeros_like(right).scatter(1, index, solution)

    return solve


def _block_pivoting(gram: Tensor, right: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Active rows of min z'Gz/2 - z'right over z >= 0, G positive definite: y = x - z'A is the projection of x.

    Args:
        gram: (m, m). right: A x - b, (n, m). size: |x| + |b|, (n, m).

    Returns:
        Active rows, bool (n, m); indices of samples where rounding kept it from an end within PIVOTING_ROUNDS.
    """
    count, rows = right.shape
    active = right > TOLERANCE * size
    best = torch.full((count,), rows + 1, device=gram.device)
    chances = torch.full((count,), 3, device=gram.device)
    live = torch.arange(count, device=gram.device)
    for _ in range(PIVOTING_ROUNDS):
        z = _active_system(gram, active[live])(right[live])
        moved = z @ gram
        # |x - y|^2 = z'Gz.
        distance = (z * moved).sum(1, keepdim=True).clamp_min(0).sqrt()
        tolerance = TOLERANCE * (size[live] + distance)
        wrong = torch.where(active[live], z, moved - right[live]) < -tolerance
        number = wrong.sum(1)
        open_ = number > 0
        live, wrong, number = live[open_], wrong[open_], number[open_]
        if not len(live):
            break
        # Exchange all wrong rows while their number falls, with three more chances; then only the last one, which ends
        # for certain (Murty's rule).
        fell = number < best[live]
        best[live] = torch.where(fell, number, best[live])
        chances[live] = torch.where(fell, 3, chances[live] - 1)
        last = rows - 1 - wrong.flip(1).to(torch.uint8).argmax(1)
        single = torch.nn.functional.one_hot(last, rows).bool()
        active[live] ^= torch.where((chances[live] >= 0).unsqueeze(1), wrong, single)
    return active, live


def _dual_active_set(
    rows: Tensor, bounds: Tensor, x: Tensor, size: Tensor, allowed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Active rows of the projections of x by Goldfarb and Idnani, every sample at its own step.

    Args:
        rows: (m, d) of norm 1. bounds: (m,). x: (n, d). size: |x| + |b|, (n, m).
        allowed: bool (n, m), rows that a sample is subject to; None for all.

    Returns:
        Active rows, bool (n, m); for each sample, whether they solve it, bool (n,): not where no point satisfies the
        constraints, or where rows are so nearly dependent that rounding makes it seem so.
    """
    count, number = len(x), len(rows)
    gram = rows @ rows.T
    active = x.new_zeros((count, number), dtype=torch.bool)
    multipliers = x.new_zeros((count, number))
    entering = x.new_full((count,), -1, dtype=torch.int64)
    # Rows that the active ones determine. They are tight where a point satisfies the constraints, up to rounding.
    determined = torch.zeros_like(active)
    solved = x.new_zeros(count, dtype=torch.bool)
    y = x.clone()
    live = torch.arange(count, device=x.device)
    for _ in range(200 + 50 * number):
        excess = y[live] @ rows.T - bounds
        scale = size[live] + y[live].abs().amax(1, keepdim=True)
        closed = active[live] | determined[live]
        if allowed is not None:
            closed |= ~allowed[live]
        beyond, chosen = (excess - TOLERANCE * scale).masked_fill(closed, -torch.inf).max(1)
        new = entering[live] < 0
        entering[live] = torch.where(new, chosen, entering[live])
        going = ~new | (beyond > 0)
        end = live[~going]
        solved[end] = ~(determined[end] & (excess > DEPENDENT_TOLERANCE * scale)[~going]).any(1)
        live, excess = live[going], excess[going]
        if not len(live):
            break
        index = torch.arange(len(live), device=x.device)
        row = entering[live]
        fall = _active_system(gram, active[live])(gram[row])
        direction = rows[row] - fall @ rows
        curvature = (direction * rows[row]).sum(1)
        # A row in the span of the active ones: only the multipliers move.
        spanned = curvature < 1e-11
        full = torch.where(spanned, torch.inf, excess[index, row].clamp_min(0) / curvature)
        ratios = torch.where(active[live] & (fall > 1e-12), multipliers[live] / fall, torch.inf)
        partial, leaving = ratios.min(1)
        step = torch.minimum(full, partial)
        stuck = step.isinf()
        step = torch.where(stuck, 0, step)
        multipliers[live] -= step.unsqueeze(1) * fall * active[live]
        multipliers[live, row] += step
        y[live] -= torch.where(spanned, 0, step).unsqueeze(1) * direction
        done = (full <= partial) & ~stuck
        dropped = ~done & ~stuck
        active[live[done], row[done]] = True
        active[live[dropped], leaving[dropped]] = False
        multipliers[live[dropped], leaving[dropped]] = 0
        determined[live[stuck], row[stuck]] = True
        determined[live[dropped]] = False
        entering[live[~dropped]] = -1
    return active, solved


def implied_rows(rows: Tensor) -> Tensor:
    """Rows that may be left out of {A x <= 0} together, non-negative combinations of those that stay, up to rounding.

    A row a is implied where its projection onto the cone of the other rows is 0 (Moreau 1962).

    Args:
        rows: float64 (m, d) of norm 1, no two equal.

    Returns:
        bool (m,).
    """
    implied = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    dropped = True
    while dropped:
        dropped = False
        stay = torch.nonzero(~implied).flatten()
        part = rows[stay]
        others = ~torch.eye(len(part), dtype=torch.bool, device=rows.device)
        size = torch.ones_like(others, dtype=rows.dtype)
        active, solved = _dual_active_set(part, part.new_zeros(len(part)), part, size, others)
        weights = _active_system(part @ part.T, active)(part @ part.T)
        zero = ((part - weights @ part).norm(dim=1) < 1e-9) & solved
        for i in torch.nonzero(zero).flatten().tolist():
            # Rows may imply one another: what implies this one has to stay, for now.
            if not implied[stay[active[i]]].any():
                implied[stay[i]] = dropped = True
    return implied


class Projection:
    """Projection onto {y : A y <= b, E y = f}.

    Args:
        inequalities, bounds: A (m, d), b (m,), float64; rows of norm 1.
        equalities, values: E (k, d), f (k,), float64; rows of norm 1.
    """

    def __init__(
        self, inequalities: np.ndarray, bounds: np.ndarray, equalities: np.ndarray, values: np.ndarray
    ) -> None:
        dimension = inequalities.shape[1]
        point, basis, spread = np.zeros(dimension), np.eye(dimension), 1.0
        if len(equalities):
            left, sizes, right = np.linalg.svd(equalities)
            rank = int((sizes > 1e-10 * sizes[0]).sum())
            point = right[:rank].T @ ((left.T @ values)[:rank] / sizes[:rank])
            basis = right[rank:]
            spread = float(sizes[0] / sizes[rank - 1])
        rows, right_sides, bounds = inequalities @ basis.T, bounds, bounds - inequalities @ point
        lengths = np.linalg.norm(rows, axis=1)
        # A row that the equalities leave without effect holds everywhere.
        useful = lengths > 1e-12 * spread
        rows, bounds, lengths = rows[useful], bounds[useful], lengths[useful]
        self.point, self.basis = torch.from_numpy(point), torch.from_numpy(basis)
        self.rows, self.bounds = torch.from_numpy(rows / lengths[:, None]), torch.from_numpy(bounds / lengths)
        # What b and its part in the equalities' point, which is subtracted, add to the rounding of A x - b.
        self.distance = float(np.linalg.norm(point))
        self.sizes = torch.from_numpy((np.abs(right_sides[useful]) + self.distance) / lengths)
        self.gram = self.rows @ self.rows.T
        self.independent = len(rows) <= len(basis) and (
            len(rows) == 0 or bool(torch.linalg.cond(self.gram) < 1e12)
        )

    def __call__(self, x: Tensor) -> Tensor:
        """Projections of x, float64 (n, d). Differentiable; the derivative at kinks is one of the two sides'."""
        slices = max(1, SLICE_NUMBERS // max(1, self.gram.numel()))
        return torch.cat([self._slice(part) for part in x.split(slices)]) if len(x) else x.clone()

    def _slice(self, x: Tensor) -> Tensor:
        point, basis, rows, bounds, gram, sizes = (
            part.to(x.device) for part in (self.point, self.basis, self.rows, self.bounds, self.gram, self.sizes)
        )
        reduced = (x - point) @ basis.T
        if len(rows):
            excess = reduced @ rows.T - bounds
            size = norms(x.detach()) + self.distance
            with torch.no_grad():
                active = self._active(reduced, excess, size + sizes, rows, bounds, gram)
            # Twice: the corrected semi-normal equations (Bjorck 1987), whose error grows with the condition of the rows
            # instead of its square.
            solve = _active_system(gram, active)
            reduced = reduced - solve(excess) @ rows
            reduced = reduced - solve(reduced @ rows.T - bounds) @ rows
            reduced = reduced * _has_direction(reduced, size)
        return point + reduced @ basis

    def _active(self, x: Tensor, excess: Tensor, size: Tensor, rows: Tensor, bounds: Tensor, gram: Tensor) -> Tensor:
        """Active rows of the projections of x, bool (n, m)."""
        if self.independent:
            active, left = _block_pivoting(gram, excess, size)
        else:
            active, left = torch.empty_like(excess, dtype=torch.bool), torch.arange(len(x), device=x.device)
        if len(left):
            active[left], solved = _dual_active_set(rows, bounds, x[left], size[left], None)
            if not solved.all():
                raise ValueError(
                    "project: float64 finds no point that satisfies the constraints: rows contradict one another or "
                    "are nearly dependent"
                )
        return active


class KnapsackProjection:
    """Projection onto {y : low <= y <= high, least <= a y <= most}: the continuous quadratic knapsack problem.

    It is y = clamp(x - t a, low, high) for some t. As t grows, a y falls, linearly between the values of t at which a
    coordinate meets a bound; the right two of these are found by bisection, and t between them (Held, Wolfe and Crowder
    1974; Kiwiel 2008).

    Args:
        row: a (d,), without 0. low, high: (d,), may be infinite. least, most: may be infinite. All float64.
    """

    def __init__(self, row: np.ndarray, low: np.ndarray, high: np.ndarray, least: float, most: float) -> None:
        self.row, self.low, self.high = torch.from_numpy(row), torch.from_numpy(low), torch.from_numpy(high)
        self.least, self.most = least, most
        self.holds_zero = least <= 0 <= most and bool(((low <= 0) & (high >= 0)).all())

    def __call__(self, x: Tensor) -> Tensor:
        """Projections of x, float64 (n, d). Differentiable; the derivative at kinks is one of the two sides'."""
        row, low, high = (part.to(x.device) for part in (self.row, self.low, self.high))
        with torch.no_grad():
            product = x.clamp(low, high) @ row
            target = product.clamp(self.least, self.most).unsqueeze(1)
            ends = torch.stack([(x - low) / row, (x - high) / row])
            begin, end = ends.amin(0), ends.amax(0)  # t from begin to end leaves the coordinate free
            left, right = self._segment(x, target, torch.cat([begin, end], 1).sort(1).values)
            free = (begin <= left) & (end >= right)
            bound = torch.where((end <= left) == (row > 0), low, high)
            weight = (free * row.square()).sum(1, keepdim=True)
        reached = torch.where(free, x, bound)
        t = (reached @ row.unsqueeze(1) - target) / torch.where(weight == 0, 1, weight)
        y = torch.where(free, x - t * row, bound).clamp(low, high)
        if self.holds_zero:
            y = y * _has_direction(y, norms(x.detach()))
        return torch.where(product.unsqueeze(1) == target, x.clamp(low, high), y)

    def _segment(self, x: Tensor, target: Tensor, breaks: Tensor) -> tuple[Tensor, Tensor]:
        """The neighbouring breaks (n, 1), or infinities, between which a y takes the value of target (n, 1)."""
        row, low, high = (part.to(x.device) for part in (self.row, self.low, self.high))
        count = breaks.shape[1]
        breaks = torch.nn.functional.pad(breaks, (1, 0), value=-torch.inf)
        breaks = torch.nn.functional.pad(breaks, (0, 1), value=torch.inf)
        first = torch.zeros_like(target, dtype=torch.int64)
        last = torch.full_like(first, count + 1)
        for _ in range((count + 1).bit_length()):
            middle = (first + last) // 2
            t = breaks.gather(1, middle)
            value = ((x - t.nan_to_num() * row).clamp(low, high) @ row).unsqueeze(1)
            above = torch.where(t.isinf(), t < 0, value > target)
            first, last = torch.where(above, middle, first), torch.where(above, last, middle)
        return breaks.gather(1, first), breaks.gather(1, last)
