"""Binarization and packing of floats against plain torch and the memory bandwidth."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

import peers
from harness import DTYPE_NAMES, Config, Row, column, measure, percent_of_rate, reading, require_equal
from lowbit_ext import binary

CAPTION = (
    "x >= 0, one bit an element; two: x >= 1/4 and x >= 3/4, two bits, as decoupled networks take them. torch: "
    "comparison and packing in plain eager torch. Limits are measured on the same tensor in the same blocks: bytes "
    "read and written by ours a second, against those of a copy between two tensors, and against those of a sum, "
    "which only reads."
)

@dataclasses.dataclass(frozen=True)
class Case:
    """An activation tensor."""

    batch: int
    channels: int
    size: int
    dtype: torch.dtype
    channels_last: bool
    two: bool = False  # thresholds

    def __str__(self) -> str:
        layout = "NHWC" if self.channels_last else "NCHW"
        two = " two" if self.two else ""
        return f"{self.channels}@{self.size} N={self.batch} {DTYPE_NAMES[self.dtype]} {layout}{two}"


@dataclasses.dataclass(kw_only=True)
class BinarizeRow(Row):
    """Times, speed-up and bandwidth of one tensor."""

    speedup_over_torch: float | None = column("vs torch")
    percent_of_copy_bandwidth: float | None = column("of copy bandwidth")
    percent_of_read_bandwidth: float | None = column("of read bandwidth")
    ours_us: float | None = column("ours µs")
    torch_us: float | None = column("torch µs")
    copy_us: float | None = column("copy µs", optional=True)
    read_us: float | None = column("read µs", optional=True)


def cases(quick: bool) -> list[Case]:
    """A small tensor, a batch of it and one larger than most second-level caches, by type and layout."""
    tensors = [(1, 256, 14), (32, 256, 14), (32, 64, 56)]
    dtypes = [torch.float32, torch.bfloat16]
    all_cases = [Case(*tensor, dtype, last) for tensor in tensors for dtype in dtypes for last in (False, True)]
    all_cases += [Case(32, 64, 56, torch.float32, last, two=True) for last in (False, True)]
    return [case for case in all_cases if not quick or case.dtype == torch.float32 or case.size == 56]


@torch.inference_mode()
def _row(case: Case, config: Config) -> BinarizeRow:
    torch.manual_seed(0)
    x = torch.randn(case.batch, case.channels, case.size, case.size).to(case.dtype)
    x = x.contiguous(memory_format=torch.channels_last if case.channels_last else torch.contiguous_format)
    destination = torch.empty_like(x)
    thresholds = torch.tensor([[0.25], [0.75]]).expand(2, case.channels).contiguous()

    def ours() -> torch.Tensor:
        packed = binary.binarize(x, "step", threshold=thresholds) if case.two else binary.binarize(x)
        return packed.words

    def plain() -> torch.Tensor:
        return peers.torch_pack(torch.cat([x - 0.25, x - 0.75], 1) if case.two else x)

    words = ours()
    require_equal(f"binarize {case}", words, plain())
    timings = measure(
        {
            "ours": ours,
            "torch": plain if config.peers else None,
            "copy": lambda: destination.copy_(x),
            "read": reading(x),
        },
        config.seconds / 2,
    )
    input_bytes = x.numel() * x.element_size()
    ours_us, our_bytes = timings.median_us("ours"), input_bytes + words.numel() * words.element_size()
    return BinarizeRow(
        case=str(case),
        threads=config.threads,
        blocks_us=timings.blocks_us,
        speedup_over_torch=timings.speedup("torch", "ours"),
        percent_of_copy_bandwidth=percent_of_rate(our_bytes, ours_us, 2 * input_bytes, timings.best_us("copy")),
        percent_of_read_bandwidth=percent_of_rate(our_bytes, ours_us, input_bytes, timings.best_us("read")),
        ours_us=ours_us,
        torch_us=timings.median_us("torch"),
        copy_us=timings.median_us("copy"),
        read_us=timings.median_us("read"),
    )


def rows(config: Config) -> Iterator[Row]:
    """Measures every case."""
    for case in cases(config.quick):
        yield _row(case, config)
