"""Antithetic sampling of bits from logits against the recipe in plain torch, eager and compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from harness import Config, Row, column, measure, percent_of_rate
from lowbit_ext import antithetic

CAPTION = (
    "From logits 3 N(0, 1) to n coupled samples and the ratio of the estimator. torch: the published recipe with one "
    "bool a sample (Dirichlet: normalised exponentials and a power; independent: torch.bernoulli), eager and compiled. "
    "Limit: our sampler with independent samples, which is the generator, one comparison and the packing."
)


@dataclasses.dataclass(frozen=True)
class Case:
    """Logits (rows, dimensions), n samples of each."""

    rows: int
    dimensions: int
    samples: int
    coupling: str

    def __str__(self) -> str:
        return f"{self.rows}x{self.dimensions} n={self.samples} {self.coupling}"


@dataclasses.dataclass(kw_only=True)
class SampleRow(Row):
    """Times, speed-ups and memory of one sampling."""

    speedup_over_torch: float | None = column("vs torch eager")
    speedup_over_torch_compiled: float | None = column("vs torch compiled")
    percent_of_independent: float | None = column("of inde- pendent")
    ours_us: float | None = column("ours µs")
    torch_us: float | None = column("torch eager µs")
    torch_compiled_us: float | None = column("torch compiled µs")
    memory_ratio: float | None = column("bytes, bool over bits")


def cases(quick: bool) -> list[Case]:
    """A batch of a small autoencoder, and a large layer."""
    if quick:
        return [Case(100, 200, 8, "dirichlet"), Case(100, 200, 8, "systematic"), Case(512, 1024, 16, "dirichlet")]
    couplings = ("dirichlet", "systematic", "independent", "antithetic_pairs", "gaussian")
    return [Case(*size, coupling) for size in ((100, 200, 8), (4096, 1024, 16)) for coupling in couplings]


def _dirichlet(logits: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """ARMS-D as published: samples (n, rows, dimensions) and ratio."""
    p = torch.sigmoid(logits)
    e = -torch.log(torch.rand(n, *logits.shape))
    u = (1 - e / e.sum(0)) ** (n - 1)
    b = torch.where(p < 0.5, u < p, 1 - u < p)
    rare = torch.minimum(p, 1 - p)
    both = (2 * (1 - rare) ** (1 / (n - 1)) - 1).clamp_min(0) ** (n - 1)
    joint = torch.where(p < 0.5, (2 * p ** (1 / (n - 1)) - 1).clamp_min(0) ** (n - 1), 2 * p - 1 + both)
    return b, p * (1 - p) / (p - joint + 1e-6)


def _independent(logits: Tensor, n: int) -> tuple[Tensor, Tensor]:
    return torch.bernoulli(torch.sigmoid(logits).expand(n, -1, -1)).bool(), torch.ones_like(logits)


def _check(case: Case, logits: Tensor, bits: Tensor) -> None:
    """Raises RuntimeError where the margins are off by more than chance allows."""
    p = torch.sigmoid(logits.double())
    z = (bits.double().mean(0) - p).sum() / (p * (1 - p)).sum().sqrt() * case.samples**0.5
    if not abs(float(z)) < 5:
        raise RuntimeError(f"antithetic_sample {case}: margins off by {z:.1f} standard errors; nothing was measured")


def _row(case: Case, config: Config) -> SampleRow:
    torch.manual_seed(0)
    logits = 3 * torch.randn(case.rows, case.dimensions)
    samples = antithetic.sample(logits, case.samples, case.coupling)
    _check(case, logits, samples.unpack(torch.bool))
    recipe: Callable[[Tensor, int], tuple[Tensor, Tensor]] | None = None
    if config.peers and case.coupling in ("dirichlet", "independent"):
        recipe = _dirichlet if case.coupling == "dirichlet" else _independent
        _check(case, logits, recipe(logits, case.samples)[0])
    compiled = None
    if recipe is not None:
        torch.compiler.reset()
        compiled = torch.compile(recipe, dynamic=False)
        compiled(logits, case.samples)
    timings = measure(
        {
            "ours": lambda: antithetic.sample(logits, case.samples, case.coupling),
            "independent": lambda: antithetic.sample(logits, case.samples, "independent"),
            "torch": (lambda: recipe(logits, case.samples)) if recipe is not None else None,
            "torch compiled": (lambda: compiled(logits, case.samples)) if compiled is not None else None,
        },
        config.seconds,
    )
    return SampleRow(
        case=str(case),
        threads=config.threads,
        blocks_us=timings.blocks_us,
        speedup_over_torch=timings.speedup("torch", "ours"),
        speedup_over_torch_compiled=timings.speedup("torch compiled", "ours"),
        percent_of_independent=percent_of_rate(1, timings.median_us("ours"), 1, timings.best_us("independent")),
        ours_us=timings.median_us("ours"),
        torch_us=timings.median_us("torch"),
        torch_compiled_us=timings.median_us("torch compiled"),
        memory_ratio=case.samples * logits.numel() / (samples.bits.numel() * samples.bits.element_size()),
    )


@torch.no_grad()
def rows(config: Config) -> Iterator[Row]:
    """Measures every case."""
    for case in cases(config.quick):
        yield _row(case, config)
