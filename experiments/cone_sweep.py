"""Where a layer that satisfies A x <= 0 by construction is faster than projecting its output, and where it is not.

`python experiments/cone_sweep.py` takes a minute on two cores, `pip install osqp "lowbit-ext[cone]"` first. A record
and a plot go to --out. Cones grow in dimension and constraints; the layer computes an affine map of as many inputs as
it has outputs, and the generators' combination. The solver is set up once, starts from the last solution, and
--threads of it share a batch.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

import common
from common import console, plt
from inference import median_seconds
from lowbit_ext import cone

with common.optional_packages():
    import osqp
    import scipy.sparse

BATCH = 256
PROJECTED = 16  # points of the batch that OSQP is given: milliseconds each
SEED = 0
LIMIT_S = 2.0  # of the measurement of a cone


def cube(dimension: int) -> cone.Cone:
    """|x_i| <= x_0, whose rays are 2^(d-1)."""
    rows = np.eye(dimension)[1:]
    return cone.Cone(np.concatenate([rows, -rows]) - np.eye(dimension)[0], max_rays=10**6)  # McMullen's bound: 341 088


def half(dimension: int) -> cone.Cone:
    """Half as many random inequalities as dimensions."""
    return cone.Cone(np.random.default_rng(SEED).normal(size=(dimension // 2, dimension)))


FAMILIES: dict[str, tuple[Callable[[int], cone.Cone], tuple[int, ...]]] = {
    "checkerboard": (lambda d: cone.checkerboard(round(d**0.5), round(d**0.5), 7), (196, 784, 3136)),
    "monotone": (cone.monotone, (16, 64, 256)),
    "convex": (cone.convex, (16, 64, 256)),
    "random, d / 2 rows": (half, (16, 64, 256)),
    "cube": (cube, (4, 8, 12, 14, 16)),
}


class Projections:
    """Projects a batch by OSQP on several threads, each with a solver of its own."""

    def __init__(self, matrix: np.ndarray, threads: int) -> None:
        rows, dimension = matrix.shape
        self._pool = ThreadPoolExecutor(threads)
        self._solvers = [osqp.OSQP() for _ in range(threads)]
        for solver in self._solvers:
            solver.setup(
                scipy.sparse.identity(dimension, format="csc"), np.zeros(dimension), scipy.sparse.csc_matrix(matrix),
                np.full(rows, -np.inf), np.zeros(rows), verbose=False, warm_starting=True,
            )

    def _part(self, solver: Any, points: np.ndarray) -> list[np.ndarray]:
        found = []
        for point in points:
            solver.update(q=-point)
            found.append(solver.solve(raise_error=False).x)
        return found

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """(N, d) -> (N, d)."""
        parts = np.array_split(points, len(self._solvers))
        return np.concatenate(list(self._pool.map(self._part, self._solvers, parts)))

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown()


@torch.no_grad()
def measure(build: Callable[[int], cone.Cone], dimension: int, threads: int) -> dict[str, Any]:
    """Times a sample of the layer and of the projections, and the largest violation of both."""
    start = time.perf_counter()
    constraints = build(dimension)
    torch.manual_seed(SEED)
    layer = cone.ConeLinear(dimension, constraints)
    set_up = time.perf_counter() - start
    x = torch.randn(BATCH, dimension)
    points = x[:PROJECTED].double().numpy()
    project = Projections(constraints._a, threads)
    calls: dict[str, Callable[[], Any]] = {"layer": lambda: layer(x), "OSQP": lambda: project(points)}
    seconds = median_seconds(calls, LIMIT_S)
    found = torch.from_numpy(project(points))
    project.close()
    exact = constraints.project(x[:PROJECTED].double())
    return {
        "rows": len(constraints._a), "generators": len(constraints.rays) + len(constraints.lines), "set_up_s": set_up,
        "layer_us": 1e6 * seconds["layer"] / BATCH, "osqp_us": 1e6 * seconds["OSQP"] / PROJECTED,
        "layer_violation": violation(constraints, layer(x)), "osqp_violation": violation(constraints, found),
        "osqp_error": float((found - exact).abs().max()),
    }


def violation(constraints: cone.Cone, x: Tensor) -> float:
    """Largest A x."""
    return float(constraints.violation(x).max())


def results_table(results: dict[str, list[tuple[int, dict[str, Any]]]], threads: int) -> common.Table:
    """A line for each cone."""
    table = common.table(
        f"A layer of d inputs and d outputs in a cone, beside a projection by OSQP; batch {BATCH}, threads: {threads}",
        "cone", "d", "rows of A", "generators", "set up s", "layer µs", "A x <=", "OSQP µs", "A x <=", "ratio",
    )
    for family, rows in results.items():
        for dimension, row in rows:
            table.add_row(
                family, f"{dimension:,}", f"{row['rows']:,}", f"{row['generators']:,}", f"{row['set_up_s']:.2f}",
                f"{row['layer_us']:.2f}", f"{row['layer_violation']:.0e}", f"{row['osqp_us']:,.0f}",
                f"{row['osqp_violation']:.0e}", f"{row['osqp_us'] / row['layer_us']:,.2g}x",
                style="" if row["osqp_us"] > row["layer_us"] else "red",
            )
    return table


def plot(path: Any, results: dict[str, list[tuple[int, dict[str, Any]]]]) -> None:
    """The ratio over the dimension."""
    figure, axes = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    for family, rows in results.items():
        axes.plot([d for d, _ in rows], [row["osqp_us"] / row["layer_us"] for _, row in rows], "o-", label=family)
    axes.axhline(1, color="#7f8c9a", linestyle="--", label="as fast as OSQP")
    axes.set(xscale="log", yscale="log", xlabel="dimension", ylabel="OSQP's time over the layer's")
    axes.legend(frameon=False)
    common.save(figure, path)


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = common.arguments(__doc__)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="of cones")
    parser.add_argument("--largest", type=common.positive, default=4096, help="dimension")
    return common.parse(parser)


def main() -> None:
    """Command line entry."""
    options = parse_arguments()
    record = common.Record(options.out / "cone_sweep.json")
    chosen = [(name, d) for name in options.families for d in FAMILIES[name][1] if d <= options.largest]
    results: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    with common.progress(len(chosen)) as bar:
        for name, dimension in chosen:
            bar.label(f"{name}, {dimension}")
            build = FAMILIES[name][0]
            row = record.run({"family": name, "dimension": dimension},
                             lambda build=build, dimension=dimension: measure(build, dimension, options.threads))
            results.setdefault(name, []).append((dimension, row))
            bar.advance()
    picture = options.out / "cone_sweep.png"
    plot(picture, results)
    console.print(results_table(results, options.threads))
    console.print(f"written: {record.path}, {picture}")


if __name__ == "__main__":
    common.start(main)
