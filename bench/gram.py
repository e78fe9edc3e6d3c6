"""Gram matrices of packed rows against float products of the same rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from harness import BinaryLimit, Config, Row, column, measure, popcount_level, require_equal
from lowbit_ext import binary
from lowbit_ext.helstrom._gram import gram

CAPTION = (
    "popcount(a_i & a_j) of all pairs of rows, packed to int32. numpy and torch: float32 matrix product of the "
    "unpacked rows, exact below 2^24 features; numpy, like ours, uses the symmetry. All write into results allocated "
    "before. Limit: 2 operations for each of all pairs and features against the popcount loop; symmetry can pass it."
)


@dataclasses.dataclass(frozen=True)
class Case:
    """Rows and features."""

    rows: int
    features: int

    def __str__(self) -> str:
        return f"{self.rows} x {self.features}"


@dataclasses.dataclass(kw_only=True)
class GramRow(Row):
    """Times, speed-ups and share of the limit of one Gram matrix."""

    speedup_over_numpy: float | None = column("vs numpy fp32")
    speedup_over_torch_float32: float | None = column("vs torch fp32")
    percent_of_popcount_limit: float | None = column("of popcount limit")
    memory_ratio: float | None = column("bytes, fp32 over bits")
    ours_us: float | None = column("ours µs")
    numpy_us: float | None = column("numpy µs")
    torch_us: float | None = column("torch µs")


def cases(quick: bool) -> list[Case]:
    """A digit set, a ragged size and the size of the goal."""
    all_cases = [Case(1797, 64), Case(1000, 784), Case(4000, 4096)]
    return all_cases[1:] if quick else all_cases


def _row(case: Case, config: Config) -> GramRow:
    rng = torch.Generator().manual_seed(0)
    dense = (torch.rand(case.rows, case.features, generator=rng) < 0.2).float()
    packed, array = binary.binarize(dense, "step"), dense.numpy()
    require_equal(f"gram {case}", gram(packed), dense @ dense.t())
    limit = BinaryLimit(popcount_level())
    products, float_products = gram(packed), dense @ dense.t()
    float_array = np.matmul(array, array.T)
    timings = measure(
        {
            "ours": lambda: gram(packed, out=products),
            "numpy": (lambda: np.matmul(array, array.T, out=float_array)) if config.peers else None,
            "torch": (lambda: torch.mm(dense, dense.t(), out=float_products)) if config.peers else None,
            "limit": limit,
        },
        config.seconds,
    )
    ours_us, limit_gops = timings.median_us("ours"), limit.gops(timings, "limit")
    operations = 2 * case.rows**2 * case.features
    return GramRow(
        case=str(case),
        threads=config.threads,
        blocks_us=timings.blocks_us,
        speedup_over_numpy=timings.speedup("numpy", "ours"),
        speedup_over_torch_float32=timings.speedup("torch", "ours"),
        percent_of_popcount_limit=100 * operations / ours_us / 1e3 / limit_gops if ours_us and limit_gops else None,
        memory_ratio=array.nbytes / (packed.words.numel() * 8),
        ours_us=ours_us,
        numpy_us=timings.median_us("numpy"),
        torch_us=timings.median_us("torch"),
    )


@torch.inference_mode()
def rows(config: Config) -> Iterator[Row]:
    """Measures every case."""
    for case in cases(config.quick):
        with threadpool_limits(config.threads, user_api="blas"):  # numpy's pool does not follow torch's
            row = _row(case, config)
        yield row
