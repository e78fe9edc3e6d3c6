"""Unpacking of bits to floats against plain torch and the memory bandwidth."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

import peers
from harness import DTYPE_NAMES, Config, Row, column, measure, percent_of_rate, require_equal
from lowbit_ext import binary

CAPTION = (
    "Bits to -1 and +1, channels-last. torch: shifts or a table of bytes in plain eager torch, whichever is faster. "
    "Limits are measured on the result in the same blocks: bytes read and written by ours a second, against those of a "
    "copy between two tensors, and against those of a fill, which only writes. Ours and torch allocate their result; "
    "copy and fill do not."
)

@dataclasses.dataclass(frozen=True)
class Case:
    """A packed activation tensor and the type that it is unpacked to."""

    batch: int
    channels: int
    size: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.channels}@{self.size} N={self.batch} {DTYPE_NAMES[self.dtype]}"


@dataclasses.dataclass(kw_only=True)
class UnpackRow(Row):
    """Times, speed-up and bandwidth of one tensor."""

    speedup_over_torch: float | None = column("vs torch")
    percent_of_copy_bandwidth: float | None = column("of copy bandwidth")
    percent_of_write_bandwidth: float | None = column("of write bandwidth")
    ours_us: float | None = column("ours µs")
    torch_us: float | None = column("torch µs")
    copy_us: float | None = column("copy µs", optional=True)
    write_us: float | None = column("write µs", optional=True)


def cases(quick: bool) -> list[Case]:
    """A small tensor, a batch of it and one larger than most second-level caches."""
    tensors = [(1, 256, 14), (32, 256, 14), (32, 64, 56)]
    all_cases = [Case(*tensor, dtype) for tensor in tensors for dtype in (torch.float32, torch.bfloat16)]
    return [case for case in all_cases if not quick or case.dtype == torch.float32]


@torch.inference_mode()
def _row(case: Case, config: Config) -> UnpackRow:
    torch.manual_seed(0)
    x = torch.randn(case.batch, case.channels, case.size, case.size)
    packed = binary.binarize(x)
    require_equal(f"unpack {case}", packed.unpack(case.dtype), x.sign().to(case.dtype))
    values, destination = packed.unpack(case.dtype), packed.unpack(case.dtype)
    timings = measure(
        {
            "ours": lambda: packed.unpack(case.dtype),
            "torch": peers.torch_unpack(packed.words, case.dtype) if config.peers else None,
            "copy": lambda: destination.copy_(values),
            "write": lambda: destination.fill_(1),
        },
        config.seconds / 2,
    )
    output_bytes = values.numel() * values.element_size()
    ours_us, our_bytes = timings.median_us("ours"), output_bytes + packed.words.numel() * packed.words.element_size()
    return UnpackRow(
        case=str(case),
        threads=config.threads,
        blocks_us=timings.blocks_us,
        speedup_over_torch=timings.speedup("torch", "ours"),
        percent_of_copy_bandwidth=percent_of_rate(our_bytes, ours_us, 2 * output_bytes, timings.best_us("copy")),
        percent_of_write_bandwidth=percent_of_rate(our_bytes, ours_us, output_bytes, timings.best_us("write")),
        ours_us=ours_us,
        torch_us=timings.median_us("torch"),
        copy_us=timings.median_us("copy"),
        write_us=timings.median_us("write"),
    )


def rows(config: Config) -> Iterator[Row]:
    """Measures every case."""
    for case in cases(config.quick):
        yield _row(case, config)
