"""What a call through Python costs over the bare kernel, on a layer so small that the kernel takes almost nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch

from harness import Config, Row, bare_binary_conv2d, column, measure, require_equal
from lowbit_ext import binary
from lowbit_ext.binary import ops

CAPTION = (
    "64 -> 64 1x1 at 4x4, packed -> int32, without gradients. bare: the compiled module's function, result allocated "
    "and arguments converted beforehand. The wrapper should cost at most 3 µs."
)

CHANNELS, SIZE = 64, 4


@dataclasses.dataclass(kw_only=True)
class OverheadRow(Row):
    """Time of a call, of the bare kernel, and the difference."""

    overhead_us: float | None = column("over bare µs")
    ours_us: float | None = column("call µs")
    bare_us: float | None = column("bare kernel µs")


def cases(quick: bool) -> list[str]:
    """The public function, and the raw operator that it calls."""
    return ["binary.conv2d", "ops.binary_conv2d"]


@torch.no_grad()
def rows(config: Config) -> Iterator[Row]:
    """Measures both calls against the bare kernel."""
    torch.manual_seed(0)
    packed = binary.binarize(torch.randn(1, CHANNELS, SIZE, SIZE))
    weight = binary.pack_weight(torch.randn(CHANNELS, CHANNELS, 1, 1))

    bare, output = bare_binary_conv2d(packed, weight, padding=0)

    geometry = ops.Geometry(1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1)
    calls: list[Callable[[], Any]] = [
        lambda: binary.conv2d(packed, weight),
        lambda: ops.binary_conv2d(
            packed.words, weight.blocked, None, None, None, None, None, CHANNELS, CHANNELS, geometry, "sign", 0,
            torch.int32,
        ),
    ]
    bare()
    for name, call in zip(cases(config.quick), calls, strict=True):
        require_equal(name, call(), output)
        timings = measure({"ours": call, "bare": bare}, config.seconds / 2)
        ours_us, bare_us = timings.median_us("ours"), timings.median_us("bare")
        assert ours_us is not None
        assert bare_us is not None
        yield OverheadRow(
            case=name,
            threads=config.threads,
            blocks_us=timings.blocks_us,
            overhead_us=ours_us - bare_us,
            ours_us=ours_us,
            bare_us=bare_us,
        )
