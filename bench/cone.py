"""Layers constrained to A x <= 0 against the paper's layout; sparse generators gathered against a dense product."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from harness import Config, Row, column, measure, require_close
from lowbit_ext import cone
from lowbit_ext.cone import layers

CAPTION = (
    "layer: ConeLinear, 784 inputs. paper: its layout (Frerix et al. 2020), each line as two rays, |.| of an affine "
    "map, times the dense generators. activation: coefficients to points alone, no matrix product of a layer; train is "
    "forward and backward. dense: the same activation as one product with all generators. "
    "wide: share of coordinates that are no plain copy of a coefficient; the gather is used up to "
    f"{layers.LARGEST_WIDE_SHARE:.0%}."
)

PIXELS = 784


@dataclasses.dataclass(frozen=True)
class Case:
    """A cone of 784 coordinates, a batch, a part of the layer."""

    name: str
    batch: int
    part: str  # "layer" or "activation"
    train: bool

    def __str__(self) -> str:
        return f"{self.name} {self.part} N={self.batch}{' train' if self.train else ''}"

    def cone(self) -> cone.Cone:
        """The constraints: a checkerboard, or monotone groups of as many coordinates as the name says."""
        if self.name == "checkerboard":
            return cone.checkerboard()
        size = int(self.name.split()[-1])
        differences = np.diff(np.eye(size, dtype=np.int64), axis=0)
        return cone.Cone(np.kron(np.eye(PIXELS // size, dtype=np.int64), -differences))


@dataclasses.dataclass(kw_only=True)
class ConeRow(Row):
    """Times of one case."""

    wide_percent: float | None = column("wide %")
    speedup_over_paper: float | None = column("vs paper")
    speedup_over_dense: float | None = column("vs dense")
    ours_us: float | None = column("ours µs")
    paper_us: float | None = column("paper µs")
    dense_us: float | None = column("dense µs")
    gather_us: float | None = column("gather µs", optional=True)


class PaperLayer(nn.Module):
    """The layer as the paper has it: |W h + b| times rays, lines and negative lines, all dense."""

    def __init__(self, in_features: int, constraints: cone.Cone) -> None:
        super().__init__()
        lines = constraints.lines
        self.register_buffer("generators", torch.cat([constraints.rays, lines, -lines]).float())
        self.linear = nn.Linear(in_features, len(self.generators))

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_features) -> (N, d)."""
        return self.linear(x).abs() @ self.generators


def cases(quick: bool) -> list[Case]:
    """The paper's layer, and cones of which 2, 50, 75 and 96 % of the coordinates are wide."""
    layer = [Case("checkerboard", batch, "layer", train) for batch in (1, 256) for train in (False, True)]
    names = ("checkerboard", "monotone groups of 2", "monotone groups of 4", "monotone groups of 28")
    activation = [Case(name, 256, "activation", train) for name in names for train in (False, True)]
    return layer + (activation[:4] if quick else activation)


def _with_share(share: float, build: Callable[[cone.Cone], nn.Module], constraints: cone.Cone) -> nn.Module:
    with mock.patch.object(layers, "LARGEST_WIDE_SHARE", share):
        return build(constraints)


def _row(case: Case, config: Config) -> ConeRow:
    torch.manual_seed(0)
    constraints = case.cone()
    build = cone.ConeActivation if case.part == "activation" else lambda c: cone.ConeLinear(PIXELS, c)
    ours = build(constraints)
    activation = ours if case.part == "activation" else ours.activation
    gathers = activation.source is not None
    features = sum(constraints.coefficient_counts) if case.part == "activation" else PIXELS
    x = torch.randn(case.batch, features, requires_grad=case.train and case.part == "activation")
    grad = torch.randn(case.batch, PIXELS)

    modules: dict[str, nn.Module | None] = {"ours": ours}
    if case.part == "layer":
        modules["paper"] = PaperLayer(PIXELS, constraints) if config.peers else None
    else:
        other = _with_share(0.0 if gathers else 1.0, cone.ConeActivation, constraints)
        modules["dense" if gathers else "gather"] = other
        with torch.no_grad():
            require_close(str(case), ours(x), other(x), 1e-4)

    def call(module: nn.Module) -> Callable[[], Any]:
        def train() -> None:
            module.zero_grad()
            x.grad = None
            module(x).backward(grad)

        def infer() -> None:
            with torch.inference_mode():
                module(x)

        return train if case.train else infer

    timings = measure({name: module and call(module) for name, module in modules.items()}, config.seconds / 2)
    # Whatever layout ours is, both have a time.
    dense, gather = ("dense", "ours") if gathers else ("ours", "gather")
    wide = 100.0 * (_with_share(1.0, cone.ConeActivation, constraints).rays.shape[1] / PIXELS)
    both = case.part == "activation"
    return ConeRow(
        case=str(case),
        threads=config.threads,
        blocks_us=timings.blocks_us,
        wide_percent=wide,
        speedup_over_paper=timings.speedup("paper", "ours"),
        speedup_over_dense=timings.speedup(dense, gather) if both else None,
        ours_us=timings.median_us("ours"),
        paper_us=timings.median_us("paper"),
        dense_us=timings.median_us(dense) if both else None,
        gather_us=timings.median_us(gather) if both else None,
    )


def rows(config: Config) -> Iterator[Row]:
    """Measures every case."""
    for case in cases(config.quick):
        yield _row(case, config)
