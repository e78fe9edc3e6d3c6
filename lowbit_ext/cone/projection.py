"""Euclidean projection onto {y : A y <= b, E y = f}, exact, batched, differentiable.

Two finite methods find which inequalities are active: block principal pivoting (Portugal, Judice and Vicente 1994; Kim
and Park 2011) where the rows of A are independent, a few exchanges of whole sets, and the dual active-set method of
Goldfarb and Idnani (1983) otherwise, one row at a time. The projection is then the solution of a linear system in x,
and so is its derivative: the implicit function theorem on the optimality conditions.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# Relative to |x|: a row violated by less counts as satisfied. Rows have norm 1, numbers are float64.
TOLERANCE = 1e-12

# Block pivoting takes about ten rounds; on nearly dependent rows, rounding can make it go round in circles.
PIVOTING_ROUNDS = 40

# Numbers in the batched systems of one slice of the batch.
SLICE_NUMBERS = 1 << 23


def _masked_solve(gram: Tensor, active: Tensor, right: Tensor) -> Tensor:
    """Solves gram_PP z_P = right_P for the active rows P of every sample; z is 0 elsewhere.

    Args:
        gram: (m, m). active: bool (n, m). right: (n, m).
    """
    most = int(active.sum(1).max()) if len(active) else 0
    # The active rows of every sample first, padded to the largest number of them by rows of the identity.
    index = active.to(torch.uint8).argsort(dim=1, descending=True)[:, :most]
    mask = active.gather(1, index).to(gram.dtype)
    system = gram[index.unsqueeze(2), index.unsqueeze(1)] * mask.unsqueeze(1) * mask.unsqueeze(2)
    # Not torch.linalg.solve: torch 2.13 on two threads answers batches of 190 x 190 wrongly (error of its LU, 1e18).
    factor, failures = torch.linalg.cholesky_ex(system + torch.diag_embed(1 - mask))
    if failures.any():
        raise RuntimeError("project: the active rows of A are dependent up to rounding")
    half = torch.linalg.solve_triangular(factor, (right.gather(1, index) * mask).unsqueeze(2), upper=False)
    solution = torch.linalg.solve_triangular(factor.mT, half, upper=True).squeeze(2)
    return torch.zeros_like(right).scatter(1, index, solution)


def _block_pivoting(gram: Tensor, right: Tensor, tolerance: Tensor) -> tuple[Tensor, Tensor]:
    """Active rows of min z'Gz/2 - z'right over z >= 0, G positive definite.

    Args:
        gram: (m, m). right: (n, m). tolerance: (n, 1).

    Returns:
        Active rows, bool (n, m); indices of samples where rounding kept it from an end within PIVOTING_ROUNDS.
    """
    count, rows = right.shape
    active = right > tolerance
    best = torch.full((count,), rows + 1)
    chances = torch.full((count,), 3)
    live = torch.arange(count)
    for _ in range(PIVOTING_ROUNDS):
        z = _masked_solve(gram, active[live], right[live])
        slope = z @ gram - right[live]
        wrong = torch.where(active[live], z, slope) < -tolerance[live]
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


def _dual_active_set(rows: Tensor, bounds: Tensor, x: Tensor, tolerance: Tensor, allowed: Tensor | None) -> Tensor:
    """Active rows of the projections of x by Goldfarb and Idnani, every sample at its own step.

    Args:
        rows: (m, d) of norm 1. bounds: (m,). x: (n, d). tolerance: (n, 1).
        allowed: bool (n, m), rows that a sample is subject to; None for all.
    """
    count, number = len(x), len(rows)
    gram = rows @ rows.T
    active = torch.zeros(count, number, dtype=torch.bool)
    multipliers = torch.zeros(count, number, dtype=x.dtype)
    entering = torch.full((count,), -1)
    y = x.clone()
    live = torch.arange(count)
    for _ in range(200 + 50 * number):
        excess = y[live] @ rows.T - bounds
        choice = excess.masked_fill(active[live], -torch.inf)
        if allowed is not None:
            choice = choice.masked_fill(~allowed[live], -torch.inf)
        largest, chosen = choice.max(1)
        new = entering[live] < 0
        going = ~new | (largest > tolerance[live, 0])
        entering[live] = torch.where(new, chosen, entering[live])
        live, excess = live[going], excess[going]
        if not len(live):
            return active
        index = torch.arange(len(live))
        row = entering[live]
        fall = _masked_solve(gram, active[live], gram[row])
        direction = rows[row] - fall @ rows
        curvature = (direction * rows[row]).sum(1)
        # A row in the span of the active ones: only the multipliers move.
        spanned = curvature < 1e-11
        full = torch.where(spanned, torch.inf, excess[index, row].clamp_min(0) / curvature)
        ratios = torch.where(active[live] & (fall > 1e-12), multipliers[live] / fall, torch.inf)
        partial, leaving = ratios.min(1)
        step = torch.minimum(full, partial)
        if step.isinf().any():
            raise ValueError("project: no point satisfies the constraints")
        multipliers[live] -= step.unsqueeze(1) * fall * active[live]
        multipliers[live, row] += step
        y[live] -= torch.where(spanned, 0, step).unsqueeze(1) * direction
        done = full <= partial
        active[live[done], row[done]] = True
        entering[live[done]] = -1
        dropped = live[~done], leaving[~done]
        active[dropped] = False
        multipliers[dropped] = 0
    raise RuntimeError("project: the active-set method did not end; the constraints are nearly degenerate")


def implied_rows(rows: Tensor) -> Tensor:
    """Which rows of A are non-negative combinations of others, for a cone {A x <= 0} with interior.

    A row a is implied where its projection onto the cone of the other rows is 0 (Moreau 1962).

    Args:
        rows: float64 (m, d) of norm 1, no two equal.

    Returns:
        bool (m,).
    """
    others = ~torch.eye(len(rows), dtype=torch.bool)
    tolerance = torch.full((len(rows), 1), TOLERANCE, dtype=rows.dtype)
    active = _dual_active_set(rows, rows.new_zeros(len(rows)), rows, tolerance, others)
    weights = _masked_solve(rows @ rows.T, active, rows @ rows.T)
    return (rows - weights @ rows).norm(dim=1) < 1e-9


class Projection:
    """Projection onto {y : A y <= b, E y = f}.

    Args:
        inequalities, bounds: A (m, d), b (m,), float64.
        equalities, values: E (k, d), f (k,), float64.
    """

    def __init__(
        self, inequalities: np.ndarray, bounds: np.ndarray, equalities: np.ndarray, values: np.ndarray
    ) -> None:
        dimension = inequalities.shape[1]
        point, basis = np.zeros(dimension), np.eye(dimension)
        if len(equalities):
            left, sizes, right = np.linalg.svd(equalities)
            rank = int((sizes > 1e-10 * sizes[0]).sum())
            point = right[:rank].T @ ((left.T @ values)[:rank] / sizes[:rank])
            basis = right[rank:]
        rows, bounds = inequalities @ basis.T, bounds - inequalities @ point
        norms = np.linalg.norm(rows, axis=1)
        # A row that the equalities leave without effect holds everywhere: Cone has refused it otherwise.
        useful = norms > 1e-12 * np.linalg.norm(inequalities, axis=1)
        rows, bounds, norms = rows[useful], bounds[useful], norms[useful]
        self.point, self.basis = torch.from_numpy(point), torch.from_numpy(basis)
        self.rows, self.bounds = torch.from_numpy(rows / norms[:, None]), torch.from_numpy(bounds / norms)
        self.gram = self.rows @ self.rows.T
        self.independent = len(rows) <= len(basis) and (
            len(rows) == 0 or bool(torch.linalg.cond(self.gram) < 1e12)
        )

    def __call__(self, x: Tensor) -> Tensor:
        """Projections of x, float64 (n, d). Differentiable; the derivative at kinks is one of the two sides'."""
        slices = max(1, SLICE_NUMBERS // max(1, self.gram.numel()))
        return torch.cat([self._slice(part) for part in x.split(slices)]) if len(x) else x.clone()

    def _slice(self, x: Tensor) -> Tensor:
        point, basis, rows, bounds, gram = (
            tensor.to(x.device) for tensor in (self.point, self.basis, self.rows, self.bounds, self.gram)
        )
        reduced = (x - point) @ basis.T
        if len(rows):
            excess = reduced @ rows.T - bounds
            with torch.no_grad():
                scale = reduced.norm(dim=1, keepdim=True) + bounds.abs().max()
                tolerance = TOLERANCE * scale
                if self.independent:
                    active, left = _block_pivoting(gram, excess, tolerance)
                else:
                    active, left = torch.empty_like(excess, dtype=torch.bool), torch.arange(len(x))
                if len(left):
                    active[left] = _dual_active_set(rows, bounds, reduced[left], tolerance[left], None)
            reduced = reduced - _masked_solve(gram, active, excess) @ rows
            # What is left of a point whose projection is the apex has no direction, only rounding.
            reduced = reduced * (reduced.detach().norm(dim=1, keepdim=True) > 1e-13 * scale)
        return point + reduced @ basis
