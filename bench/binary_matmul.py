"""Products of two binary operands, as attention has them, against torch's matmul in float32 and bfloat16."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from harness import BinaryLimit, Config, Row, column, measure, percent_of_rate, popcount_level, require_equal
from lowbit_ext import PackedTensor, binary

CAPTION = (
    "int32: packed -> int32. fp32: packed -> scaled float32. call: float32 -> scaled float32, binarized inside; bf16 "
    "call: the same from and to bfloat16. Speed-ups: torch's matmul of float32 or bfloat16 over our call of that type, "
    "and of float32 over our product of packed operands. Limit: over int32."
)


@dataclasses.dataclass(frozen=True)
class Case:
    """`batch` products (rows, depth) by (depth, columns)."""

    name: str
    batch: int
    rows: int
    depth: int
    columns: int
    encoding: str  # of the first factor
    transposed: bool  # whether the second factor's columns lie together, else its rows

    @property
    def operations(self) -> int:
        """2 for each multiply-add of two bits."""
        return 2 * self.batch * self.rows * self.depth * self.columns

    def __str__(self) -> str:
        return f"{self.name} {self.batch} x ({self.rows}, {self.depth}) ({self.depth}, {self.columns})"


@dataclasses.dataclass(kw_only=True)
class BinaryMatmulRow(Row):
    """Times, ratios and share of the limit of one product."""

    speedup_over_torch_float32: float | None = column("call vs torch fp32")
    speedup_over_torch_bfloat16: float | None = column("bf16 call vs torch bf16")
    packed_speedup_over_torch_float32: float | None = column("packed vs torch fp32")
    percent_of_popcount_limit: float | None = column("of popcount limit")
    ours_int32_us: float | None = column("ours int32 µs", optional=True)
    ours_packed_us: float | None = column("ours fp32 µs", optional=True)
    ours_call_us: float | None = column("ours call µs", optional=True)
    ours_bfloat16_call_us: float | None = column("ours bf16 call µs", optional=True)
    torch_float32_us: float | None = column("torch fp32 µs", optional=True)
    torch_bfloat16_us: float | None = column("torch bf16 µs", optional=True)


def cases(quick: bool) -> list[Case]:
    """Scores and values of attention: of a vision transformer of 196 tokens and 6 heads of 64, and of longer ones."""
    sizes = [(48, 196, 64)] if quick else [(6, 196, 64), (48, 196, 64), (12, 512, 64), (4, 1024, 128)]
    scores = [Case("scores", batch, tokens, depth, tokens, "sign", True) for batch, tokens, depth in sizes]
    return scores + [Case("values", batch, tokens, tokens, depth, "step", False) for batch, tokens, depth in sizes]


def _packed(rows: torch.Tensor, encoding: str) -> PackedTensor:
    """Of (batch, rows, K)."""
    return binary.binarize(rows.mT, encoding)


@torch.inference_mode()
def _row(case: Case, config: Config) -> BinaryMatmulRow:
    torch.manual_seed(0)
    a, by_column = torch.randn(case.batch, case.rows, case.depth), torch.randn(case.batch, case.columns, case.depth)
    b = by_column.mT if case.transposed else by_column.mT.contiguous()
    packed_a, packed_b, scale = _packed(a, case.encoding), _packed(by_column, "sign"), case.depth**-0.5
    a_values = binary.binary_activation(a, case.encoding)
    require_equal(f"binary_matmul {case}", binary.matmul(packed_a, packed_b), a_values @ binary.binary_activation(b))
    a_half, b_half = a.bfloat16(), b.bfloat16()
    options = {"a_encoding": case.encoding, "scale": scale}
    limit = BinaryLimit(popcount_level())
    contenders = {
        "ours_int32": lambda: binary.matmul(packed_a, packed_b),
        "ours_packed": lambda: binary.matmul(packed_a, packed_b, scale=scale),
        "ours_call": lambda: binary.matmul(a, b, **options),
        "ours_bfloat16_call": lambda: binary.matmul(a_half, b_half, **options),
        "torch_float32": (lambda: torch.matmul(a, b)) if config.peers else None,
        "torch_bfloat16": (lambda: torch.matmul(a_half, b_half)) if config.peers else None,
        "limit": limit,
    }
    timings = measure(contenders, config.seconds)
    return BinaryMatmulRow(
        case=str(case),
        threads=config.threads,
        blocks_us=timings.blocks_us,
        speedup_over_torch_float32=timings.speedup("torch_float32", "ours_call"),
        speedup_over_torch_bfloat16=timings.speedup("torch_bfloat16", "ours_bfloat16_call"),
        packed_speedup_over_torch_float32=timings.speedup("torch_float32", "ours_packed"),
        percent_of_popcount_limit=percent_of_rate(
            case.operations, timings.median_us("ours_int32"), limit.operations, timings.best_us("limit")
        ),
        ours_int32_us=timings.median_us("ours_int32"),
        ours_packed_us=timings.median_us("ours_packed"),
        ours_call_us=timings.median_us("ours_call"),
        ours_bfloat16_call_us=timings.median_us("ours_bfloat16_call"),
        torch_float32_us=timings.median_us("torch_float32"),
        torch_bfloat16_us=timings.median_us("torch_bfloat16"),
    )


def rows(config: Config) -> Iterator[Row]:
    """Measures every case."""
    for case in cases(config.quick):
        yield _row(case, config)
