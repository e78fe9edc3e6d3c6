"""Maximum, average and global average pooling of packed bits against torch's pooling of the same values as floats."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from harness import Config, Row, column, fastest, measure, require_close, require_equal
from lowbit_ext import PackedTensor, binary

CAPTION = (
    "Ours pools packed bits: maximum to packed bits, averages to float32. torch pools the same -1 and +1 as float32 or "
    "bfloat16, NCHW or channels-last, whichever is faster."
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A pooling of one packed tensor; window 0 is the whole image."""

    kind: str
    batch: int
    channels: int
    size: int
    window: int = 0
    stride: int = 0
    padding: int = 0

    def __str__(self) -> str:
        window = f" {self.window}x{self.window}/{self.stride}" if self.window else ""
        return f"{self.kind}{window} {self.channels}@{self.size} N={self.batch}"

    def ours(self, packed: PackedTensor) -> PackedTensor | Tensor:
        """The pooling of packed bits."""
        if self.kind == "max":
            return binary.max_pool2d(packed, self.window, self.stride, self.padding)
        if self.kind == "avg":
            return binary.avg_pool2d(packed, self.window, self.stride, self.padding)
        return binary.global_avg_pool(packed)

    def torch(self, values: Tensor) -> Tensor:
        """The pooling of floats."""
        if self.kind == "max":
            return F.max_pool2d(values, self.window, self.stride, self.padding)
        if self.kind == "avg":
            return F.avg_pool2d(values, self.window, self.stride, self.padding)
        return F.adaptive_avg_pool2d(values, 1)


@dataclasses.dataclass(kw_only=True)
class BinaryPoolRow(Row):
    """Times and speed-ups of one pooling."""

    speedup_over_torch_float32: float | None = column("vs torch fp32")
    speedup_over_torch_bfloat16: float | None = column("vs torch bf16")
    ours_us: float | None = column("ours µs")
    torch_float32_us: float | None = column("torch fp32 µs")
    torch_bfloat16_us: float | None = column("torch bf16 µs")


def cases(quick: bool) -> list[Case]:
    """ResNet's first pooling, VGG's, and the ends of both networks."""
    return [
        case
        for batch in ((1,) if quick else (1, 32))
        for case in (
            Case("max", batch, 64, 112, 3, 2, 1),
            Case("max", batch, 128, 32, 2, 2),
            Case("avg", batch, 64, 56, 2, 2),
            Case("global avg", batch, 512, 7),
        )
    ]


def _torch_pool(case: Case, values: Tensor) -> Callable[[], Any]:
    planar = values.contiguous()
    last = values.contiguous(memory_format=torch.channels_last)
    return fastest([lambda: case.torch(planar), lambda: case.torch(last)])


@torch.inference_mode()
def _row(case: Case, config: Config) -> BinaryPoolRow:
    torch.manual_seed(0)
    packed = binary.binarize(torch.randn(case.batch, case.channels, case.size, case.size))
    values = packed.unpack()
    ours, expected = case.ours(packed), case.torch(values)
    if isinstance(ours, PackedTensor):
        require_equal(f"binary_pool {case}", ours.unpack(), expected)
    else:
        # torch sums in float32 and rounds; ours counts and rounds once.
        require_close(f"binary_pool {case}", ours, expected, 1e-5)
    timings = measure(
        {
            "ours": lambda: case.ours(packed),
            "torch_float32": _torch_pool(case, values) if config.peers else None,
            "torch_bfloat16": _torch_pool(case, values.bfloat16()) if config.peers else None,
        },
        config.seconds / 2,
    )
    return BinaryPoolRow(
        case=str(case),
        threads=config.threads,
        blocks_us=timings.blocks_us,
        speedup_over_torch_float32=timings.speedup("torch_float32", "ours"),
        speedup_over_torch_bfloat16=timings.speedup("torch_bfloat16", "ours"),
        ours_us=timings.median_us("ours"),
        torch_float32_us=timings.median_us("torch_float32"),
        torch_bfloat16_us=timings.median_us("torch_bfloat16"),
    )


def rows(config: Config) -> Iterator[Row]:
    """Measures every case."""
    for case in cases(config.quick):
        yield _row(case, config)
