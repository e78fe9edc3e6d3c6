"""The estimator's gradient from packed samples against bool samples in plain torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from harness import Config, Row, column, measure, percent_of_rate, require_close
from lowbit_ext.antithetic import ops, sample

CAPTION = (
    "ratio * sum over samples of weight * bit. torch: bool samples to float, einsum, product with the ratio. Limit: "
    "bytes that ours must move a second (bits and ratio read, gradient written) against those of a copy of the ratio."
)


@dataclasses.dataclass(frozen=True)
class Case:
    """Samples (n, rows, dimensions) in one of the two layouts."""

    rows: int
    dimensions: int
    samples: int
    layout: str

    def __str__(self) -> str:
        return f"{self.rows}x{self.dimensions} n={self.samples} by {self.layout}"


@dataclasses.dataclass(kw_only=True)
class GradientRow(Row):
    """Times, speed-up and bandwidth of one gradient."""

    speedup_over_torch: float | None = column("vs torch")
    percent_of_copy_bandwidth: float | None = column("of copy bandwidth")
    ours_us: float | None = column("ours µs")
    torch_us: float | None = column("torch µs")
    copy_us: float | None = column("copy µs", optional=True)


def cases(quick: bool) -> list[Case]:
    """A batch of a small autoencoder, and a large layer."""
    all_cases = [
        Case(*size, layout)
        for size in ((100, 200, 8), (4096, 1024, 16))
        for layout in ("sample", "dimension")
    ]
    return [case for case in all_cases if not quick or case.layout == "sample" or case.samples == 16]


@torch.no_grad()
def _row(case: Case, config: Config) -> GradientRow:
    torch.manual_seed(0)
    samples = sample(3 * torch.randn(case.rows, case.dimensions), case.samples, layout=case.layout)
    weight, dense, ratio = torch.randn(case.rows, case.samples), samples.unpack(torch.bool), samples.ratio
    arguments = (samples.bits, weight, ratio, case.dimensions, case.layout)

    def by_torch() -> torch.Tensor:
        return torch.einsum("rn,nrd->rd", weight, dense.float()) * ratio

    require_close(f"antithetic_gradient {case}", ops.antithetic_gradient(*arguments), by_torch(), 1e-5)
    destination = torch.empty_like(ratio)
    timings = measure(
        {
            "ours": lambda: ops.antithetic_gradient(*arguments),
            "torch": by_torch if config.peers else None,
            "copy": lambda: destination.copy_(ratio),
        },
        config.seconds / 2,
    )
    element_bytes = ratio.numel() * ratio.element_size()
    our_bytes = samples.bits.numel() * samples.bits.element_size() + 2 * element_bytes
    ours_us = timings.median_us("ours")
    return GradientRow(
        case=str(case),
        threads=config.threads,
        blocks_us=timings.blocks_us,
        speedup_over_torch=timings.speedup("torch", "ours"),
        percent_of_copy_bandwidth=percent_of_rate(our_bytes, ours_us, 2 * element_bytes, timings.best_us("copy")),
        ours_us=ours_us,
        torch_us=timings.median_us("torch"),
        copy_us=timings.median_us("copy"),
    )


def rows(config: Config) -> Iterator[Row]:
    """Measures every case."""
    for case in cases(config.quick):
        yield _row(case, config)
